"""From the text of a tool call's parameter to a JSON value of the type that the tool's schema asks for.

The model writes every value as bare text; only the schema tells `5` the number from "5" the text. `Typing`
is what a schema says about one parameter, `convert` applies it. Whatever does not fit its type stays text: the
tool, not the parser, is the judge of a wrong argument.
"""

from __future__ import annotations

import ast
import json
import math
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from pydantic_core import from_json

# Type names beside those of JSON schema are what people write; models were trained on them too.
_SPELLINGS: dict[str, tuple[str, ...]] = {
    "string": ("string", "str", "text", "varchar", "char", "enum"),
    "integer": ("int", "uint", "long", "short", "unsigned"),  # beginnings: int64, integer, ...
    "number": ("num", "float", "double", "decimal"),  # beginnings
    "boolean": ("bool", "binary"),  # beginnings
    "object": ("object", "dict", "map"),  # beginnings
    "array": ("arr", "list", "tuple", "set"),  # beginnings
    "null": ("null", "none"),
}
_INTEGER = re.compile(r"[+-]?[0-9]+")
_SURROGATE = re.compile("[\ud800-\udfff]")
_MAX_EXACT_FLOAT = 2.0**53  # above, a float is no longer every integer


@dataclass(frozen=True, slots=True)
class Typing:
    """The JSON types that a parameter may have; empty when the schema does not say. `literals` are the texts
    that an enum lists: they are meant as they stand."""

    types: frozenset[str] = frozenset()
    literals: frozenset[str] = frozenset()

    @property
    def is_text(self) -> bool:
        """Whether every value is its text, but for a literal null, so that it can be passed on as it arrives."""
        return self.types <= {"string", "null"}


def typings(parameters: Any) -> dict[str, Typing]:
    """The typing of every declared parameter, from the JSON schema of a tool's arguments."""
    properties = parameters.get("properties") if isinstance(parameters, Mapping) else None
    if not isinstance(properties, Mapping):
        return {}
    return {str(key): _typing(schema, parameters) for key, schema in properties.items()}


def _typing(schema: Any, root: Mapping[str, Any]) -> Typing:
    """Union over type lists, anyOf, oneOf, allOf, enum and const; each local `$ref` is followed once."""
    types: set[str] = set()
    literals: set[str] = set()
    followed: set[str] = set()
    waiting = [schema]
    while waiting:
        part = waiting.pop()
        if not isinstance(part, Mapping):
            continue
        values = part["enum"] if isinstance(part.get("enum"), list) else []
        if "const" in part:
            values = [*values, part["const"]]
        literals.update(value for value in values if isinstance(value, str))
        types.update(declared_types(part))
        if part.get("type") is None:
            types.update(type_of_value(value) for value in values)
            if "properties" in part or "additionalProperties" in part:
                types.add("object")
            if "items" in part:
                types.add("array")
        for key in ("anyOf", "oneOf", "allOf"):
            waiting.extend(part[key] if isinstance(part.get(key), list) else [])
        reference = part.get("$ref")
        if isinstance(reference, str) and reference not in followed:
            followed.add(reference)
            waiting.append(resolve(reference, root))
    return Typing(frozenset(types), frozenset(literals))


def declared_types(schema: Mapping[str, Any]) -> Iterable[str]:
    """The JSON types that a schema's `type` names."""
    names = schema.get("type")
    for name in names if isinstance(names, list) else [] if names is None else [names]:
        lowered = str(name).strip().lower()
        for json_type, spellings in _SPELLINGS.items():
            exact = json_type in ("string", "null")
            if lowered in spellings or (not exact and lowered.startswith(spellings)):
                yield json_type
                break


def type_of_value(value: Any) -> str:
    kinds: tuple[tuple[type | tuple[type, ...], str], ...] = (
        (bool, "boolean"),
        (int, "integer"),
        (float, "number"),
        (str, "string"),
        (list, "array"),
        (dict, "object"),
    )
    return next((name for kind, name in kinds if isinstance(value, kind)), "null")


def resolve(reference: str, root: Mapping[str, Any]) -> Any:
    """The target of a local JSON pointer such as `#/$defs/Color`; None when it leads nowhere."""
    target: Any = root
    for part in reference.removeprefix("#").strip("/").split("/"):
        key = part.replace("~1", "/").replace("~0", "~")
        target = target.get(key) if isinstance(target, Mapping) else None
    return target


def convert(text: str, typing: Typing) -> Any:
    """The value that `text` stands for.

    A literal null, in any case, is null for every type but an enum that lists it. Otherwise types are tried from
    the most to the least specific: integer, number, boolean, object and array (JSON first, then a Python
    literal), text.
    """
    types = typing.types
    stripped = text.strip()
    if text in typing.literals:
        return text
    if text.lower() == "null":
        return None
    if typing.is_text:
        return text
    if stripped.lower() in ("null", "none"):
        return None
    if "integer" in types and _INTEGER.fullmatch(stripped) and len(stripped) < 4000:
        return int(stripped)
    if "number" in types:
        number = _number(stripped)
        if number is not None:
            return number
    if "boolean" in types:
        if stripped.lower() in ("true", "false"):
            return stripped.lower() == "true"
        if types == {"boolean"}:
            return False
    if types & {"object", "array"}:
        value = _structure(stripped)
        fits = (isinstance(value, dict) and "object" in types) or (
            isinstance(value, list) and "array" in types
        )
        if fits or (value is not None and "string" not in types):
            return value
    return text


def _number(text: str) -> int | float | None:
    """A finite number; integral ones are integers, as JSON clients expect of 3.0 or 1e3."""
    if _INTEGER.fullmatch(text) and len(text) < 4000:
        return int(text)
    try:
        value = float(text) if "_" not in text else math.nan
    except ValueError:
        return None
    if not math.isfinite(value):
        return None
    return int(value) if value.is_integer() and abs(value) < _MAX_EXACT_FLOAT else value


def _structure(text: str) -> Any:
    """JSON, else a Python literal made of JSON's types, else None."""
    try:
        return json.loads(text, parse_constant=_refuse, parse_float=_finite)
    except (ValueError, RecursionError):
        pass
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "invalid escape sequence" is the model's, not ours
            value = ast.literal_eval(text)
        return json.loads(json.dumps(value, allow_nan=False))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refuse(text)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def convert_to_json(text: str, typing: Typing) -> str:
    """`convert`, as JSON text."""
    try:
        return to_json(convert(text, typing))
    except RecursionError:
        return to_json(text)


def to_json(value: Any) -> str:
    """JSON text, non-ASCII kept, except for the lone surrogates that no encoding can carry."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return _SURROGATE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def read_json(text: str) -> Any:
    """The value of JSON text; of text that was cut off, as far as it goes: a call that a limit cut off comes back in
    conversations as it was sent.

    Raises:
        ValueError: it does not even begin like JSON.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return from_json(text, allow_partial="trailing-strings")
