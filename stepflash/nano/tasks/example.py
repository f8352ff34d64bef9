"""One training or evaluation conversation, and which side of the split it belongs to.

An `Example` is a whole conversation whose last message is the assistant's: what comes before is the prompt, the
last message is the only right answer. Whether an example may be trained on is a property of its prompt alone:
a fixed sixteenth of the hash space of (query, tools) is reserved for evaluation, so no seed, phase or process can
leak a held-out prompt into training.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random
from typing import Literal

from stepflash.chat.messages import Message, Tool

Tier = Literal["easy", "hard"]
HELD_OUT_SHARE = 16  # one prompt in so many is for evaluation only


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A conversation that ends with the assistant's right answer.

    `loss_on_prompt` adds the user's text to what the model is trained to predict; by default only the assistant's
    turns after the last user message are (older turns are rendered without their thoughts).
    """

    task: str
    tier: Tier
    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()
    loss_on_prompt: bool = False

    @property
    def prompt(self) -> tuple[Message, ...]:
        return self.messages[:-1]

    @property
    def target(self) -> Message:
        return self.messages[-1]


Generator = Callable[[Random, Tier], Example]


def single_turn(task: str, tier: Tier, question: str, reasoning: str, answer: str) -> Example:
    """The common shape: a question, a thought and a short answer."""
    return Example(
        task=task,
        tier=tier,
        messages=(
            Message(role="user", content=question),
            Message(role="assistant", content=answer, reasoning=reasoning),
        ),
    )


def turns(example: Example) -> list[Example]:
    """One example per assistant message after the last user message, each ending with that message.

    A conversation of two calls and an answer gives three: every step is evaluated after the right history.
    """
    messages = example.messages
    last_user = max(index for index, message in enumerate(messages) if message.role == "user")
    ends = [index for index in range(last_user + 1, len(messages)) if messages[index].role == "assistant"]
    return [replace(example, messages=messages[: end + 1]) for end in ends]


def is_held_out(query: str, tools: tuple[Tool, ...]) -> bool:
    """True if this prompt is reserved for evaluation."""
    definitions = json.dumps([tool.definition for tool in tools], sort_keys=True)
    digest = hashlib.blake2b(f"{query}\0{definitions}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") % HELD_OUT_SHARE == 0


def belongs_to_held_out(example: Example) -> bool:
    """True if the query that the example answers is reserved for evaluation."""
    return is_held_out(_queries(example)[-1], example.tools)


def belongs_to_training(example: Example) -> bool:
    """True if no query of the conversation, with or without the tools, is reserved for evaluation."""
    return not any(is_held_out(query, example.tools) or is_held_out(query, ()) for query in _queries(example))


def _queries(example: Example) -> list[str]:
    return [message.content for message in example.messages if message.role == "user"]
