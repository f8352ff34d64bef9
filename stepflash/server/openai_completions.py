"""The wire format of `/v1/completions`: raw text in, raw text out, no template and no parsing."""

from __future__ import annotations

import codecs
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from stepflash.assistant.stream import Answer, Progress, StreamItem, TextLogprobs, Usage, total_usage
from stepflash.chat.answer_format import AnswerFormat
from stepflash.chat.messages import ContentDelta, Finish
from stepflash.engine.request import SamplingParams, TokenLogprob
from stepflash.errors import RequestError
from stepflash.server.openai_chat_encode import ResponseHead, TokenBytes, finish_reason, finite, usage_json
from stepflash.server.openai_schema import CompletionBody, num_choices, stream_options
from stepflash.server.sampling_fields import sampling_params, stop_strings
from stepflash.server.scheduling_fields import WHENEVER, Scheduling, read_scheduling
from stepflash.server.sse import frame
from stepflash.server.structured_output import read_format

DEFAULT_MAX_TOKENS = 16
MAX_PROMPTS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionRequest:
    """A decoded body. Choices are ordered by prompt, then by `num_choices`."""

    prompts: tuple[str | tuple[int, ...], ...]
    sampling: SamplingParams
    num_choices: int = 1
    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    echo: bool = False
    answer_format: AnswerFormat | None = None
    scheduling: Scheduling = WHENEVER


