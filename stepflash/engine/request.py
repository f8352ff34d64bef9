"""What goes into the engine and what comes out: token ids, never text.

`SamplingParams` and `Request` are validated when they are made, so that nothing wrong reaches the engine
thread. `Output` is news about a request; `RequestStats` says what it cost.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Literal

from stepflash.errors import RequestError

if TYPE_CHECKING:
    from stepflash.engine.constraints import Constraint

FinishReason = Literal["stop", "length", "abort", "error"]
MAX_DRAFT_DEPTH = 3
MAX_BIAS = 1e30


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to continue a prompt.

    `temperature` 0 is greedy. `top_k` 0 and `top_p` 1 and `min_p` 0 switch their filter off.
    `seed` fixes the output whatever else runs and however deep speculation goes; None draws one.
    `logprobs` asks for that many alternatives beside each chosen token (0: the chosen one alone; None: none);
    they are those of the model itself, before temperature, penalties, bias and filters.
    `prompt_logprobs` asks for the same of every token of the prompt but the first. None of it then comes from the
    prefix cache, and `max_tokens` may be 0.
    `draft_depth` None adapts the speculation depth, 0 switches speculation off; output is the same in law.
    `max_tokens` None means up to the end of the context.
    """

    max_tokens: int | None = 256
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    draft_depth: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_tokens", "top_k", "seed", "logprobs", "prompt_logprobs", "draft_depth"):
            self._convert(name, int, Integral, "a whole number")
        for name in (
            "temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty",
        ):  # fmt: skip
            self._convert(name, float, Real, "a number")
        stop: object = self.stop  # callers also pass one string or a list
        self._set("stop", _tuple((stop,) if isinstance(stop, str) else stop, str, "stop", "strings"))
        self._set("stop_token_ids", _tuple(self.stop_token_ids, Integral, "stop_token_ids", "token ids"), int)
        if not isinstance(self.logit_bias, Mapping):
            raise RequestError("logit_bias must map token ids to numbers", param="logit_bias")
        for token_id, value in self.logit_bias.items():
            is_pair = _is_a(token_id, Integral) and _is_a(value, Real)
            # As float32; minus infinity forbids a token.
            if not is_pair or token_id < 0 or not -math.inf <= value <= MAX_BIAS:
                raise RequestError(
                    f"logit_bias must map token ids to numbers of at most {MAX_BIAS:g}, "
                    f"got {token_id!r}: {value!r}",
                    param="logit_bias",
                )
        least = 1 if self.prompt_logprobs is None else 0
        checks: tuple[tuple[str, bool, str], ...] = (
            ("max_tokens", self.max_tokens is None or self.max_tokens >= least, f"at least {least}"),
            ("temperature", 0.0 <= self.temperature <= 100.0, "between 0 and 100"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("top_p", 0.0 < self.top_p <= 1.0, "above 0 and at most 1"),
            ("min_p", 0.0 <= self.min_p < 1.0, "at least 0 and below 1"),
            ("presence_penalty", -2.0 <= self.presence_penalty <= 2.0, "between -2 and 2"),
            ("frequency_penalty", -2.0 <= self.frequency_penalty <= 2.0, "between -2 and 2"),
            ("repetition_penalty", 1e-3 <= self.repetition_penalty <= 1e3, "between 0.001 and 1000"),
            ("logprobs", self.logprobs is None or 0 <= self.logprobs <= 20, "between 0 and 20"),
            (
                "prompt_logprobs",
                self.prompt_logprobs is None or 0 <= self.prompt_logprobs <= 20,
                "between 0 and 20",
            ),
            ("stop", all(self.stop), "non-empty strings"),
            (
                "draft_depth",
                self.draft_depth is None or 0 <= self.draft_depth <= MAX_DRAFT_DEPTH,
                f"between 0 and {MAX_DRAFT_DEPTH}",
            ),
        )
        for name, holds, allowed in checks:
            if not holds:
                raise RequestError(f"{name} must be {allowed}, got {getattr(self, name)!r}", param=name)

    def _convert(self, name: str, to: Callable[[Any], Any], kind: type, what: str) -> None:
        """Take other libraries' numbers as Python's, and nothing that is none."""
        value = getattr(self, name)
        if type(value) is to or (value is None and name in _OPTIONAL):
            return
        if not _is_a(value, kind):
            raise RequestError(f"{name} must be {what}, got {value!r}", param=name)
        object.__setattr__(self, name, to(value))

    def _set(self, name: str, values: tuple[Any, ...], to: Callable[[Any], Any] = str) -> None:
        object.__setattr__(self, name, tuple(to(value) for value in values))


_OPTIONAL = ("max_tokens", "seed", "logprobs", "prompt_logprobs", "draft_depth")


def _is_a(value: object, kind: type) -> bool:
    """Booleans are numbers in Python, and not here."""
    return isinstance(value, kind) and not isinstance(value, bool)


def _tuple(values: object, kind: type, name: str, what: str) -> tuple[Any, ...]:
    found = tuple(values) if isinstance(values, Iterable) else (None,)
    if not all(_is_a(value, kind) for value in found):
        raise RequestError(f"{name} must be {what}, got {values!r}", param=name)
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One prompt to continue. `cut_points` are prompt lengths at which a cache snapshot is worth keeping.

    A lower `priority` runs earlier. `constraint` is a `stepflash.engine.constraints.Constraint` or None; it
    belongs to this request alone, because it advances with it. After `deadline_seconds` from submission the
    request ends with finish reason "abort" and stop reason "deadline".
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    cut_points: tuple[int, ...] = ()
    priority: int = 0
    deadline_seconds: float | None = None
    constraint: Constraint | None = None

    def __post_init__(self) -> None:
        for name, kind, what in (
            ("priority", Integral, "a whole number"),
            ("deadline_seconds", Real, "a number"),
        ):
            value = getattr(self, name)
            if not (_is_a(value, kind) and value == value) and not (
                value is None and name == "deadline_seconds"
            ):
                raise RequestError(f"{name} must be {what}, got {value!r}", param=name)


@dataclass(slots=True, kw_only=True)
class RequestStats:
    """What a request cost. `num_accepted_tokens[k]` counts accepted drafts of MTP module k+1.

    `num_prefill_tokens` counts prompt tokens that were really computed, again after a preemption;
    `num_forced_tokens` counts drafts that a constraint dictated. `cache_miss` says in words why no more of the
    prompt came from the prefix cache. `prefill_seconds` end when the first token leaves the engine, with the prompt
    read by the prediction modules, too; `decode_seconds` are those from then to the last token.
    """

    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_prefill_tokens: int = 0
    num_generated_tokens: int = 0
    num_steps: int = 0
    num_drafted_tokens: list[int] = field(default_factory=lambda: [0] * MAX_DRAFT_DEPTH)
    num_accepted_tokens: list[int] = field(default_factory=lambda: [0] * MAX_DRAFT_DEPTH)
    num_forced_tokens: int = 0
    num_preemptions: int = 0
    queue_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    cache_miss: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheLookup:
    """What the prefix cache holds of a prompt, in tokens.

    A request could start behind `num_cached_tokens`. `num_known_tokens` are there in whole blocks of `block_size`,
    perhaps without the window that continuing needs.
    """

    num_cached_tokens: int
    num_known_tokens: int
    block_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """Log-probability of a token, and the best alternatives as (token id, logprob)."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """News of one request after a step, or after several quick ones (`outbox`). The last has a `finish_reason`.

    `token_ids` includes the stop token that ended the request. `stats` is a live view until then. `error` says why it
    failed; `request_error` is there, too, where that is the request's own fault, as of a grammar that cannot go on.
    `prompt_logprobs` come with the first output, of every token of the prompt but the first.
    """

    request_id: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    error: str | None = None
    request_error: RequestError | None = None
    stats: RequestStats | None = None
