"""Settings of the commands: defaults, checked values, and the environment variables that are read.

Frozen after construction. A value out of range is refused with the key, the value and what is allowed.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from stepflash.errors import ConfigError

DEFAULT_MODEL = "nano"
DTYPES = ("float32", "bfloat16", "float16")
KV_DTYPES = ("float32", "bfloat16", "float16", "int8")  # by torch's names
SCHEDULING_POLICIES = ("fcfs", "priority")
LOG_FORMATS = ("auto", "json", "text", "off")
# Where chat completions tell the thought: names of fields by the name of the choice.
REASONING_FIELDS = {
    "reasoning_content": ("reasoning_content",),
    "reasoning": ("reasoning",),
    "both": ("reasoning_content", "reasoning"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """How to run a model. None leaves the choice to the engine.

    `device` is cpu, cuda or cuda:N. `threads` compute on the CPU. `prefix_cache` is a file: what was cached when the
    engine ended is there again when it starts.
    """

    device: str = "cpu"
    threads: int | None = None
    dtype: str | None = None
    quantization: str | None = None
    max_num_seqs: int | None = None
    kv_cache_gb: float | None = None
    kv_dtype: str | None = None
    max_model_len: int | None = None
    prefix_cache: str | None = None

    def __post_init__(self) -> None:
        if self.threads is not None and not 1 <= self.threads <= 4096:
            raise ConfigError(f"threads must be between 1 and 4096, got {self.threads}")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.kv_dtype is not None and self.kv_dtype not in KV_DTYPES:
            raise ConfigError(f"kv_dtype must be one of {', '.join(KV_DTYPES)}, got {self.kv_dtype!r}")
        if self.max_model_len is not None and self.max_model_len < 2:
            raise ConfigError(f"max_model_len must be at least 2, got {self.max_model_len}")
        if self.max_num_seqs is not None and not 1 <= self.max_num_seqs <= 4096:
            raise ConfigError(f"max_num_seqs must be between 1 and 4096, got {self.max_num_seqs}")
        if self.kv_cache_gb is not None and not 0 < self.kv_cache_gb <= 65536:
            raise ConfigError(f"kv_cache_gb must be above 0 and at most 65536, got {self.kv_cache_gb:g}")

    @property
    def kv_cache_bytes(self) -> int | None:
        return None if self.kv_cache_gb is None else int(self.kv_cache_gb * 2**30)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """Where and for whom to serve, and how much.

    `api_keys` are "KEY" or "KEY NAME". `cors_origins`: web pages that may use the API. The limits per client (a key,
    or an address where there are no keys) are off if None; `max_open_answers` run and wait in all, then 429 or
    529 is the answer. `scheduling_policy` as in vLLM: "priority" lets requests say theirs. After `request_timeout`
    seconds a request ends with what there is; one may ask for less time. `is_canonical` takes known noise of clients
    out of prompts (see `stepflash.chat.canonical`); False renders them as they come. The limits of thoughts hold
    where a request says nothing of its own.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    max_body_bytes: int = 64 * 2**20
    body_seconds: float = 60.0
    send_seconds: float = 300.0
    max_output_tokens: int | None = None
    max_open_answers: int = 1024
    max_requests_per_client: int | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    scheduling_policy: str = "fcfs"
    request_timeout: float | None = None
    drain_seconds: int = 30
    log_format: str = "auto"
    log_prompts: bool = False
    otlp_endpoint: str | None = None
    is_canonical: bool = True
    reasoning_field: str = "reasoning_content"
    max_thinking_tokens: int | None = None
    max_task_thinking_tokens: int | None = None
    stops_thinking_loops: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port must be between 0 and 65535, got {self.port}")
        if any(not key.strip() for key in self.api_keys):
            raise ConfigError("api_key must not be empty; leave the option out to serve without keys")
        if any(key[:1].isspace() for key in self.api_keys):
            raise ConfigError("api_key must not begin with a space")
        if self.log_format not in LOG_FORMATS:
            raise ConfigError(f"log_format must be one of {', '.join(LOG_FORMATS)}, got {self.log_format!r}")
        if self.scheduling_policy not in SCHEDULING_POLICIES:
            known = " or ".join(SCHEDULING_POLICIES)
            raise ConfigError(f"scheduling_policy must be {known}, got {self.scheduling_policy!r}")
        if self.request_timeout is not None and not 0 < self.request_timeout < float("inf"):
            raise ConfigError(f"request_timeout must be above 0 seconds, got {self.request_timeout:g}")
        if self.reasoning_field not in REASONING_FIELDS:
            known = ", ".join(REASONING_FIELDS)
            raise ConfigError(f"reasoning_field must be one of {known}, got {self.reasoning_field!r}")
        if self.drain_seconds < 0:
            raise ConfigError(f"drain_seconds must be at least 0, got {self.drain_seconds}")
        for origin in self.cors_origins:
            if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/]+", origin):
                raise ConfigError(f"cors_origin must be as in 'https://chat.example', got {origin!r}")
        for name in ("max_thinking_tokens", "max_task_thinking_tokens"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ConfigError(f"{name} must be 0 (no thoughts) or more, got {value}")
        for name in _COUNTS:
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"{name} must be at least 1, got {value}")


_COUNTS = (
    "max_body_bytes",
    "body_seconds",
    "send_seconds",
    "max_output_tokens",
    "max_open_answers",
    "max_requests_per_client",
    "requests_per_minute",
    "tokens_per_minute",
)


def is_debug() -> bool:
    """Whether errors are shown with their traceback (`STEPFLASH_DEBUG=1`)."""
    return os.environ.get("STEPFLASH_DEBUG", "0") not in ("", "0")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A question that suggests the nearest known name, or nothing."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def allows_known_bad() -> bool:
    """STEPFLASH_ALLOW_KNOWN_BAD=1 or --allow-known-bad: a checkpoint known to be bad loads with a warning."""
    return os.environ.get("STEPFLASH_ALLOW_KNOWN_BAD", "0") not in ("", "0")


def trusted_signers_file() -> Path:
    """The public keys whose receipts are trusted: STEPFLASH_TRUSTED_SIGNERS, else in the user's configuration."""
    given = os.environ.get("STEPFLASH_TRUSTED_SIGNERS")
    config = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    return Path(given) if given else config / "stepflash" / "trusted-signers"
