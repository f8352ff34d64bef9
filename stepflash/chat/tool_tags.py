"""The tags of a tool call, recognised in text that may not be complete yet.

A well-formed call is `<tool_call> <function=NAME> (<parameter=KEY>VALUE</parameter>)* </function> </tool_call>`
with any whitespace between tags. Each question here is asked about a position in the text and has three answers:
yes, no, and `NeedMore` (raised) when the text ends before that is certain. So an answer, once given, is the same
however much text follows, and a parser built on it cannot depend on how its input was cut. After the end of the
output `NeedMore` is never raised: what is undecided then is decided by what is there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from stepflash.chat.arguments import Typing

CALL_START, CALL_END = "<tool_call>", "</tool_call>"
FUNCTION_END, PARAMETER_END = "</function>", "</parameter>"
CLOSING_TAGS = (CALL_END, FUNCTION_END, PARAMETER_END)

HeaderKind = Literal["function", "parameter"]

# `<function=NAME>`, and what models write instead: no "=", no ">". A name is at most this long, so that prose
# with a "<" is not held back for ever.
_NAME = "([^<>\\n]{0,200})"
_ATTRIBUTE = "([ \\t]*=[ \\t]*|[ \\t]+|)" + _NAME
_HEADER: dict[str, re.Pattern[str]] = {
    kind: re.compile(f"<{kind}{_ATTRIBUTE}([<>\\n])") for kind in ("function", "parameter")
}
_UNFINISHED_HEADER: dict[str, re.Pattern[str]] = {
    kind: re.compile(f"<{kind}{_ATTRIBUTE}") for kind in ("function", "parameter")
}
_TAGS = (CALL_START, *CLOSING_TAGS, "<function=", "<parameter=")
_SPACE = re.compile(r"\s*")

Declared = Mapping[str, Mapping[str, Typing]]


class NeedMore(Exception):
    """The text ends too early to tell."""


@dataclass(frozen=True, slots=True)
class Header:
    """An opening tag. `end` is where what follows it begins; `repaired` that it had to be mended."""

    name: str
    end: int
    repaired: bool


@dataclass(frozen=True, slots=True)
class Opening:
    """The beginning of a call: `<tool_call>`, if it is there, and the function's header."""

    name: str
    end: int
    wrapped: bool
    repaired: bool


class TagReader:
    """Looks for tags in `text`, which grows; `at_end` says that it will not grow any more."""

    def __init__(self, declared: Declared, *, any_function: bool) -> None:
        """`declared` maps tools to the typings of their parameters. `any_function` accepts a well-formed call of
        a tool that is not declared; a malformed one is only ever mended into a declared name."""
        self.declared = declared
        self.any_function = any_function
        self.text = ""
        self.at_end = False

    def is_at(self, position: int, tag: str) -> bool:
        """Whether `tag` stands at `position`."""
        found = self.text[position : position + len(tag)]
        if len(found) < len(tag) and tag.startswith(found) and not self.at_end:
            raise NeedMore
        return found == tag

    def after_space(self, position: int) -> int:
        """The first position from `position` on that is no whitespace; the length of the text at the end."""
        match = _SPACE.match(self.text, position)
        assert match is not None
        if match.end() == len(self.text) and not self.at_end:
            raise NeedMore
        return match.end()

    def header(
        self, position: int, kind: HeaderKind, declared: Mapping[str, object], *, any_name: bool
    ) -> Header | None:
        """The header at `position`. One that is not well-formed counts only if it can be mended into a declared
        name; a well-formed one counts whatever its name if `any_name`."""
        if not self.is_at(position, f"<{kind}"):
            return None
        match = _HEADER[kind].match(self.text, position)
        if match is None:
            if not self.at_end and _UNFINISHED_HEADER[kind].fullmatch(self.text, position):
                raise NeedMore
            return None
        equals, written, terminator = match.groups()
        is_well_formed = "=" in equals and terminator == ">"
        # Only ">" belongs to the tag: a newline instead of it is the first character of what follows.
        end = match.end() if terminator == ">" else match.end() - 1
        name = written.strip()
        if name in declared:
            return Header(name, end, repaired=not is_well_formed)
        for mended in _mended_names(name, kind):
            if mended in declared:
                return Header(mended, end, repaired=True)
        if is_well_formed and any_name and name:
            return Header(name, end, repaired=False)
        return None

    def opening(self, position: int) -> Opening | None:
        """The call that begins at `position`: a header that is followed by a parameter, by a closing tag, by the
        next call or by the end of the output. Anything else, even with the right tags, is prose about calls."""
        wrapped = self.is_at(position, CALL_START)
        start = self.after_space(position + len(CALL_START)) if wrapped else position
        repaired = not wrapped
        header = self.header(start, "function", self.declared, any_name=wrapped and self.any_function)
        if header is None and wrapped:
            # <parameter=NAME> in place of <function=NAME>
            header = self.header(start, "parameter", self.declared, any_name=False)
            repaired = True
        if header is None:
            return None
        opening = Opening(header.name, header.end, wrapped, repaired or header.repaired)
        follows = self.after_space(header.end)
        keys = self.declared.get(header.name, {})
        if (
            self.is_over(follows)
            or self.is_at(follows, FUNCTION_END)
            or self.is_at(follows, CALL_END)
            or self.header(follows, "parameter", keys, any_name=True)
            or self.is_at(follows, CALL_START)
        ):
            return opening
        return None

    def is_over(self, position: int) -> bool:
        """Whether the output ends at `position`, or in the middle of a tag that begins there."""
        if not self.at_end:
            return False
        rest = self.text[position:]
        return (
            not rest
            or any(tag.startswith(rest) and tag != rest for tag in _TAGS)
            or any(pattern.fullmatch(rest) for pattern in _UNFINISHED_HEADER.values())
        )


def _mended_names(name: str, kind: HeaderKind) -> tuple[str, ...]:
    """What may be meant by a name: quoted, `name="NAME"`, or with the tag's word doubled."""
    return (
        name.strip("\"'"),
        name.removeprefix("name=").strip("\"'"),
        name.removeprefix(f"{kind}=").strip(),
    )
