"""Takes out of prompts what clients change in every request without meaning anything by it; pure.

A prompt is reused from the cache up to the first difference, so one changing number at its very front costs a
whole prefill. Known noise:
  * Claude Code begins its system text with `x-anthropic-billing-header: cc_version=...; ...;`, whose values
    change with every build.
Order of keys and blocks is kept: the model sees the tools as they were sent.
"""

from __future__ import annotations

import re
from dataclasses import replace

from stepflash.chat.messages import Conversation

# Its fields are matched one by one, because a client that joins blocks may put the next text on the same line.
_BILLING_HEADER = re.compile(r"\s*x-anthropic-billing-header:(?:[ \t]*[\w.-]+=[^;\n]*(?:;|(?=\n)|\Z))*\s*")


def canonical(conversation: Conversation) -> Conversation:
    """The same conversation without the noise."""
    if not conversation.messages or conversation.messages[0].role != "system":
        return conversation
    first, *others = conversation.messages
    text = drop_billing_header(first.content)
    if text == first.content:
        return conversation
    kept = [replace(first, content=text), *others] if text or not others else others
    return replace(conversation, messages=tuple(kept))


def drop_billing_header(text: str) -> str:
    """System text without the header that Claude Code puts in front of it."""
    header = _BILLING_HEADER.match(text)
    return text[header.end() :] if header else text
