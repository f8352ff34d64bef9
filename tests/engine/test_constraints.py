"""Constraints and speculation together: same output at any depth, exact distribution, forced tokens for free."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

from stepflash.engine.constraints import AllOf, Constraint, allows, as_tensor
from stepflash.engine.core import EngineCore
from stepflash.errors import RequestError
from tests.engine.conftest import drive, request
from tests.engine.test_sampler import CHI_SQUARE_999, chi_square

NewCore = Callable[..., EngineCore]


class Alternating:
    """Even places take tokens of one set, odd places of another; place `forced_at` dictates a phrase."""

    def __init__(self, forced_at: int = -1, phrase: Sequence[int] = ()) -> None:
        self.token_ids: list[int] = []
        self.forced_at, self.phrase = forced_at, list(phrase)

    def mask(self) -> Sequence[int]:
        if forced := self.forced():
            return forced[:1]
        return range(40, 45) if len(self.token_ids) % 2 == 0 else (200, 210, 220)

    def accept(self, token_id: int) -> None:
        assert allows(self.mask(), token_id)
        self.token_ids.append(token_id)

    def rollback(self, num_tokens: int) -> None:
        assert num_tokens <= len(self.token_ids)
        del self.token_ids[len(self.token_ids) - num_tokens :]

    def forced(self) -> Sequence[int]:
        place = len(self.token_ids) - self.forced_at
        return self.phrase[place:] if 0 <= place < len(self.phrase) and self.forced_at >= 0 else ()


def is_valid(token_ids: list[int]) -> bool:
    return all(t in (range(40, 45) if i % 2 == 0 else (200, 210, 220)) for i, t in enumerate(token_ids))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_output_under_a_constraint_is_the_same_at_any_depth(new_core: NewCore, temperature: float) -> None:
    outputs = []
    for depth in (0, 1, 2, 3, None):
        constraint = Alternating()
        asked = request(
            "a",
            [9] * 20,
            max_tokens=30,
            temperature=temperature,
            seed=3,
            draft_depth=depth,
            constraint=constraint,
        )
        done = drive(new_core(), asked)["a"]
        assert (
            constraint.token_ids == done.token_ids
        )  # walked along drafts and back, it saw just what came out
        outputs.append(done.token_ids)
        if depth == 3:
            assert sum(done.stats.num_accepted_tokens) > 0
    assert is_valid(outputs[0])
    assert len(outputs[0]) == 30
    assert all(other == outputs[0] for other in outputs)


class Late(Alternating):
    """Free for 12 tokens; then a phrase is dictated, and it is free again."""

    num_masks = 0

    def mask(self) -> Sequence[int] | None:  # type: ignore[override]
        self.num_masks += 1
        return self.forced()[:1] or None

    def accept(self, token_id: int) -> None:
        assert token_id in (self.forced()[:1] or [token_id])
        self.token_ids.append(token_id)


class KnownLate(Late):
    """Says so."""

    @property
    def num_free(self) -> int:
        place = len(self.token_ids)
        return 12 - place if place <= 12 else 0 if self.forced() else 1000


def test_freedom_that_is_known_changes_nothing_but_the_questions(new_core: NewCore) -> None:
    seen = {}
    for kind in (Late, KnownLate):
        for depth in (0, 1, 2, 3, None):
            constraint = kind(12, [300, 301])
            alone: Constraint = AllOf([constraint]) if depth == 2 else constraint
            options = {"temperature": 0.0, "draft_depth": depth, "constraint": alone}
            done = drive(new_core(), request("a", [9] * 20, max_tokens=30, **options))["a"]
            assert constraint.token_ids == done.token_ids
            seen[kind, depth] = done.token_ids, constraint.num_masks
    assert len({tuple(token_ids) for token_ids, _ in seen.values()}) == 1
    assert seen[Late, 0][0][12:14] == [300, 301]
    assert all(seen[KnownLate, depth][1] < seen[Late, depth][1] / 2 for depth in (0, 1, 2, 3, None))


def test_forced_tokens_take_one_step(new_core: NewCore) -> None:
    phrase = [300, 301, 302, 303, 304, 305, 306, 307]
    for depth in (0, 3):
        constraint = Alternating(forced_at=2, phrase=phrase)
        asked = request("a", [9] * 20, max_tokens=12, draft_depth=depth, constraint=constraint)
        done = drive(new_core(), asked)["a"]
        assert done.token_ids[2:10] == phrase
        assert done.stats.num_forced_tokens == 8
        assert done.stats.num_steps <= 5


def test_constrained_speculative_sampling_has_the_exact_distribution(new_core: NewCore) -> None:
    """The second token, drafted by module 1, given the first: masked softmax of the model's logits."""
    core = new_core(max_num_batched_tokens=256, max_num_seqs=32, max_waiting=2000)
    requests = [
        request(
            f"r{i}", [9] * 8, max_tokens=2, temperature=1.5, seed=i, draft_depth=3, constraint=Alternating()
        )
        for i in range(2000)
    ]
    done = drive(core, *requests, max_steps=100000)
    pairs = [tuple(entry.token_ids) for entry in done.values()]
    first = core.runner.model.logits(torch.tensor([9] * 8))[-1] / 1.5
    evens, odds = list(range(40, 45)), [200, 210, 220]
    counts = np.array([sum(a == t for a, _ in pairs) for t in evens])
    statistic, freedom = chi_square(counts, first[evens].softmax(-1).double().numpy())
    assert statistic < CHI_SQUARE_999[freedom]
    common = evens[int(counts.argmax())]
    after = core.runner.model.logits(torch.tensor([9] * 8 + [common]))[-1][odds] / 1.5
    counts = np.array([sum(p == (common, t) for p in pairs) for t in odds])
    statistic, _ = chi_square(counts, after.softmax(-1).double().numpy())
    assert statistic < 13.82  # 0.001 quantile, 2 degrees of freedom