def decode(body: CompletionBody, defaults: SamplingParams) -> CompletionRequest:
    """Turn a checked body into values.

    Raises:
        RequestError: a value is wrong, or asks for something that is not supported.
    """
    for name, is_set, reason in (
        ("best_of", body.best_of not in (None, body.n or 1), "must be equal to n"),
        ("max_tokens", body.max_tokens == 0 and not body.echo, "0 is for echo alone"),
    ):
        if is_set:
            raise RequestError(f"{name}: {reason}", param=name, code="unsupported_parameter")
    prompts = _prompts(body.prompt)
    if not 1 <= len(prompts) <= MAX_PROMPTS:
        raise RequestError(f"prompt: between 1 and {MAX_PROMPTS} prompts are allowed", param="prompt")
    max_tokens = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    options = stream_options(body)
    # Without tokens, reading the prompt is all that there is to ask for.
    reads_prompt = bool(body.echo) and (body.logprobs is not None or not max_tokens)
    return CompletionRequest(
        prompts=prompts,
        sampling=sampling_params(
            body,
            defaults,
            max_tokens=("max_tokens", max_tokens),
            logprobs=("logprobs", body.logprobs),
            prompt_logprobs=("logprobs", (body.logprobs or 0) if reads_prompt else None),
            stop=stop_strings("stop", body.stop),
        ),
        num_choices=num_choices(body),
        stream=bool(body.stream),
        include_usage=bool(options.include_usage),
        continuous_usage=bool(options.continuous_usage_stats),
        echo=bool(body.echo),
        answer_format=read_format(body, body.response_format, "response_format"),
        scheduling=read_scheduling(body),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Echo:
    """The prompt in front of a choice. `first_token` of its text has no log-probability, if those of the others are
    told; `num_hidden` tokens are in front of it, which the server put there."""

    text: str = ""
    first_token: int | None = None
    num_hidden: int = 0


class TokenTexts:
    """Texts of a choice's tokens, one after the other, and where each begins, in characters of the text."""

    def __init__(self, token_bytes: TokenBytes) -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._num_characters = 0

    def text(self, token_id: int) -> str:
        return self._token_bytes(token_id).decode("utf-8", "replace")

    def advance(self, token_id: int) -> int:
        """Where this token begins; the next one begins behind it."""
        begin = self._num_characters
        self._num_characters += len(self._decoder.decode(self._token_bytes(token_id)))
        return begin


async def frames(
    head: ResponseHead,
    batches: AsyncGenerator[tuple[int, list[StreamItem]]],
    echoes: Sequence[Echo],
    request: CompletionRequest,
    token_bytes: TokenBytes,
) -> AsyncGenerator[bytes]:
    """The streamed reply; `echoes` are what each choice begins with."""
    usages = [Usage()] * len(echoes)
    pending: list[list[TokenLogprob]] = [[] for _ in echoes]
    texts = [TokenTexts(token_bytes) for _ in echoes]
    waiting = {index: echo for index, echo in enumerate(echoes) if echo.first_token is not None}
    for index, echo in enumerate(echoes):
        if echo.text and index not in waiting:
            yield frame(response(head, [choice(index, echo.text, None, None)], None))
    async with aclosing(batches):
        async for index, batch in batches:
            parts = []
            for item in batch:
                text, reason = "", None
                match item:
                    case Progress():
                        usages[index] = item.usage
                        pending[index].extend(item.logprobs)
                        if echoes[index].first_token is not None:
                            pending[index].extend(item.stop_logprobs)
                        if index in waiting:
                            echo = waiting.pop(index)
                            told = _logprobs(
                                item.prompt_logprobs[echo.num_hidden :], texts[index], echo.first_token
                            )
                            choices = [choice(index, echo.text, None, told)]
                            parts.append(frame(response(head, choices, None)))
                        continue
                    case TextLogprobs():
                        continue  # of text completions every token is told, whatever became of it
                    case ContentDelta():
                        text = item.text
                    case Finish():
                        reason = item.reason
                logprobs, pending[index] = pending[index], []
                running = total_usage(usages, request.num_choices) if request.continuous_usage else None
                choices = [choice(index, text, reason, _logprobs(logprobs, texts[index]))]
                parts.append(frame(response(head, choices, running)))
            if parts:
                yield b"".join(parts)
    if request.include_usage:
        yield frame(response(head, [], total_usage(usages, request.num_choices)))


def choice(index: int, text: str, reason: str | None, logprobs: Mapping[str, Any] | None) -> dict[str, Any]:
    """A choice object; those of a stream differ from a whole one in their text alone."""
    return {
        "index": index,
        "text": text,
        "logprobs": logprobs,
        "finish_reason": None if reason is None else finish_reason(reason),
    }


def response(head: ResponseHead, choices: Sequence[Mapping[str, Any]], usage: Usage | None) -> dict[str, Any]:
    """A whole reply, or one chunk of a streamed one: they have the same shape."""
    data: dict[str, Any] = {
        "id": head.id,
        "object": "text_completion",
        "created": head.created,
        "model": head.model,
        "choices": list(choices),
    }
    if usage is not None:
        data["usage"] = usage_json(usage)
    return data


def answer_choice(index: int, answer: Answer, echo: Echo, token_bytes: TokenBytes) -> dict[str, Any]:
    logprobs = answer.logprobs
    if echo.first_token is not None:
        # Harnesses leave out one generated token, whichever it is.
        logprobs = answer.prompt_logprobs[echo.num_hidden :] + logprobs + answer.stop_logprobs
    told = _logprobs(logprobs, TokenTexts(token_bytes), echo.first_token)
    return choice(index, echo.text + (answer.content or ""), answer.finish_reason, told)


def _prompts(prompt: str | list[str] | list[int] | list[list[int]]) -> tuple[str | tuple[int, ...], ...]:
    if isinstance(prompt, str):
        return (prompt,)
    if all(isinstance(item, int) for item in prompt):
        return (tuple(item for item in prompt if isinstance(item, int)),)
    return tuple(
        item if isinstance(item, str) else tuple(item) for item in prompt if not isinstance(item, int)
    )


def _logprobs(
    logprobs: Sequence[TokenLogprob], texts: TokenTexts, first_token: int | None = None
) -> dict[str, Any] | None:
    """`first_token` stands in front of them and has no log-probability."""
    token_ids = [] if first_token is None else [first_token]
    nothing = [None for _ in token_ids]
    token_ids += [token.token_id for token in logprobs]
    if not token_ids:
        return None
    return {
        "tokens": [texts.text(token_id) for token_id in token_ids],
        "token_logprobs": [*nothing, *(finite(token.logprob) for token in logprobs)],
        # The best last: of tokens with the same text, as pieces of characters have it, that one is told.
        "top_logprobs": [
            *nothing,
            *({texts.text(i): finite(value) for i, value in reversed(token.top)} for token in logprobs),
        ],
        "text_offset": [texts.advance(token_id) for token_id in token_ids],
    }
