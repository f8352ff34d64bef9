"""`stepflash clients NAME --test`: the real client program, headless, reads a file and writes another.

The program is configured with exactly what `stepflash clients NAME` prints, in a home and a work folder of its own,
so that nothing of the user's is read or changed; traffic to other machines goes to a proxy that does not exist.
Without a server to test, one with a scripted model is started: then everything is real but the model.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepflash.assistant.scripted_agent import start_file, task
from stepflash.errors import ConfigError, StepflashError
from stepflash.tools.connect import (
    TIMEOUT_SECONDS,
    Target,
    claude_code,
    claude_code_router,
    codex,
    opencode,
)

CLIENTS_FOLDER = "STEPFLASH_CLIENTS"
DEFAULT_FOLDER = "~/.cache/stepflash/clients"
CHECK_SECONDS = 900
START_SECONDS = 120
SHOWN_LINES = 25
NO_SUCH_PROXY = "http://127.0.0.1:9"
LOOPBACK = "127.0.0.1,localhost"
AGENT_TOOLS = "Read,Write,Edit,Bash"


class ClientFailed(StepflashError):
    """The client did not do the task; the text says what it printed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientProgram:
    """How to run a client: the npm package that holds it, what to write into its home, the command for a task, and
    where in its output the answer is. `configure` returns environment variables."""

    program: str
    package: str
    configure: Callable[[Target, Path], dict[str, str]]
    command: Callable[[str], list[str]]
    answer: Callable[[str], str]
    afterwards: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """What a client did. The requests are as `/cache/explain` tells them, oldest first; None if nothing does."""

    version: str
    answer: str
    seconds: float
    requests: list[dict[str, Any]] | None


def _configure_claude_code(target: Target, home: Path) -> dict[str, str]:
    lines = (shlex.split(line) for line in claude_code(target).splitlines() if line.startswith("export "))
    return dict(words[1].split("=", 1) for words in lines)


def _configure_codex(target: Target, home: Path) -> dict[str, str]:
    _write(home / ".codex" / "config.toml", codex(target))
    return {"STEPFLASH_API_KEY": target.api_key}


def _configure_opencode(target: Target, home: Path) -> dict[str, str]:
    _write(home / ".config" / "opencode" / "opencode.json", _without_comment(opencode(target)))
    names = ("OPENCODE_DISABLE_AUTOUPDATE", "OPENCODE_DISABLE_MODELS_FETCH", "OPENCODE_DISABLE_LSP_DOWNLOAD")
    return dict.fromkeys(names, "1")


def _configure_router(target: Target, home: Path) -> dict[str, str]:
    config = json.loads(_without_comment(claude_code_router(target)))
    # A port of its own: the user's router may be running.
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        config |= {"HOST": "127.0.0.1", "PORT": free.getsockname()[1]}
    _write(home / ".claude-code-router" / "config.json", json.dumps(config))
    return {
        "CLAUDE_CODE_MAX_CONTEXT_TOKENS": str(target.context_tokens),
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    }


def _claude_arguments(text: str) -> list[str]:
    return ["-p", text, "--allowedTools", AGENT_TOOLS, "--output-format", "json"]


def _claude_answer(output: str) -> str:
    reply = json.loads(next(line for line in output.splitlines() if line.startswith("{")))
    return str(reply["result"])


def _codex_answer(output: str) -> str:
    items = [event.get("item", {}) for event in _json_lines(output)]
    return str([item["text"] for item in items if item.get("type") == "agent_message"][-1])


def _opencode_answer(output: str) -> str:
    return str([event["part"]["text"] for event in _json_lines(output) if event["type"] == "text"][-1])


PROGRAMS: Mapping[str, ClientProgram] = {
    "claude-code": ClientProgram(
        program="claude",
        package="@anthropic-ai/claude-code",
        configure=_configure_claude_code,
        command=_claude_arguments,
        answer=_claude_answer,
    ),
    "codex": ClientProgram(
        program="codex",
        package="@openai/codex",
        configure=_configure_codex,
        # The sandbox of its own needs kernel features that containers often lack.
        command=lambda text: [
            *("exec", "--json", "--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox"),
            text,
        ],
        answer=_codex_answer,
    ),
    "opencode": ClientProgram(
        program="opencode",
        package="opencode-ai",
        configure=_configure_opencode,
        command=lambda text: ["run", "--format", "json", text],
        answer=_opencode_answer,
    ),
    "ccr": ClientProgram(
        program="ccr",
        package="@musistudio/claude-code-router@2.0.0",
        configure=_configure_router,
        command=lambda text: ["code", *_claude_arguments(text)],
        answer=_claude_answer,
        afterwards=("stop",),
    ),
}


def find_program(client: str) -> str | None:
    """The path of a client's program: on the PATH, or where `make test-clients` installs it."""
    return shutil.which(PROGRAMS[client].program, path=_path())


