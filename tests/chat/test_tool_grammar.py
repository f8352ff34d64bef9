"""Tool calls under a grammar: what our parser reads from any allowed text is what the schema allows (jsonschema)."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from typing import Any
from uuid import UUID

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepflash.chat.answer_format import AnswerFormat
from stepflash.chat.messages import ParsedMessage, Tool
from stepflash.chat.parser import parse
from stepflash.chat.text_grammar import _search
from stepflash.chat.tool_grammar import MAX_FREE_ORDER, CallRules, answer_grammar
from stepflash.errors import BadSchema
from tests.chat.grammar_walks import compiler, tokenizer, walk

PROPERTY = settings(max_examples=80)


def tool(
    name: str, properties: Any, required: Sequence[str] = (), *, strict: bool = True, **more: Any
) -> Tool:
    parameters = {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
        **more,
    }
    definition = {"type": "function", "function": {"name": name, "parameters": parameters}}
    return Tool(definition=definition, is_strict=strict, param=f"tools[{name}]")


def grammar(tools: Sequence[Tool], **rules: Any) -> str:
    found = answer_grammar(tools, CallRules(**{"demanded": tuple(t.name for t in tools), **rules}), None)
    assert found is not None
    return found


def calls(tools: Sequence[Tool], seed: int, num_free: int = 25, **rules: Any) -> ParsedMessage:
    text = walk(compiler().compile(grammar(tools, **rules), param="tools"), seed, num_free=num_free)
    assert text is not None
    read = parse(f"\n</think>\n{text}", tools)
    assert read.content is None, text
    assert read.finish_reason == "tool_calls"
    assert read.tool_calls
    return read


PARAMETERS: list[dict[str, Any]] = [
    {"type": "string"},
    {"type": "string", "minLength": 1, "maxLength": 4},
    {"type": "string", "pattern": "^[a-z]{1,3}$"},
    {"type": "string", "format": "date"},
    {"type": "string", "enum": ["red", "null", "5", "", " x\n"]},
    {"type": "string", "const": "only"},
    {"type": "integer"},
    {"type": "integer", "minimum": 3, "maximum": 12},
    {"type": "number"},
    {"type": "number", "exclusiveMinimum": 0},
    {"type": "boolean"},
    {"type": "null"},
    {"enum": [1, "one", None, True, [1], {"a": "b"}, 2.5]},
    {"type": ["string", "null"]},
    {"type": ["string", "integer", "boolean"]},
    {"type": ["number", "null"]},
    {"anyOf": [{"type": "string", "maxLength": 3}, {"type": "null"}]},
    {"anyOf": [{"enum": ["a", "b"]}, {"type": "null"}]},
    {"anyOf": [{"type": "string"}, {"type": "array"}, {"type": "number"}]},
    {"anyOf": [{"type": "integer", "minimum": 0}, {"type": "null"}]},
    {"type": "array", "items": {"type": "string", "maxLength": 3}, "maxItems": 2},
    {
        "type": "object",
        "properties": {"x": {"type": "integer"}, "y": {"type": ["string", "null"]}},
        "required": ["x"],
        "additionalProperties": False,
    },
    {"$ref": "#/$defs/point"},
    {"type": "array", "items": {"$ref": "#/$defs/point"}, "maxItems": 2},
    {"$ref": "#/$defs/color"},
    {"allOf": [{"type": "string"}, {"pattern": "^[a-c]+$"}, {"maxLength": 3}]},
    {},
]
DEFINITIONS = {
    "point": {
        "type": "object",
        "properties": {"x": {"type": "integer"}, "next": {"$ref": "#/$defs/point"}},
        "required": ["x"],
        "additionalProperties": False,
    },
    "color": {"type": "string", "enum": ["red", "green"]},
}


@pytest.mark.parametrize("schema", PARAMETERS, ids=str)
def test_every_kind_of_parameter(schema: dict[str, Any]) -> None:
    one = tool("f", {"x": schema}, ["x"], **{"$defs": DEFINITIONS})
    validator = jsonschema.Draft202012Validator(dict(one.parameters))
    for seed in range(25):
        for call in calls([one], seed, num_free=seed % 13, is_single=True).tool_calls:
            validator.validate(dict(call.arguments))


@PROPERTY
@given(
    tools=st.lists(
        st.lists(st.tuples(st.sampled_from(PARAMETERS), st.booleans()), max_size=MAX_FREE_ORDER + 2),
        min_size=1,
        max_size=3,
    ),
    is_single=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_every_call_fits_the_schema_of_its_tool(
    tools: list[list[tuple[dict[str, Any], bool]]], is_single: bool, seed: int
) -> None:
    offered = [
        tool(
            f"tool_{i}",
            {f"p{j}": schema for j, (schema, _) in enumerate(parameters)},
            [f"p{j}" for j, (_, is_required) in enumerate(parameters) if is_required],
            **{"$defs": DEFINITIONS},
        )
        for i, parameters in enumerate(tools)
    ]
    read = calls(offered, seed, is_single=is_single)
    assert len(read.tool_calls) == 1 or not is_single
    by_name = {t.name: t for t in offered}
    for call in read.tool_calls:
        jsonschema.Draft202012Validator(dict(by_name[call.name].parameters)).validate(dict(call.arguments))


def allows(text_grammar: str, text: str) -> bool:
    """Whether an answer may be just this text, in the longest tokens that are allowed."""
    constraint = compiler().compile(text_grammar, param="f")
    rest = text.encode()
    while rest:
        allowed = [tokenizer().token_bytes(int(i)) for i in np.flatnonzero(constraint.mask())]
        longest = max((token for token in allowed if token and rest.startswith(token)), key=len, default=None)
        if longest is None:
            return False
        ids = np.flatnonzero(constraint.mask())
        constraint.accept(next(int(i) for i in ids if tokenizer().token_bytes(int(i)) == longest))
        rest = rest[len(longest) :]
    return bool(constraint.mask()[sorted(tokenizer().eos_token_ids)].any())


def written(name: str, **arguments: str) -> str:
    parameters = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in arguments.items())
    return f"<tool_call>\n<function={name}>\n{parameters}</function>\n</tool_call>"


def test_parameters_come_in_any_order_and_once() -> None:
    few = grammar([tool("f", {name: {"type": "integer"} for name in "abc"}, "ab")])
    assert allows(few, written("f", c="1", b="2", a="3"))
    assert allows(few, written("f", b="2", a="3"))
    assert not allows(few, written("f", b="2"))
    assert not allows(few, written("f", a="1", b="2").replace("=b>", "=a>"))
    names = [f"p{i}" for i in range(MAX_FREE_ORDER + 1)]
    many = grammar([tool("f", {name: {"type": "integer"} for name in names}, names[:2])])
    assert allows(many, written("f", p0="1", p1="2", p5="3"))
    assert not allows(many, written("f", p1="1", p0="2"))


def test_what_a_call_may_look_like() -> None:
    tools = [tool("f", {"x": {"type": "boolean"}}, "x"), tool("g", {}), tool("h", {"t": {"type": "string"}})]
    free = grammar(tools)
    assert allows(free, written("f", x="True"))
    assert allows(free, written("f", x="false") + written("g"))
    assert allows(free, written("f", x="false") + "\n" + written("h", t="a < b\n\n</p>"))
    for wrong in (
        "Hello",
        "",
        written("f"),
        written("f", x="yes"),
        written("nope"),
        written("g", y="1"),
        written("h", t="</parameter>"),
        written("h", t="<function=g>"),
        written("h", t="null"),
        written("g") + " and more",
        "\n" + written("g"),
    ):
        assert not allows(free, wrong), wrong
    assert not allows(grammar(tools, is_single=True), written("g") + written("g"))
    assert not allows(grammar(tools, demanded=("g",)), written("f", x="true"))


def test_a_tool_without_a_schema_takes_what_comes() -> None:
    bare = Tool(definition={"type": "function", "function": {"name": "f"}})
    assert allows(grammar([bare]), written("f"))
    assert allows(grammar([bare]), written("f", anything="goes\nhere"))


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"type": "string", "pattern": "a("}, "properties.x.pattern"),
    ({"type": "string", "not": {"const": "a"}}, "properties.x.not"),
    ({"type": "array", "uniqueItems": True}, "properties.x"),
    ({"anyOf": [{"type": "string"}, {"type": "integer", "minimum": 0}]}, "properties.x"),
    ({"type": "string", "enum": ["</parameter>"]}, "properties.x"),
    ({"enum": ["abc"], "maxLength": 2}, "properties.x.maxLength"),
    ({"$ref": "#/$defs/nowhere", "type": "object"}, "properties.x"),
]


@pytest.mark.parametrize(("schema", "place"), REFUSED, ids=str)
def test_strict_tools_are_enforced_in_full_or_refused(schema: dict[str, Any], place: str) -> None:
    with pytest.raises(BadSchema) as error:
        grammar([tool("f", {"x": schema})])
    assert error.value.param == f"tools[f].{place}"


def test_hints_of_other_tools_are_passed_over() -> None:
    hints = {"type": "array", "items": {"type": "integer"}, "uniqueItems": True}
    loose = tool("f", {"x": hints}, "x", strict=False, minProperties=1)
    assert allows(grammar([loose]), written("f", x="[1, 1]"))
    assert not allows(grammar([loose]), written("f", x='["a"]'))
    with pytest.raises(BadSchema, match="minProperties"):
        grammar([tool("f", {}, minProperties=1)])


FORMATS = {
    "date": (["2024-02-29"], ["2024-13-01", "24-01-01", ""]),
    "time": (["10:20:30Z", "23:59:59.25+02:00"], ["10:20", "24:00:00Z"]),
    "date-time": (["2024-02-29T10:20:30Z"], ["2024-02-29 10:20:30Z", "2024-02-29"]),
    "duration": (["P3W", "P1Y2M", "P1DT2H3M", "PT5S"], ["P", "P1DT", "3W", "P1S"]),
    "email": (["a@b.example", "first.last+tag@x"], ["falseses", "@x", "a@", "a b@x", "a@-x"]),
    "hostname": (["x", "a-b.example"], ["-a", "a..b", "a_b", ""]),
    "ipv4": (["0.0.0.0", "192.168.1.255"], ["256.1.1.1", "1.2.3", "01.2.3.4"]),
    "ipv6": (
        ["::", "::1", "fe80::1:2", "1:2:3:4:5:6:7:8", "1:2:3:4:5:6:7::", "1::3:4:5:6:7:8"],
        ["1:2:3", "1::2::3", "1:2:3:4:5:6:7:8:9", "12345::", "1:2:3:4::5:6:7:8", ":"],
    ),
    "uuid": (["123e4567-e89b-12d3-a456-426614174000"], ["123e4567"]),
    "uri": (
        ["https://u@x.example:80/a%20b?q=1/2#f", "mailto:a@b", "file:///tmp/x", "urn:a:b"],
        ["x.example", "http://a b", "http://x/%zz", "://x", "http://x#a#b"],
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats_of_text(name: str) -> None:
    formatted = grammar([tool("f", {"x": {"type": "string", "format": name}}, "x")])
    right, wrong = FORMATS[name]
    for text in right:
        assert allows(formatted, written("f", x=text)), text
    for text in wrong:
        assert not allows(formatted, written("f", x=text)), text


@pytest.mark.parametrize("name", ["ipv4", "ipv6", "uuid"])
def test_what_is_written_in_a_format_is_of_it(name: str) -> None:
    one = tool("f", {"x": {"type": "string", "format": name}}, ["x"])
    for seed in range(30):
        (call,) = calls([one], seed, num_free=seed, is_single=True).tool_calls
        text = call.arguments["x"]
        assert UUID(text) if name == "uuid" else ipaddress.ip_address(text).version == int(name[3])


PATTERNS = ["ab", "^ab", "ab$", "^ab$", "^a|b$", "a|^b$", "^(a|b)$", r"a\$", r"[|^$]b", r"a\\$"]


@pytest.mark.parametrize("pattern", PATTERNS)
@given(text=st.text(alphabet="ab|^$\\x", max_size=4))
@settings(max_examples=60)
def test_patterns_search_as_in_json_schema(pattern: str, text: str) -> None:
    assert bool(re.fullmatch(f"(?:{_search(pattern)})", text)) == bool(re.search(pattern, text))


# Free text with calls in it

PATCH = r"""
start: begin hunk+ end
begin: "*** Begin Patch" LF
end: "*** End Patch" LF?
hunk: "*** Add File: " /(.+)/ LF add_line+ | "*** Delete File: " /(.+)/ LF
add_line: "+" /(.*)/ LF
%import common.LF
"""
FREEFORM = tool("apply_patch", {"input": {"type": "string"}}, ["input"], strict=False)


def auto(form: AnswerFormat | None = None, *others: Tool) -> str:
    formats = {"apply_patch": form} if form else {}
    found = answer_grammar([FREEFORM, *others], CallRules(formats=formats), None)
    assert found is not None
    return found


def test_the_grammar_of_a_freeform_tool_holds_wherever_it_is_called() -> None:
    patch = "*** Begin Patch\n*** Add File: a.py\n+x = 1\n+\n*** End Patch"
    loose = tool("loose", {"x": {"type": "integer"}}, strict=False)
    free = auto(AnswerFormat("lark", PATCH, "f"), loose)
    good = written("apply_patch", input=patch)
    for text in ("Just text, with a <tool_call> in it.", "", f"Now:\n{good}", f"{good}\n{good}", f"a{good}b"):
        assert allows(free, text), text
    for text in (
        written("apply_patch", input="*** Begin Patch\n*** End Patch"),
        f"Now:\n{written('apply_patch', input='sed -i')}",
        written("unknown"),
    ):
        assert not allows(free, text), text
    assert allows(free, written("loose", x="whatever", y="z"))
    demanded = answer_grammar(
        [FREEFORM],
        CallRules(demanded=("apply_patch",), formats={"apply_patch": AnswerFormat("lark", PATCH, "f")}),
        None,
    )
    assert demanded is not None
    assert allows(demanded, good)
    assert not allows(demanded, "Just text")


def test_lines_of_a_freeform_tool_may_look_like_tags() -> None:
    lines = AnswerFormat("lark", 'start: LINE ("\\n" LINE)*\nLINE: /[^\\n]*/', "f")
    for text in ("a", "<x>", "a\n<x>\n</y>", "\n", "</param", "a\n\n"):
        assert allows(auto(lines), written("apply_patch", input=text)), text


def test_a_freeform_tool_with_a_regular_expression() -> None:
    free = auto(AnswerFormat("regex", "[a-z]+ [0-9]+", "f"))
    assert allows(free, written("apply_patch", input="abc 12"))
    assert not allows(free, written("apply_patch", input="abc"))


def test_a_strict_tool_holds_without_being_demanded() -> None:
    strict = tool("count", {"n": {"type": "integer"}}, "n")
    free = answer_grammar([strict, FREEFORM], CallRules(), None)
    assert free is not None
    assert allows(free, "Text and " + written("count", n="5"))
    assert not allows(free, "Text and " + written("count", n="five"))
    # Without its wrapper a call would be read all the same.
    bare = written("count", n="five").removeprefix("<tool_call>\n")
    for text in (
        bare,
        bare.replace("=", " ", 1),
        bare.replace("=", "", 1),
        f"<tool_call><parameter=count>{bare}",
    ):
        assert not allows(free, f"Text and {text}"), text
    assert allows(free, "Text about <function=other> and <function>")
    assert answer_grammar([FREEFORM], CallRules(), None) is None


def test_the_first_mask_of_demanded_calls() -> None:
    constraint = compiler().compile(grammar([tool("f", {}), tool("g", {})]), param="f")
    assert [tokenizer().decode([int(i)]) for i in np.flatnonzero(constraint.mask())] == ["<tool_call>"]
    assert tokenizer().decode(constraint.forced()) == "<tool_call>\n<function="
