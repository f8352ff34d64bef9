"""Bodies of the OpenAI API's chat and text completions as they arrive.

pydantic checks names and types here; ranges are checked by `SamplingParams`, messages and tools by
`stepflash.chat.openai_messages`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from stepflash.errors import RequestError
from stepflash.server.answer_request import AnswerBody
from stepflash.server.body import Body, Items, Refusal
from stepflash.server.sampling_fields import MAX_CHOICES, SamplingBody
from stepflash.server.structured_output import FormatBody

_IN_MESSAGES = Refusal("send it as a message with role system")
_NEEDS_ANSWER = Refusal("use /v1/messages, which continues a last message of the assistant")
# A cache is filled by any request that has the same beginning.
NO_PREWARM = Refusal("nothing runs without an answer; send the request with a limit of one token")
# Nothing of ours depends on them: there is one model, its cache finds common prefixes by itself, nobody is billed.
OPENAI_IGNORED = frozenset(
    {
        "metadata",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "user",
    }
)


class StreamOptionsBody(Body):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class CompletionsBody(SamplingBody):
    """Fields that chat and text completions share."""

    stream: bool | None = None
    stream_options: StreamOptionsBody | None = None
    n: int | None = None
    max_tokens: int | None = None
    stop: str | Items[str] | None = None


class ChatBody(CompletionsBody, AnswerBody):
    """Body of `POST /v1/chat/completions`."""

    refused: ClassVar[Mapping[str, Refusal]] = {
        **SamplingBody.refused,
        "audio": Refusal("this model writes text only"),
        "modalities": Refusal("this model writes text only", harmless=(["text"],)),
        "web_search_options": Refusal("there is no built-in web search"),
        "moderation": Refusal("there is no model for moderation here"),
        "functions": Refusal("use tools instead"),
        "function_call": Refusal("use tool_choice instead", harmless=("none", "auto")),
        "prompt_cache_options.prewarm": NO_PREWARM,
        "system": _IN_MESSAGES,
        "instructions": _IN_MESSAGES,
        "prompt": Refusal("use messages, or /v1/completions"),
        "max_output_tokens": Refusal("use max_completion_tokens"),
        "stop_sequences": Refusal("use stop"),
        "echo": _NEEDS_ANSWER,
        "continue_final_message": _NEEDS_ANSWER,
        "add_generation_prompt": Refusal("an answer always begins", harmless=(True,)),
        "chat_template": Refusal("the template is the model's own"),
        "documents": Refusal("send documents as text in a message"),
        "include_reasoning": Refusal("leave reasoning_content out yourself", harmless=(True,)),
        "separate_reasoning": Refusal("the thought is never part of content", harmless=(True,)),
    }
    ignored: ClassVar[frozenset[str]] = SamplingBody.ignored | OPENAI_IGNORED | {"store", "prediction"}

    messages: Items[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: Items[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    response_format: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None


class CompletionBody(CompletionsBody, FormatBody):
    """Body of `POST /v1/completions`."""

    refused: ClassVar[Mapping[str, Refusal]] = {
        **SamplingBody.refused,
        "suffix": Refusal("this model does not fill gaps", harmless=("",)),
        "messages": Refusal("use /v1/chat/completions"),
        "tools": Refusal("use /v1/chat/completions"),
        "max_completion_tokens": Refusal("use max_tokens"),
        "add_special_tokens": Refusal("text always gets the bos token in front", harmless=(True,)),
    }
    ignored: ClassVar[frozenset[str]] = SamplingBody.ignored | {"user"}

    prompt: str | Items[str] | Items[int] | Items[Items[int]]
    logprobs: int | None = None
    echo: bool | None = None
    best_of: int | None = None
    response_format: dict[str, Any] | None = None


def num_choices(body: CompletionsBody) -> int:
    n = 1 if body.n is None else body.n
    if not 1 <= n <= MAX_CHOICES:
        raise RequestError(f"n must be between 1 and {MAX_CHOICES}, got {n}", param="n")
    return n


def stream_options(body: CompletionsBody) -> StreamOptionsBody:
    """
    Raises:
        RequestError: there are some, and no stream.
    """
    if body.stream_options is not None and not body.stream:
        raise RequestError("stream_options is only allowed when stream is true", param="stream_options")
    return body.stream_options or StreamOptionsBody()
