"""The benchmarks on the micro checkpoint: bytes against a count from the files, figures against their definition."""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from stepflash.cli import main
from stepflash.engine.llm import LLM
from stepflash.errors import ConfigError, StepflashError
from stepflash.tools.bench_measure import (
    PeakMemory,
    decode_rates,
    prefill_rates,
    speculation_rates,
    step_bytes,
)
from stepflash.tools.bench_serve import Answer, Load, percentiles, run_load, summarize

MICRO = Path(__file__).parent.parent / "fixtures" / "micro"
EOS = 1


def bench(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    status = main(["bench", *arguments, "--json"])
    output = capsys.readouterr()
    assert status == 0, output.err
    return json.loads(output.out)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(MICRO, quantization="bf16", max_num_seqs=4, prefix_caching=False)


# Bytes


def read_by_hand(tokens: int) -> float:
    """bf16 bytes of the micro checkpoint's trunk, 2 of its 8 experts for a token; the router and norms float32."""
    total = 0.0
    with safe_open(MICRO / "model-00001.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118
            size = np.prod(file.get_slice(name).get_shape())
            layer = int(name.split(".")[2]) if name.startswith("model.layers.") else -1
            if layer >= 8 or "embed_tokens" in name:
                continue
            is_float = "norm" in name or "moe.gate.weight" in name or "router_bias" in name
            is_expert = ".moe." in name and "_proj" in name
            total += size * (4 if is_float else 2) * (1 - (6 / 8) ** tokens if is_expert else 1)
    return total + tokens * 128 * 2


def test_step_bytes_are_those_of_the_file(llm: LLM) -> None:
    # The panels of packed weights have 32 rows, and the head gates only 4 or 6: 28 and 26 rows are padding.
    padding = (2 * 28 + 6 * 26) * 128 * 2
    for streams in (1, 3):
        found = step_bytes(llm.model, 10, streams)
        assert found.weights == pytest.approx(read_by_hand(streams) + padding, rel=1e-6)
        # k and v of 2 KV heads of 32 in 8 layers, all 10 positions inside the window of 16
        assert found.kv == streams * 10 * 8 * 2 * 2 * 32 * 2
    # 40 positions: two full layers see all, six sliding ones 16
    assert step_bytes(llm.model, 40, 1).kv == (2 * 40 + 6 * 16) * 2 * 2 * 32 * 2
    # int8: a byte a value, and a float32 scale for each head's key and value
    assert step_bytes(llm.model, 40, 1, torch.int8).kv == (2 * 40 + 6 * 16) * 2 * 2 * (32 + 4)


def test_a_packed_format_reads_less(llm: LLM) -> None:
    packed = LLM(MICRO, quantization="int4")
    assert step_bytes(packed.model, 10, 1).weights < 0.5 * step_bytes(llm.model, 10, 1).weights


# Rates


def test_rates_are_tokens_over_time(llm: LLM) -> None:
    start = time.perf_counter()
    decode, later = decode_rates(llm, contexts=(16, 40), num_generated=9, streams=2, runs=3)
    seconds = time.perf_counter() - start
    assert len(decode.values) == len(later.values) == 3
    # 3 runs of 2 streams with 8 counted tokens took no longer than everything together.
    assert sum(16 / value for value in decode.values) < seconds
    assert decode.median == sorted(decode.values)[1]


def test_prefill_refuses_a_prefix_cache(llm: LLM) -> None:
    assert prefill_rates(llm, 64, 1, 1).median > 0
    cached = LLM(MICRO)
    cached.generate([list(range(3, 67))], progress=False)
    (repeated,) = decode_rates(cached, (64,), 4, 1, 2)
    assert len(repeated.values) == 2
    # Without one the same prompts are computed every time.
    before = llm.stats().num_computed_prompt_tokens
    decode_rates(llm, (64,), 4, 1, 2)
    assert llm.stats().num_computed_prompt_tokens - before == 3 * 64


def test_speculation_counts_what_was_accepted(llm: LLM) -> None:
    before = llm.stats()
    found, is_identical = speculation_rates(llm, [[5, 6, 7], [8, 9]], (0, 3), num_generated=12, runs=1)
    after = llm.stats()
    assert is_identical
    plain, deep = found
    assert plain.acceptance == ()
    assert plain.tokens_per_step == pytest.approx(1)
    # Both rounds, warm-up and counted, are the same: half of the engine's counters.
    for k, share in enumerate(deep.acceptance):
        drafted = after.num_drafted_tokens[k] - before.num_drafted_tokens[k]
        accepted = after.num_accepted_tokens[k] - before.num_accepted_tokens[k]
        assert share == pytest.approx(accepted / drafted)


# The command


def test_decode_reports_the_fraction_of_the_ceiling(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--format", "int8", "--context", "40,16", "--tokens", "6", "--runs", "2", "--threads", "1")
    report = bench(capsys, "decode", str(MICRO), *arguments)
    assert [row["context"] for row in report["results"]] == [16, 40]
    for row in report["results"]:
        assert row["fraction_of_ceiling"] == pytest.approx(row["bytes_per_second"] / report["bandwidth"])
        pairs = zip(row["samples"], report["results"][0]["samples"], strict=True)
        assert row["ratio"] == pytest.approx(statistics.median(a / b for a, b in pairs), rel=1e-3)
        assert len(row["samples"]) == 2
    assert report["format"] == "int8_g128 100%" or report["format"].startswith("int8")
    assert report["kv_dtype"] == "bfloat16"
    assert (
        report["kv_bytes_per_token"] == 2 * 2 * 2 * 32 * 2
    )  # two full layers, two heads of 32, key and value
    assert report["threads"] == 1
    assert 1e8 < report["bandwidth"] < 1e13
    assert report["peak_rss_bytes"] > 100e6


def test_mtp_alternates_depths(capsys: pytest.CaptureFixture[str]) -> None:
    report = bench(capsys, "mtp", str(MICRO), "--tokens", "6", "--runs", "1")
    assert [row["draft_depth"] for row in report["results"]] == [0, 3, "adaptive"]
    assert report["answers_identical"]
    assert report["results"][0]["ratio"] == 1
    plain, deep, _ = report["results"]
    assert plain["steps_by_depth"][1:] == [0, 0, 0]
    assert len(deep["acceptance"]) == 3
    model = LLM(MICRO).model
    low, high = (step_bytes(model, context, 1).total for context in (1, 200))
    assert low < plain["bytes_per_token"] < high
    # Random modules: three are read for hardly more than one token.
    assert deep["bytes_per_token"] > low
    for row in report["results"]:
        assert row["fraction_of_ceiling"] == pytest.approx(row["bytes_per_second"] / report["bandwidth"])


def test_a_step_with_drafts_reads_its_modules_and_more_experts(llm: LLM) -> None:
    plain, deep = step_bytes(llm.model, 10, 1), step_bytes(llm.model, 10, 1, num_drafts=2)
    config = llm.model.config
    modules = sum(
        tensor.nbytes
        for name, tensor in [*llm.model.named_parameters(), *llm.model.named_buffers()]
        if name.startswith((f"model.layers.{config.num_layers}.", f"model.layers.{config.num_layers + 1}."))
    )
    experts = sum(t.nbytes for n, t in llm.model.named_buffers() if ".feed_forward.experts." in n)
    # One token meets 2 of 8 experts; three meet 1 - (3/4)^3 of them. Rows of the embedding: 3 for the trunk, 2.
    more = modules + experts * ((1 - 0.75**3) - 0.25) + 4 * 128 * 2
    assert deep.weights == pytest.approx(plain.weights + more)
    assert deep.kv == plain.kv * 10 // 8  # ten layers now, all inside the window


def test_prefill_compares_with_a_matrix_product(capsys: pytest.CaptureFixture[str]) -> None:
    report = bench(capsys, "prefill", str(MICRO), "--context", "20,64", "--runs", "1", "--kv-dtype", "int8")
    assert report["kv_dtype"] == "int8"
    assert [row["context"] for row in report["results"]] == [20, 64]
    for row in report["results"]:
        flops = row["fraction_of_gemm"] * report["gemm_flops_per_second"]
        assert flops == pytest.approx(row["flops_per_second"])
        assert row["fraction_of_ceiling"] == pytest.approx(
            row["bytes_per_token"] * row["tokens_per_second"] / report["bandwidth"], rel=1e-3
        )


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's peak that can be reset")
def test_memory_that_is_not_to_count_is_forgotten() -> None:
    memory = PeakMemory()
    memory.forget()  # the tests before this one
    before = memory.note()
    waste = np.ones(1 << 28, dtype=np.uint8)
    del waste
    memory.forget()
    assert memory.note() < before + (1 << 27)
    held = np.ones(1 << 28, dtype=np.uint8)
    assert memory.note() > before + (1 << 27)
    del held


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("decode", "--runs", "0"), "--runs must be at least 1"),
        (("decode", "--tokens", "1"), "--tokens must be at least 2"),
        (("mtp", "--tokens", "1"), "--tokens must be at least 2"),
        (("decode", "--base-url", "http://127.0.0.1:9/v1"), "--base-url says nothing about decode"),
        (("mtp", "--context", "16"), "--context says nothing about mtp"),
        (("serve", "--kv-dtype", "int8"), "--kv-dtype says nothing about serve"),
        (("decode", "--context", "0"), "--context must be at least 1"),
        (("decode", "--context", "1k"), "'1k' is not a number, or several like 1024,32768"),
        (("decode", str(MICRO), "--kv-dtype", "fp8"), "kv_dtype is 'fp8'"),
        (("decode", str(MICRO), "--format", "int5"), "unknown weight format 'int5'"),
        (("serve", "--rate", "-1"), "rate must be above 0"),
        (("serve", "--base-url", "http://127.0.0.1:9/v1"), "no list of models there"),
    ],
)
def test_wrong_use_is_one_line(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


# Load on a server


def server(delay: float, broken: int | None = None) -> httpx.MockTransport:
    """Two tokens `delay` seconds apart after as long a wait; request number `broken` is refused."""
    seen = 0

    async def stream():
        yield b'data: {"choices": [{"delta": {"role": "assistant"}}]}\n\n'
        for text in ("a", "b"):
            await asyncio.sleep(delay)
            yield f'data: {{"choices": [{{"delta": {{"content": "{text}"}}}}]}}\n\n'.encode()
        yield b'data: {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 2}}\n\ndata: [DONE]\n\n'

    async def handle(request: httpx.Request) -> httpx.Response:
        nonlocal seen
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "m"}]})
        body = json.loads(request.content)
        assert body["model"] == "m"
        assert body["stream"]
        assert len(body["messages"][0]["content"].split()) == 5
        seen += 1
        if seen - 1 == broken:
            return httpx.Response(503, text="full")
        return httpx.Response(200, content=stream())

    return httpx.MockTransport(handle)


