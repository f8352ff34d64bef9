"""The sampler against its definition: exact probabilities (chi-square), naive filters, OpenAI's penalty formula."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stepflash.engine.request import SamplingParams
from stepflash.engine.sampler import NUCLEUS_GUESS, Row, Sampler, filter_logits
from stepflash.engine.speculative import num_accepted

# Upper 0.001 quantiles of chi-square by degrees of freedom (tables).
CHI_SQUARE_999 = {3: 16.27, 4: 18.47, 5: 20.52, 6: 22.46, 7: 24.32}


def chi_square(counts: np.ndarray, probabilities: np.ndarray) -> tuple[float, int]:
    """Statistic and degrees of freedom; impossible outcomes must not occur."""
    possible = probabilities > 0
    assert counts[~possible].sum() == 0
    expected = probabilities[possible] * counts.sum()
    return float(((counts[possible] - expected) ** 2 / expected).sum()), int(possible.sum()) - 1


def rows_of(params: SamplingParams, sampler: Sampler, count: int, seed: int = 0) -> list[Row]:
    state = sampler.state(params, [], seed)
    return [Row(state, position) for position in range(count)]


@pytest.mark.parametrize("seed", [0, 1, 2**63 + 5])
def test_choices_follow_the_softmax(seed: int) -> None:
    sampler = Sampler(8)
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -2.0, 3.0, -0.5])
    params = SamplingParams(temperature=0.7)
    chosen = sampler.choose(logits.expand(20000, 8), rows_of(params, sampler, 20000, seed)).token_ids
    counts = np.bincount(chosen, minlength=8)
    statistic, freedom = chi_square(counts, (logits / 0.7).softmax(-1).numpy())
    assert statistic < CHI_SQUARE_999[freedom]


def test_noise_of_neighbouring_positions_and_seeds_is_independent() -> None:
    sampler = Sampler(4)
    logits = torch.zeros(16000, 4)
    params = SamplingParams(temperature=1.0)
    a = np.array(sampler.choose(logits, rows_of(params, sampler, 16000, 7)).token_ids)
    b = np.array(sampler.choose(logits, rows_of(params, sampler, 16000, 8)).token_ids)
    for first, second in ((a[:-1], a[1:]), (a, b)):
        table = np.histogram2d(first, second, bins=4)[0]
        expected = table.sum() / 16
        assert ((table - expected) ** 2 / expected).sum() < 37.7  # 0.001 quantile, 15 degrees of freedom


def test_gumbel_noise_has_the_right_moments() -> None:
    sampler = Sampler(1000)
    noise = sampler.gumbel(rows_of(SamplingParams(), sampler, 300))
    assert torch.isfinite(noise).all()
    assert abs(float(noise.mean()) - 0.5772) < 0.01  # Euler-Mascheroni
    assert abs(float(noise.var()) - math.pi**2 / 6) < 0.02


def test_speculation_keeps_the_distribution_whatever_the_draft_says() -> None:
    """Draft from q, verify against p, with the same noise: what is emitted first follows p, not q."""
    sampler = Sampler(6)
    p = torch.tensor([0.5, 0.2, 0.1, 0.1, 0.05, 0.05]).log()
    q = torch.tensor([0.1, 0.4, 0.3, 0.1, 0.05, 0.05]).log()
    rows = rows_of(SamplingParams(temperature=1.0), sampler, 20000, 3)
    target = sampler.choose(p.expand(20000, 6), rows).token_ids
    drafts = sampler.choose(q.expand(20000, 6), rows).token_ids
    accepted = sum(num_accepted([d], [t]) for d, t in zip(drafts, target, strict=True)) / 20000
    emitted = np.bincount(target, minlength=6)
    statistic, freedom = chi_square(emitted, p.exp().numpy())
    assert statistic < CHI_SQUARE_999[freedom]
    distance = float((p.exp() - q.exp()).abs().sum() / 2)
    # The bound of Daliri et al. 2024, theorem 1.2, less four standard errors.
    assert accepted > (1 - distance) / (1 + distance) - 4 * 0.0036


def naive_filter(logits: list[float], params: SamplingParams) -> set[int]:
    """Surviving tokens, by sorting and counting in float64."""
    order = sorted(range(len(logits)), key=lambda i: -logits[i])
    if params.top_k:
        order = order[: params.top_k]
    weights = [math.exp(logits[i]) for i in order]
    total, kept, mass = sum(weights), [], 0.0
    for i, weight in zip(order, weights, strict=True):
        if kept and mass / total >= params.top_p:
            break
        kept.append(i)
        mass += weight
    return {i for i in kept if math.exp(logits[i] - logits[order[0]]) >= params.min_p}


@settings(max_examples=200)
@given(
    logits=st.lists(st.integers(-40, 40), min_size=2, max_size=12, unique=True),
    top_k=st.integers(0, 14),
    top_p=st.sampled_from([0.05, 0.31, 0.7, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.013, 0.4]),
)
def test_filters_equal_the_naive_ones(logits: list[int], top_k: int, top_p: float, min_p: float) -> None:
    params = SamplingParams(top_k=top_k, top_p=top_p, min_p=min_p)
    values = [x / 8 for x in logits]
    off = SamplingParams()
    # Beside a row with other settings: rows must not leak into each other.
    both = filter_logits(torch.tensor([values, values]), [params, off])
    assert {i for i, x in enumerate(both[0].tolist()) if x > -math.inf} == naive_filter(values, params)
    assert both[1].tolist() == torch.tensor(values).tolist()


@pytest.mark.parametrize("top_p", [0.5, 0.95])
def test_a_nucleus_larger_than_the_first_guess_is_found(top_p: float) -> None:
    logits = torch.linspace(0, 1, 5000, dtype=torch.float32)
    kept = filter_logits(logits[None], [SamplingParams(top_p=top_p)])[0] > -math.inf
    expected = naive_filter(logits.tolist(), SamplingParams(top_p=top_p))
    assert len(expected) > NUCLEUS_GUESS
    # float32 sums of 5000 terms may move the edge by a token or two.
    assert abs(int(kept.sum()) - len(expected)) <= 2
    assert bool(kept[min(expected) + 2 :].all())


def test_penalties_bias_and_mask_follow_their_formulas() -> None:
    sampler = Sampler(5)
    params = SamplingParams(
        temperature=0.0,
        repetition_penalty=2.0,
        frequency_penalty=0.5,
        presence_penalty=1.0,
        logit_bias={4: 0.25},
        logprobs=2,
    )
    state = sampler.state(params, [0, 0], seed=0)
    state.accept([1, 1])
    logits = torch.tensor([[4.0, 6.0, 1.5, -2.0, 1.75, 9.0]])
    # 0: in the prompt, 4 / 2 = 2; 1: twice out and once drafted, 6 / 2 - 3 * 0.5 - 1 = 0.5; 2: drafted, 1.5 / 2 -
    # 0.5 - 1 = -0.75; 4: bias, 2.0; 5: beyond the vocabulary.
    row = Row(state, 9, drafted=(1, 2), logprobs=2)
    choice = sampler.choose(logits, [row])
    assert choice.token_ids == [0]  # ties with 4: the lower id wins
    allowed = torch.tensor([False, True, True, True, False])
    assert sampler.choose(logits, [Row(state, 9, drafted=(1, 2), allowed=allowed)]).token_ids == [1]
    entry = choice.logprobs[0]
    assert entry is not None
    raw = logits[0].log_softmax(-1)
    assert entry.logprob == pytest.approx(float(raw[0]))
    assert [i for i, _ in entry.top] == [5, 1]
    assert logits.tolist() == [[4.0, 6.0, 1.5, -2.0, 1.75, 9.0]]  # the input is not changed


def test_a_mixed_batch_chooses_as_each_row_alone() -> None:
    sampler = Sampler(50)
    logits = torch.randn(6, 60, generator=torch.Generator().manual_seed(0))
    kinds = [
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=1.3, top_p=0.8),
        SamplingParams(temperature=0.9, top_k=3),
        SamplingParams(temperature=0.0, logit_bias={5: 50.0}),
        SamplingParams(temperature=1.0, min_p=0.2, frequency_penalty=1.0),
        SamplingParams(temperature=2.0),
    ]
    rows = [Row(sampler.state(params, [1, 2], seed), 17) for seed, params in enumerate(kinds)]
    together = sampler.choose(logits, rows).token_ids
    assert together == [sampler.choose(logits[i : i + 1], [row]).token_ids[0] for i, row in enumerate(rows)]
    assert together[3] == 5
    assert max(together) < 50


def test_rows_without_a_usable_token_are_reported() -> None:
    sampler = Sampler(3)
    logits = torch.tensor([[0.0, float("nan"), 1.0], [0.0, 1.0, 2.0], [-math.inf] * 3])
    for temperature in (0.0, 1.0):
        rows = rows_of(SamplingParams(temperature=temperature), sampler, 3)
        assert sampler.choose(logits, rows).is_finite == [False, True, False]
