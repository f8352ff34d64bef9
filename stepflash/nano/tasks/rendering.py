"""Conversations as training text: pieces in the checkpoint's prompt format, each with or without loss.

The pieces join to exactly what the chat template renders (a test compares them); cutting the text up is why this
is not the template itself. The model writes everything from behind `<think>\\n` through `<|im_end|>` in the turns
after the last user message, so that is what carries loss.
"""

from __future__ import annotations

import functools
import json

from stepflash.chat.messages import Message, Tool
from stepflash.chat.template import ChatTemplate
from stepflash.chat.tokenizer import BOS_TEXT
from stepflash.nano.tasks.example import Example

THINK_START = "<think>\n"
THINK_END = "\n</think>\n"
TURN_END = "<|im_end|>"

Piece = tuple[str, bool]  # text, whether the model is trained to write it


def render(example: Example) -> list[Piece]:
    """The whole conversation with its answers, bos first.

    Raises:
        ValueError: an answer without a thought, which the prompt format cannot express.
    """
    messages = example.messages
    last_user = max(index for index, message in enumerate(messages) if message.role == "user")
    pieces = [(_head(messages, example.tools), False)]
    for index, message in enumerate(messages):
        if message.role == "assistant" and index > last_user:
            if not message.reasoning:
                raise ValueError(f"{example.task}: an answer to the last question needs a thought, got none")
            pieces.append((f"<|im_start|>assistant\n{THINK_START}", False))
            pieces.append((completion(message) + TURN_END, True))
            pieces.append(("\n", False))
        elif message.role == "assistant":
            pieces.append((f"<|im_start|>assistant\n{_body(message)}{TURN_END}\n", False))
        elif message.role == "tool":
            pieces.append((_tool_turn(messages, index), False))
        elif message.role == "user":
            pieces.append(("<|im_start|>user\n", False))
            pieces.append((message.content, example.loss_on_prompt and index == last_user))
            pieces.append((f"{TURN_END}\n", False))
    return _merge(pieces)


def prompt_text(example: Example) -> str:
    """What the model is given: everything before its last message, with the generation prompt."""
    pieces = render(example)
    return "".join(text for text, _ in pieces[:-2])


def completion(message: Message) -> str:
    """What the model has to write for `message`, without the end of the turn."""
    return f"{message.reasoning}{THINK_END}{_body(message)}"


def _body(message: Message) -> str:
    parts = [message.content]
    for call in message.tool_calls:
        parts.append(f"<tool_call>\n<function={call.name}>\n")
        parts += [
            f"<parameter={key}>\n{_value(value)}\n</parameter>\n" for key, value in call.arguments.items()
        ]
        parts.append("</function>\n</tool_call>")
    return "".join(parts)


def _value(value: object) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | tuple | dict) else str(value)


def _tool_turn(messages: tuple[Message, ...], index: int) -> str:
    """One result; results that follow each other share a turn."""
    opens = messages[index - 1].role != "tool"
    closes = index + 1 == len(messages) or messages[index + 1].role != "tool"
    return (
        ("<|im_start|>tool_response\n" if opens else "")
        + f"<tool_response>{messages[index].content}</tool_response>"
        + (f"{TURN_END}\n" if closes else "")
    )


def _head(messages: tuple[Message, ...], tools: tuple[Tool, ...]) -> str:
    system = messages[0].content if messages[0].role == "system" else None
    if not tools:
        return BOS_TEXT if system is None else f"{BOS_TEXT}<|im_start|>system\n{system}{TURN_END}\n"
    before, after = tool_interface()
    definitions = "".join(json.dumps(tool.definition, ensure_ascii=False) + "\n" for tool in tools)
    opening = "" if system is None else f"{system}\n\n"
    return f"{BOS_TEXT}<|im_start|>system\n{opening}{before}{definitions}{after}{TURN_END}\n"


@functools.cache
def tool_interface() -> tuple[str, str]:
    """The fixed text before and after the tool definitions, taken from the built-in chat template."""
    probe = {"probe": 0}
    question = Message(role="user", content="?")
    text = ChatTemplate.builtin().render((question,), (probe,), add_generation_prompt=False).text
    text = text.removeprefix(f"{BOS_TEXT}<|im_start|>system\n")
    head, _, _ = text.partition(f"{TURN_END}\n<|im_start|>user")
    before, _, after = head.partition(json.dumps(probe) + "\n")
    return before, after


def _merge(pieces: list[Piece]) -> list[Piece]:
    """Join neighbours of the same kind."""
    merged: list[Piece] = []
    for text, has_loss in pieces:
        if merged and merged[-1][1] == has_loss:
            merged[-1] = (merged[-1][0] + text, has_loss)
        else:
            merged.append((text, has_loss))
    return merged
