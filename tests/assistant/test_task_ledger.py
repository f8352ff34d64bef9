"""The budget of a task: counted from what clients send, remembered where they drop it."""

import asyncio
from dataclasses import replace

from stepflash.assistant.budget import Thinking, limit_of
from stepflash.assistant.session import Session
from stepflash.assistant.stream import Answer, fold
from stepflash.assistant.task_ledger import MAX_ENTRIES, TaskLedger
from stepflash.chat.messages import Conversation, Message, Tool, ToolCall
from stepflash.engine.request import SamplingParams
from tests.scripted_engine import END, scripted_session

USER = Message(role="user", content="Mend the bug")
CALL = ToolCall(name="ls", arguments={"b": 1, "a": 2}, id="call_1")
LS = Tool(definition={"type": "function", "function": {"name": "ls"}})


def turn(thought: str | None, text: str = "", **more: object) -> Message:
    return Message(role="assistant", content=text, reasoning=thought, tool_calls=(CALL,), **more)  # type: ignore[arg-type]


def result(text: str) -> Message:
    return Message(role="tool", content=text)


def thought_in(ledger: TaskLedger, *messages: Message) -> int:
    return ledger.task(messages, len).num_thought_tokens


def test_thoughts_since_the_last_message_of_the_user_count() -> None:
    ledger = TaskLedger()
    earlier = (
        USER,
        turn("long ago"),
        result("x"),
        Message(role="assistant", content="done", reasoning="old"),
    )
    assert thought_in(ledger, *earlier, USER) == 0
    assert thought_in(ledger, *earlier, USER, turn("abc"), result("y"), turn("de"), result("z")) == 5
    wrapped = Message(role="user", content="<tool_response>r</tool_response>")
    assert thought_in(ledger, USER, turn("abc"), wrapped, turn("de")) == 5


def test_what_clients_drop_is_remembered() -> None:
    ledger = TaskLedger()
    first = ledger.task([USER], len)
    ledger.record(first, turn("abc", "I look"), 3)
    seen = turn(None, " I look\n")
    changed = replace(CALL, id="toolu_9", arguments={"a": 2, "b": 1})
    seen = replace(seen, tool_calls=(changed,))
    second = ledger.task([USER, seen, result("y")], len)
    assert second.num_thought_tokens == 3
    ledger.record(second, turn("defg"), 4)
    assert thought_in(ledger, USER, seen, result("y"), turn(None), result("z")) == 7
    # The same question again, or another turn of events, is another task.
    assert thought_in(ledger, USER) == 0
    assert thought_in(ledger, USER, seen, result("other"), turn(None)) == 0
    assert thought_in(ledger, Message(role="user", content="else"), seen) == 0
    # What is sent counts if it is more.
    assert thought_in(ledger, USER, replace(seen, reasoning="abcdefghij"), result("y")) == 10


def test_the_ledger_forgets_the_oldest() -> None:
    ledger = TaskLedger()
    tasks = [ledger.task([Message(role="user", content=str(i))], len) for i in range(MAX_ENTRIES + 1)]
    for task in tasks:
        ledger.record(task, turn(None), 1)
    assert thought_in(ledger, *tasks[0].messages, turn(None)) == 0
    assert thought_in(ledger, *tasks[-1].messages, turn(None)) == 1


def ask(session: Session, *messages: Message, budget: int = 20) -> Answer:
    prompt = session.prepare(
        Conversation(messages=messages, tools=(LS,)), SamplingParams(), thinking=Thinking(task_tokens=budget)
    )
    limit = limit_of(prompt.request.constraint)
    assert limit is not None
    return asyncio.run(fold(session.answer(prompt)))


def test_the_budget_shrinks_with_each_turn() -> None:
    """A byte is a token here: 12 of thought and its end in the first turn, so 7 are left for the second."""
    call = "<tool_call>\n<function=ls>\n</function>\n</tool_call>"
    session = scripted_session(f"I think now.</think>{call}{END}", f"And I think once more.</think>Done{END}")
    first = ask(session, USER)
    assert (first.usage.thinking_budget, first.usage.thinking_cut) == (20, None)
    assert first.usage.task_reasoning_tokens == first.usage.reasoning_tokens == 13
    dropped = replace(first.to_message(), reasoning=None)
    second = ask(session, USER, dropped, result("a b"))
    assert (second.usage.thinking_budget, second.usage.thinking_cut) == (7, "task_budget")
    assert second.reasoning is not None
    assert second.reasoning.startswith("And I t\n\nThat is enough")
    assert second.content == "Done"
    assert second.usage.task_reasoning_tokens == 13 + second.usage.reasoning_tokens
    spent = ask(session, USER, replace(dropped, reasoning="x" * 30), result("a b"))
    assert (spent.usage.thinking_budget, spent.usage.thinking_cut) == (0, "task_budget")