class DeadEnd:
    """Four tokens may follow each other freely, but after token 55 the constraint knows no way on."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []

    def mask(self) -> Sequence[int]:
        return [] if self.token_ids[-1:] == [55] else (7, 31, 55, 102)

    def accept(self, token_id: int) -> None:
        assert token_id in self.mask()
        self.token_ids.append(token_id)

    def rollback(self, num_tokens: int) -> None:
        assert num_tokens <= len(self.token_ids)
        del self.token_ids[len(self.token_ids) - num_tokens :]

    def forced(self) -> Sequence[int]:
        return ()


def test_a_draft_into_a_dead_end_does_no_harm(new_core: NewCore) -> None:
    """Whoever never takes it never hears of it; whoever does gets the same tokens and the same error."""
    ends = set()
    for seed in range(12):
        told = []
        for depth in (0, 1, 2, 3):
            asked = request(
                "a",
                [9, 31, 7] * 5,
                max_tokens=8,
                temperature=1.5,
                seed=seed,
                draft_depth=depth,
                constraint=DeadEnd(),
            )
            done = drive(new_core(), asked)["a"]
            told.append((done.token_ids, done.last.finish_reason, done.last.error))
        assert all(other == told[0] for other in told), seed
        ends.add(told[0][1])
    assert ends == {"length", "error"}


def test_all_of_combines_and_stays_consistent_when_one_raises() -> None:
    class Bad(Alternating):
        def accept(self, token_id: int) -> None:
            raise ValueError("no")

    good = Alternating()
    both = AllOf([good, Alternating(forced_at=0, phrase=[41, 200])])
    assert isinstance(both, Constraint)
    assert set(both.mask() or ()) == {41}
    assert list(both.forced()) == [41, 200]
    both.accept(41)
    assert set(both.mask() or ()) == {200}
    both.rollback(1)
    assert good.token_ids == []
    with pytest.raises(ValueError, match="no"):
        AllOf([good, Bad()]).accept(41)
    assert good.token_ids == []


def test_every_form_of_mask_means_the_same() -> None:
    as_array = np.array([False, True, False, True])
    for mask in ({1, 3}, [1, 3], as_array, torch.from_numpy(as_array)):
        tensor = as_tensor(mask, 6)
        assert tensor is not None
        assert tensor.tolist() == [False, True, False, True, False, False]
        assert [allows(mask, i) for i in range(6)] == tensor.tolist()
    assert as_tensor(None, 6) is None
    with pytest.raises(RequestError, match="allows no token"):
        as_tensor([7], 6)
