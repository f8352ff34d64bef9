"""The exact configuration of a coding agent for a server of ours, as `stepflash clients NAME` prints it.

Model name and context come from the running server, or from the options if both are given. What each client needs
is a function from a `Target` to text; what stands there was measured on the clients themselves, and
`stepflash.tools.client_check` runs them with just that.
"""

from __future__ import annotations

import json
import os
import shlex
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from stepflash.errors import ConfigError

TIMEOUT_SECONDS = 5.0
OUTPUT_TOKENS = 32_000
NO_KEY = "none"  # clients insist on a key; a server without keys takes any


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The server to connect to; `base_url` has no path."""

    base_url: str
    model: str
    context_tokens: int
    api_key: str = NO_KEY

    @property
    def output_tokens(self) -> int:
        return min(OUTPUT_TOKENS, self.context_tokens // 4)


def claude_code(target: Target) -> str:
    """Environment variables. Every tier of model is the served one: sub-agents and titles ask for others."""
    variables = {
        "ANTHROPIC_BASE_URL": target.base_url,
        "ANTHROPIC_AUTH_TOKEN": target.api_key,
        "ANTHROPIC_MODEL": target.model,
        "ANTHROPIC_DEFAULT_OPUS_MODEL": target.model,
        "ANTHROPIC_DEFAULT_SONNET_MODEL": target.model,
        "ANTHROPIC_DEFAULT_HAIKU_MODEL": target.model,
        "CLAUDE_CODE_SUBAGENT_MODEL": target.model,
        # Without it an unknown model counts as one of a million tokens, and nothing is ever compacted.
        "CLAUDE_CODE_MAX_CONTEXT_TOKENS": str(target.context_tokens),
        "CLAUDE_CODE_MAX_OUTPUT_TOKENS": str(target.output_tokens),
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    }
    lines = [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]
    return "\n".join(["# in the shell that starts Claude Code", *lines, "claude"])


def codex(target: Target) -> str:
    """A provider in config.toml; only the Responses API is known to recent versions."""
    compact_at = target.context_tokens * 85 // 100
    return f"""# ~/.codex/config.toml, top level first
model = {json.dumps(target.model)}
model_provider = "stepflash"
model_context_window = {target.context_tokens}
model_auto_compact_token_limit = {compact_at}

[model_providers.stepflash]
name = "stepflash"
base_url = {json.dumps(target.base_url + "/v1")}
wire_api = "responses"
env_key = "STEPFLASH_API_KEY"

# and in the shell that starts Codex
# export STEPFLASH_API_KEY={shlex.quote(target.api_key)}"""


def opencode(target: Target) -> str:
    """A provider of the OpenAI-compatible kind in opencode.json."""
    limit = {"context": target.context_tokens, "output": target.output_tokens}
    provider = {
        "npm": "@ai-sdk/openai-compatible",
        "name": "stepflash",
        "options": {"baseURL": f"{target.base_url}/v1", "apiKey": target.api_key},
        "models": {target.model: {"name": target.model, "limit": limit}},
    }
    config = {
        "$schema": "https://opencode.ai/config.json",
        "model": f"stepflash/{target.model}",
        "provider": {"stepflash": provider},
    }
    return "// opencode.json in the project, or ~/.config/opencode/opencode.json\n" + json.dumps(
        config, indent=2
    )


def claude_code_router(target: Target) -> str:
    """A provider in the router's config.json."""
    provider = {
        "name": "stepflash",
        "api_base_url": f"{target.base_url}/v1/chat/completions",
        "api_key": target.api_key,
        "models": [target.model],
        # Usage must be asked for, or Claude Code never knows how full its context is; and without "reasoning" the
        # router keeps the thoughts to itself, so that every answer is read anew in the next turn.
        "transformer": {"use": ["streamoptions", "reasoning"]},
    }
    config = {"Providers": [provider], "Router": {"default": f"stepflash,{target.model}"}}
    variables = f"CLAUDE_CODE_MAX_CONTEXT_TOKENS={target.context_tokens}"
    return f"// ~/.claude-code-router/config.json; then: {variables} ccr code\n" + json.dumps(
        config, indent=2
    )


CLIENTS: Mapping[str, Callable[[Target], str]] = {
    "claude-code": claude_code,
    "codex": codex,
    "opencode": opencode,
    "ccr": claude_code_router,
}


def find_target(base_url: str, api_key: str, model: str | None, context_tokens: int | None) -> Target:
    """The server's address, its model and its context, asked from it where not given.

    Raises:
        ConfigError: the address is none, or the server does not answer as ours does.
    """
    parts = urlsplit(base_url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ConfigError(f"--base-url must be like http://HOST:PORT, got {base_url!r}")
    if context_tokens is not None and context_tokens < 1:
        raise ConfigError(f"--context must be at least 1, got {context_tokens}")
    base_url = base_url.rstrip("/").removesuffix("/v1")
    if model is None or context_tokens is None:
        served, served_context = _ask(base_url, api_key)
        model, context_tokens = model or served, context_tokens or served_context
    return Target(base_url=base_url, model=model, context_tokens=context_tokens, api_key=api_key)


def _ask(base_url: str, api_key: str) -> tuple[str, int]:
    request = urllib.request.Request(f"{base_url}/v1/models", headers={"authorization": f"Bearer {api_key}"})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as reply:
            (first, *_) = json.load(reply)["data"]
            return str(first["id"]), int(first["max_model_len"])
    except urllib.error.HTTPError as error:
        with error:
            hint = "; give its key with --api-key" if error.code == 401 else ""
        raise ConfigError(f"{base_url} answered with status {error.code}{hint}") from None
    except OSError as error:
        reason = getattr(error, "reason", error)
        shown = os.strerror(reason.errno) if isinstance(reason, OSError) and reason.errno else reason
        raise ConfigError(
            f"no server at {base_url} ({shown}); start one with stepflash serve, or give --model and --context"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise ConfigError(
            f"{base_url} is not a stepflash server; give --model and --context to go on"
        ) from None
