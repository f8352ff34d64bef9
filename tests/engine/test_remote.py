"""The remote engine over a stand-in for vLLM and SGLang, against the engine that computes there.

The same requests go to the engine directly and through HTTP; what comes out must be the same, token by token. A real
vLLM is tested in tests/interop/test_vllm_upstream.py.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import aclosing
from typing import Any

import pytest

from stepflash.chat.tokenizer import Tokenizer
from stepflash.engine.core import EngineCore
from stepflash.engine.engine import Engine
from stepflash.engine.remote import RemoteEngine
from stepflash.engine.request import Output, Request, SamplingParams, TokenLogprob
from stepflash.engine.upstream import connect
from stepflash.errors import ConfigError, EngineError, PromptTooLong, QueueFull, RequestError
from tests.engine.conftest import MICRO
from tests.upstream_stand_in import OnlyThese, StandIn, running

PROMPT = tuple(range(40, 90))
VOCAB = 512
KINDS = ("vllm", "sglang")


@pytest.fixture(params=KINDS)
def stand_in(request: pytest.FixtureRequest, new_core: Callable[..., EngineCore]) -> Iterator[StandIn]:
    with (
        Engine(new_core()) as engine,
        running(
            StandIn(engine=engine, tokenizer=Tokenizer.from_pretrained(MICRO), kind=request.param)
        ) as server,
    ):
        yield server


async def outputs_of(engine: Any, request: Request) -> list[Output]:
    return [output async for output in engine.submit(request)]


def remote(stand_in: StandIn, *requests: Request, **options: Any) -> list[Any]:
    """The outputs of requests that run together, or what they raised."""

    async def run() -> list[Any]:
        engine = RemoteEngine(
            connect(stand_in.url, stand_in.api_key), eos_token_ids=frozenset({1}), vocab_size=VOCAB, **options
        )
        try:
            return await asyncio.gather(
                *(outputs_of(engine, request) for request in requests), return_exceptions=True
            )
        finally:
            await engine.aclose()

    return asyncio.run(run())


def local(stand_in: StandIn, request: Request) -> list[Output]:
    named = dataclasses.replace(request, request_id=f"local-{request.request_id}")
    return asyncio.run(outputs_of(stand_in.engine, named))


def tokens(outputs: list[Output]) -> list[int]:
    return [token_id for output in outputs for token_id in output.token_ids]


def greedy(**options: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=24, **options)


VARIANTS = {
    "greedy": greedy(),
    "seed": SamplingParams(temperature=1.3, seed=7, max_tokens=24),
    "negative seed": SamplingParams(temperature=1.0, seed=-3, max_tokens=8),
    "filters": SamplingParams(temperature=0.8, top_k=20, top_p=0.9, min_p=0.01, seed=3, max_tokens=24),
    "penalties": greedy(presence_penalty=1.5, frequency_penalty=0.5, repetition_penalty=1.3),
    "bias": greedy(logit_bias={77: 40.0, 78: -100.0}),
    "logprobs": greedy(logprobs=4),
    "chosen logprob": greedy(logprobs=0),
    "stop token": greedy(stop_token_ids=tuple(range(2, 500, 3))),
    "no eos": greedy(ignore_eos=True, logit_bias={1: 100.0}),
    "eos": greedy(logit_bias={1: 100.0}),
}


@pytest.mark.parametrize("sampling", VARIANTS.values(), ids=VARIANTS)
def test_every_sampling_parameter_arrives(stand_in: StandIn, sampling: SamplingParams) -> None:
    request = Request(request_id="r", prompt_token_ids=PROMPT, sampling=sampling)
    (outputs,) = remote(stand_in, request)
    # The engine there was given the seed as a number without sign, and draws from that.
    seed = None if sampling.seed is None else sampling.seed % 2**63
    # Its own end tokens are {1} here, as the remote engine was told; the checkpoint's configuration names others.
    stop = (*sampling.stop_token_ids, *(() if sampling.ignore_eos else (1,)))
    same = dataclasses.replace(sampling, seed=seed, ignore_eos=True, stop_token_ids=stop)
    expected = local(stand_in, dataclasses.replace(request, sampling=same))
    assert tokens(outputs) == tokens(expected)
    assert outputs[-1].finish_reason == expected[-1].finish_reason

    def rounded(outputs: list[Output]) -> list[TokenLogprob]:
        return [entry for output in outputs for entry in output.logprobs]

    assert [entry.token_id for entry in rounded(outputs)] == [entry.token_id for entry in rounded(expected)]
    for ours, theirs in zip(rounded(outputs), rounded(expected), strict=True):
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)
        assert [i for i, _ in ours.top] == [i for i, _ in theirs.top]
    stats = outputs[-1].stats
    assert stats is not None
    assert stats.num_prompt_tokens == len(PROMPT)
    assert stats.num_generated_tokens == len(tokens(outputs))


def test_counts_of_the_upstream_are_ours(stand_in: StandIn) -> None:
    request = Request(request_id="r", prompt_token_ids=PROMPT, sampling=greedy())
    drafting = dataclasses.replace(request, sampling=greedy(draft_depth=3))
    expected = local(stand_in, drafting)[-1].stats  # also fills the cache
    (outputs,) = remote(stand_in, dataclasses.replace(request, request_id="again"))
    stats = outputs[-1].stats
    assert stats.num_cached_tokens > 0
    assert sum(stats.num_drafted_tokens) > 0
    assert sum(stats.num_accepted_tokens) == sum(expected.num_accepted_tokens)


def test_incremental_streaming_of_sglang(new_core: Callable[..., EngineCore]) -> None:
    tokenizer = Tokenizer.from_pretrained(MICRO)
    request = Request(request_id="r", prompt_token_ids=PROMPT, sampling=greedy(logprobs=2))
    with Engine(new_core()) as engine:
        found = []
        for is_incremental in (False, True):
            server = StandIn(engine=engine, tokenizer=tokenizer, kind="sglang", is_incremental=is_incremental)
            with running(server):
                found.append(remote(server, request)[0])
    assert tokens(found[0]) == tokens(found[1])
    assert len(tokens(found[0])) == 24


# What a constraint says is kept although the server knows nothing of it.


class Alternating:
    """Even ids, then odd ids, then even ones ...; every fourth token is dictated. It may end after `length`."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.accepted: list[int] = []

    def mask(self) -> set[int]:
        if forced := self.forced():
            return set(forced)
        if len(self.accepted) >= self.length:
            return {1}
        return set(range(10 + len(self.accepted) % 2, VOCAB, 2))

    def accept(self, token_id: int) -> None:
        self.accepted.append(token_id)

    def rollback(self, num_tokens: int) -> None:
        del self.accepted[len(self.accepted) - num_tokens :]

    def forced(self) -> tuple[int, ...]:
        position = len(self.accepted)
        return (100 + position,) if position % 4 == 3 and position < self.length else ()