def check(client: str, target: Target) -> Checked:
    """Run a client through the task.

    Raises:
        ClientFailed: it ended with an error, did not write the file, or took too long.
    """
    program, path = PROGRAMS[client], find_program(client)
    if path is None:
        raise ConfigError(f"{program.program} is not installed")
    before = {report["request_id"] for report in _explained(target) or ()}
    number = random.randrange(1000, 9000)
    with tempfile.TemporaryDirectory(prefix="stepflash-client-", ignore_cleanup_errors=True) as folder:
        home, work = Path(folder).resolve() / "home", Path(folder).resolve() / "work"
        home.mkdir()
        work.mkdir()
        (work / "in.txt").write_text(start_file(number))
        environment = _environment(home) | program.configure(target, home)
        started = time.monotonic()
        output = _run([path, *program.command(task(str(work)))], work, environment)
        seconds = time.monotonic() - started
        if program.afterwards:
            with contextlib.suppress(ClientFailed):
                _run([path, *program.afterwards], work, environment)
        written = _text_of(work / "out.txt")
        version = _version(path, work, environment)
    if written is None or written.strip() != str(number + 1):
        found = "was not written" if written is None else f"holds {written[:80]!r}"
        raise ClientFailed(
            f"{client}: out.txt should hold {number + 1} and {found}; it printed:\n{_tail(output)}"
        )
    try:
        answer = program.answer(output)
    except (ValueError, LookupError, TypeError, StopIteration) as error:
        raise ClientFailed(
            f"{client}: no answer is in what it printed ({error!r}):\n{_tail(output)}"
        ) from None
    reports = _explained(target)
    if reports is not None:
        reports = [report for report in reversed(reports) if report["request_id"] not in before]
    return Checked(version=f"{program.program} {version}", answer=answer, seconds=seconds, requests=reports)


@contextlib.contextmanager
def scripted_server() -> Iterator[str]:
    """The address of a server process with the scripted model.

    Raises:
        ConfigError: it did not start.
    """
    command = [sys.executable, "-m", "stepflash.server.scripted"]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + START_SECONDS
            while not (found := re.search(r" at (http://\S+)", _read_log(log))):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise ConfigError(f"the scripted server did not start:\n{_tail(_read_log(log))}")
                time.sleep(0.05)
            yield found[1]
        finally:
            process.terminate()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _explained(target: Target) -> list[dict[str, Any]] | None:
    """The latest requests of this machine, newest first."""
    headers = {"authorization": f"Bearer {target.api_key}"}
    request = urllib.request.Request(f"{target.base_url}/cache/explain?limit=100", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as reply:
            return list(json.load(reply)["requests"])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _environment(home: Path) -> dict[str, str]:
    """Nothing of the user's but the PATH."""
    proxies = dict.fromkeys(
        ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "ALL_PROXY"), NO_SUCH_PROXY
    )
    return {
        "PATH": _path(),
        "HOME": str(home),
        "TERM": "dumb",
        "LANG": "C.UTF-8",
        "NO_PROXY": LOOPBACK,
        "no_proxy": LOOPBACK,
        "DISABLE_TELEMETRY": "1",
        "DO_NOT_TRACK": "1",
        **proxies,
    }


def _path() -> str:
    folder = Path(os.environ.get(CLIENTS_FOLDER) or DEFAULT_FOLDER).expanduser()
    return os.pathsep.join([str(folder / "node_modules" / ".bin"), os.environ.get("PATH", os.defpath)])


def _run(command: list[str], folder: Path, environment: Mapping[str, str]) -> str:
    """Standard output of a program that ended well. It is ended with all that it started if it takes too long."""
    with subprocess.Popen(
        command,
        cwd=folder,
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    ) as process:
        try:
            output, errors = process.communicate(timeout=CHECK_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            output, errors = process.communicate()
            raise ClientFailed(
                f"{command[0]} took more than {CHECK_SECONDS} seconds:\n{_tail(output + errors)}"
            ) from None
        except BaseException:
            process.kill()
            raise
    if process.returncode != 0:
        raise ClientFailed(f"{command[0]} ended with status {process.returncode}:\n{_tail(output + errors)}")
    return output


def _version(path: str, folder: Path, environment: Mapping[str, str]) -> str:
    for word in ("--version", "version"):
        with contextlib.suppress(ClientFailed):
            if found := re.search(r"\d+\.\d+\.\d+\S*", _run([path, word], folder, environment)):
                return found[0]
    return "of unknown version"


def _json_lines(output: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")]


def _without_comment(text: str) -> str:
    return "\n".join(line for line in text.splitlines() if not line.startswith("//"))


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True)
    file.write_text(text, encoding="utf-8")


def _text_of(file: Path) -> str | None:
    return file.read_text(errors="replace") if file.is_file() else None


def _read_log(log: Any) -> str:
    log.seek(0)
    return str(log.read())


def _tail(text: str) -> str:
    return "\n".join(line[:300] for line in text.strip().splitlines()[-SHOWN_LINES:])
