"""From a conversation to a stream of events, over any engine.

The one way in which anything talks to a model: render the template, encode, submit token ids, and read what
comes back. A wire format, the terminal and a script all consume the same stream, so they cannot disagree.

Errors of the caller are raised by `prepare` and `prepare_text`, before anything is submitted; a failure of
the engine is raised by the stream. A stream that is closed or cancelled before its end aborts its request.
"""

from __future__ import annotations

import copy
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any, NamedTuple, Protocol, runtime_checkable

from stepflash.assistant.budget import NO_THOUGHT, Thinking, ThoughtLimit, thought_limit
from stepflash.assistant.reader import AnswerReader, Prompt
from stepflash.assistant.stream import Fold, StreamItem
from stepflash.assistant.task_ledger import TaskLedger
from stepflash.chat.answer_format import AnswerFormat
from stepflash.chat.grammar import AnswerGrammar, GrammarCompiler
from stepflash.chat.messages import Conversation, Tool
from stepflash.chat.template import ChatTemplate
from stepflash.chat.tokenizer import Tokenizer
from stepflash.chat.tool_grammar import FREE_CALLS, CallRules, answer_grammar
from stepflash.engine.constraints import AllOf, Constraint
from stepflash.engine.request import CacheLookup, Output, Request, SamplingParams
from stepflash.errors import EngineError, PromptTooLong, RequestError

EMPTY_THOUGHT = "\n</think>\n"  # behind the `<think>` with which a prompt ends


class EngineClient(Protocol):
    """What a session needs of an engine; ours and a remote one both provide it.

    One that cannot follow constraints says so with an attribute `takes_constraints` that is False; one that can say
    what its cache holds of a prompt has a method `lookup`.
    """

    def submit(self, request: Request) -> AsyncIterator[Output]: ...

    def abort(self, request_id: str) -> None: ...

    def stats(self) -> Any: ...


class PromptText(NamedTuple):
    """A rendered prompt; `cut_points` as the template found them. `thinks`: the answer begins with a thought."""

    text: str
    cut_points: Sequence[int]
    thinks: bool