def test_a_constraint_gives_what_a_mask_gives(stand_in: StandIn) -> None:
    """Greedy: the engine with the mask inside and the remote one outside must choose the same tokens."""

    def request(name: str, sampling: SamplingParams) -> Request:
        return Request(
            request_id=name, prompt_token_ids=PROMPT, sampling=sampling, constraint=Alternating(14)
        )

    (outputs,) = remote(stand_in, request("remote", greedy()))
    expected = asyncio.run(
        outputs_of(stand_in.engine, request("local", greedy(ignore_eos=True, stop_token_ids=(1,))))
    )
    assert tokens(outputs) == tokens(expected)
    assert len(tokens(outputs)) == 15
    assert outputs[-1].finish_reason == "stop"
    assert len(stand_in.bodies) > 5
    assert outputs[-1].stats.num_forced_tokens == 3


def test_a_constraint_leaves_the_distribution_as_a_mask_would(new_core: Callable[..., EngineCore]) -> None:
    """Chi-square on one token out of four allowed ones, against the engine's own masked sampling."""
    allowed = [50, 51, 52, 53]
    bias = {50: 6.0, 51: 5.0, 52: 5.5, 53: 4.5}
    num_draws = 400
    with Engine(new_core()) as engine:
        server = StandIn(engine=engine, tokenizer=Tokenizer.from_pretrained(MICRO), kind="vllm")
        probabilities = _masked_probabilities(engine, allowed, bias)
        with running(server):
            requests = [
                Request(
                    request_id=f"r{seed}",
                    prompt_token_ids=PROMPT,
                    sampling=SamplingParams(max_tokens=1, seed=seed, logit_bias=bias),
                    constraint=OnlyThese(allowed),
                )
                for seed in range(num_draws)
            ]
            found = [tokens(outputs)[0] for outputs in remote(server, *requests)]
    expected = [num_draws * probability for probability in probabilities]
    counts = [found.count(token_id) for token_id in allowed]
    assert sum(counts) == num_draws
    chi_square = sum((count - mean) ** 2 / mean for count, mean in zip(counts, expected, strict=True))
    assert chi_square < 16.27  # three degrees of freedom, p = 0.001


