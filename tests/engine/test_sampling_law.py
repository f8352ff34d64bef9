"""Speculative sampling leaves the distribution unchanged: whole answers against probabilities by enumeration.

With all but four tokens ruled out there are 64 answers of three tokens. Their probabilities are computed one by
one in float64, from dense logits and from definitions written here (temperature, filters, penalties, bias,
mask); answers drawn by the engine with drafts of all three modules must follow them (chi-square), on the random
micro checkpoint and on nano.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from stepflash.engine.core import EngineConfig, EngineCore
from stepflash.model.transformer import Step3p5ForCausalLM
from stepflash.weights.load import load_model
from tests.engine.conftest import drive, request

NUM_ANSWERS = 1000
LENGTH = 3
MICRO_TOKENS = (7, 31, 55, 102)
PROMPT = (9, 31, 9, 200, 31, 7, 9, 9)


class NoTwice:
    """A grammar: no token may follow itself."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self.tokens = tokens
        self.said: list[int] = []

    def mask(self) -> list[int]:
        return [t for t in self.tokens if not self.said or t != self.said[-1]]

    def accept(self, token_id: int) -> None:
        assert token_id in self.mask()
        self.said.append(token_id)

    def rollback(self, num_tokens: int) -> None:
        del self.said[len(self.said) - num_tokens :]

    def forced(self) -> Sequence[int]:
        return ()


Logits = Callable[[tuple[int, ...]], list[float]]


def answer_probabilities(
    logits: Logits, tokens: Sequence[int], prompt: Sequence[int], options: dict[str, Any]
) -> dict[tuple[int, ...], float]:
    """The chance of each answer, by walking the tree of all of them."""
    found: dict[tuple[int, ...], float] = {}

    def walk(answer: tuple[int, ...], chance: float) -> None:
        if len(answer) == LENGTH:
            found[answer] = chance
            return
        for token, p in next_token(logits(answer), tokens, prompt, answer, options).items():
            walk((*answer, token), chance * p)

    walk((), 1.0)
    return found


def next_token(
    logits: list[float],
    tokens: Sequence[int],
    prompt: Sequence[int],
    answer: tuple[int, ...],
    options: dict[str, Any],
) -> dict[int, float]:
    scores = dict(zip(tokens, logits, strict=True))
    for token in tokens:
        count = answer.count(token)
        repetition = options.get("repetition_penalty", 1.0)
        if count or token in prompt:
            scores[token] *= repetition if scores[token] < 0 else 1 / repetition
        scores[token] -= options.get("frequency_penalty", 0.0) * count
        scores[token] -= options.get("presence_penalty", 0.0) * bool(count)
        scores[token] += options.get("bias", {}).get(token, 0.0)
    if options.get("grammar") and answer:
        del scores[answer[-1]]
    scores = {token: score / options.get("temperature", 1.0) for token, score in scores.items()}
    order = sorted(scores, key=lambda t: -scores[t])[: options.get("top_k", 0) or len(scores)]
    weights = {token: math.exp(scores[token] - scores[order[0]]) for token in order}
    total, mass, kept = sum(weights.values()), 0.0, {}
    for token in order:
        if kept and mass / total >= options.get("top_p", 1.0):
            break
        kept[token] = weights[token]
        mass += weights[token]
    kept = {token: w for token, w in kept.items() if w >= options.get("min_p", 0.0) * kept[order[0]]}
    return {token: w / sum(kept.values()) for token, w in kept.items()}


