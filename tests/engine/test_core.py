"""Life of requests in the core: refusal, abort, deadlines, faults, preemption; nothing leaks (property)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stepflash.engine.core import EngineCore
from stepflash.engine.kv_cache import FULL, SLIDING
from stepflash.errors import ConfigError, PromptTooLong, QueueFull, RequestError
from tests.engine.conftest import FEW_TOKENS, Finished, collect, drive, request

NewCore = Callable[..., EngineCore]
PROPERTY = settings(max_examples=12)

event = st.one_of(
    st.tuples(st.just("submit"), st.integers(1, 120), st.integers(1, 25), st.sampled_from([0, 1, 3, None])),
    st.tuples(st.just("abort"), st.integers(0, 20)),
    st.tuples(st.just("step"), st.integers(1, 6)),
)


@PROPERTY
@given(events=st.lists(event, max_size=25), scarce=st.booleans(), caching=st.booleans())
def test_any_interleaving_leaves_no_block_held(
    new_core: NewCore, events: list[tuple[Any, ...]], scarce: bool, caching: bool
) -> None:
    """Submit, abort and step in any order, also with hardly any memory: all end, and the accounting is at zero."""
    core = new_core(
        max_num_seqs=3,
        max_model_len=160,
        kv_cache_bytes=1_950_000 if scarce else 32 << 20,
        prefix_caching=caching,
    )
    finished: dict[str, Finished] = {}
    names: list[str] = []
    for number, (kind, *values) in enumerate(events):
        if kind == "submit":
            length, max_tokens, depth = values
            prompt = [(number % 3 + i) % 400 + 3 for i in range(length)]
            names.append(f"r{number}")
            core.add(
                request(names[-1], prompt, max_tokens=max_tokens, draft_depth=depth, logit_bias=FEW_TOKENS)
            )
        elif kind == "abort" and names:
            output = core.abort(names[values[0] % len(names)])
            collect(finished, [output] if output else [])
        elif kind == "step":
            for _ in range(values[0]):
                collect(finished, core.step())
        core.check_integrity()
        check_accounting(core)
    for _ in range(3000):
        if not core.has_work:
            break
        collect(finished, core.step())
    assert sorted(finished) == sorted(names)
    assert all(entry.last.finish_reason in ("length", "abort") for entry in finished.values())
    core.check_integrity()
    assert core.stats().kv_used_bytes == core.stats().kv_cached_bytes
    if core.prefix is not None:
        core.prefix.clear()
    assert core.cache.used_bytes == 0


def check_accounting(core: EngineCore) -> None:
    """The reported bytes are those of the tensors' rows that sequences and prefix cache say to have."""
    stats, cache = core.stats(), core.cache
    tensors = [
        [t for layer in cache.layers.values() if layer.group == group for t in (layer.keys, layer.values)]
        for group in (FULL, SLIDING)
    ]
    running = [seq.blocks for seq in core.scheduler.running if seq.blocks is not None]
    held = [{i for b in running for i in b.full}, {i for b in running for i in b.sliding}]
    kept = [
        {i for ids in core.prefix.keepers(group) for i in ids} if core.prefix else set()
        for group in (FULL, SLIDING)
    ]
    used = [sum(t[list(h | k)].nbytes for t in ts) for ts, h, k in zip(tensors, held, kept, strict=True)]
    cached = [sum(t[list(k - h)].nbytes for t in ts) for ts, h, k in zip(tensors, held, kept, strict=True)]
    assert [stats.kv_full_bytes, stats.kv_sliding_bytes] == used
    assert stats.kv_used_bytes == sum(used)
    assert stats.kv_cached_bytes == sum(cached)
    totals = [sum(t.nbytes for t in ts) for ts in tensors]
    assert [stats.kv_full_total_bytes, stats.kv_sliding_total_bytes] == totals
    assert stats.kv_total_bytes == sum(totals)