def _masked_probabilities(engine: Engine, allowed: list[int], bias: dict[int, float]) -> list[float]:
    """From the model's own log-probabilities: softmax over the allowed tokens, with their bias."""
    import math

    weights = []
    for token_id in allowed:
        request = Request(
            request_id=f"p{token_id}",
            prompt_token_ids=PROMPT,
            sampling=SamplingParams(max_tokens=1, temperature=0.0, logprobs=0),
            constraint=OnlyThese([token_id]),
        )
        (entry,) = asyncio.run(outputs_of(engine, request))[-1].logprobs
        weights.append(math.exp(entry.logprob + bias[token_id]))
    return [weight / sum(weights) for weight in weights]


def test_dictated_tokens_have_no_log_probability(stand_in: StandIn) -> None:
    request = Request(
        request_id="r", prompt_token_ids=PROMPT, sampling=greedy(logprobs=1), constraint=Alternating(8)
    )
    (error,) = remote(stand_in, request)
    assert isinstance(error, RequestError)
    assert error.param == "logprobs"


# What goes wrong.


@pytest.mark.parametrize("statuses", [[503], [429, 502]])
def test_tries_again_before_the_first_token(stand_in: StandIn, statuses: list[int]) -> None:
    stand_in.statuses = list(statuses)
    (outputs,) = remote(stand_in, Request(request_id="r", prompt_token_ids=PROMPT, sampling=greedy()))
    assert len(tokens(outputs)) == 24
    names = [body.get("request_id") or body.get("rid") for body in stand_in.bodies]
    assert len(set(names)) == len(statuses) + 1


@pytest.mark.parametrize(
    ("statuses", "error_type", "words"),
    [
        ([503] * 3, QueueFull, "told to"),
        ([429] * 3, QueueFull, "told to"),
        ([502] * 3, EngineError, "told to"),
        ([500], EngineError, "told to"),
        ([400], RequestError, "told to"),
        ([401], EngineError, "--upstream-api-key"),
    ],
)
def test_refusals(stand_in: StandIn, statuses: list[int], error_type: type[Exception], words: str) -> None:
    stand_in.statuses = list(statuses)
    (error,) = remote(stand_in, Request(request_id="r", prompt_token_ids=PROMPT, sampling=greedy()))
    assert type(error) is error_type
    assert words in str(error)
    if isinstance(error, QueueFull):
        assert error.retry_after_seconds == 7.0
    assert stand_in.statuses == []


def test_a_connection_that_breaks_before_the_first_token_is_made_again(stand_in: StandIn) -> None:
    stand_in.cut_after = 0
    (outputs,) = remote(stand_in, Request(request_id="r", prompt_token_ids=PROMPT, sampling=greedy()))
    assert len(tokens(outputs)) == 24


def test_a_connection_that_breaks_later_is_an_error(stand_in: StandIn) -> None:
    stand_in.cut_after = 2
    (error,) = remote(stand_in, Request(request_id="r", prompt_token_ids=PROMPT, sampling=greedy()))
    assert isinstance(error, EngineError)
    assert "broke after" in str(error)


def test_an_error_in_the_stream(stand_in: StandIn) -> None:
    stand_in.error_event = "the engine died"
    (error,) = remote(stand_in, Request(request_id="r", prompt_token_ids=PROMPT, sampling=greedy()))
    assert isinstance(error, EngineError)
    assert "the engine died" in str(error)


def test_silence(stand_in: StandIn) -> None:
    stand_in.pause = 1.0
    request = Request(request_id="r", prompt_token_ids=PROMPT, sampling=greedy())
    (error,) = remote(stand_in, request, silence_seconds=0.2)
    assert isinstance(error, EngineError)
    assert "silent" in str(error)
    assert len(stand_in.bodies) == 1


def test_deadline(stand_in: StandIn) -> None:
    stand_in.pause = 0.05
    request = Request(request_id="r", prompt_token_ids=PROMPT, sampling=greedy(), deadline_seconds=0.3)
    (outputs,) = remote(stand_in, request)
    assert (outputs[-1].finish_reason, outputs[-1].stop_reason) == ("abort", "deadline")


@pytest.mark.parametrize("how", ["abort", "close"])
def test_whoever_leaves_ends_the_work_there(stand_in: StandIn, how: str) -> None:
    stand_in.pause = 0.02

    async def run() -> list[Output]:
        engine = RemoteEngine(connect(stand_in.url), eos_token_ids=frozenset({1}), vocab_size=VOCAB)
        request = Request(
            request_id="r", prompt_token_ids=PROMPT, sampling=SamplingParams(max_tokens=400, temperature=0.0)
        )
        received = []
        async with aclosing(engine.submit(request)) as outputs:  # type: ignore[type-var]
            async for output in outputs:
                received.append(output)
                if len(received) == 3:
                    if how == "close":
                        break
                    engine.abort("r")
        assert engine.stats().num_running == 0
        for _ in range(200):
            if stand_in.ended and stand_in.engine.stats().num_running == 0:
                break
            await asyncio.sleep(0.02)
        await engine.aclose()
        return received

    received = asyncio.run(run())
    assert stand_in.ended == ["left"]
    assert stand_in.engine.stats().num_running == 0
    if how == "abort":
        assert received[-1].finish_reason == "abort"


