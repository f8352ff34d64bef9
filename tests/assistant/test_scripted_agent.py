"""The scripted agent does its task with any set of tools, and what is wrong on the way shows in what it writes."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from stepflash.assistant.budget import Thinking
from stepflash.assistant.scripted import scripted_session
from stepflash.assistant.scripted_agent import scripted_agent, start_file, task
from stepflash.assistant.stream import Answer, fold
from stepflash.chat.messages import Conversation, Message, Tool
from stepflash.engine.request import SamplingParams

SAMPLING = SamplingParams(max_tokens=None)


def tool(name: str, *parameters: str) -> Tool:
    properties = {parameter: {"type": "string"} for parameter in parameters}
    return Tool(definition={"name": name, "parameters": {"type": "object", "properties": properties}})


FILES = (tool("Read", "file_path"), tool("Write", "file_path", "content"), tool("Bash", "command"))
SHELL = (tool("exec_command", "cmd"),)


def ask(*messages: Message, tools: tuple[Tool, ...] = (), **options: Any) -> Answer:
    session = scripted_session(answer=scripted_agent, bursts=(5,), max_context_tokens=50_000)
    prompt = session.prepare(Conversation(messages=messages, tools=tools), SAMPLING, **options)
    return asyncio.run(fold(session.answer(prompt)))


def run(tools: tuple[Tool, ...], result: Callable[[str, str], str]) -> tuple[list[tuple[str, str]], str]:
    """The calls that it makes, and its last words."""
    messages = [Message(role="user", content=task("/some/where"))]
    calls: list[tuple[str, str]] = []
    for _ in range(4):
        answer = ask(*messages, tools=tools)
        assert answer.reasoning
        messages.append(answer.to_message())
        if not answer.tool_calls:
            return calls, str(answer.content)
        (call,) = answer.tool_calls
        calls.append((call.name, call.arguments))
        messages.append(Message(role="tool", content=result(call.name, call.arguments), tool_call_id=call.id))
    raise AssertionError(calls)


@pytest.mark.parametrize(
    ("tools", "calls"),
    [
        (
            FILES,
            [
                ("Read", '{"file_path": "/some/where/in.txt"}'),
                ("Write", '{"file_path": "/some/where/out.txt", "content": "42"}'),
            ],
        ),
        (
            SHELL,
            [
                ("exec_command", '{"cmd": "cat /some/where/in.txt"}'),
                ("exec_command", '{"cmd": "printf %s 42 > /some/where/out.txt"}'),
            ],
        ),
    ],
)
def test_it_reads_and_writes_with_what_there_is(
    tools: tuple[Tool, ...], calls: list[tuple[str, str]]
) -> None:
    done, words = run(tools, lambda name, _: start_file(41) if name in ("Read", "exec_command") else "ok")
    assert (done, words) == (calls, "I wrote 42.")


def test_a_lost_result_is_noticed() -> None:
    done, words = run(FILES, lambda *_: "")
    assert (len(done), words) == (1, "I could not read in.txt.")


def test_what_is_not_the_task_gets_a_short_text() -> None:
    answer = ask(Message(role="user", content="Make a title."))
    assert (answer.content, answer.tool_calls) == ("Read a number and write the next one", ())


def test_it_does_not_think_where_no_thought_is_wanted() -> None:
    answer = ask(Message(role="user", content="Make a title."), thinking=Thinking(max_tokens=0))
    assert answer.content == "Read a number and write the next one"
    assert not answer.reasoning
