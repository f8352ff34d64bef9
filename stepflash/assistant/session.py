"""From a conversation to a stream of events, over any engine.

The one way in which anything talks to a model: render the template, encode, submit token ids, and read what
comes back. A wire format, the terminal and a script all consume the same stream, so they cannot disagree.

Errors of the caller are raised by `prepare` and `prepare_text`, before anything is submitted; a failure of
the engine is raised by the stream. A stream that is closed or cancelled before its end aborts its request.
"""

from __future__ import annotations

import copy
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

from stepflash.assistant.budget import thinking_budget
from stepflash.assistant.reader import AnswerReader, Prompt
from stepflash.assistant.stream import StreamItem
from stepflash.chat.messages import Conversation, Tool
from stepflash.chat.template import ChatTemplate
from stepflash.chat.tokenizer import Tokenizer
from stepflash.engine.request import CacheLookup, Output, Request, SamplingParams
from stepflash.errors import EngineError, PromptTooLong, RequestError

NO_THINKING = "\n</think>\n"  # as `prefill`: an empty thought


class EngineClient(Protocol):
    """What a session needs of an engine; ours and a remote one both provide it."""

    def submit(self, request: Request) -> AsyncIterator[Output]: ...

    def abort(self, request_id: str) -> None: ...

    def stats(self) -> Any: ...


@runtime_checkable
class LooksUp(Protocol):
    """An engine that can say what its cache holds of a prompt; a remote one cannot."""

    def lookup(self, request: Request) -> CacheLookup | None: ...