def test_requests_run_together(stand_in: StandIn) -> None:
    requests = [
        Request(request_id=f"r{i}", prompt_token_ids=PROMPT[i:], sampling=greedy(ignore_eos=True))
        for i in range(8)
    ]
    for request, outputs in zip(requests, remote(stand_in, *requests), strict=True):
        assert tokens(outputs) == tokens(local(stand_in, request))


def test_refused_before_anything_is_sent(stand_in: StandIn) -> None:
    long = tuple(range(2, 500)) * 2
    (error,) = remote(stand_in, Request(request_id="r", prompt_token_ids=long, sampling=greedy()))
    assert isinstance(error, PromptTooLong)
    assert (error.num_tokens, error.max_tokens) == (len(long), 512)
    assert stand_in.bodies == []


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_log_probabilities_of_prompts_are_refused(new_core: Callable[..., EngineCore], kind: str) -> None:
    with Engine(new_core()) as engine:
        server = StandIn(engine=engine, tokenizer=Tokenizer.from_pretrained(MICRO), kind=kind)
        with running(server):
            sampling = SamplingParams(prompt_logprobs=1, max_tokens=0)
            (error,) = remote(server, Request(request_id="r", prompt_token_ids=PROMPT, sampling=sampling))
    assert isinstance(error, RequestError)
    assert (error.param, error.code) == ("echo", "unsupported_parameter")
    assert server.bodies == []


def test_sglang_without_deterministic_inference_follows_no_seed(new_core: Callable[..., EngineCore]) -> None:
    with Engine(new_core()) as engine:
        server = StandIn(
            engine=engine, tokenizer=Tokenizer.from_pretrained(MICRO), kind="sglang", takes_seeds=False
        )
        with running(server):
            request = Request(
                request_id="r", prompt_token_ids=PROMPT, sampling=SamplingParams(seed=1, max_tokens=4)
            )
            (error,) = remote(server, request)
    assert isinstance(error, RequestError)
    assert error.param == "seed"
    assert server.bodies == []


@pytest.mark.parametrize(("low_first", "sent"), [(True, 3), (False, -3)])
def test_a_priority_means_there_what_it_means_here(stand_in: StandIn, low_first: bool, sent: int) -> None:
    """vLLM runs the lowest first, SGLang the highest unless it was told otherwise."""
    stand_in.has_priorities, stand_in.runs_low_priorities_first = True, low_first
    requests = [
        Request(request_id=f"r{priority}", prompt_token_ids=PROMPT, sampling=greedy(), priority=priority)
        for priority in (3, 0)
    ]
    for outputs in remote(stand_in, *requests):
        assert len(tokens(outputs)) == 24
    found = {body.get("rid", body.get("request_id"))[:2]: body.get("priority") for body in stand_in.bodies}
    if stand_in.kind == "vllm":
        assert found == {"r3": 3, "r0": None}
    else:
        assert found == {"r3": sent, "r0": 0}


def test_a_priority_that_the_upstream_has_not_is_refused(stand_in: StandIn) -> None:
    request = Request(request_id="r", prompt_token_ids=PROMPT, sampling=greedy(), priority=3)
    (error,) = remote(stand_in, request)
    assert isinstance(error, RequestError)
    assert "priority" in str(error).lower()


def test_gauges_of_the_upstream(stand_in: StandIn) -> None:
    async def run() -> Any:
        engine = RemoteEngine(connect(stand_in.url), eos_token_ids=frozenset(), vocab_size=VOCAB)
        assert engine.stats().upstream_running == -1
        for _ in range(100):
            if engine.stats().upstream_running >= 0:
                break
            await asyncio.sleep(0.02)
        stats = engine.stats()
        await engine.aclose()
        return stats

    stats = asyncio.run(run())
    assert (stats.upstream_running, stats.upstream_waiting, stats.upstream_kv_usage) == (6, 2, 0.5)
    assert stats.is_reachable == 1


def test_a_key_for_the_upstream(stand_in: StandIn) -> None:
    stand_in.api_key = "secret"
    with pytest.raises(ConfigError, match="--upstream-api-key"):
        connect(stand_in.url)
    (outputs,) = remote(stand_in, Request(request_id="r", prompt_token_ids=PROMPT, sampling=greedy()))
    assert len(tokens(outputs)) == 24


def test_nobody_there() -> None:
    with pytest.raises(ConfigError, match="no answer"):
        connect("http://127.0.0.1:9/v1")
