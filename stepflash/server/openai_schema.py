"""Bodies of the OpenAI API's chat and text completions as they arrive.

pydantic checks names and types here; ranges are checked by `SamplingParams`, messages and tools by
`stepflash.chat.openai_messages`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from stepflash.engine.request import SamplingParams
from stepflash.errors import RequestError
from stepflash.server.body import Body
from stepflash.server.thinking_fields import ThinkingBody

MAX_CHOICES = 16
MIN_SEED, MAX_SEED = -(2**63), 2**63 - 1 - MAX_CHOICES
MAX_STOP_STRINGS = 16


class StreamOptionsBody(Body):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class SamplingBody(Body):
    """Fields that chat and text completions share; those after `stop` are extensions of other servers."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptionsBody | None = None
    n: int | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    draft_depth: int | None = None


class ChatBody(SamplingBody, ThinkingBody):
    """Body of `POST /v1/chat/completions`."""

    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    modalities: list[str] | None = None
    audio: Any = None
    web_search_options: Any = None
    functions: list[Any] | None = None
    function_call: Any = None


class CompletionBody(SamplingBody):
    """Body of `POST /v1/completions`."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = None
    echo: bool | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    best_of: int | None = None
    suffix: str | None = None


def sampling_params(
    body: SamplingBody, *, max_tokens: int | None, logprobs: int | None, defaults: SamplingParams
) -> SamplingParams:
    """The sampling parameters of a body over those of the server.

    Raises:
        RequestError: a value is out of range.
    """
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    if len(stop) > MAX_STOP_STRINGS:
        raise RequestError(f"stop: at most {MAX_STOP_STRINGS} strings are allowed", param="stop")
    given: dict[str, Any] = {
        "max_tokens": max_tokens,
        "logprobs": logprobs,
        "stop": stop,
        "stop_token_ids": tuple(body.stop_token_ids or ()),
        "logit_bias": _logit_bias(body.logit_bias or {}),
        **{
            name: getattr(body, name)
            for name in (
                "temperature",
                "top_p",
                "top_k",
                "min_p",
                "presence_penalty",
                "frequency_penalty",
                "repetition_penalty",
                "seed",
                "ignore_eos",
                "draft_depth",
            )
        },
    }
    if given["top_k"] == -1:  # how vLLM's clients say "off"
        given["top_k"] = 0
    if body.seed is not None and not MIN_SEED <= body.seed <= MAX_SEED:
        raise RequestError(f"seed must fit in 63 bits and a sign, got {body.seed}", param="seed")
    return replace(defaults, **{name: value for name, value in given.items() if value is not None})


def num_choices(body: SamplingBody) -> int:
    n = 1 if body.n is None else body.n
    if not 1 <= n <= MAX_CHOICES:
        raise RequestError(f"n must be between 1 and {MAX_CHOICES}, got {n}", param="n")
    return n


def _logit_bias(bias: Mapping[str, float]) -> dict[int, float]:
    result = {}
    for token, value in bias.items():
        if not token.isascii() or not token.isdigit():
            raise RequestError(f"logit_bias: {token!r} is not a token id", param="logit_bias")
        if not -100.0 <= value <= 100.0:
            raise RequestError(f"logit_bias: {value} is not between -100 and 100", param="logit_bias")
        result[int(token)] = value
    return result
