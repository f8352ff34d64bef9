"""Golden: each rule of the schema typing, by hand. Property: JSON written as text is read back."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepflash.chat.arguments import Typing, convert, convert_to_json, to_json, typings


def typing_of(schema: Any, **root: Any) -> Typing:
    return typings({"properties": {"p": schema}, **root})["p"]


INTEGER, NUMBER, BOOLEAN = ({"type": name} for name in ("integer", "number", "boolean"))
OBJECT, ARRAY, STRING = ({"type": name} for name in ("object", "array", "string"))

CASES: list[tuple[Any, str, Any]] = [
    # text
    (STRING, "5", "5"),
    (STRING, " a ", " a "),
    (STRING, "[1]", "[1]"),
    (STRING, "None", "None"),
    ({}, "5", "5"),
    ({"description": "no type"}, "[1]", "[1]"),
    ({"type": "any"}, "5", "5"),
    (None, "5", "5"),
    (True, "5", "5"),
    # null, in any case, for every type
    (STRING, "null", None),
    (STRING, "NULL", None),
    (STRING, " null", " null"),
    (INTEGER, "Null", None),
    (OBJECT, " null ", None),
    (INTEGER, "None", None),
    ({"enum": ["null", "x"]}, "null", "null"),
    # integers
    (INTEGER, "42", 42),
    (INTEGER, " -7 ", -7),
    (INTEGER, "+7", 7),
    (INTEGER, "007", 7),
    (INTEGER, "4.0", "4.0"),
    (INTEGER, "1_000", "1_000"),
    (INTEGER, "\u0664", "\u0664"),
    (INTEGER, "x", "x"),
    (INTEGER, "", ""),
    (INTEGER, "9" * 5000, "9" * 5000),
    ({"type": "int64"}, "5", 5),
    ({"type": "uint"}, "5", 5),
    # numbers: integral ones are integers
    (NUMBER, "3.14", 3.14),
    (NUMBER, "3.0", 3),
    (NUMBER, "1e3", 1000),
    (NUMBER, "-2", -2),
    (NUMBER, "12345678901234567890", 12345678901234567890),
    (NUMBER, "1e300", 1e300),
    (NUMBER, "1e999", "1e999"),
    (OBJECT, '{"k": [1e999]}', '{"k": [1e999]}'),
    (NUMBER, "nan", "nan"),
    (NUMBER, "-Infinity", "-Infinity"),
    (NUMBER, "1_0.5", "1_0.5"),
    (NUMBER, "five", "five"),
    ({"type": "float"}, "2.5", 2.5),
    ({"type": "double"}, "2.5", 2.5),
    # booleans
    (BOOLEAN, "true", True),
    (BOOLEAN, "True", True),
    (BOOLEAN, " TRUE ", True),
    (BOOLEAN, "false", False),
    (BOOLEAN, "yes", False),
    # objects and arrays: JSON first, then a Python literal, then text
    (OBJECT, '{"k": [1, null, true]}', {"k": [1, None, True]}),
    (OBJECT, "{'k': None, 'b': True}", {"k": None, "b": True}),
    (OBJECT, "{1: 'a'}", {"1": "a"}),
    (OBJECT, "{'k': {1, 2}}", "{'k': {1, 2}}"),
    (OBJECT, "{'k': b'x'}", "{'k': b'x'}"),
    (OBJECT, "{k: 1}", "{k: 1}"),
    (OBJECT, '{"k": NaN}', '{"k": NaN}'),
    (OBJECT, "__import__('os')", "__import__('os')"),
    (OBJECT, "{'k': '\\d'}", {"k": "\\d"}),
    (ARRAY, "[true, null]", [True, None]),
    (ARRAY, "[True, None]", [True, None]),
    (ARRAY, "('a', 2)", ["a", 2]),
    (ARRAY, "[1,", "[1,"),
    (ARRAY, "a, b", "a, b"),
    (ARRAY, "[" * 10_000, "[" * 10_000),
    (OBJECT, "-" * 10_000 + "1", "-" * 10_000 + "1"),
    (ARRAY, '["\u65e5"]', ["\u65e5"]),
    ({"type": "dict"}, "{}", {}),
    ({"type": "list[str]"}, "[]", []),
    # several types: from the most specific to text
    ({"type": ["integer", "string"]}, "5", 5),
    ({"type": ["integer", "string"]}, "x", "x"),
    ({"type": ["string", "null"]}, "5", "5"),
    ({"type": ["string", "null"]}, "null", None),
    ({"type": ["array", "string"]}, '["a"]', ["a"]),
    ({"type": ["array", "string"]}, "[a", "[a"),
    ({"type": ["array", "string"]}, '{"a": 1}', '{"a": 1}'),
    ({"type": ["boolean", "string"]}, "yes", "yes"),
    ({"type": ["boolean", "string"]}, "true", True),
    ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, "5", 5),
    ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, "null", None),
    ({"oneOf": [{"type": "number"}, {"type": "boolean"}]}, "1.5", 1.5),
    ({"oneOf": [{"type": "number"}, {"type": "boolean"}]}, "False", False),
    ({"allOf": [{"type": "object"}, {"required": ["a"]}]}, '{"a": 1}', {"a": 1}),
    ({"anyOf": [{"anyOf": [{"type": "array"}]}, {"type": "string"}]}, "[1]", [1]),
    # inferred from the rest of the schema
    ({"enum": [1, 2]}, "2", 2),
    ({"enum": ["1", "2"]}, "2", "2"),
    ({"enum": ["1", 2]}, "1", "1"),
    ({"enum": ["1", 2]}, "2", 2),
    ({"const": True}, "true", True),
    ({"properties": {}}, '{"a": 1}', {"a": 1}),
    ({"items": {}}, "[1]", [1]),
]


@pytest.mark.parametrize(("schema", "text", "value"), CASES)
def test_conversion(schema: Any, text: str, value: Any) -> None:
    converted = convert(text, typing_of(schema))
    assert converted == value
    assert type(converted) is type(value)
    assert json.loads(convert_to_json(text, typing_of(schema))) == value


def test_references_are_followed_and_loops_end() -> None:
    root = {
        "$defs": {
            "count": {"type": "integer"},
            "json": {
                "anyOf": [{"$ref": "#/$defs/count"}, {"type": "array", "items": {"$ref": "#/$defs/json"}}] * 9
            },
            "a/b": {"type": "boolean"},
        }
    }
    assert convert("5", typing_of({"$ref": "#/$defs/count"}, **root)) == 5
    assert typing_of({"$ref": "#/$defs/json"}, **root).types == {"integer", "array"}
    assert typing_of({"$ref": "#/$defs/a~1b"}, **root).types == {"boolean"}
    for nowhere in ("#/$defs/nothing", "https://example.com/schema", "#"):
        assert not typing_of({"$ref": nowhere}, **root).types - {"object"}


def test_schemas_that_are_none() -> None:
    for wrong in ({}, [], None, "x", {"properties": None}, {"properties": ["a"]}):
        assert typings(wrong) == {}


def test_lone_surrogates_stay_escaped() -> None:
    text = convert_to_json('["\\ud800", "\u00e9"]', typing_of(ARRAY))
    assert text == '["\\ud800", "\u00e9"]'
    assert text.encode("utf-8")
    assert to_json("\ud800") == '"\\ud800"'


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@given(st.lists(JSON, max_size=4) | st.dictionaries(st.text(max_size=4), JSON, max_size=4))
def test_structures_are_read_back_from_json_and_from_python(value: Any) -> None:
    typing = Typing(frozenset({"object", "array"}))
    assert convert(json.dumps(value), typing) == value
    assert convert(repr(value), typing) == value


ANY_TYPE = st.sampled_from(["integer", "number", "boolean", "object", "array", "string", "null"])
NEAR_MISSES = st.text(alphabet="[]{}(),:'\"0123456789.e+-_ntfalsru \\", max_size=20)


@given(st.text(max_size=30) | NEAR_MISSES, st.frozensets(ANY_TYPE, max_size=3))
def test_any_text_of_any_type_is_valid_json(text: str, types: frozenset[str]) -> None:
    encoded = convert_to_json(text, Typing(types))
    assert json.loads(encoded, parse_constant=pytest.fail) == convert(text, Typing(types))