def test_aborting_a_thousand_requests_leaves_nothing(new_core: NewCore) -> None:
    core = new_core(max_num_batched_tokens=32)
    generator = torch.Generator().manual_seed(4)
    pending: list[str] = []
    for number in range(1000):
        prompt = torch.randint(
            3, 500, (int(torch.randint(1, 60, (), generator=generator)),), generator=generator
        )
        core.add(request(f"r{number}", prompt.tolist(), max_tokens=50))
        pending.append(f"r{number}")
        if number % 4 == 0:
            core.step()
        while len(pending) > 6:
            index = int(torch.randint(len(pending), (), generator=generator))
            core.abort(pending.pop(index))
    for name in pending:
        core.abort(name)
    assert not core.has_work
    core.check_integrity()
    assert core.prefix is not None
    core.prefix.clear()
    assert core.cache.used_bytes == 0
    assert core.cache.num_free_rows == 8


def test_abort_takes_effect_in_the_middle_of_a_long_prompt(new_core: NewCore) -> None:
    core = new_core(max_num_batched_tokens=16)
    core.add(request("long", [5] * 400, max_tokens=5))
    core.step()
    core.step()
    output = core.abort("long")
    assert output is not None
    assert output.finish_reason == "abort"
    assert output.stats is not None
    assert output.stats.num_prefill_tokens == 64  # 32 a step, so that 8 sequences can verify their drafts
    assert not core.has_work
    assert core.scheduler.running == []
    core.check_integrity()


def test_what_can_never_run_is_refused_with_numbers(new_core: NewCore) -> None:
    core = new_core(max_model_len=300, max_waiting=1)
    with pytest.raises(PromptTooLong, match="300 tokens > 299 maximum"):
        core.add(request("long", [5] * 300))
    with pytest.raises(RequestError, match="between 0 and 511, got 5 to 512"):
        core.add(request("outside", [5, 512]))
    with pytest.raises(RequestError, match="empty"):
        core.add(request("empty", []))
    core.add(request("a", [5], max_tokens=3))
    with pytest.raises(RequestError, match="already running"):
        core.add(request("a", [5]))
    with pytest.raises(QueueFull) as refusal:
        core.add(request("b", [5]))
    assert refusal.value.retry_after_seconds > 0
    small = new_core(max_num_seqs=1, kv_cache_bytes=1_200_000)
    room = small.cache.capacity_tokens
    with pytest.raises(
        RequestError, match=rf"prompt of {room} tokens can never fit.*bytes holds {room} tokens"
    ):
        small.add(request("big", [5] * room))
    for length in (room, room + 40, 290):
        with pytest.raises(RequestError, match="raise kv_cache_bytes by") as told:
            small.check(request("big", [5] * length))
        more = int(str(told.value).rsplit(" ", 1)[1])
        enough = new_core(max_num_seqs=1, kv_cache_bytes=1_200_000 + more)
        enough.check(request("big", [5] * length))
    done = drive(small, request("fits", [5] * (room - 1), max_tokens=50))["fits"]
    assert len(done.token_ids) == 1  # capped by what the cache holds
    assert done.last.finish_reason == "length"
    with pytest.raises(ConfigError, match="max_draft_depth"):
        new_core(max_draft_depth=4)


def test_a_deadline_ends_a_request(new_core: NewCore, monkeypatch: pytest.MonkeyPatch) -> None:
    core = new_core()
    now = [100.0]
    monkeypatch.setattr("stepflash.engine.core.time.perf_counter", lambda: now[0])
    core.add(request("late", [5] * 10, max_tokens=100, deadline_seconds=5.0))
    core.add(request("free", [5] * 10, max_tokens=4))
    core.step()
    now[0] = 106.0
    outputs = {o.request_id: o for o in core.step()}
    assert outputs["late"].finish_reason == "abort"
    assert outputs["late"].stop_reason == "deadline"
    assert outputs["free"].finish_reason is None


def test_priority_decides_who_starts_and_who_gives_way(new_core: NewCore) -> None:
    core = new_core(max_num_seqs=1)
    finished: list[str] = []
    for name, priority in (("a", 1), ("b", 1), ("urgent", 0)):
        core.add(request(name, [7, 8, 9], max_tokens=2, priority=priority))
    while core.has_work:
        finished += [o.request_id for o in core.step() if o.finish_reason]
    assert finished == ["urgent", "a", "b"]


