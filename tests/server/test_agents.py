"""Real coding agents against a server process: they must run the tool calls and finish, in their own way.

The model is scripted: it calls the shell once, then answers. The configuration is what `stepflash clients` prints.
Needs `claude` (npm @anthropic-ai/claude-code, node 22) or `codex` (npm @openai/codex) on the PATH; outside traffic
goes to a proxy that does not exist.
"""

import contextlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from stepflash.tools.connect import Target, claude_code, codex

pytestmark = [pytest.mark.client, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
NO_PROXY = "127.0.0.1"
SERVER = """
import json, sys
from stepflash.server.app import create_app
from stepflash.server.run import listen, run_server
from stepflash.settings import ServerSettings
from tests.scripted_engine import scripted_session
texts, prompts = json.loads(sys.argv[1]), sys.argv[2]
session = scripted_session(*texts, bursts=[5], max_context_tokens=400_000)
settings = ServerSettings(port=0)
with listen(settings) as listener:
    status = run_server(create_app(session, "scripted"), listener, settings, "scripted")
with open(prompts, "w") as file:
    json.dump([session.tokenizer.decode(r.prompt_token_ids) for r in session.engine.requests], file)
raise SystemExit(status)
"""
FINAL = "It is done.\n</think>\nThe file holds 42.<|im_end|>"


def script(tool: str, parameter: str) -> list[str]:
    """The model's two answers: a call of the shell, and the end."""
    command = f"<parameter={parameter}>\necho 42 > out.txt; cat out.txt\n</parameter>\n"
    call = f"<tool_call>\n<function={tool}>\n{command}</function>\n</tool_call>"
    return [f"I should write.\n</think>\nWriting.\n{call}<|im_end|>", FINAL]


@contextlib.contextmanager
def serving(texts: list[str], prompts: Path) -> Iterator[str]:
    """The address of a server process, which writes the prompts it got to a file at its end."""
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER, json.dumps(texts), str(prompts)],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    try:
        yield process.stderr.readline().split()[-1]
        process.terminate()
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def run_agent(arguments: list[str], folder: Path, environment: dict[str, str]) -> str:
    result = subprocess.run(
        arguments,
        cwd=folder,
        env={
            "PATH": os.environ["PATH"],
            "HOME": str(folder.parent / "home"),
            "HTTP_PROXY": "http://127.0.0.1:9",
            "HTTPS_PROXY": "http://127.0.0.1:9",
            "NO_PROXY": NO_PROXY,
            "DISABLE_TELEMETRY": "1",
            **environment,
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("home", "work"):
        (tmp_path / name).mkdir()
    return tmp_path / "work"


def check_task(folder: Path, prompts: Path, texts: list[str]) -> None:
    """The file is written, and the second prompt is the first with the answer and the tool's result behind it."""
    assert (folder / "out.txt").read_text() == "42\n"
    first, second = json.loads(prompts.read_text())
    assert second.startswith(first + texts[0])
    assert "42" in second[len(first + texts[0]) :]


@pytest.mark.skipif(shutil.which("claude") is None, reason="Claude Code is not installed")
def test_claude_code_runs_a_task(folder: Path, tmp_path: Path) -> None:
    texts = script("Bash", "command")
    with serving(texts, tmp_path / "prompts.json") as url:
        printed = claude_code(Target(base_url=url, model="scripted", context_tokens=262_144))
        exports = [shlex.split(line)[1] for line in printed.splitlines() if line.startswith("export")]
        environment = dict(export.split("=", 1) for export in exports)
        arguments = ["claude", "-p", "write 42 into out.txt", "--allowedTools", "Bash"]
        output = run_agent([*arguments, "--output-format", "json"], folder, environment)
    reply = json.loads(output[output.index("{") :])
    assert (reply["subtype"], reply["result"], reply["num_turns"]) == ("success", "The file holds 42.", 2)
    assert reply["modelUsage"]["scripted"]["contextWindow"] == 262_144
    check_task(folder, tmp_path / "prompts.json", texts)
    assert "x-anthropic-billing-header" not in (tmp_path / "prompts.json").read_text()


@pytest.mark.skipif(shutil.which("codex") is None, reason="Codex is not installed")
def test_codex_runs_a_task(folder: Path, tmp_path: Path) -> None:
    texts = script("exec_command", "cmd")
    with serving(texts, tmp_path / "prompts.json") as url:
        config = tmp_path / "home" / ".codex" / "config.toml"
        config.parent.mkdir()
        config.write_text(codex(Target(base_url=url, model="scripted", context_tokens=262_144)))
        arguments = ["codex", "exec", "--json", "--skip-git-repo-check"]
        arguments.append("--dangerously-bypass-approvals-and-sandbox")
        output = run_agent([*arguments, "write 42 into out.txt"], folder, {"STEPFLASH_API_KEY": "none"})
    events = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    texts_shown = [
        event["item"]["text"] for event in events if event.get("item", {}).get("type") == "agent_message"
    ]
    assert texts_shown[-1] == "The file holds 42."
    assert events[-1]["type"] == "turn.completed"
    assert events[-1]["usage"]["reasoning_output_tokens"] > 0
    check_task(folder, tmp_path / "prompts.json", texts)
