"""How an answer is made to begin with a tool call; the same for every API.

The prompt then already holds an empty thought and the tags that the model itself would write.
"""

from __future__ import annotations

from collections.abc import Sequence

from stepflash.assistant.session import NO_THINKING
from stepflash.chat.messages import Tool
from stepflash.errors import RequestError


def forced_call(tools: Sequence[Tool], name: str | None = None) -> str:
    """The beginning of an answer that calls the named tool, or any one.

    Raises:
        RequestError: there are no tools, or none of that name.
    """
    if not tools:
        raise RequestError("tool_choice needs tools", param="tool_choice")
    if name is not None and name not in {tool.name for tool in tools}:
        raise RequestError(f"tool_choice: there is no tool {name!r} in tools", param="tool_choice")
    opening = f"{NO_THINKING}<tool_call>\n<function="
    if name is None and len(tools) == 1:
        name = tools[0].name
    return opening if name is None else f"{opening}{name}>\n"