def test_a_short_prompt_is_not_kept_waiting_by_a_long_one(new_core: NewCore) -> None:
    core = new_core(max_num_batched_tokens=32)
    core.add(request("long", [5] * 480, max_tokens=1))
    core.step()
    core.add(request("short", [6] * 20, max_tokens=1))
    seen = [{o.request_id for o in core.step()} for _ in range(2)]
    assert "short" in seen[0] | seen[1]


def test_stop_tokens_end_a_request_in_the_middle_of_accepted_drafts(new_core: NewCore) -> None:
    plain = drive(new_core(), request("a", [9] * 20, max_tokens=40, logit_bias=FEW_TOKENS, draft_depth=0))[
        "a"
    ]
    stop = plain.token_ids[25]
    cut = plain.token_ids[: plain.token_ids.index(stop) + 1]
    for depth in (0, 3):
        asked = request(
            "a", [9] * 20, max_tokens=40, logit_bias=FEW_TOKENS, draft_depth=depth, stop_token_ids=(stop,)
        )
        done = drive(new_core(), asked)["a"]
        assert done.token_ids == cut
        assert (done.last.finish_reason, done.last.stop_reason) == ("stop", stop)
    # The checkpoint's own end tokens: 1 and 2.
    ended = drive(new_core(), request("a", [9] * 20, logit_bias={2: 1e4}, ignore_eos=False))["a"]
    assert ended.token_ids == [2]
    assert (ended.last.finish_reason, ended.last.stop_reason) == ("stop", None)


class Poison:
    """A constraint that allows everything until it raises."""

    def __init__(self, fuse: int, where: str) -> None:
        self.fuse, self.where = fuse, where

    def _burn(self, where: str) -> None:
        if where == self.where:
            self.fuse -= 1
            if self.fuse < 0:
                raise ValueError(f"poisoned in {where}")

    def mask(self) -> None:
        self._burn("mask")

    def accept(self, token_id: int) -> None:
        self._burn("accept")

    def rollback(self, num_tokens: int) -> None: ...

    def forced(self) -> Sequence[int]:
        self._burn("forced")
        return ()


@pytest.mark.parametrize("where", ["mask", "accept", "forced"])
@pytest.mark.parametrize("fuse", [0, 9])
def test_an_exception_ends_its_request_alone(new_core: NewCore, where: str, fuse: int) -> None:
    healthy = [request(f"h{i}", [i + 3] * (9 + i), max_tokens=20, draft_depth=i) for i in range(3)]
    alone = {r.request_id: drive(new_core(), r)[r.request_id].token_ids for r in healthy}
    core = new_core()
    bad = request("bad", [4] * 12, max_tokens=40, constraint=Poison(fuse, where))
    done = drive(core, *healthy[:2], bad, healthy[2])
    assert done["bad"].last.finish_reason == "error"
    assert done["bad"].last.error == f"ValueError: poisoned in {where}"
    assert {name: done[name].token_ids for name in alone} == alone
    core.check_integrity()