class Session:
    """One model that can be talked to: an engine with its tokenizer and chat template.

    `max_context_tokens` bounds prompt and answer together.
    """

    def __init__(
        self, engine: EngineClient, tokenizer: Tokenizer, template: ChatTemplate, *, max_context_tokens: int
    ) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.template = template
        self.max_context_tokens = max_context_tokens

    def prepare(
        self,
        conversation: Conversation,
        sampling: SamplingParams,
        *,
        prefill: str = "",
        max_tool_calls: int | None = None,
        template_variables: Mapping[str, Any] | None = None,
        extra_tools: tuple[Tool, ...] = (),
        max_thinking_tokens: int | None = None,
    ) -> Prompt:
        """Render and encode a conversation.

        `prefill` starts the answer: the model continues after it, and it is part of the events. Begun with
        `NO_THINKING` the model does not think (a template that opens no thought needs none closed).
        `extra_tools` may be called, but the head of the prompt does not list them. After `max_thinking_tokens` a
        thought is closed with a short sentence.

        Raises:
            PromptTooLong: no room is left for even one token of the answer.
            RequestError: the template refuses the conversation.
        """
        rendered = self.template.render(
            conversation.messages, tools=conversation.tools, variables=template_variables
        )
        given = prefill.removeprefix(NO_THINKING)
        in_reasoning = rendered.opens_thought and given == prefill
        text = rendered.text + (prefill if rendered.opens_thought else given)
        token_ids, cut_points = self.tokenizer.encode_with_cuts(text, rendered.cut_points)
        request = self._request(token_ids, sampling, cut_points)
        if in_reasoning and max_thinking_tokens is not None:
            request = replace(request, constraint=thinking_budget(max_thinking_tokens, self.tokenizer))
        return Prompt(
            request=request,
            # Read as an answer without thought, so that one which the model begins all the same is found.
            in_reasoning=in_reasoning,
            tools=(*conversation.tools, *extra_tools),
            prefill=prefill if in_reasoning else given,
            max_tool_calls=max_tool_calls,
        )

    def num_prompt_tokens(self, conversation: Conversation, prefill: str = "") -> int:
        """The length of the prompt that `prepare` would make of it, whether or not it fits.

        Raises:
            RequestError: the template refuses the conversation.
        """
        rendered = self.template.render(conversation.messages, tools=conversation.tools)
        if not rendered.opens_thought:
            prefill = prefill.removeprefix(NO_THINKING)
        return len(self.tokenizer.encode(rendered.text + prefill))

    def prepare_text(self, prompt: str | Sequence[int], sampling: SamplingParams) -> Prompt:
        """A prompt without chat template, as text or token ids; text gets the bos token in front.

        Raises:
            PromptTooLong: no room is left for even one token of the answer.
            RequestError: the prompt is empty or holds an id that the model does not have.
        """
        if isinstance(prompt, str):
            token_ids = self.tokenizer.encode(prompt)
            bos = self.tokenizer.bos_token_id
            if bos is not None and token_ids[:1] != [bos]:
                token_ids = [bos, *token_ids]
        else:
            token_ids = list(prompt)
            wrong = next((i for i in token_ids if not 0 <= i < self.tokenizer.vocab_size), None)
            if wrong is not None:
                last = self.tokenizer.vocab_size - 1
                raise RequestError(
                    f"token id {wrong} is outside the vocabulary (0 to {last})", param="prompt"
                )
        if not token_ids:
            raise RequestError("the prompt is empty", param="prompt")
        return Prompt(request=self._request(token_ids, sampling, ()), parse=False, in_reasoning=False)

    def lookup(self, prompt: Prompt) -> CacheLookup | None:
        """What the prefix cache has of a prompt now; None where that is not known."""
        return self.engine.lookup(prompt.request) if isinstance(self.engine, LooksUp) else None

    def chat(self, conversation: Conversation, sampling: SamplingParams) -> AsyncGenerator[StreamItem]:
        """Answer a conversation; `answer(prepare(...))`."""
        return self.answer(self.prepare(conversation, sampling))

    def answer(self, prompt: Prompt) -> AsyncGenerator[StreamItem]:
        """Submit a prepared prompt and return its stream; closing the stream aborts the request.

        Raises:
            RequestError: the engine refuses the request, now.
            EngineError: the engine failed while running it; raised by the stream.
        """
        return self._read(prompt, self.engine.submit(prompt.request))

    async def _read(self, prompt: Prompt, outputs: AsyncIterator[Output]) -> AsyncGenerator[StreamItem]:
        reader = AnswerReader(prompt, self.tokenizer)
        is_running = True
        try:
            async for output in outputs:
                is_running = output.finish_reason is None
                for item in reader.read(output):
                    yield item
                if reader.is_finished or not is_running:
                    break
        finally:
            if is_running:
                self.engine.abort(prompt.request.request_id)
        if not reader.is_finished:
            raise EngineError("the engine ended the request without a result")

    def _request(
        self, token_ids: list[int], sampling: SamplingParams, cut_points: tuple[int, ...]
    ) -> Request:
        last_id = self.tokenizer.vocab_size - 1
        if any(not 0 <= token_id <= last_id for token_id in sampling.logit_bias):
            raise RequestError(f"logit_bias: token ids go from 0 to {last_id}", param="logit_bias")
        room = self.max_context_tokens - len(token_ids)
        if room < 1:
            raise PromptTooLong(len(token_ids), self.max_context_tokens)
        max_tokens = room if sampling.max_tokens is None else min(sampling.max_tokens, room)
        return Request(
            request_id=new_request_id(),
            prompt_token_ids=tuple(token_ids),
            sampling=replace(sampling, max_tokens=max_tokens),
            cut_points=cut_points,
        )


def as_choice(prompt: Prompt, index: int) -> Prompt:
    """The same prompt as request number `index` of several; a given seed moves by the index."""
    sampling = prompt.request.sampling
    if sampling.seed is not None:
        sampling = replace(sampling, seed=sampling.seed + index)
    # A constraint advances with its request, so each has its own.
    constraint = copy.deepcopy(prompt.request.constraint)
    return replace(
        prompt,
        request=replace(
            prompt.request, request_id=new_request_id(), sampling=sampling, constraint=constraint
        ),
    )


def new_request_id() -> str:
    return uuid.uuid4().hex
