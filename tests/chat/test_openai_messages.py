"""Golden: dictionaries as OpenAI's clients send them, read by hand. Property: writing and reading back."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepflash.chat.messages import Message, Tool, ToolCall
from stepflash.chat.openai_messages import message_to_openai, messages_from_openai, tools_from_openai
from stepflash.errors import BadSchema, RequestError


def test_a_conversation_as_clients_send_it() -> None:
    made = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "f", "arguments": '{"a": [1, "\\u00e9"]}'},
    }
    assert messages_from_openai(
        [
            {"role": "developer", "content": "Be brief."},
            {"role": "system", "content": "it rains", "name": "observation"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "input_text", "text": "b"}]},
            {
                "role": "assistant",
                "content": None,
                "reasoning_content": "hm",
                "tool_calls": [made],
                "refusal": None,
            },
            {
                "role": "tool",
                "tool_call_id": "call_1",
                "content": [{"type": "text", "text": "x", "cache_control": {}}],
            },
            {"role": "assistant", "content": "yes", "reasoning": "so"},
            {"role": "assistant", "content": "yes", "thinking": {"content": "so", "signature": "1"}},
            {
                "role": "assistant",
                "content": "yes",
                "reasoning_content": None,
                "reasoning": None,
                "tool_calls": None,
            },
            {"role": "assistant", "function_call": {"name": "f", "arguments": ""}},
            {"role": "tool", "content": None},
            Message(role="user", content="z"),
        ]
    ) == (
        Message(role="system", content="Be brief."),
        Message(role="system", content="it rains", name="observation"),
        Message(role="user", content="ab"),
        Message(
            role="assistant",
            reasoning="hm",
            tool_calls=(ToolCall(id="call_1", name="f", arguments={"a": [1, "é"]}),),
        ),
        Message(role="tool", content="x", tool_call_id="call_1"),
        Message(role="assistant", content="yes", reasoning="so"),
        Message(role="assistant", content="yes", reasoning="so"),
        Message(role="assistant", content="yes"),
        Message(role="assistant", tool_calls=(ToolCall(name="f"),)),
        Message(role="tool"),
        Message(role="user", content="z"),
    )


def assistant(**fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": "", **fields}


def made_call(**function: Any) -> dict[str, Any]:
    return assistant(tool_calls=[{"function": function}])


@pytest.mark.parametrize(
    ("message", "where", "problem"),
    [
        ("hi", "", "must be an object, not str"),
        ({"content": "x"}, ".role", "None is not one of system, developer, user"),
        ({"role": "wizard", "content": "x"}, ".role", "'wizard' is not one of"),
        ({"role": "user"}, ".content", "is missing"),
        ({"role": "user", "content": 5}, ".content", "must be a string or a list"),
        ({"role": "user", "content": [5]}, ".content[0]", "must be an object, not int"),
        ({"role": "user", "content": [{"type": "text"}]}, ".content[0].text", "must be a string"),
        ({"role": "user", "content": ["a", {"type": "image_url"}]}, ".content[1].type", "reads text only"),
        (assistant(reasoning_content=5), ".reasoning_content", "must be a string, not int"),
        (assistant(reasoning={}), ".reasoning", "must be a string, not dict"),
        (assistant(thinking={"content": 5}), ".thinking.content", "must be a string, not int"),
        (assistant(tool_calls={}), ".tool_calls", "must be a list"),
        (assistant(tool_calls=[{}]), ".tool_calls[0].function", "must be an object, not NoneType"),
        (made_call(name=""), ".tool_calls[0].function.name", "must be a name"),
        (made_call(name="f", arguments='{"a" 1}'), ".tool_calls[0].function.arguments", "not valid JSON"),
        (
            made_call(name="f", arguments="[1]"),
            ".tool_calls[0].function.arguments",
            "must be a JSON object, not list",
        ),
        (made_call(name="f", arguments="[" * 100_000), ".tool_calls[0].function.arguments", "not valid JSON"),
        ({"role": "tool", "content": "", "tool_call_id": 1}, ".tool_call_id", "must be a string"),
    ],
)
def test_wrong_messages_are_named(message: Any, where: str, problem: str) -> None:
    with pytest.raises(RequestError) as caught:
        messages_from_openai([{"role": "user", "content": "a"}, message])
    assert caught.value.param == f"messages[1]{where}"
    assert str(caught.value).startswith(f"messages[1]{where}: ")
    assert problem in str(caught.value)


def test_wrong_lists() -> None:
    for wrong in ("hi", {"role": "user"}, None, 5):
        with pytest.raises(RequestError, match="messages must be a list"):
            messages_from_openai(wrong)  # type: ignore[arg-type]
        with pytest.raises(RequestError, match="tools must be a list"):
            tools_from_openai(wrong)  # type: ignore[arg-type]


def test_tools_are_kept_whole() -> None:
    nested = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}, "strict": True}}
    flat = {"type": "function", "name": "g", "description": "d"}
    tools = tools_from_openai([nested, flat, Tool(definition={"function": {"name": "h"}})])
    assert [tool.name for tool in tools] == ["f", "g", "h"]
    assert tools[0].definition == nested
    assert tools[1].definition == {"type": "function", "function": {"name": "g", "description": "d"}}
    assert tools[2].definition == {"function": {"name": "h"}}


@pytest.mark.parametrize(
    ("tool", "where", "problem"),
    [
        (5, "", "must be an object"),
        ({"type": "web_search"}, ".type", "'web_search' is not supported"),
        ({"type": "function"}, ".function", "must be an object"),
        ({"function": {}}, ".function.name", "None is no name"),
        ({"function": {"name": "a b"}}, ".function.name", "'a b' is no name"),
        ({"function": {"name": "a>"}}, ".function.name", "'a>' is no name"),
        ({"function": {"name": "a", "parameters": []}}, ".function.parameters", "must be a JSON schema"),
        (
            {"function": {"name": "a", "parameters": {"type": "array"}}},
            ".function.parameters",
            "must be 'object'",
        ),
        (
            {"function": {"name": "a", "parameters": {"properties": []}}},
            ".function.parameters",
            "must be an object",
        ),
        ({"function": {"name": "first"}}, "", "there is a tool called 'first' already"),
    ],
)
def test_wrong_tools_are_named(tool: Any, where: str, problem: str) -> None:
    with pytest.raises(RequestError) as caught:
        tools_from_openai([{"function": {"name": "first"}}, tool])
    assert caught.value.param == f"tools[1]{where}"
    assert problem in str(caught.value)
    assert isinstance(caught.value, BadSchema) == (
        where not in ("", ".type", ".function") or "already" in problem
    )


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
CALLS = st.builds(
    ToolCall,
    name=st.text(min_size=1, max_size=5),
    arguments=st.dictionaries(st.text(max_size=3), VALUES, max_size=3),
    id=st.text(max_size=5),
)
TEXT = st.text(max_size=10)
MESSAGES = st.one_of(
    st.builds(Message, role=st.sampled_from(["system", "user"]), content=TEXT, name=st.none() | TEXT),
    st.builds(Message, role=st.just("tool"), content=TEXT, tool_call_id=st.none() | TEXT),
    st.builds(
        Message,
        role=st.just("assistant"),
        content=TEXT,
        reasoning=st.none() | TEXT,
        tool_calls=st.lists(CALLS, max_size=2).map(tuple),
    ),
)


@given(st.lists(MESSAGES, max_size=4))
def test_written_messages_are_read_back(messages: list[Message]) -> None:
    assert list(messages_from_openai([message_to_openai(message) for message in messages])) == messages
