"""Takes out of prompts what clients change from request to request without meaning anything by it; pure.

A prompt is reused from the cache up to the first difference, so one changing number at its very front costs a
whole prefill. Known noise, all of it in the head of the prompt:
  * Claude Code begins its system text with `x-anthropic-billing-header: cc_version=...; ...;`, whose values
    change with every build and, in some builds, with every request.
  * A clock in the system text, `Current time: 2026-11-25 14:03:27`. The date stays, for the model needs it and it
    costs one miss a day; the time of day goes.
  * The order of JSON keys in tools: clients that keep them in hash tables send another one after each start.
    Here they come in the order in which people write them; of the parameters of a function the required ones
    come first, as `required` lists them, then the others by name. The order of the tools is kept.
  * `cache_control` marks in tools, which move from request to request.
That a text is once a string and once a list of blocks, that ids change and that marks move between messages is
settled where a request is decoded: none of it is rendered.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from stepflash.chat.messages import Conversation, Tool

# Its fields are matched one by one, because a client that joins blocks may put the next text on the same line.
_BILLING_HEADER = re.compile(r"\s*x-anthropic-billing-header:(?:[ \t]*[\w.-]+=[^;\n]*(?:;|(?=\n)|\Z))*\s*")
# A line whose label says that it is the present moment, up to the time of day.
_CLOCK_LINE = re.compile(
    r"^(?P<kept>[^\n:]{0,40}?\b(?:current|now|today|local|utc)\b[^\n:]{0,40}?(?::|\bis\b)[^\n]*?)"
    r"(?:[ T,]|\bat\b)+\d{1,2}:\d{2}(?::\d{2}(?:[.,]\d+)?)?(?: ?[AaPp](?:\.[Mm]\.|[Mm]\b))?"
    r"(?: ?(?:Z|[+-]\d{2}:?\d{2}|UTC|GMT)\b(?:[+-]\d{1,2})?)?",
    re.MULTILINE | re.IGNORECASE,
)
_DATE = re.compile(
    r"\d{4}-\d{2}-\d{2}|\d{1,2}[/.]\d{1,2}[/.]\d{2,4}|\b\d{1,2},? \d{4}\b|\b[A-Z][a-z]{2} \d{1,2}\b"
)
_MARKS = frozenset({"cache_control"})
# In this order, then what is left by name.
_TOOL_KEYS = ("type", "function")
_FUNCTION_KEYS = ("name", "description", "parameters", "strict")
_SCHEMA_KEYS = ("$schema", "type", "description", "enum", "properties", "required", "items")
# Where schemas stand inside a schema: by name, in a list, or one alone.
_NAMED_SCHEMAS = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
_LISTED_SCHEMAS = frozenset({"anyOf", "oneOf", "allOf", "prefixItems"})
_ONE_SCHEMA = frozenset(
    {"items", "additionalProperties", "not", "if", "then", "else", "contains", "propertyNames"}
)
_MAX_DEPTH = 64  # deeper schemas stay as they are


def canonical(conversation: Conversation) -> Conversation:
    """The same conversation without the noise."""
    messages = conversation.messages
    if messages and messages[0].role == "system":
        first, *others = messages
        text = drop_clock(drop_billing_header(first.content))
        if text != first.content:
            messages = (replace(first, content=text), *others) if text or not others else tuple(others)
    return replace(conversation, messages=messages, tools=canonical_tools(conversation.tools))


def canonical_tools(tools: Iterable[Tool]) -> tuple[Tool, ...]:
    """The same tools with their keys in one order and without marks for caches."""
    return tuple(replace(tool, definition=_tool(tool.definition)) for tool in tools)


def drop_billing_header(text: str) -> str:
    """System text without the header that Claude Code puts in front of it."""
    header = _BILLING_HEADER.match(text)
    return text[header.end() :] if header else text


def drop_clock(text: str) -> str:
    """System text whose lines about the present moment tell the date and not the time of day.

    A line without a date is left alone: it may be an example, or all that the model is told.
    """
    return _CLOCK_LINE.sub(lambda line: line["kept"] if _DATE.search(line["kept"]) else line[0], text)


def _tool(definition: Mapping[str, Any]) -> dict[str, Any]:
    function = definition.get("function")
    if not isinstance(function, Mapping):
        return _function(definition)
    ordered = _ordered(definition, _TOOL_KEYS)
    return {**ordered, "function": _function(function)}


def _function(function: Mapping[str, Any]) -> dict[str, Any]:
    ordered = _ordered(function, ("type", *_FUNCTION_KEYS))
    return {name: _schema(value, 0) if name == "parameters" else value for name, value in ordered.items()}


def _schema(schema: Any, depth: int) -> Any:
    if not isinstance(schema, Mapping) or depth > _MAX_DEPTH:
        return _plain(schema, depth)
    ordered = _ordered(schema, _SCHEMA_KEYS)
    required = schema.get("required")
    first = [name for name in required if isinstance(name, str)] if isinstance(required, list) else []
    for name, value in ordered.items():
        if name in _NAMED_SCHEMAS and isinstance(value, Mapping):
            of_name = _ordered(value, first if name == "properties" else (), without=frozenset())
            ordered[name] = {key: _schema(inner, depth + 1) for key, inner in of_name.items()}
        elif name in _LISTED_SCHEMAS and isinstance(value, list):
            ordered[name] = [_schema(inner, depth + 1) for inner in value]
        elif name in _ONE_SCHEMA:
            ordered[name] = _schema(value, depth + 1)
        else:
            ordered[name] = _plain(value, depth + 1)
    return ordered


def _plain(value: Any, depth: int) -> Any:
    """Any other JSON: a default, an example."""
    if depth > _MAX_DEPTH:
        return value
    if isinstance(value, Mapping):
        return {name: _plain(value[name], depth + 1) for name in sorted(value)}
    return [_plain(inner, depth + 1) for inner in value] if isinstance(value, list) else value


def _ordered(
    fields: Mapping[str, Any], first: Iterable[str], without: frozenset[str] = _MARKS
) -> dict[str, Any]:
    names = [name for name in dict.fromkeys(first) if name in fields]
    names += sorted(name for name in fields if name not in names)
    return {name: fields[name] for name in names if name not in without}
