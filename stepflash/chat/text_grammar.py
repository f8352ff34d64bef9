"""Which texts a JSON schema allows, as terms of a regular expression: for tool parameters, whose strings stand in a
call as they are, without quotes.

A term is what may stand in a terminal of a Lark grammar; `&` joins terms, `~` negates one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from typing import Any

from llguidance import regex_to_lark

from stepflash.chat.arguments import declared_types, resolve
from stepflash.chat.grammar import check_grammar
from stepflash.errors import BadSchema

# Text in a call. Tags of calls must not be in it: whoever reads it could not tell them from the real ones.
TAG = re.compile("</?(parameter|function|tool_call)")
RAW = rf"/(?s:.*)/ & ~/(?s:.*){TAG.pattern.replace('/', chr(92) + '/')}(?s:.*)/"
MAX_ALTERNATIVES_DEPTH = 16
# What would be read as a value of another type, where a parameter may be of that type or text.
_READ_AS = {
    "null": r"/\s*([nN][uU][lL][lL]|[nN][oO][nN][eE])\s*/",
    "integer": r"/\s*[+-]?[0-9]+\s*/",
    "number": r"/\s*[+-]?([0-9][0-9_]*\.?[0-9_]*|\.[0-9_]+)([eE][+-]?[0-9_]+)?\s*/",
    "boolean": r"/\s*([tT][rR][uU][eE]|[fF][aA][lL][sS][eE])\s*/",
    "object": r"/\s*[{\[(](?s:.*)/",
    "array": r"/\s*[{\[(](?s:.*)/",
}
_DATE = "[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])"
_TIME = r"([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{1,6})?(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
_DAYS, _SECONDS = "[0-9]+D", "[0-9]+S"
_MONTHS, _MINUTES = f"[0-9]+M({_DAYS})?", f"[0-9]+M({_SECONDS})?"
_IN_DAYS = f"({_DAYS}|{_MONTHS}|[0-9]+Y({_MONTHS})?)"
_IN_HOURS = f"T({_SECONDS}|{_MINUTES}|[0-9]+H({_MINUTES})?)"
_LABEL = "[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_HOST = rf"{_LABEL}(\.{_LABEL})*"
_ATOM = r"[A-Za-z0-9!#$%&'*+\/=?^_`{|}~-]+"
_OCTET = "(25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_HEX = "[0-9a-fA-F]{1,4}"
_SHORTENED = [  # by the number of groups in front of the gap
    (f"{_HEX}(:{_HEX}){{{before - 1}}}" if before else "")
    + "::"
    + (f"({_HEX}(:{_HEX}){{0,{6 - before}}})?" if before < 7 else "")
    for before in range(8)
]
_PATH = r"([A-Za-z0-9._~!$&'()*+,;=:@-]|%[0-9A-Fa-f]{2})"
_AUTHORITY = rf"([A-Za-z0-9._~!$&'()*+,;=:-]*@)?({_HOST})?(:[0-9]{{1,5}})?"
# What is allowed is of the format; of rare ways to write a value (addresses in brackets, say) some are not.
_FORMATS = {
    "date": f"/{_DATE}/",
    "time": f"/{_TIME}/",
    "date-time": f"/{_DATE}T{_TIME}/",
    "duration": f"/P([0-9]+W|{_IN_DAYS}({_IN_HOURS})?|{_IN_HOURS})/",
    "email": rf"/{_ATOM}(\.{_ATOM})*@{_HOST}/",
    "hostname": f"/{_HOST}/",
    "ipv4": rf"/{_OCTET}(\.{_OCTET}){{3}}/",
    "ipv6": f"/({_HEX}:){{7}}{_HEX}|{'|'.join(_SHORTENED)}/",
    "uuid": "/[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}/",
    "uri": rf"/[A-Za-z][A-Za-z0-9+.-]*:(\/\/{_AUTHORITY}(\/{_PATH}*)*|\/?({_PATH}+(\/{_PATH}*)*)?)"
    rf"(\?({_PATH}|[\/?])*)?(#({_PATH}|[\/?])*)?/",
}


def excluded(types: Collection[str]) -> list[str]:
    """What text must not be where these types are allowed too. The word null is always read as null but where no
    type is declared at all."""
    if not types:
        return []
    return [f"~{_READ_AS[kind]}" for kind in sorted({*types, "null"} - {"string"})]


def text_terms(
    schema: Any, root: Mapping[str, Any], where: str, *, is_strict: bool, depth: int = MAX_ALTERNATIVES_DEPTH
) -> list[str] | None:
    """Terms that a text must match under the schema; None if no text is allowed.

    Raises:
        BadSchema: a pattern is no regular expression or, with `is_strict`, a keyword cannot be enforced.
    """
    if schema is False:
        return None
    if not isinstance(schema, Mapping):
        return []
    if depth == 0:
        raise BadSchema(f"{where}: its references or alternatives go too deep", param=where)
    declared = list(declared_types(schema))
    if declared and "string" not in declared:
        return None
    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    terms: list[str] = []
    if isinstance(values, list):
        texts = [json.dumps(value, ensure_ascii=False) for value in values if isinstance(value, str)]
        if not texts:
            return None
        terms.append(f"({' | '.join(texts)})")
    if not declared and values is None and {"properties", "items", "additionalProperties"} & set(schema):
        return None
    terms += _own_terms(schema, where)
    if is_strict and (unknown := sorted({"not", "if"} & set(schema))):
        raise BadSchema(f"{where}.{unknown[0]}: cannot be enforced on text", param=f"{where}.{unknown[0]}")
    for key in ("anyOf", "oneOf"):
        if isinstance(schema.get(key), list):
            ways = [
                text_terms(part, root, where, is_strict=is_strict, depth=depth - 1) for part in schema[key]
            ]
            allowed = [way for way in ways if way is not None]
            if not allowed:
                return None
            if all(allowed):
                terms.append("(" + " | ".join(f"({' & '.join(way)})" for way in allowed) + ")")
    parts = list(schema["allOf"]) if isinstance(schema.get("allOf"), list) else []
    if isinstance(schema.get("$ref"), str):
        parts.append(resolve(schema["$ref"], root))
    for part in parts:
        more = text_terms(part, root, where, is_strict=is_strict, depth=depth - 1)
        if more is None:
            return None
        terms += more
    return terms


def _own_terms(schema: Mapping[str, Any], where: str) -> list[str]:
    terms = []
    pattern = schema.get("pattern")
    if isinstance(pattern, str):
        terms.append(f"/{_search(pattern)}/")
        check_grammar(f"start: A\nA: {terms[-1]}", f"{where}.pattern")
    shortest, longest = schema.get("minLength", 0), schema.get("maxLength")
    if isinstance(shortest, int) and (shortest > 0 or isinstance(longest, int)):
        limit = longest if isinstance(longest, int) else ""
        terms.append(f"/(?s:.{{{shortest},{limit}}})/")
        check_grammar(f"start: A\nA: {terms[-1]}", where)
    if schema.get("format") in _FORMATS:
        terms.append(_FORMATS[schema["format"]])
    return terms


def _search(pattern: str) -> str:
    """A pattern of JSON schema, which may match anywhere, as one that matches the whole text."""
    regex = regex_to_lark(pattern, "dw")
    alternatives = _alternatives(regex)
    return "|".join(
        ("" if part.startswith("^") else "(?s:.*)")
        + f"({part.removeprefix('^').removesuffix('$') if _ends_with_anchor(part) else part.removeprefix('^')})"
        + ("" if _ends_with_anchor(part) else "(?s:.*)")
        for part in alternatives
    )


def _ends_with_anchor(part: str) -> bool:
    return part.endswith("$") and (len(part) - len(part[:-1].rstrip("\\")) - 1) % 2 == 0


def _alternatives(regex: str) -> list[str]:
    """Split at each `|` that is in no group and no class."""
    parts, depth, in_class, begin, at = [], 0, False, 0, 0
    while at < len(regex):
        letter = regex[at]
        if letter == "\\":
            at += 1
        elif in_class:
            in_class = letter != "]"
        elif letter == "[":
            in_class = True
        elif letter in "()":
            depth += 1 if letter == "(" else -1
        elif letter == "|" and depth == 0:
            parts.append(regex[begin:at])
            begin = at + 1
        at += 1
    return [*parts, regex[begin:]]
