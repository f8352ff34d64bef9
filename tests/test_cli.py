"""The command line as users meet it: help, one-line errors, and each command on the micro checkpoint."""

import io
import json
import math
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

import stepflash
from stepflash.cli import main

ROOT = Path(__file__).parents[1]
MICRO = Path(__file__).parent / "fixtures" / "micro"
HELP = Path(__file__).parent / "fixtures" / "help"
REAL_CONFIG = Path(__file__).parent / "fixtures" / "step-3.5-flash-config.json"
COMMANDS = (
    "",
    "generate",
    "chat",
    "serve",
    "inspect",
    "convert",
    "plan",
    "cost",
    "doctor",
    "bench",
    "quantize",
)


@pytest.fixture
def micro(tmp_path: Path) -> Path:
    """A copy of the micro checkpoint that a test may damage."""
    return Path(shutil.copytree(MICRO, tmp_path / "micro"))


@pytest.fixture(autouse=True)
def _plain_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.delenv("STEPFLASH_DEBUG", raising=False)


def run(*arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    status = main(arguments)
    output = capsys.readouterr()
    return status, output.out, output.err


# Help and version


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_the_stored_text(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Golden; rewrite with `STEPFLASH_WRITE_HELP=1 pytest tests/test_cli.py` and read the difference."""
    with pytest.raises(SystemExit) as caught:
        main([*([command] if command else []), "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    file = HELP / f"{command or 'stepflash'}.txt"
    if os.environ.get("STEPFLASH_WRITE_HELP"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(text, encoding="utf-8")
    assert text == file.read_text(encoding="utf-8")


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from stepflash.cli import build_parser; build_parser();"
        "heavy = {'torch', 'numpy', 'rich', 'fastapi', 'pydantic', 'tokenizers', 'asyncio'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout == "[]\n"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"stepflash {stepflash.__version__}\n"


def test_public_names_are_there_and_lazy() -> None:
    code = "import stepflash, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
    for name in stepflash.__all__:
        assert getattr(stepflash, name) is not None
        assert name in dir(stepflash)
    with pytest.raises(AttributeError, match="no attribute 'Llm'"):
        _ = stepflash.Llm


# Errors: one line, status 2, no traceback


def damaged(change: Callable[[Path], None]) -> Callable[[Path], str]:
    def prepare(folder: Path) -> str:
        change(folder)
        return str(folder)

    return prepare


def _edit_config(**values: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    return change


def _truncate(folder: Path) -> None:
    shard = folder / "model-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1000])


def _reshape(folder: Path) -> None:
    shard = folder / "model-00001.safetensors"
    tensors = load_file(shard)
    tensors["model.norm.weight"] = torch.zeros(3)
    save_file(tensors, shard)


def _drop(folder: Path) -> None:
    shard = folder / "model-00001.safetensors"
    tensors = load_file(shard)
    del tensors["model.norm.weight"]
    save_file(tensors, shard)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(content))


def _write_gguf(folder: Path) -> str:
    (folder / "model.gguf").write_bytes(b"GGUF" + bytes(2))
    return str(folder / "model.gguf")


BAD_MODELS: dict[str, tuple[Callable[[Path], str], str]] = {
    "truncated shard": (damaged(_truncate), "model-00001.safetensors"),
    "absent shard": (damaged(lambda f: (f / "model-00001.safetensors").unlink()), "model-00001.safetensors"),
    "wrong shape": (damaged(_reshape), "model.norm.weight"),
    "missing tensor": (damaged(_drop), "model.norm.weight"),
    "unknown model_type": (damaged(_edit_config(model_type="llama")), "model_type"),
    "impossible config": (damaged(_edit_config(num_attention_heads=0)), "num_attention_heads"),
    "config is no JSON": (damaged(lambda f: (f / "config.json").write_text("{")), "config.json"),
    "no config": (damaged(lambda f: (f / "config.json").unlink()), "config.json"),
    "no tokenizer": (damaged(lambda f: (f / "tokenizer.json").unlink()), "tokenizer.json"),
    "damaged tokenizer": (damaged(lambda f: (f / "tokenizer.json").write_text("{}")), "tokenizer.json"),
    "wrong vocabulary": (damaged(_edit_config(vocab_size=256)), "vocab"),
    "damaged gguf": (_write_gguf, "model.gguf"),
    "nothing of that name": (lambda f: "no such thing", "neither a folder"),
    "no such folder": (lambda f: str(f / "absent"), "absent"),
}


@pytest.mark.parametrize("case", BAD_MODELS)
def test_a_bad_model_is_one_line(case: str, micro: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare, mentioned = BAD_MODELS[case]
    status, out, err = run("generate", prepare(micro), "--prompt", "x", capsys=capsys)
    assert (status, out) == (2, "")
    assert err.startswith("stepflash: error: ")
    assert err.count("\n") == 1
    assert mentioned in err


BAD_USAGE: list[tuple[list[str], str]] = [
    ([], "a command is needed"),
    (["genrate"], "did you mean 'generate'?"),
    (["dance"], "there are generate"),
    (["generate", "--max-tokens", "many"], "--max-tokens"),
    (["generate", "--nonsense"], "--nonsense"),
    (["generate", str(MICRO), "--prompt", "x", "--temperature", "-1"], "temperature"),
    (["generate", str(MICRO), "--prompt", "x", "--draft-depth", "9"], "draft_depth"),
    (["generate", str(MICRO), "--prompt", "x", "--max-tokens", "0"], "max_tokens"),
    (["generate", str(MICRO), "--prompt", "x", "--dtype", "int3"], "dtype"),
    (["generate", str(MICRO), "--prompt", "x", "--kv-cache-gb", "-1"], "kv_cache_gb"),
    (["generate", str(MICRO), "--prompt", "x", "--raw", "--system", "s"], "--raw"),
    (["generate", str(MICRO), "--prompt", "word " * 5000], "prompt is too long"),
    (["serve", str(MICRO), "--port", "99999"], "port"),
    (["serve", str(MICRO), "--api-key", ""], "api_key"),
    (["serve", str(MICRO), "--max-body-mb", "nan"], "--max-body-mb"),
    (["serve", str(MICRO), "--host", "no.such.host.invalid"], "cannot listen"),
]


@pytest.mark.parametrize(("arguments", "mentioned"), BAD_USAGE, ids=lambda value: str(value)[:40])
def test_wrong_usage_is_one_line(
    arguments: list[str], mentioned: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = run(*arguments, capsys=capsys)
    assert (status, out) == (2, "")
    assert err.startswith("stepflash: error: ")
    assert err.count("\n") == 1
    assert mentioned in err


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run("generate", "no such thing", "--prompt", "x", "--debug", capsys=capsys)
    assert status == 2
    assert "Traceback" in err


def test_a_port_in_use_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        status, _, err = run("serve", str(MICRO), "--port", port, capsys=capsys)
    assert status == 2
    assert err == (
        f"stepflash: error: cannot listen on 127.0.0.1 port {port}: Address already in use; "
        "choose another --port or --host\n"
    )


def test_a_bug_is_one_line_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(*_: object, **__: object) -> int:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr("stepflash.terminal.inspect.run_inspect", broken)
    status, _, err = run("inspect", str(MICRO), capsys=capsys)
    assert (status, err) == (
        1,
        "stepflash: internal error: ZeroDivisionError: oops (--debug shows the traceback)\n",
    )


# generate


def test_generate_greedy_is_the_same_at_every_draft_depth(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--prompt", "hello", "--max-tokens", "24", "--temperature", "0", "--json"]
    answers = []
    for depth in ("0", "3"):
        status, out, err = run("generate", str(MICRO), *options, "--draft-depth", depth, capsys=capsys)
        assert (status, err) == (0, "")
        answers.append(json.loads(out))
    plain, drafted = answers
    assert plain["token_ids"] == drafted["token_ids"]
    assert len(plain["token_ids"]) == plain["usage"]["completion_tokens"] == 24
    assert plain["finish_reason"] == "length"
    assert plain["usage"]["drafted_tokens"] == 0 < drafted["usage"]["drafted_tokens"]


def test_generate_text_is_the_text_of_the_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--raw", "--prompt", "hello", "--max-tokens", "16", "--seed", "3"]
    _, text, _ = run("generate", str(MICRO), *options, capsys=capsys)
    _, out, _ = run("generate", str(MICRO), *options, "--json", capsys=capsys)
    result = json.loads(out)
    control = {code: "\ufffd" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}
    assert text.removesuffix("\n") == result["text"].translate(control).removesuffix("\n")
    assert result["prompt_token_ids"][0] == 0


def test_generate_reads_standard_input(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("from a pipe"))
    _, out, _ = run("generate", str(MICRO), "--max-tokens", "4", "--json", capsys=capsys)
    assert json.loads(out)["prompt"] == "from a pipe"


# inspect


def test_inspect_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run("inspect", str(MICRO), "--verify", "--json", capsys=capsys)
    report = json.loads(out)
    assert status == 0
    # Independent of the code that counts: the shapes in the file.
    stored = load_file(MICRO / "model-00001.safetensors")
    assert report["tensors"]["missing"] == report["tensors"]["unexpected"] == []
    assert report["parameters"]["total"] == sum(tensor.numel() for tensor in stored.values())
    assert report["tokenizer"]["eos_token_ids"] == [1, 2]
    assert [layer["window"] for layer in report["layers"]][:5] == [None, 16, 16, 16, None]
    assert report["verified"]["passed"]
    # Random weights: no better than chance, which is ln(1 / 512).
    predictions = report["verified"]["predictions"]
    assert predictions["uniform_logprob"] == pytest.approx(math.log(1 / 512))
    assert not predictions["passed"]


def test_inspect_the_released_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run("inspect", str(REAL_CONFIG), capsys=capsys)
    assert status == 0
    for fact in ("196,956,130,368", "809,390,336", "48 KiB a token", "66 MiB a sequence"):
        assert fact in out


def test_inspect_lists_what_is_wrong(micro: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _drop(micro)
    (micro / "tokenizer.json").unlink()
    status, out, _ = run("inspect", str(micro), capsys=capsys)
    assert status == 1
    assert "1 missing" in out
    assert "model.norm.weight" in out
    assert "tokenizer.json is missing" in out


# chat; in a terminal: tests/terminal/test_chat.py


def test_chat_in_a_pipe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\nagain\n/quit\nnever read\n"))
    status, out, err = run("chat", str(MICRO), "--max-tokens", "5", capsys=capsys)
    assert status == 0
    assert out.strip()
    assert "\033" not in out
    # One answer per line, each cut at its five tokens.
    assert err.count("the answer was cut") == 2


# serve; signals and disconnects: tests/server/test_run.py


def test_serve_answers_over_http() -> None:
    command = [sys.executable, "-m", "stepflash", "serve", str(MICRO), "--port", "0"]
    command += ["--served-model-name", "micro-test", "--api-key", "one", "--api-key", "two"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        line = process.stderr.readline()
        assert line.startswith("stepflash: serving micro-test at http://127.0.0.1:"), line
        _check_server(line.split()[-1])
    finally:
        process.terminate()
        status = process.wait(timeout=60)
        rest = process.stderr.read()
        process.stderr.close()
    assert status == 0
    # Nothing but log lines, and no prompt in them.
    told = [json.loads(line) for line in rest.splitlines()]
    assert [(entry["route"], entry["status"]) for entry in told][:3] == [
        ("/v1/models", 401),
        ("/v1/models", 200),
        ("/v1/chat/completions", 200),
    ]
    assert "hello" not in rest


def _check_server(url: str) -> None:
    assert httpx.get(f"{url}/v1/models", timeout=60).status_code == 401
    assert httpx.get(f"{url}/health", timeout=60).json()["status"] == "ok"
    with httpx.Client(base_url=url, headers={"authorization": "Bearer two"}, timeout=60) as client:
        assert client.get("/v1/models").json()["data"][0]["id"] == "micro-test"
        body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 8, "temperature": 0}
        whole = client.post("/v1/chat/completions", json=body).json()
        assert whole["usage"]["completion_tokens"] == 8
        with client.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as response:
            lines = [line for line in response.iter_lines() if line]
        assert lines[-1] == "data: [DONE]"
        deltas = [json.loads(line[6:])["choices"][0]["delta"] for line in lines[:-1]]
        streamed = "".join(delta.get("content", "") for delta in deltas)
        assert streamed == whole["choices"][0]["message"]["content"]
        assert "stepflash_engine_num_steps" in client.get("/metrics").text
