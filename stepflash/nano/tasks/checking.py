"""Is an answer right? Exact: the text after the thought, and the tool calls with their arguments.

The thought itself is not judged. Arguments are compared as rendered text, which is what the model writes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

from stepflash.chat.messages import ContentDelta, Event, ToolCall, ToolCallArguments, ToolCallStart
from stepflash.nano.tasks.example import Example

_CALL = re.compile(r"<tool_call>\s*<function=([^>\n]+)>\n(.*?)</function>\s*</tool_call>", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>\n?", re.DOTALL)

Call = tuple[str, dict[str, str]]


def check(example: Example, answer: str | Sequence[Event]) -> bool:
    """True if `answer` gives the last message of `example`.

    Args:
        answer: the text that the model wrote after `<think>\\n` (with or without `<|im_end|>`), or the events that
            an output parser made of it.
    """
    content, calls = _read_text(answer) if isinstance(answer, str) else _read_events(answer)
    expected = [(call.name, _as_text(call.arguments)) for call in example.target.tool_calls]
    return content.strip() == example.target.content.strip() and calls == expected


def _as_text(arguments: Mapping[str, object]) -> dict[str, str]:
    return {key: str(value).strip() for key, value in arguments.items()}


def _read_text(text: str) -> tuple[str, list[Call]]:
    _, end, rest = text.partition("</think>")
    if not end:
        return "", []
    rest, _, _ = rest.partition("<|im_end|>")
    calls: list[Call] = []
    for name, body in _CALL.findall(rest):
        calls.append((name, {key: value.strip() for key, value in _PARAMETER.findall(body)}))
    return _CALL.sub("", rest), calls


def _read_events(events: Sequence[Event]) -> tuple[str, list[Call]]:
    content, names, fragments = "", dict[int, str](), dict[int, str]()
    for event in events:
        if isinstance(event, ContentDelta):
            content += event.text
        elif isinstance(event, ToolCallStart):
            names[event.index] = event.name
        elif isinstance(event, ToolCallArguments):
            fragments[event.index] = fragments.get(event.index, "") + event.fragment
    calls = [
        ToolCall(name=names[index], arguments=json.loads(fragments.get(index) or "{}"))
        for index in sorted(names)
    ]
    return content, [(call.name, _as_text(call.arguments)) for call in calls]
