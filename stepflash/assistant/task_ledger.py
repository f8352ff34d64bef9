"""How much a model has thought since the last message of the user, over all its turns with tools.

Clients send the history back with every request. Most send the thoughts too, and then counting is enough. Some
drop them; for those a ledger remembers, by a digest of what the task looked like without its thoughts, how much
had been thought when an answer was finished. The next request begins with that answer, so it finds the entry.
Two tasks that are the same to the letter share an entry, and then it is right for both.

Entries are some bytes each, the `MAX_ENTRIES` used last are kept, in memory alone. After a restart what clients send
is all there is.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from stepflash.chat.messages import Message

MAX_ENTRIES = 16384


@dataclass(frozen=True, slots=True)
class Task:
    """The messages from the last one of the user on, and the tokens thought in them so far."""

    messages: tuple[Message, ...]
    num_thought_tokens: int


class TaskLedger:
    """Used from one event loop and its worker threads; entries are replaced whole, so nothing needs a lock."""

    def __init__(self) -> None:
        self._num_tokens: OrderedDict[bytes, int] = OrderedDict()

    def task(self, messages: Sequence[Message], count: Callable[[str], int]) -> Task:
        """The task that a conversation is in; `count` gives the number of tokens of a text."""
        begin = max((i for i, message in enumerate(messages) if _is_of_user(message)), default=0)
        current = tuple(messages[begin:])
        num_tokens = sum(count(message.reasoning) for message in current if message.reasoning)
        answers = [i for i, message in enumerate(current) if message.role == "assistant"]
        if answers:
            num_tokens = max(num_tokens, self._num_tokens.get(_digest(current[: answers[-1] + 1]), 0))
        return Task(current, num_tokens)

    def record(self, task: Task, answer: Message, num_thought_tokens: int) -> None:
        """An answer was finished, with so many tokens of thought."""
        key = _digest((*task.messages, answer))
        self._num_tokens[key] = task.num_thought_tokens + num_thought_tokens
        self._num_tokens.move_to_end(key)
        while len(self._num_tokens) > MAX_ENTRIES:
            self._num_tokens.popitem(last=False)


def _is_of_user(message: Message) -> bool:
    """Whether a message begins a task; the result of a tool as a message of the user does not (as in the
    template)."""
    text = message.content.strip()
    return message.role == "user" and not (
        text.startswith("<tool_response>") and text.endswith("</tool_response>")
    )


def _digest(messages: Sequence[Message]) -> bytes:
    """Of what was said, without thoughts, ids of calls and white space at the ends, which clients change."""
    said = [
        [
            message.role,
            message.content.strip(),
            [[call.name, dict(call.arguments)] for call in message.tool_calls],
        ]
        for message in messages
    ]
    text = json.dumps(said, ensure_ascii=True, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
