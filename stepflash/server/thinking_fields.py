"""Reads what clients say about how much may be thought; pure.

Every server and client has a name of its own for the same number, so each API takes them all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stepflash.assistant.budget import EFFORT_TOKENS, Thinking
from stepflash.errors import RequestError
from stepflash.server.body import Body


class ThinkingBody(Body):
    """The fields of every API. `thinking` is Anthropic's object, `reasoning` that of OpenAI's Responses and of
    OpenRouter; the flat ones are extensions."""

    thinking: dict[str, Any] | None = None
    reasoning: dict[str, Any] | None = None
    max_thinking_tokens: int | None = None
    thinking_budget: int | None = None
    thinking_token_budget: int | None = None
    max_task_thinking_tokens: int | None = None
    stop_thinking_loops: bool | None = None


def read_thinking(body: ThinkingBody, *, effort: str | None = None, effort_param: str = "") -> Thinking:
    """The limits that a body asks for; an explicit number counts more than a level of effort.

    Raises:
        RequestError: a number or a level is none.
    """
    thinking, reasoning = body.thinking or {}, body.reasoning or {}
    levels = {effort_param: effort, "reasoning.effort": reasoning.get("effort")}
    known = [_effort_tokens(level, param) for param, level in levels.items() if level is not None]
    numbers = [
        _number(value, param)
        for param, value in (
            ("max_thinking_tokens", body.max_thinking_tokens),
            ("thinking_budget", body.thinking_budget),
            ("thinking_token_budget", body.thinking_token_budget),
            ("thinking.budget_tokens", thinking.get("budget_tokens")),
            ("reasoning.max_tokens", reasoning.get("max_tokens")),
        )
        if value is not None
    ]
    max_tokens = next(iter(numbers), next(iter(known), None))
    # A router that translates Anthropic's "adaptive" says "enabled": false beside a level of effort; it means
    # the level.
    if thinking.get("type") == "disabled" or (reasoning.get("enabled") is False and not known):
        max_tokens = 0
    task_tokens = body.max_task_thinking_tokens
    task_param = "max_task_thinking_tokens"
    if task_tokens is None:
        task_tokens, task_param = thinking.get("task_budget_tokens"), "thinking.task_budget_tokens"
    return Thinking(
        max_tokens=max_tokens,
        task_tokens=None if task_tokens is None else _number(task_tokens, task_param),
        stops_loops=body.stop_thinking_loops is not False,
    )


def _effort_tokens(effort: Any, param: str) -> int | None:
    if not isinstance(effort, str) or effort not in EFFORT_TOKENS:
        raise RequestError(f"{param}: {effort!r} is not one of {', '.join(EFFORT_TOKENS)}", param=param)
    return EFFORT_TOKENS[effort]


def _number(value: Any, param: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise RequestError(f"{param}: must be a whole number, 0 or more, got {value!r}", param=param)
    return value


def turns_thinking_off(variables: Mapping[str, Any]) -> bool:
    """Whether variables of a chat template, as other servers take them, ask for an answer without a thought."""
    return variables.get("enable_thinking") is False or variables.get("thinking") is False