@runtime_checkable
class HoldsConnections(Protocol):
    """An engine that keeps connections, each belonging to the event loop that made it."""

    async def aclose(self) -> None: ...


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
        self.ledger = TaskLedger()
        self._grammars = GrammarCompiler(tokenizer)

    def prepare(
        self,
        conversation: Conversation,
        sampling: SamplingParams,
        *,
        prefill: str = "",
        max_tool_calls: int | None = None,
        template_variables: Mapping[str, Any] | None = None,
        extra_tools: tuple[Tool, ...] = (),
        thinking: Thinking | None = None,
        answer_format: AnswerFormat | None = None,
        calls: CallRules = FREE_CALLS,
    ) -> Prompt:
        """Render and encode a conversation.

        `prefill` starts the answer: the model continues after it, without a thought. It is no part of the events, but
        for a call that it opens.
        `extra_tools` may be called, but the head of the prompt does not list them. `thinking` None does not limit the
        thought. `answer_format` and `calls` restrict the answer behind the thought; compiling them takes time.

        Raises:
            PromptTooLong: no room is left for even one token of the answer.
            BadSchema: the format, or the schema of a tool that it concerns, cannot be enforced.
            RequestError: the template refuses the conversation.
        """
        tools = (*conversation.tools, *extra_tools)
        thinking = thinking or Thinking(stops_loops=False)
        if calls.demanded and not self._takes_constraints:
            # All that can be done is to begin the call and to leave the rest to the model.
            thinking, prefill, calls = NO_THOUGHT, calls.opening(), replace(calls, demanded=())
        text, cut_points, thinks = self.render(conversation, template_variables, thinking, prefill)
        grammar = self._grammar(tools, calls, answer_format, thinks)
        token_ids, cut_points = self.tokenizer.encode_with_cuts(
            text, cut_points, limit=self.max_context_tokens
        )
        request = self._request(token_ids, sampling, cut_points)
        task = None
        if thinks and thinking.task_tokens is not None:
            task = self.ledger.task(conversation.messages, self.tokenizer.count)
        limit = self._thought_limit(thinking, task.num_thought_tokens if task else 0) if thinks else None
        return Prompt(
            request=self._with(request, limit, grammar),
            # Without a grammar, one that begins its thought all the same is understood; with one, tags are text.
            in_reasoning=thinks or grammar is not None,
            tools=tools,
            prefill=EMPTY_THOUGHT + prefill if grammar is not None and not thinks else prefill,
            max_tool_calls=max_tool_calls,
            task=task,
        )

    @property
    def _takes_constraints(self) -> bool:
        return getattr(self.engine, "takes_constraints", True)

    def _grammar(
        self, tools: Sequence[Tool], calls: CallRules, answer_format: AnswerFormat | None, thinks: bool
    ) -> AnswerGrammar | None:
        if answer_format is not None and not self._takes_constraints:
            raise RequestError(
                f"{answer_format.param}: the engine behind this server cannot be held to a format",
                param=answer_format.param,
                code="unsupported_parameter",
            )
        # The line break behind `</think>` belongs to the tag.
        grammar = answer_grammar(tools, calls, answer_format, prefix='"\\n"?' if thinks else "")
        if grammar is None or not self._takes_constraints:
            return None
        return self._grammars.compile(
            grammar,
            param=answer_format.param if answer_format is not None else "tools",
            in_thought=thinks,
            may_end_in_thought=answer_format is None and not calls.demanded,
        )

    def _with(self, request: Request, limit: ThoughtLimit | None, grammar: AnswerGrammar | None) -> Request:
        """The request under its constraints."""
        if grammar is not None and request.sampling.ignore_eos:
            raise RequestError(
                "ignore_eos: an answer in a format ends where the format does", param="ignore_eos"
            )
        parts: list[Constraint] = [part for part in (limit, grammar) if part is not None]
        return replace(request, constraint=AllOf(parts) if len(parts) > 1 else next(iter(parts), None))

    def _thought_limit(self, thinking: Thinking, num_thought_in_task: int) -> ThoughtLimit | None:
        # Agents send a level of effort with every request, so where none can be kept, none is refused; the usage
        # then says that there was no limit.
        if not self._takes_constraints:
            return None
        return thought_limit(thinking, self.tokenizer, num_thought_in_task)

    def num_prompt_tokens(
        self,
        conversation: Conversation,
        *,
        prefill: str = "",
        template_variables: Mapping[str, Any] | None = None,
        thinking: Thinking | None = None,
    ) -> int:
        """The length of the prompt that `prepare` would make of it, whether or not it fits.

        Raises:
            RequestError: the template refuses the conversation.
        """
        prompt = self.render(conversation, template_variables, thinking, prefill)
        return self.tokenizer.count(prompt.text)

    def render(
        self,
        conversation: Conversation,
        template_variables: Mapping[str, Any] | None = None,
        thinking: Thinking | None = None,
        prefill: str = "",
    ) -> PromptText:
        """The prompt as text, with the beginning of its answer.

        Raises:
            RequestError: the template refuses the conversation.
        """
        rendered = self.template.render(
            conversation.messages, tools=conversation.tools, variables=template_variables
        )
        thinks = rendered.opens_thought and (thinking or Thinking()).is_wanted and not prefill
        closing = EMPTY_THOUGHT if rendered.opens_thought and not thinks else ""
        return PromptText(rendered.text + closing + prefill, rendered.cut_points, thinks)

    def prepare_text(
        self,
        prompt: str | Sequence[int],
        sampling: SamplingParams,
        answer_format: AnswerFormat | None = None,
    ) -> Prompt:
        """A prompt without chat template, as text or token ids; text gets the bos token in front.

        Raises:
            PromptTooLong: no room is left for even one token of the answer.
            RequestError: the prompt is empty or holds an id that the model does not have.
        """
        if isinstance(prompt, str):
            token_ids = self.tokenizer.encode(prompt, limit=self.max_context_tokens)
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
        grammar = self._grammar((), FREE_CALLS, answer_format, thinks=False)
        request = self._with(self._request(token_ids, sampling, ()), None, grammar)
        return Prompt(request=request, parse=False, in_reasoning=False)

    def lookup(self, prompt: Prompt) -> CacheLookup | None:
        """What the prefix cache has of a prompt now; None where that is not known."""
        lookup: Callable[[Request], CacheLookup | None] | None = getattr(self.engine, "lookup", None)
        return None if lookup is None else lookup(prompt.request)

    async def aclose(self) -> None:
        """Close what the engine holds open for this event loop, when nothing runs here any more."""
        if isinstance(self.engine, HoldsConnections):
            await self.engine.aclose()

    def chat(self, conversation: Conversation, sampling: SamplingParams) -> AsyncGenerator[StreamItem]:
        """Answer a conversation; `answer(prepare(...))`."""
        return self.answer(self.prepare(conversation, sampling))

    def answer(self, prompt: Prompt) -> AsyncGenerator[StreamItem]:
        """Submit a prepared prompt and return its stream; closing the stream aborts the request.

        Raises:
            RequestError: the engine refuses the request, now.
            EngineError: the engine failed while running it; raised by the stream.
        """
        return _one_by_one(self.batches(prompt))

    def batches(self, prompt: Prompt) -> AsyncGenerator[list[StreamItem]]:
        """`answer`, with all items that came together in one list. Raises what that raises."""
        return self._read(prompt, self.engine.submit(prompt.request))

    async def _read(self, prompt: Prompt, outputs: AsyncIterator[Output]) -> AsyncGenerator[list[StreamItem]]:
        reader = AnswerReader(prompt, self.tokenizer)
        whole = Fold() if prompt.task is not None else None
        is_running = True
        try:
            async for output in outputs:
                is_running = output.finish_reason is None
                items = reader.read(output)
                if whole is not None:
                    for item in items:
                        whole.add(item)
                yield items
                if reader.is_finished or not is_running:
                    break
        finally:
            if is_running:
                self.engine.abort(prompt.request.request_id)
        if not reader.is_finished:
            raise EngineError("the engine ended the request without a result")
        if prompt.task is not None and whole is not None:
            answer = whole.answer()
            self.ledger.record(prompt.task, answer.to_message(), answer.usage.reasoning_tokens)

    def _request(
        self, token_ids: list[int], sampling: SamplingParams, cut_points: tuple[int, ...]
    ) -> Request:
        last_id = self.tokenizer.vocab_size - 1
        if any(not 0 <= token_id <= last_id for token_id in sampling.logit_bias):
            raise RequestError(f"logit_bias: token ids go from 0 to {last_id}", param="logit_bias")
        room = self.max_context_tokens - len(token_ids)
        if room < 1:
            raise PromptTooLong(len(token_ids), self.max_context_tokens)
        if sampling.max_tokens is None or sampling.max_tokens > room:
            sampling = replace(sampling, max_tokens=room)
        return Request(
            request_id=new_request_id(),
            prompt_token_ids=tuple(token_ids),
            sampling=sampling,
            cut_points=cut_points,
        )


async def _one_by_one(batches: AsyncGenerator[list[StreamItem]]) -> AsyncGenerator[StreamItem]:
    async with aclosing(batches):
        async for items in batches:
            for item in items:
                yield item


def as_choice(prompt: Prompt, index: int) -> Prompt:
    """The same prompt as request number `index` of several; a given seed moves by the index. Number 0 is the prompt
    itself: submit only one of them."""
    if index == 0:
        return prompt
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
