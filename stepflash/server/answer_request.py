"""What every API that answers conversations has in common: fields of the body, and what a body is decoded into."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from stepflash.assistant.budget import NO_THOUGHT, Thinking
from stepflash.chat.answer_format import AnswerFormat
from stepflash.chat.messages import Conversation, Tool
from stepflash.chat.tool_grammar import FREE_CALLS, CallRules, is_restricted
from stepflash.engine.request import SamplingParams
from stepflash.server.sampling_fields import SamplingBody
from stepflash.server.scheduling_fields import WHENEVER, Scheduling, read_scheduling
from stepflash.server.structured_output import FormatBody
from stepflash.server.thinking_fields import ThinkingBody, turns_thinking_off


class AnswerBody(SamplingBody, ThinkingBody, FormatBody):
    """The fields of all three APIs."""

    stream: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerRequest:
    """A decoded body.

    `prefill` is the beginning of the answer, in the client's own words. `deferred_tools` may be called, but the head
    of the prompt does not list them.
    """

    conversation: Conversation
    sampling: SamplingParams
    stream: bool = False
    prefill: str = ""
    deferred_tools: tuple[Tool, ...] = ()
    thinking: Thinking = field(default_factory=Thinking)
    answer_format: AnswerFormat | None = None
    calls: CallRules = FREE_CALLS
    template_variables: Mapping[str, Any] = field(default_factory=dict)
    scheduling: Scheduling = WHENEVER

    @property
    def tools(self) -> tuple[Tool, ...]:
        """All that may be called."""
        return (*self.conversation.tools, *self.deferred_tools)

    @property
    def max_tool_calls(self) -> int | None:
        return 1 if self.calls.is_single else None

    @property
    def has_grammar(self) -> bool:
        """Whether preparing it means compiling a grammar, which takes time."""
        return is_restricted(self.tools, self.calls, self.answer_format)


def shared_fields(body: AnswerBody, thinking: Thinking) -> dict[str, Any]:
    """When the request is to run; the template's variables, and the thinking that they, too, can switch off.

    Raises:
        RequestError: a value is out of range.
    """
    variables = body.chat_template_kwargs or {}
    return {
        "scheduling": read_scheduling(body),
        "template_variables": variables,
        "thinking": NO_THOUGHT if turns_thinking_off(variables) else thinking,
    }
