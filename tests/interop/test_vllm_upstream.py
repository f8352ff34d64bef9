"""`stepflash serve --upstream` over a real vLLM on the processor, against our own engine on the same checkpoint.

The checkpoint is a random Step-3.5 without clamps, for which vLLM has no kernels on the CPU. Both compute in float32,
so that greedy tokens must be equal and log-probabilities nearly so.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.llama_cpp import ENV_DIR
from stepflash.weights import random_checkpoint
from stepflash.weights.random_checkpoint import SIZES, write_random_checkpoint

pytestmark = pytest.mark.client
PYTHON = Path(os.environ.get("STEPFLASH_VLLM_PYTHON", ENV_DIR / "vllm" / "bin" / "python"))
ROOT = Path(__file__).parents[2]
SERVER = Path(__file__).with_name("vllm_server.py")
QUESTION = [{"role": "user", "content": "Say something about numbers."}]
GREEDY = {"temperature": 0, "max_tokens": 24}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    size = replace(SIZES["tiny"], vocab=263)
    plain = random_checkpoint.config_json

    def without_clamps(size: Any) -> dict[str, Any]:
        raw = plain(size)
        return raw | {name: [0.0] * len(raw[name]) for name in ("swiglu_limits", "swiglu_limits_shared")}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(random_checkpoint, "config_json", without_clamps)
        write_random_checkpoint(path, size)
    tokenizer = path / "tokenizer_config.json"
    settings = json.loads(tokenizer.read_text())
    tokenizer.write_text(json.dumps(settings | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    return path


@contextlib.contextmanager
def serving(command: list[Any], log: Path, **environment: str) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with log.open("w") as output:
        process = subprocess.Popen(
            [*map(str, command), "--host", "127.0.0.1", "--port", str(port)],
            stdout=output, stderr=subprocess.STDOUT, cwd=log.parent, env={**os.environ, **environment},
        )  # fmt: skip
        try:
            for _ in range(240):
                with contextlib.suppress(httpx.HTTPError):
                    if httpx.get(f"{url}/health", timeout=5, trust_env=False).status_code == 200:
                        break
                assert process.poll() is None, log.read_text()[-3000:]
                time.sleep(1)
            else:
                pytest.fail(f"not ready: {log.read_text()[-3000:]}")
            yield url
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@pytest.fixture(scope="module")
def servers(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """Ours over vLLM, and ours alone."""
    if not PYTHON.is_file():
        pytest.skip("no vLLM; `python benchmarks/peers.py --prepare --peers vllm` installs it")
    logs = tmp_path_factory.mktemp("logs")
    vllm = [
        PYTHON, "-P", SERVER, "--model", folder, "--dtype", "float32",
        "--enforce-eager",
        "--max-model-len", "1024", "--max-num-seqs", "8", "--enable-prompt-tokens-details",
    ]  # fmt: skip
    ours = [sys.executable, "-m", "stepflash", "serve", folder, "--served-model-name", "tiny"]
    paths = {"PYTHONPATH": str(ROOT)}
    limits = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "0", "PYTHONPATH": ""}
    with (
        serving(vllm, logs / "vllm", **limits) as upstream,
        serving([*ours, "--upstream", upstream], logs / "over", **paths) as over,
        serving([*ours, "--dtype", "float32"], logs / "alone", **paths) as alone,
    ):
        yield over, alone


def post(url: str, path: str, **body: Any) -> dict[str, Any]:
    answer = httpx.post(f"{url}{path}", json=body, timeout=120, trust_env=False)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


BODIES = {
    "greedy": GREEDY,
    "penalties": GREEDY | {"presence_penalty": 0.5, "frequency_penalty": 0.5, "repetition_penalty": 1.2},
    "bias": GREEDY | {"logit_bias": {"72": 30, "73": -100}},
    "budget": GREEDY | {"max_tokens": 100, "thinking": {"type": "enabled", "budget_tokens": 8}},
    "no thought": GREEDY | {"reasoning_effort": "none"},
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_the_same_answer_as_our_own_engine(servers: tuple[str, str], body: dict[str, Any]) -> None:
    over, alone = (post(url, "/v1/chat/completions", messages=QUESTION, **body) for url in servers)
    assert over["choices"] == [dict(choice) for choice in alone["choices"]]
    ours, theirs = over["usage"], alone["usage"]
    for name in ("prompt_tokens", "completion_tokens"):
        assert ours[name] == theirs[name]


def test_logprobs(servers: tuple[str, str]) -> None:
    body = GREEDY | {"prompt": "One, two, three", "logprobs": 5}
    over, alone = (post(url, "/v1/completions", **body)["choices"][0] for url in servers)
    assert over["text"] == alone["text"]
    assert over["logprobs"]["tokens"] == alone["logprobs"]["tokens"]
    assert over["logprobs"]["token_logprobs"] == pytest.approx(alone["logprobs"]["token_logprobs"], abs=1e-3)
    for ours, theirs in zip(over["logprobs"]["top_logprobs"], alone["logprobs"]["top_logprobs"], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-3)


def test_a_seed_fixes_the_answer(servers: tuple[str, str]) -> None:
    body = {"messages": QUESTION, "max_tokens": 16, "temperature": 1.0}
    found = [
        post(servers[0], "/v1/chat/completions", seed=seed, **body)["choices"][0]["message"]
        for seed in (5, 5, 6)
    ]
    assert found[0] == found[1] != found[2]


def test_all_apis_and_the_cache(servers: tuple[str, str]) -> None:
    over, alone = servers
    for path, body in (
        (
            "/v1/messages",
            {"messages": QUESTION, "max_tokens": 16, "temperature": 0, "thinking": {"type": "adaptive"}},
        ),
        ("/v1/responses", {"input": QUESTION, "max_output_tokens": 16, "temperature": 0}),
    ):
        found = [json.loads(json.dumps(post(url, path, **body))) for url in (over, alone)]
        texts = [_texts(reply) for reply in found]
        assert texts[0] == texts[1]
        assert any(texts[0])
    long = [
        {"role": "user", "content": "Count to a hundred. " * 20}
    ]  # vLLM caches whole blocks of 128 tokens
    for _ in range(2):
        usage = post(over, "/v1/chat/completions", messages=long, **GREEDY)["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] > 0


def _texts(reply: Any) -> list[str]:
    if isinstance(reply, dict):
        return [
            text
            for key, value in reply.items()
            for text in ([value] if key in ("text", "thinking") and isinstance(value, str) else _texts(value))
        ]
    return [text for item in reply for text in _texts(item)] if isinstance(reply, list) else []


def test_health_and_metrics_show_the_upstream(servers: tuple[str, str]) -> None:
    assert httpx.get(f"{servers[0]}/health", trust_env=False, timeout=60).json()["status"] == "ok"
    for _ in range(20):
        text = httpx.get(f"{servers[0]}/metrics", trust_env=False).text
        if "stepflash_engine_upstream_running 0.0" in text:
            break
        time.sleep(0.2)
    assert "stepflash_engine_upstream_running 0.0" in text
    assert "stepflash_engine_is_reachable 1.0" in text


def test_a_client_that_leaves_ends_the_work_of_vllm(servers: tuple[str, str]) -> None:
    body = {"messages": QUESTION, "max_tokens": 800, "stream": True, "temperature": 0, "ignore_eos": True}
    with httpx.stream(
        "POST", f"{servers[0]}/v1/chat/completions", json=body, trust_env=False, timeout=60
    ) as reply:
        for number, _ in enumerate(reply.iter_lines()):
            if number == 10:
                break
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        text = httpx.get(f"{servers[0]}/metrics", trust_env=False).text
        if "stepflash_engine_num_running 0.0" in text and "stepflash_engine_upstream_running 0.0" in text:
            return
        time.sleep(0.5)
    pytest.fail(text)
