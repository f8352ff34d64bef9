"""Real agent programs against a server process: they must do a task with files, in their own way, and be served well.

The model is scripted (`stepflash.assistant.scripted_agent`): nano is too small for prompts of 8,000 to 25,000 tokens
of instructions. All else is real. `make test-clients` installs the programs; the configuration of each is what
`stepflash clients` prints.
"""

from collections.abc import Iterator

import pytest

from stepflash.cli import main
from stepflash.tools.client_check import PROGRAMS, Checked, check, find_program, scripted_server
from stepflash.tools.connect import Target

pytestmark = [pytest.mark.client, pytest.mark.slow]
CONTEXT_TOKENS = 400_000


@pytest.fixture(scope="module")
def base_url() -> Iterator[str]:
    with scripted_server() as url:
        yield url


def checked(client: str, base_url: str) -> Checked:
    if find_program(client) is None:
        pytest.skip(f"{PROGRAMS[client].program} is not installed: make test-clients")
    return check(client, Target(base_url=base_url, model="scripted", context_tokens=CONTEXT_TOKENS))


@pytest.mark.parametrize("client", PROGRAMS)
def test_a_client_does_a_task_with_files(client: str, base_url: str) -> None:
    result = checked(client, base_url)
    assert result.answer.startswith("I wrote ")
    assert result.requests is not None
    # Titles and the like come first; then a read, a write and an answer.
    first, *later = result.requests[-3:]
    assert first["prompt_tokens"] > 20_000
    assert len(later) == 2
    for before, request in zip(result.requests[-3:], later, strict=False):
        nearest = request["nearest"]
        # The prompt begins with the one before and its answer, to the letter: nothing would be computed twice.
        assert nearest["request_id"] == before["request_id"]
        assert nearest["shared_tokens"] == nearest["tokens"], nearest
        assert nearest["tokens"] > before["prompt_tokens"]


@pytest.mark.skipif(find_program("codex") is None, reason="Codex is not installed: make test-clients")
def test_the_command_starts_a_server_of_its_own(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["clients", "codex", "--test"]) == 0
    output = capfd.readouterr().out
    assert "a server with a scripted model is started" in output
    assert "I wrote " in output
    assert "request 3: " in output
