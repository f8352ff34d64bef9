"""Reading the body of a request without trusting it; the same for every API.

A `Body` judges every field that is known: those that it declares do something, and pydantic checks their types; those
that it refuses would change the answer and cannot be honoured; those that it ignores are harmless. Fields that nobody
has judged are ignored too, as the official servers do, but not silently: the reply names them. Every problem becomes
one `RequestError` that names the field. docs/api.md holds the same judgements in one table, and a test compares the
two with each other and with the official packages.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from stepflash.errors import RequestError

T = TypeVar("T")
# A list whose first wrong item is told, not the gigabytes of errors that a large body can hold.
Items = Annotated[list[T], Field(fail_fast=True)]

_NOTHING: tuple[Any, ...] = (None, False, [])


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a field is refused. `harmless` values ask for nothing, beside null, false and an empty list."""

    reason: str
    harmless: tuple[Any, ...] = ()

    def holds_of(self, value: Any) -> bool:
        return not any(
            value == ask and isinstance(value, bool) == isinstance(ask, bool)
            for ask in (*_NOTHING, *self.harmless)
        )


class Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)

    # Names of fields, also of fields in objects, as in `reasoning.mode`.
    refused: ClassVar[Mapping[str, Refusal]] = {}
    ignored: ClassVar[frozenset[str]] = frozenset()


BodyType = TypeVar("BodyType", bound=Body)


def read_body(raw: bytes, body_type: type[BodyType]) -> tuple[BodyType, list[str]]:
    """Parse and check a request body. Also returns the names of its fields that nobody has judged.

    Raises:
        RequestError: not JSON, nested too deeply, not an object, a field of the wrong type, or a refused one.
    """
    try:
        data = from_json(raw, allow_inf_nan=False)
    except ValueError as error:
        raise RequestError(f"the body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(data, dict):
        raise RequestError(f"the body must be a JSON object, not {_json_type(data)}", code="invalid_json")
    for name, refusal in body_type.refused.items():
        # All others are not there, which asks for nothing.
        if name.partition(".")[0] in data and refusal.holds_of(_value_at(data, name)):
            raise RequestError(f"{name}: {refusal.reason}", param=name, code="unsupported_parameter")
    judged = _judged(body_type)
    try:
        return body_type.model_validate(data), [name for name in data if name not in judged]
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        param = _field_path(first["loc"], data, is_missing=first["type"] == "missing")
        raise RequestError(f"{param}: {first['msg'].lower()}", param=param) from None


@functools.cache
def _judged(body_type: type[Body]) -> frozenset[str]:
    return frozenset({*body_type.model_fields, *body_type.refused, *body_type.ignored})


def _value_at(data: Any, path: str) -> Any:
    for name in path.split("."):
        data = data.get(name) if isinstance(data, dict) else None
    return data


def _field_path(loc: tuple[int | str, ...], data: Any, *, is_missing: bool) -> str:
    """The path of a field, as in `tools[0].type`, without the names that pydantic gives to members of a union."""
    path = ""
    for step in loc[:-1] if is_missing else loc:
        is_there = (isinstance(data, list) and isinstance(step, int) and step < len(data)) or (
            isinstance(data, dict) and step in data
        )
        if is_there:
            data = data[step]
            path += f"[{step}]" if isinstance(step, int) else f".{step}"
    return (f"{path}.{loc[-1]}" if is_missing else path).removeprefix(".")


def _json_type(value: Any) -> str:
    if value is None:
        return "null"
    names = {list: "an array", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names[type(value)]
