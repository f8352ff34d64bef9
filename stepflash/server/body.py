"""Reading the body of a request without trusting it; the same for every API.

pydantic checks the types of the fields that a `Body` names. Unknown fields are ignored, as the official servers
do. Every problem becomes one `RequestError` that names the field.
"""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import from_json

from stepflash.errors import RequestError


class Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


BodyType = TypeVar("BodyType", bound=Body)


def read_body(raw: bytes, body_type: type[BodyType]) -> BodyType:
    """Parse and check a request body.

    Raises:
        RequestError: not JSON, nested too deeply, not an object, or a field of the wrong type.
    """
    try:
        data = from_json(raw, allow_inf_nan=False)
    except ValueError as error:
        raise RequestError(f"the body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(data, dict):
        raise RequestError(f"the body must be a JSON object, not {_json_type(data)}", code="invalid_json")
    try:
        return body_type.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        param = _field_path(first["loc"], data, is_missing=first["type"] == "missing")
        raise RequestError(f"{param}: {first['msg'].lower()}", param=param) from None


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