def test_times_are_those_of_the_server() -> None:
    load = Load(rate=200, num_requests=6, input_words=5, max_tokens=4)
    report = asyncio.run(run_load("http://test/v1", load, transport=server(0.05, broken=2)))
    assert (report.num_requests, report.num_failed) == (6, 1)
    assert report.errors == ("HTTP 503: full",)
    # The role comes at once and is not a token: the first is after one wait, the answer after two.
    assert 0.05 <= report.time_to_first_token["p50"] < 0.09
    assert 0.05 <= report.time_per_token["p50"] < 0.09
    assert 0.1 <= report.latency["p50"] < 0.18
    assert report.output_rate * report.seconds == pytest.approx(5 * 2)
    assert report.prompt_rate * report.seconds == pytest.approx(5 * 7)


def test_arrivals_are_a_poisson_process() -> None:
    """Gaps of a rate of 500 a second: mean 2 ms, and the deviation of an exponential is its mean."""
    starts: list[float] = []

    async def handle(request: httpx.Request) -> httpx.Response:
        if request.url.path.endswith("models"):
            return httpx.Response(200, json={"data": [{"id": "m"}]})
        starts.append(time.perf_counter())
        return httpx.Response(200, text='data: {"choices": [{"delta": {"content": "x"}}]}\n\n')

    load = Load(rate=500, num_requests=200, input_words=1, max_tokens=1)
    report = asyncio.run(run_load("http://test/v1", load, transport=httpx.MockTransport(handle)))
    assert report.num_failed == 0
    # The schedule can only be late: 199 gaps of 2 ms take 0.4 s, give or take 3 deviations of 0.028 s.
    assert starts[-1] - starts[0] > 0.4 - 3 * 0.028


def test_no_server_is_an_error() -> None:
    transport = httpx.MockTransport(lambda request: httpx.Response(401, text="key"))
    with pytest.raises(StepflashError, match="--api-key"):
        asyncio.run(
            run_load(
                "http://test/v1",
                Load(rate=1, num_requests=1, input_words=1, max_tokens=1),
                transport=transport,
            )
        )


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50))
def test_percentiles_are_numpys(values: list[float]) -> None:
    expected = np.percentile(values, (50, 90, 99))
    assert list(percentiles(values).values()) == pytest.approx(list(expected))


def test_an_answer_of_one_token_has_no_time_per_token() -> None:
    one = Answer(start_seconds=0, end_seconds=2, first_token_seconds=1, num_tokens=1)
    three = Answer(start_seconds=1, end_seconds=5, first_token_seconds=2, num_tokens=3)
    report = summarize([one, three])
    assert report.time_per_token == {"p50": 1.0, "p90": 1.0, "p99": 1.0}
    assert report.seconds == 5
    assert report.output_rate == pytest.approx(4 / 5)


def test_load_is_checked() -> None:
    with pytest.raises(ConfigError, match="num_requests must be above 0"):
        Load(rate=1, num_requests=0, input_words=1, max_tokens=1)
