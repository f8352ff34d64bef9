"""The check of client programs, with small programs in the place of the clients: what it says when they fail."""

import stat
import sys
from pathlib import Path

import pytest

from stepflash.cli import main
from stepflash.tools.client_check import ClientFailed, check
from stepflash.tools.connect import Target

TARGET = Target(base_url="http://127.0.0.1:9", model="m", context_tokens=1000)
GOOD = """
import json, os, pathlib, re
assert set(os.environ) >= {"ANTHROPIC_BASE_URL", "HOME"} and "SECRET" not in os.environ
assert pathlib.Path.home().parent == pathlib.Path.cwd().parent
number = int(re.search("[0-9]+", pathlib.Path("in.txt").read_text())[0])
pathlib.Path("out.txt").write_text(str(number + 1))
print("a warning")
print(json.dumps({"result": f"I wrote {number + 1}."}))
"""


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "node_modules" / ".bin"
    folder.mkdir(parents=True)
    monkeypatch.setenv("STEPFLASH_CLIENTS", str(tmp_path))
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("SECRET", "of the user")
    return folder


def install(folder: Path, text: str) -> None:
    file = folder / "claude"
    version = "import sys\nif sys.argv[1:] == ['--version']: sys.exit(print('7.8.9 (stand-in)'))\n"
    file.write_text(f"#!{sys.executable}\n{version}{text}")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)


def test_a_client_that_does_the_task(programs: Path) -> None:
    install(programs, GOOD)
    checked = check("claude-code", TARGET)
    assert checked.version == "claude 7.8.9"
    assert checked.answer.startswith("I wrote ")
    assert checked.requests is None  # nothing answers at the address


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("print('hello')", "out.txt should hold"),
        ("import sys\nsys.exit('no network')", "ended with status 1:\nno network"),
        ("open('out.txt', 'w').write('12')", "holds '12'"),
        (GOOD.replace("json.dumps", "repr"), "no answer is in what it printed"),
    ],
)
def test_a_client_that_fails_is_told_with_its_own_words(programs: Path, text: str, message: str) -> None:
    install(programs, text)
    with pytest.raises(ClientFailed) as caught:
        check("claude-code", TARGET)
    assert message in str(caught.value)


def test_a_client_that_is_not_there(programs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["clients", "opencode", "--test"]) == 2
    assert "npm install opencode-ai" in capsys.readouterr().err


def test_a_server_that_is_not_there(programs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    install(programs, GOOD)
    assert main(["clients", "claude-code", "--test", "--base-url", "http://127.0.0.1:9"]) == 2
    assert "no server at http://127.0.0.1:9" in capsys.readouterr().err