@pytest.mark.parametrize("method", ["forward", "mtp_forward"])
def test_a_model_that_fails_on_one_request_fails_for_it_alone(
    new_core: NewCore, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    core = new_core()
    model = core.runner.model
    run = getattr(type(model), method)

    def explode(self: Any, *args: Any, **kwargs: Any) -> Any:
        input_ids = args[1] if method == "mtp_forward" else args[0]
        if (input_ids == 499).any():
            raise RuntimeError("bad token")
        return run(self, *args, **kwargs)

    healthy = request("healthy", [3] * 10, max_tokens=10, logit_bias=FEW_TOKENS)
    expected = drive(new_core(), healthy)["healthy"].token_ids
    monkeypatch.setattr(type(model), method, explode)
    done = drive(core, healthy, request("bad", [4] * 10 + [499], max_tokens=10))
    assert done["healthy"].token_ids == expected
    assert done["bad"].last.error == "RuntimeError: bad token"


def test_logits_that_are_not_numbers_end_their_request_alone(
    new_core: NewCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = new_core()
    model = core.runner.model
    run = type(model).forward

    def poison(self: Any, input_ids: torch.Tensor, *args: Any) -> torch.Tensor:
        hidden_states = run(self, input_ids, *args).clone()
        hidden_states[input_ids == 499] = float("nan")
        return hidden_states

    monkeypatch.setattr(type(model), "forward", poison)
    done = drive(
        core, request("bad", [4] * 10 + [499], max_tokens=10), request("good", [3] * 9, max_tokens=9)
    )
    assert done["good"].last.finish_reason == "length"
    assert "not finite" in (done["bad"].last.error or "")


@pytest.mark.parametrize("prefix_caching", [False, True])
def test_modules_do_not_read_along_for_hopeless_drafts(
    new_core: NewCore, monkeypatch: pytest.MonkeyPatch, prefix_caching: bool
) -> None:
    """Who asks for drafts has them, and all answers stay as they are."""
    prompts = {"adaptive": [5, 6, 7] * 7, "fixed": [9, 8, 7, 6] * 4}
    plain = drive(
        new_core(), *(request(name, ids, max_tokens=90, draft_depth=0) for name, ids in prompts.items())
    )
    core = new_core(prefix_caching=prefix_caching, max_deferred_tokens=16)
    monkeypatch.setattr(core.depth, "choose", lambda *_: 0)
    monkeypatch.setattr(core.depth, "is_hopeless", lambda _: True)
    core.add(request("adaptive", prompts["adaptive"], max_tokens=90))
    core.add(request("fixed", prompts["fixed"], max_tokens=90, draft_depth=2))
    sequences = dict(core._sequences)
    tokens: dict[str, list[int]] = {name: [] for name in prompts}
    num_steps = 0
    while core.has_work:
        num_steps += 1
        if num_steps == 40:
            core.scheduler.preempt(sequences["adaptive"])
        for output in core.step():
            tokens[output.request_id] += output.token_ids
        core.check_integrity()
    assert tokens == {name: finished.token_ids for name, finished in plain.items()}
    assert sequences["adaptive"].num_modules == 0
    assert sequences["fixed"].num_modules == (3 if prefix_caching else 2)


def test_logprobs_are_those_of_the_model(new_core: NewCore) -> None:
    core = new_core()
    asked = request("a", [9] * 20, max_tokens=12, logprobs=3, temperature=0.7, seed=1, logit_bias=FEW_TOKENS)
    done = drive(core, asked)["a"]
    logprobs = [entry for output in done.outputs for entry in output.logprobs]
    assert [entry.token_id for entry in logprobs] == done.token_ids
    dense = core.runner.model.logits(torch.tensor([9] * 20 + done.token_ids)).log_softmax(-1)
    for i, entry in enumerate(logprobs):
        assert entry.logprob == pytest.approx(float(dense[19 + i, entry.token_id]), abs=1e-4)
        assert [t for t, _ in entry.top] == dense[19 + i].topk(3).indices.tolist()


def test_ids_without_a_token_are_never_chosen(new_core: NewCore) -> None:
    core = new_core(vocab_limit=20)
    done = drive(
        core,
        *(request(f"r{t}", [9] * 5, max_tokens=30, temperature=float(t)) for t in range(3)),
    )
    assert max(i for entry in done.values() for i in entry.token_ids) < 20


def test_a_core_made_in_inference_mode_can_be_used_outside_of_it(new_core: NewCore) -> None:
    """An abort keeps what was computed, and clears what modules that do not read along have not written."""
    with torch.inference_mode():
        core = new_core()
    core.add(request("a", list(range(3, 60)), draft_depth=0, max_tokens=100))
    for _ in range(30):
        core.step()
    core.abort("a")
    core.check_integrity()
    done = drive(core, request("b", list(range(3, 70)), draft_depth=3, max_tokens=20))["b"]
    assert done.stats.num_cached_tokens >= 48
    assert torch.is_grad_enabled()
