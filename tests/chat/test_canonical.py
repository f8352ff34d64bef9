"""Noise of clients is taken out of prompts, and nothing else is."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepflash.chat.canonical import canonical, drop_clock
from stepflash.chat.messages import Conversation, Message, Tool

KEYWORDS = ["type", "properties", "required", "items", "anyOf", "$defs", "description", "cache_control"]
names = st.sampled_from([*KEYWORDS, "path", "command", "x", "with space"])
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=4),
    max_leaves=12,
)


def only(tool: dict[str, Any]) -> dict[str, Any]:
    (result,) = canonical(Conversation(messages=(), tools=(Tool(definition=tool),))).tools
    return dict(result.definition)


def shuffled(value: Any, data: st.DataObject) -> Any:
    if isinstance(value, dict):
        items = data.draw(st.permutations(list(value.items())))
        return {key: shuffled(inner, data) for key, inner in items}
    return [shuffled(inner, data) for inner in value] if isinstance(value, list) else value


@settings(max_examples=150)
@given(st.dictionaries(names, values, max_size=5), st.data())
def test_the_order_of_keys_in_a_schema_does_not_matter(schema: dict[str, Any], data: st.DataObject) -> None:
    def tool(parameters: Any) -> dict[str, Any]:
        return {"type": "function", "function": {"name": "f", "description": "d", "parameters": parameters}}

    once = only(tool(schema))
    assert json.dumps(only(shuffled(tool(schema), data))) == json.dumps(once)
    assert json.dumps(only(once)) == json.dumps(once)


def test_keys_come_in_the_order_in_which_people_write_them() -> None:
    parameters = {
        "required": ["path", "content"],
        "properties": {
            "append": {"default": False, "type": "boolean"},
            "content": {"description": "text", "type": "string"},
            "path": {"type": "string"},
        },
        "type": "object",
        "additionalProperties": False,
    }
    tool = {
        "function": {"parameters": parameters, "description": "Write.", "name": "write"},
        "type": "function",
    }
    assert json.dumps(only(tool)) == json.dumps(
        {
            "type": "function",
            "function": {
                "name": "write",
                "description": "Write.",
                "parameters": {
                    "type": "object",
                    "properties": {
                        "path": {"type": "string"},
                        "content": {"type": "string", "description": "text"},
                        "append": {"type": "boolean", "default": False},
                    },
                    "required": ["path", "content"],
                    "additionalProperties": False,
                },
            },
        }
    )


def test_marks_go_and_a_parameter_of_that_name_stays() -> None:
    mark = {"type": "ephemeral"}
    parameters = {"type": "object", "properties": {"cache_control": {"type": "string"}}}
    function = {"name": "f", "parameters": parameters, "cache_control": mark}
    tool = {"type": "function", "function": function, "cache_control": mark}
    assert only(tool) == {"type": "function", "function": {"name": "f", "parameters": parameters}}


def test_the_tools_stay_in_their_order() -> None:
    tools = tuple(Tool(definition={"name": name, "parameters": {}}) for name in ("b", "a"))
    assert [tool.name for tool in canonical(Conversation(messages=(), tools=tools)).tools] == ["b", "a"]


@pytest.mark.parametrize(
    ("line", "kept"),
    [
        ("Current time: 2026-11-25 14:03:27", "Current time: 2026-11-25"),
        ("Current date and time: 2026-11-25T14:03:27.123Z", "Current date and time: 2026-11-25"),
        (
            "- The current time is 2026-11-25 14:03 UTC+2, a Wednesday",
            "- The current time is 2026-11-25, a Wednesday",
        ),
        ("Today is Wed, Nov 25, 2026, 2:03 PM.", "Today is Wed, Nov 25, 2026."),
        ("Now: 25.11.2026 14:03:27 +01:00", "Now: 25.11.2026"),
    ],
)
def test_a_clock_loses_its_time_of_day(line: str, kept: str) -> None:
    assert drop_clock(f"You help.\n{line}\nBe brief.") == f"You help.\n{kept}\nBe brief."


@pytest.mark.parametrize(
    "line",
    [
        "Today's date: 2026-11-25",
        "The meeting is on 2026-11-25 at 14:03.",
        "Current time: 14:03",
        "Use `date '+%H:%M'` to know the current time: it is not 2026.",
        "Python 3.11.2 now: see 10:15 in the log",
        "Released 2026-11-25 14:03:27",
    ],
)
def test_other_times_stay(line: str) -> None:
    assert drop_clock(line) == line


def test_only_the_head_is_touched() -> None:
    clock = "Current time: 2026-11-25 14:03:27"
    messages = (Message(role="user", content=clock), Message(role="system", content=clock))
    assert canonical(Conversation(messages=messages)).messages == messages
    assert canonical(Conversation(messages=messages[1:])).messages[0].content == "Current time: 2026-11-25"
