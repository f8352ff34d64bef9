"""Levels of verbosity, `verbosity` in chat completions and `text.verbosity` in responses; pure.

The model was not trained on such levels, so the nearest that there is, is said to it: a sentence at the end of the
system message. `medium`, the default of the API, adds nothing.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from stepflash.chat.messages import Conversation, Message
from stepflash.errors import RequestError

SENTENCES = {
    "low": "Keep your answers short.",
    "medium": "",
    "high": "Answer at length and in detail.",
}


def with_verbosity(conversation: Conversation, level: Any, param: str) -> Conversation:
    """The conversation that asks for a level; None asks for nothing.

    Raises:
        RequestError: there is no such level.
    """
    if level is None:
        return conversation
    if not isinstance(level, str) or level not in SENTENCES:
        raise RequestError(f"{param}: {level!r} is not one of {', '.join(SENTENCES)}", param=param)
    sentence = SENTENCES[level]
    if not sentence:
        return conversation
    first, *others = conversation.messages
    if first.role != "system":
        return replace(
            conversation, messages=(Message(role="system", content=sentence), *conversation.messages)
        )
    text = f"{first.content}\n\n{sentence}" if first.content else sentence
    return replace(conversation, messages=(replace(first, content=text), *others))
