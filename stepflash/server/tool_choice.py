"""What a demanded tool call means for the answer, and which tools may be called; the same for every API."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from stepflash.chat.messages import Tool
from stepflash.chat.tool_grammar import CallRules
from stepflash.errors import RequestError

ToolName = tuple[str, str | None]  # what the client calls a tool: its name and its namespace


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


def allowed_tools(value: Any, param: str, known: Collection[ToolName]) -> tuple[list[ToolName], Any]:
    """The tools that OpenAI's `allowed_tools` leaves, as (name, namespace), and its mode. Chat completions nest what
    responses have flat. Tools of a provider have no name and are passed over, as they are in `tools`.

    Raises:
        RequestError: it is no list of tools, or one of them is not known.
    """
    tools = value.get("tools") if isinstance(value, Mapping) else None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise RequestError(f"{param}.tools: must be a list of tools", param=f"{param}.tools")
    allowed = []
    for index, tool in enumerate(tools):
        function = tool.get("function", tool)
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(name, str):
            continue
        if (name, tool.get("namespace")) not in known:
            where = f"{param}.tools[{index}]"
            raise RequestError(f"{where}: there is no tool {name!r} in tools", param=where)
        allowed.append((name, tool.get("namespace")))
    return allowed, value.get("mode", "auto")
