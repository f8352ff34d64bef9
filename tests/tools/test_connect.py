"""Client configurations: complete, in the client's own syntax, and asked from the server where not given."""

import http.server
import json
import shlex
import threading
import tomllib
from collections.abc import Iterator

import pytest

from stepflash.cli import main
from stepflash.tools.connect import CLIENTS

GIVEN = ("--model", "step's", "--context", "100000", "--base-url", "http://box:9000/v1/", "--api-key", "k 1")


@pytest.fixture
def base_url() -> Iterator[str]:
    """A server that has one model, for who has the key."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            is_allowed = self.headers["authorization"] == "Bearer right"
            body = json.dumps({"data": [{"id": "nano", "max_model_len": 8192}]}).encode()
            self.send_response(200 if is_allowed and self.path == "/v1/models" else 401)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def printed(client: str, *options: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["clients", client, *options]) == 0
    return capsys.readouterr().out


def test_claude_code_is_shell(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed("claude-code", *GIVEN, capsys=capsys).splitlines()
    exported = dict(shlex.split(line)[1].split("=", 1) for line in lines if line.startswith("export"))
    assert exported["ANTHROPIC_BASE_URL"] == "http://box:9000"
    assert exported["ANTHROPIC_AUTH_TOKEN"] == "k 1"
    assert {value for name, value in exported.items() if name.endswith("_MODEL")} == {"step's"}
    assert exported["CLAUDE_CODE_MAX_CONTEXT_TOKENS"] == "100000"
    assert exported["CLAUDE_CODE_MAX_OUTPUT_TOKENS"] == "25000"


def test_codex_is_toml(capsys: pytest.CaptureFixture[str]) -> None:
    config = tomllib.loads(printed("codex", *GIVEN, capsys=capsys))
    assert (config["model"], config["model_context_window"]) == ("step's", 100_000)
    provider = config["model_providers"][config["model_provider"]]
    assert (provider["base_url"], provider["wire_api"]) == ("http://box:9000/v1", "responses")


@pytest.mark.parametrize("client", ["opencode", "ccr"])
def test_the_others_are_json(client: str, capsys: pytest.CaptureFixture[str]) -> None:
    comment, _, text = printed(client, *GIVEN, capsys=capsys).partition("\n")
    assert comment.startswith("// ")
    config = json.loads(text)
    if client == "opencode":
        provider, _, model = config["model"].partition("/")
        options = config["provider"][provider]["options"]
        assert options == {"baseURL": "http://box:9000/v1", "apiKey": "k 1"}
        assert config["provider"][provider]["models"][model]["limit"]["context"] == 100_000
    else:
        (provider,) = config["Providers"]
        assert provider["api_base_url"] == "http://box:9000/v1/chat/completions"
        assert provider["transformer"] == {"use": ["streamoptions", "reasoning"]}
        assert "CLAUDE_CODE_MAX_CONTEXT_TOKENS=100000 ccr code" in comment
        assert config["Router"]["default"] == f"{provider['name']},{provider['models'][0]}"


@pytest.mark.parametrize("client", CLIENTS)
def test_model_and_context_are_asked_from_the_server(
    client: str, base_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["clients", client, "--base-url", base_url, "--api-key", "right"]) == 0
    output = capsys.readouterr()
    assert "nano" in output.out
    assert "nano has 8192" in output.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--base-url", "box:9000"), "--base-url must be like"),
        (("--base-url", "http://127.0.0.1:9"), "no server at http://127.0.0.1:9"),
        (("--model", "m", "--context", "0"), "--context must be at least 1"),
    ],
)
def test_errors(options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["clients", "codex", *options]) == 2
    assert message in capsys.readouterr().err


def test_a_wrong_key_is_named(base_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["clients", "codex", "--base-url", base_url, "--api-key", "wrong"]) == 2
    assert "--api-key" in capsys.readouterr().err
