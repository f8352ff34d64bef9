"""Reads what the APIs say about the form of an answer; pure.

OpenAI's and Anthropic's fields know JSON and JSON schemas. Besides, every API takes `{"type": "regex",
"pattern": ...}` and the form in which OpenAI writes grammars of custom tools, `{"type": "grammar", "syntax":
"lark" | "regex", "definition": ...}`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from stepflash.chat.answer_format import JSON_OBJECT, AnswerFormat
from stepflash.errors import RequestError
from stepflash.server.body import Body, Items


class FormatBody(Body):
    """The extensions that every API takes: vLLM's field, and the four that it had before."""

    structured_outputs: dict[str, Any] | None = None
    guided_json: Any = None
    guided_regex: str | None = None
    guided_choice: Items[str] | None = None
    guided_grammar: str | None = None


def read_format(body: FormatBody, value: Any, param: str) -> AnswerFormat | None:
    """The format that a body asks for: in its API's own field, which is given, or in an extension.

    Raises:
        RequestError: it is of no known type, a field is missing, or there are two formats; names the field.
    """
    guided = {kind: getattr(body, f"guided_{kind}") for kind in ("json", "regex", "choice", "grammar")}
    found = [
        answer_format(value, param),
        structured_outputs(body.structured_outputs),
        *(
            structured_outputs({kind: part}, f"guided_{kind}", path=f"guided_{kind}")
            for kind, part in guided.items()
        ),
    ]
    formats = [form for form in found if form is not None]
    if len(formats) > 1:
        raise RequestError(
            f"{formats[1].param}: there is a format in {formats[0].param} already", param=formats[1].param
        )
    return next(iter(formats), None)


def answer_format(value: Any, param: str) -> AnswerFormat | None:
    """`response_format`, `text.format` or `output_config.format`; None for plain text.

    Raises:
        RequestError: it is of no known type, or a field is missing; names it.
    """
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise RequestError(f"{param}: must be an object with a type", param=param)
    match value.get("type"):
        case "text":
            return None
        case "json_object":
            return AnswerFormat("json_schema", JSON_OBJECT, param)
        case "json_schema":
            # In chat completions the schema is one level deeper.
            inner, path = value, param
            if "schema" not in value and "json_schema" in value:
                inner, path = value["json_schema"], f"{param}.json_schema"
            if not isinstance(inner, Mapping) or "schema" not in inner:
                raise RequestError(f"{path}.schema: field required", param=f"{path}.schema")
            return AnswerFormat("json_schema", inner["schema"], f"{path}.schema")
        case "regex":
            return AnswerFormat("regex", value.get("pattern"), f"{param}.pattern")
        case "grammar":
            return grammar_format(value, param)
    known = "text, json_object, json_schema, regex, grammar"
    raise RequestError(f"{param}.type: {value.get('type')!r} is not one of {known}", param=f"{param}.type")


def grammar_format(value: Mapping[str, Any], param: str) -> AnswerFormat:
    """A grammar as OpenAI writes it.

    Raises:
        RequestError: the syntax is not one of the two.
    """
    syntax = value.get("syntax")
    if syntax not in ("lark", "regex"):
        raise RequestError(f"{param}.syntax: {syntax!r} is not one of lark, regex", param=f"{param}.syntax")
    return AnswerFormat(syntax, value.get("definition"), f"{param}.definition")


def structured_outputs(
    value: Mapping[str, Any] | None, param: str = "structured_outputs", path: str = ""
) -> AnswerFormat | None:
    """vLLM's field of this name: one of json, json_object, regex, choice, grammar. `path` is where the format itself
    stands, if not below `param`.

    Raises:
        RequestError: it holds none of them, or several.
    """
    given = {key: part for key, part in (value or {}).items() if part is not None and part is not False}
    if not given:
        return None
    kinds = [key for key in ("json", "json_object", "regex", "choice", "grammar") if key in given]
    if len(kinds) != 1:
        raise RequestError(f"{param}: give one of json, json_object, regex, choice, grammar", param=param)
    path = path or f"{param}.{kinds[0]}"
    wanted = given[kinds[0]]
    match kinds[0]:
        case "json":
            return AnswerFormat("json_schema", _parsed(wanted, path), path)
        case "json_object":
            return AnswerFormat("json_schema", JSON_OBJECT, path)
        case "choice":
            if not isinstance(wanted, list) or not wanted or not all(isinstance(way, str) for way in wanted):
                raise RequestError(f"{path}: must be a list of strings", param=path)
            ways = " | ".join(json.dumps(way, ensure_ascii=False) for way in wanted)
            return AnswerFormat("lark", f"start: {ways}", path)
        case "regex":
            return AnswerFormat("regex", wanted, path)
    return AnswerFormat("lark", wanted, path)


def _parsed(schema: Any, param: str) -> Any:
    if not isinstance(schema, str):
        return schema
    try:
        return json.loads(schema)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{param}: not valid JSON ({error})", param=param) from None