def check(observed: Counter[tuple[int, ...]], expected: dict[tuple[int, ...], float]) -> None:
    """Chi-square at the 0.001 level; rare answers share one cell, impossible ones must not occur."""
    number = sum(observed.values())
    assert set(observed) <= {answer for answer, p in expected.items() if p > 0}
    cells: list[tuple[float, float]] = []
    rare_expected = rare_observed = 0.0
    for answer, p in expected.items():
        if p * number >= 5:
            cells.append((p * number, observed[answer]))
        else:
            rare_expected += p * number
            rare_observed += observed[answer]
    if rare_expected >= 5:
        cells.append((rare_expected, rare_observed))
    statistic = sum((seen - wanted) ** 2 / wanted for wanted, seen in cells)
    freedom = len(cells) - 1
    assert freedom >= 3
    # Wilson and Hilferty 1931: the cube root is nearly normal; 3.09 is the normal 0.999 quantile.
    limit = freedom * (1 - 2 / (9 * freedom) + 3.09 * math.sqrt(2 / (9 * freedom))) ** 3
    assert statistic < limit, (statistic, limit)


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "hot": {"temperature": 1.7},
    "top-k": {"top_k": 3, "temperature": 1.5},
    "top-p": {"top_p": 0.8, "temperature": 2.0},
    "min-p": {"min_p": 0.3, "temperature": 2.0},
    "penalties": {"presence_penalty": 0.7, "frequency_penalty": 0.9, "repetition_penalty": 1.4},
    "bias": {"bias": {0: 1.0, 2: -1.5}},
    "grammar": {"grammar": True},
    "all": {
        "grammar": True,
        "temperature": 1.3,
        "top_k": 3,
        "top_p": 0.95,
        "min_p": 0.02,
        "presence_penalty": 0.4,
        "repetition_penalty": 1.2,
        "bias": {1: 0.5},
    },
}


@pytest.fixture(scope="module")
def nano() -> Step3p5ForCausalLM:
    return load_model("nano", dtype="float32", progress=False)


def close_call(model: Step3p5ForCausalLM) -> tuple[int, ...]:
    """Four tokens that a model finds likely after the prompt, so that there is something to choose."""
    return tuple(model.logits(torch.tensor(PROMPT))[-1].topk(4).indices.tolist())


@pytest.mark.parametrize(
    ("which", "kind"),
    [("micro", kind) for kind in KINDS]
    + [
        pytest.param("nano", kind, marks=() if kind in ("plain", "all") else (pytest.mark.slow,))
        for kind in KINDS
    ],
)
def test_answers_with_drafts_follow_the_enumerated_law(
    request: pytest.FixtureRequest, which: str, kind: str
) -> None:
    network: Step3p5ForCausalLM = request.getfixturevalue("model" if which == "micro" else which)
    tokens = MICRO_TOKENS if which == "micro" else close_call(network)
    options = dict(KINDS[kind])
    # Biases are given by place among the four.
    options["bias"] = {tokens[place]: value for place, value in options.get("bias", {}).items()}
    cache: dict[tuple[int, ...], list[float]] = {}

    def logits(answer: tuple[int, ...]) -> list[float]:
        if answer not in cache:
            ids = torch.tensor([*PROMPT, *answer])
            cache[answer] = network.logits(ids)[-1][list(tokens)].double().tolist()
        return cache[answer]

    expected = answer_probabilities(logits, tokens, PROMPT, options)
    assert sum(expected.values()) == pytest.approx(1.0)
    done = draw(network, tokens, options)
    check(Counter(tuple(answer) for answer, _ in done), expected)
    accepted = sum(count for _, count in done)
    assert accepted > NUM_ANSWERS / 20, "hardly a draft was right: nothing is tested"


def draw(
    network: Step3p5ForCausalLM, tokens: Sequence[int], options: dict[str, Any]
) -> list[tuple[list[int], int]]:
    """Answers of the engine with independent seeds, and how many drafts each accepted."""
    config = EngineConfig(
        max_num_seqs=48,
        max_num_batched_tokens=512,
        max_model_len=64,
        max_waiting=NUM_ANSWERS,
        kv_cache_bytes=128 << 20,
    )
    core = EngineCore(network, config)
    grammar = options.get("grammar", False)
    sampling = {k: v for k, v in options.items() if k not in ("bias", "grammar")}
    # The penalties act before the bias, so this rules the others out under any of them.
    bias = {token: -1e4 for token in range(network.config.vocab_size) if token not in tokens}
    asked = [
        request(
            f"r{i}",
            list(PROMPT),
            max_tokens=LENGTH,
            seed=1000 + i,
            draft_depth=3,
            logit_bias=bias | options["bias"],
            constraint=NoTwice(tokens) if grammar else None,
            **({"temperature": 1.0} | sampling),
        )
        for i in range(NUM_ANSWERS)
    ]
    done = drive(core, *asked, max_steps=10**6)
    return [(entry.token_ids, sum(entry.stats.num_accepted_tokens)) for entry in done.values()]
