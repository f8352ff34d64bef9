"""What a demanded tool call means for the answer; the same for every API."""

from __future__ import annotations

from collections.abc import Sequence

from stepflash.chat.messages import Tool
from stepflash.chat.tool_grammar import CallRules
from stepflash.errors import RequestError


def demanded_calls(tools: Sequence[Tool], name: str | None = None) -> CallRules:
    """The answer is a call of the named tool, or one or more calls of any.

    Raises:
        RequestError: there are no tools, or none of that name.
    """
    if not tools:
        raise RequestError("tool_choice needs tools", param="tool_choice")
    names = tuple(tool.name for tool in tools)
    if name is not None and name not in names:
        raise RequestError(f"tool_choice: there is no tool {name!r} in tools", param="tool_choice")
    return CallRules(demanded=names if name is None else (name,), is_single=name is not None)
