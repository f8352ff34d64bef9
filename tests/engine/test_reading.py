"""Modules that nobody gains from: what they cost on a simulated machine, when they are tried again, and that answers
stay as they are when they stop and begin in the middle of a text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from random import Random
from typing import Any

import pytest

from stepflash.engine import reading
from stepflash.engine.core import EngineCore
from stepflash.engine.depth_controller import DepthController
from stepflash.engine.kv_cache import SequenceBlocks
from stepflash.engine.reading import FIRST_REST, LONGEST_REST, Reading, Rest
from stepflash.engine.request import RequestStats
from stepflash.engine.sequence import Sequence
from stepflash.engine.speculative import follows_engine, wanted_depth
from tests.engine.conftest import FEW_TOKENS, Finished, drive, request

DEFERRED = 64
PROMPT = 16


class _NoCache:
    def clear_modules(self, blocks: SequenceBlocks, begin: int, end: int) -> None:
        pass


@dataclass
class Machine:
    """Sequences one after the other, where a step at depth d takes 1 + cost * d and reading along 0.05 a token."""

    cost: float
    seconds: float = 0.0
    num_steps: int = 0

    def __post_init__(self) -> None:
        self.depth = DepthController(3)
        self.reading = Reading(_NoCache(), self.depth, DEFERRED, is_shared=True)  # type: ignore[arg-type]
        self.random = Random(0)

    def answer(self, num_tokens: int, chance: Callable[[int], float], asked: int | None = None) -> list[int]:
        """The depth at which each token came. `chance` that a draft for the i-th token is right."""
        seq = Sequence(
            request=request("a", [1] * PROMPT, draft_depth=asked),
            sampler=None,  # type: ignore[arg-type]
            constraint=None,
            stop_ids=frozenset(),
            max_tokens=num_tokens,
            arrival=0,
            submitted_at=0.0,
            token_ids=[1] * PROMPT,
            stats=RequestStats(),
            blocks=SequenceBlocks(0),
        )
        self.reading.begin(seq, self.num_steps)
        seq.begin_modules()
        seq.token_ids.append(1)
        seq.num_computed = PROMPT
        depths: list[int] = []
        while len(depths) < num_tokens:
            self.reading.wake([seq], self.num_steps)
            depth = wanted_depth(seq, self.depth.choose([seq.acceptance]) if follows_engine(seq) else 0)
            right = 0
            while right < depth and self.random.random() < chance(len(depths) + right):
                right += 1
            self.depth.accept(seq.acceptance, depth, right)
            for k in range(right):
                seq.stats.num_accepted_tokens[k] += 1
            depths += [depth] * (right + 1)
            seq.token_ids += [1] * (right + 1)
            seq.num_computed = len(seq.token_ids) - 1
            self.num_steps += 1
            seconds = 1.0 + self.cost * depth
            if not depth:
                self.reading.judge(seq, self.num_steps, is_last=False)
            lag = len(seq.token_ids) - seq.mtp.num_computed[0] if seq.num_modules else 0
            if depth or lag >= DEFERRED:
                seconds += 0.05 * max(0, lag - right - 1)
                seq.mtp.num_computed = [len(seq.token_ids)] * seq.num_modules
            self.seconds += seconds
            if follows_engine(seq):
                self.depth.observe(1, depth, seconds)
        self.reading.judge(seq, self.num_steps, is_last=True)
        return depths


def never(_: int) -> float:
    return 0.0


@pytest.mark.parametrize("num_tokens", [40, 120, 1000])
def test_drafts_that_are_never_right_cost_next_to_nothing(num_tokens: int) -> None:
    machine = Machine(cost=0.5)
    total = 0
    while total < 20_000:
        total += len(machine.answer(num_tokens, never))
    assert machine.seconds < 1.01 * total
    before, total = machine.seconds, 0
    while total < 20_000:
        total += len(machine.answer(num_tokens, never))
    assert machine.seconds - before < 1.003 * total


def test_a_text_whose_drafts_become_right_recovers() -> None:
    """After the longest rest at the latest, however long they were wrong; and soon after a short time."""
    for bad, most in ((1000, 1200), (30_000, LONGEST_REST + 300)):
        machine = Machine(cost=0.2)
        depths = machine.answer(bad + 12_000, lambda i, bad=bad: 0.95 * (i > bad))
        assert depths[bad - 200 : bad].count(0) > 100
        settled = depths[bad + most :]
        assert settled.count(3) > 0.97 * len(settled)
        assert 0 in depths[bad : bad + most]


def test_good_drafts_lose_nothing_beside_answers_where_they_are_wrong() -> None:
    machine = Machine(cost=0.2)
    for _ in range(20):
        machine.answer(150, never)
        depths = machine.answer(400, lambda _: 0.95)
        assert depths.count(0) < 20


def test_after_many_answers_without_use_one_with_use_ends_the_rest() -> None:
    machine = Machine(cost=0.2)
    for _ in range(200):
        machine.answer(100, never)
    tries = 1 + LONGEST_REST // 400
    assert any(machine.answer(400, lambda _: 0.95).count(3) > 200 for _ in range(tries + 1))
    assert machine.answer(400, lambda _: 0.95).count(3) > 350


def test_rests_double_and_side_by_side_count_once() -> None:
    rest, now, lengths = Rest(), 0, []
    for _ in range(8):
        woken = rest.vain(now + 80, now)
        assert rest.vain(now + 81, now) == rest.vain(now + 90, now) == woken
        lengths.append(woken - now - 80)
        now = woken
    assert lengths == [FIRST_REST * 2**i for i in range(5)] + [LONGEST_REST] * 3
    assert rest.for_new(now - 1) == now
    assert rest.for_new(now) is None
    # Of use for longer than the rest before: that was not in vain.
    assert rest.vain(now + 2 * LONGEST_REST, now) == now + 2 * LONGEST_REST + FIRST_REST
    rest.worked()
    assert rest.for_new(now) is None


def test_who_wants_no_drafts_pays_for_nobody(new_core: Callable[..., EngineCore]) -> None:
    core = new_core(max_deferred_tokens=8)
    runs: list[int] = []
    module = core.runner.network.module
    core.runner.network.module = lambda k, *args: (runs.append(k), module(k, *args))[1]  # type: ignore[method-assign,func-returns-value]
    drive(core, request("a", [5, 6, 7] * 20, max_tokens=60, draft_depth=0))
    assert not runs
    drive(core, request("b", [5, 6, 7] * 20, max_tokens=60, draft_depth=1))
    assert set(runs) == {1, 2, 3}


@pytest.mark.parametrize("prefix_caching", [False, True])
@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_modules_begin_in_the_middle_of_a_text(
    new_core: Callable[..., EngineCore],
    monkeypatch: pytest.MonkeyPatch,
    prefix_caching: bool,
    block_size: int,
) -> None:
    """Over and over, beside others; answers are those without drafts, and once they have read enough, drafts are
    right as often as those of modules that have read all."""
    monkeypatch.setattr(reading, "FIRST_REST", 4)
    monkeypatch.setattr(reading, "LONGEST_REST", 8)
    prompts = {name: [5 + i, 6, 7 * i + 3] * (3 + 5 * i) for i, name in enumerate("abc")}

    def ask(**options: Any) -> list[Any]:
        few = {"max_tokens": 200, "logit_bias": FEW_TOKENS}
        return [request(name, ids, **(few | options)) for name, ids in prompts.items()]

    plain = drive(new_core(max_draft_depth=0), *ask())
    always = drive(new_core(prefix_caching=False), *ask(draft_depth=3))
    core = new_core(
        prefix_caching=prefix_caching, block_size=block_size, max_deferred_tokens=8, max_num_batched_tokens=48
    )
    # Drafts for so many steps, none for so many.
    steps = count()
    monkeypatch.setattr(core.depth, "choose", lambda *_: 3 if next(steps) % 60 < 20 else 0)
    monkeypatch.setattr(core.depth, "is_hopeless", lambda _: True)
    num_wakes = 0
    wake = core.reading.wake

    def counted(seqs: Any, now: int) -> None:
        nonlocal num_wakes
        asleep = [seq for seq in seqs if not seq.num_modules]
        wake(asleep, now)
        num_wakes += sum(seq.num_modules > 0 for seq in asleep)

    monkeypatch.setattr(core.reading, "wake", counted)
    done = drive(core, *ask())
    assert {n: f.token_ids for n, f in done.items()} == {n: f.token_ids for n, f in plain.items()}
    assert num_wakes >= 6
    assert _share_of_right_drafts(done) > 0.7 * _share_of_right_drafts(always)
    for name, ids in prompts.items() if prefix_caching else ():
        asked = request(name, ids + plain[name].token_ids, max_tokens=1, draft_depth=3)
        # All but the last block, and the last token, which has not been computed.
        assert drive(core, asked)[name].stats.num_prefill_tokens <= block_size + 1


def _share_of_right_drafts(done: dict[str, Finished]) -> float:
    right, drafted = (
        sum(getattr(finished.stats, name)[0] for finished in done.values())
        for name in ("num_accepted_tokens", "num_drafted_tokens")
    )
    assert drafted > 50
    return float(right / drafted)
