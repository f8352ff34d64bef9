"""Tool calls as a grammar: the tags that the model was trained on, and between them values of the right types.

A call is written `<tool_call>`, `<function=NAME>`, parameters, closing tags, with the line breaks of the chat
template. `chat/tool_calls` reads it back, so what is allowed here is what it reads as the same call: text may hold
no tag that could be taken for the end of its parameter, and no number that the schema would have read as a number.
Up to `MAX_FREE_ORDER` parameters may come in any order; more come in the order of the schema, which is the one that
models use.

A tool that is `strict` gets exactly what its schema says or is refused; for others, keywords that cannot be
enforced are passed over, as they are hints to the model (OpenAI's meaning of the flag).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from stepflash.chat.answer_format import AnswerFormat, joined, json_rule
from stepflash.chat.arguments import Typing, declared_types, type_of_value, typings
from stepflash.chat.grammar import check_grammar
from stepflash.chat.messages import Tool
from stepflash.chat.text_grammar import RAW, TAG, excluded, text_terms
from stepflash.chat.tool_tags import CALL_END, CALL_START, FUNCTION_END, PARAMETER_END
from stepflash.errors import BadSchema

MAX_FREE_ORDER = 5
CALLS_START = f"{CALL_START}\n<function="
VALUE_END = f"\n{PARAMETER_END}\n"
_SCALARS = {
    "integer": "/-?(0|[1-9][0-9]{0,300})/",
    "number": "/-?(0|[1-9][0-9]{0,30})(\\.[0-9]{1,30})?([eE][+-]?[0-9]{1,2})?/",
    "boolean": "/true|false|True|False/",
    "null": '"null"',
}
_ANNOTATIONS = frozenset(
    {"$schema", "$id", "$comment", "title", "description", "default", "examples", "deprecated"}
)
_OF_TEXT = frozenset({"pattern", "minLength", "maxLength", "format", "enum"})  # say nothing of other types
_PARAMETERS_KEYWORDS = _ANNOTATIONS | {
    "type",
    "properties",
    "required",
    "additionalProperties",
    "$defs",
    "definitions",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class CallRules:
    """What calls are demanded or, where an answer makes some, how they must look.

    `demanded`: the names of tools of which at least one must be called; empty demands none. `is_single`: at most one
    call. `formats` are grammars of free text, by tool: what its parameter `input` must hold.
    """

    demanded: tuple[str, ...] = ()
    is_single: bool = False
    formats: Mapping[str, AnswerFormat] = field(default_factory=dict)

    def opening(self) -> str:
        """How an answer of demanded calls begins, as far as that is certain."""
        name = f"{self.demanded[0]}>\n" if len(self.demanded) == 1 else ""
        return f"{CALLS_START}{name}"


FREE_CALLS = CallRules()


def is_restricted(tools: Sequence[Tool], rules: CallRules, answer: AnswerFormat | None) -> bool:
    """Whether there is anything that a grammar has to see to."""
    return (
        bool(rules.demanded)
        or answer is not None
        or any(tool.is_strict or tool.name in rules.formats for tool in tools)
    )


def answer_grammar(
    tools: Sequence[Tool], rules: CallRules, answer: AnswerFormat | None, *, prefix: str = ""
) -> str | None:
    """The grammar of a whole answer behind its thought; None if nothing restricts it.

    With demanded calls the answer is those calls. Else with a format it is either text of that format or, when there
    are tools, calls. Else it is free but for the calls of tools that are strict or have a format. `prefix` is how the
    answer may begin, as a part of a rule.

    Raises:
        BadSchema: something cannot be enforced; names the field.
    """
    if not is_restricted(tools, rules, answer):
        return None
    for form in (answer, *rules.formats.values()):
        if form is not None:
            form.check()
    writer = _Writer(rules)
    if rules.demanded:
        named = [(i, tool) for i, tool in enumerate(tools) if tool.name in rules.demanded]
        return writer.grammar(f"{prefix} {writer.calls(named)}")
    if answer is not None:
        writer.parts["answer"] = answer.grammar()
        body = "@answer"
        if tools:
            body = f"(@answer | {writer.calls(list(enumerate(tools)))})"
        return writer.grammar(f"{prefix} {body}")
    writer.lines += [f"FREE: {_free_text(tools)}", f"BEFORE_CALL: FREE {json.dumps(CALLS_START)}"]
    return writer.grammar(
        f"(BEFORE_CALL {writer.functions(list(enumerate(tools)), only_strict=True)})* FREE?"
    )


class _Writer:
    """Collects the rules of one grammar."""

    def __init__(self, rules: CallRules) -> None:
        self._rules = rules
        self.lines: list[str] = []
        self.parts: dict[str, str] = {}

    def grammar(self, start: str) -> str:
        used = [f"RAW: {RAW}"] if any("RAW" in line for line in self.lines) else []
        return joined("\n".join([f"start: {start}", *self.lines, *used]) + "\n", self.parts)

    def calls(self, tools: Sequence[tuple[int, Tool]]) -> str:
        """One call or several, as a part of a rule."""
        self.lines.append(f"call: {json.dumps(CALLS_START)} {self.functions(tools)}")
        return "call" if self._rules.is_single else 'call ("\\n"? call)*'

    def functions(self, tools: Sequence[tuple[int, Tool]], *, only_strict: bool = False) -> str:
        """A call behind the opening tags; with `only_strict` those of the other tools are free between their tags."""
        bodies = []
        for index, tool in tools:
            if only_strict and not tool.is_strict and tool.name not in self._rules.formats:
                self.lines.append(f"loose_{index}: {json.dumps(tool.name + '>', ensure_ascii=False)} LOOSE")
                bodies.append(f"loose_{index}")
            else:
                self._tool(index, tool)
                bodies.append(f"tool_{index}")
        if any(body.startswith("loose") for body in bodies):
            call_end = json.dumps(CALL_END)
            self.lines.append(f"LOOSE: (FREE & ~/(?s:.*)<\\/tool_call>(?s:.*)/) {call_end}")
        return f"({' | '.join(bodies)})"

    def _tool(self, index: int, tool: Tool) -> None:
        """Rule `tool_INDEX`: name, parameters and closing tags."""
        end = json.dumps(f"{FUNCTION_END}\n{CALL_END}")
        name = json.dumps(f"{tool.name}>\n", ensure_ascii=False)
        self.lines.append(f"tool_{index}: {name} {self._parameters(index, tool)} {end}")

    def _parameters(self, index: int, tool: Tool) -> str:
        schema, strict, param = tool.parameters, tool.is_strict, tool.param
        if strict and (unknown := sorted(set(schema) - _PARAMETERS_KEYWORDS)):
            raise _unenforceable(f"{param}.{unknown[0]}")
        listed = schema.get("required")
        required = [str(name) for name in listed] if isinstance(listed, list) else []
        properties = schema.get("properties") or {}
        if not properties and not required:
            if strict or schema.get("additionalProperties") is False:
                return ""
            return f'("<parameter=" /[A-Za-z0-9_.-]{{1,64}}/ ">\\n" {self._text_end("any", "RAW")})*'
        types = typings(schema)
        rules: list[str] = []
        needed: set[str] = set()
        for number, name in enumerate(dict.fromkeys([*properties, *required])):
            where = f"{param}.properties.{name}"
            part = properties.get(name, {})
            if part is False or not _is_writable(name):
                if name in required:
                    raise BadSchema(f"{where}: a call cannot have this parameter", param=where)
                continue
            rule = f"p_{index}_{number}"
            value = self._value(rule, tool, {} if part is True else part, types.get(name, Typing()), where)
            tag = json.dumps(f"<parameter={name}>\n", ensure_ascii=False)
            self.lines.append(f"{rule}: {tag} ({value})")
            rules.append(rule)
            if name in required:
                needed.add(rule)
        if len(rules) > MAX_FREE_ORDER:
            return " ".join(rule if rule in needed else f"{rule}?" for rule in rules)
        return self._any_order(index, rules, needed)

    def _any_order(self, index: int, rules: Sequence[str], needed: set[str]) -> str:
        """Every order of the parameters, each at most once: one rule per set of those that have come."""
        everything = (1 << len(rules)) - 1
        for seen in range(everything):
            ways = [
                f"{rule} s_{index}_{seen | 1 << i}" if seen | 1 << i != everything else rule
                for i, rule in enumerate(rules)
                if not seen >> i & 1
            ]
            is_complete = all(seen >> i & 1 for i, rule in enumerate(rules) if rule in needed)
            self.lines.append(f"s_{index}_{seen}: ({' | '.join(ways)}){'?' if is_complete else ''}")
        return f"s_{index}_0" if rules else ""

    def _value(self, rule: str, tool: Tool, schema: Any, typing: Typing, where: str) -> str:
        """The value of a parameter with the closing tag behind it, as alternatives of a rule."""
        if not isinstance(schema, Mapping):
            raise BadSchema(f"{where}: must be a JSON schema, which is an object", param=where)
        if (form := self._rules.formats.get(tool.name)) is not None:
            if form.kind == "lark":
                self.parts[rule] = form.grammar()
                # The line break apart from the tag: the lexer would take both together and never a line of the
                # grammar that begins with "<".
                return f"@{rule} {json.dumps(VALUE_END[0])} {json.dumps(VALUE_END[1:])}"
            return self._text_end(rule, f"RAW & {form.grammar().removeprefix('start: ')}")
        strict = tool.is_strict
        values = schema.get("enum", [schema["const"]] if "const" in schema else None)
        if isinstance(values, list):
            return self._literals(schema, values, strict, where)
        text = text_terms(schema, tool.parameters, where, is_strict=strict)
        others = sorted(typing.types - {"string"})
        if text is None:
            return self._json(rule, schema, tool, others, where)
        alternatives = [self._text_end(f"{rule}_text", " & ".join(["RAW", *text, *excluded(typing.types)]))]
        # Beside text a scalar must be one token of the lexer, or it would read on into the text.
        if strict and others and not _is_plain(schema):
            raise _unenforceable(where)
        for kind in others:
            if kind in _SCALARS:
                alternatives.append(self._text_end(kind, _SCALARS[kind]))
            else:
                alternatives.append(self._json(f"{rule}_{kind}", {"type": kind}, tool, [kind], where))
        return " | ".join(alternatives)

    def _literals(self, schema: Mapping[str, Any], values: Sequence[Any], strict: bool, where: str) -> str:
        """One of the listed values, each as the text that is read as it."""
        if strict and (more := sorted(set(schema) - {"type", "enum", "const"} - _ANNOTATIONS)):
            raise _unenforceable(f"{where}.{more[0]}")
        types = set(declared_types(schema))
        texts = [
            value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            for value in values
            if not types
            or type_of_value(value) in types
            or {type_of_value(value), *types} >= {"integer", "number"}
        ]
        usable = [text for text in texts if not TAG.search(text)]
        if not usable:
            raise BadSchema(f"{where}: no value is left that a call could hold", param=where)
        return " | ".join(json.dumps(text + VALUE_END, ensure_ascii=False) for text in usable)

    def _json(
        self, rule: str, schema: Mapping[str, Any], tool: Tool, types: Sequence[str], where: str
    ) -> str:
        """A value that is no text: plain scalars as the chat template writes them, anything else as JSON."""
        if len(types) == 1 and types[0] in _SCALARS and set(schema) <= {"type", *_ANNOTATIONS}:
            return self._text_end(types[0], _SCALARS[types[0]])
        text = json_rule(_with_root(schema, tool.parameters), where, is_lenient=not tool.is_strict)
        check_grammar(f"start: {text}", where)
        self.lines.append(f"{rule}_json: {text}")
        return f"{rule}_json {json.dumps(VALUE_END)}"

    def _text_end(self, name: str, terms: str) -> str:
        """A terminal of such text and the closing tag; text alone would not know where to end."""
        terminal = f"T_{name.upper()}"
        line = f"{terminal}: ({terms}) {json.dumps(VALUE_END)}"
        if line not in self.lines:
            self.lines.append(line)
        return terminal


def _free_text(tools: Sequence[Tool]) -> str:
    """Text in which nobody would read a call, be it a malformed one that would be mended (see `tool_tags`)."""
    names = "|".join(re.escape(tool.name).replace("/", "\\/") for tool in tools)
    call = r"<tool_call>\s*<(function|parameter)"
    bare = rf"<function[ \t]*=?[ \t]*[\"']?(name=[\"']?|function=)?({names})"
    return f"/(?s:.*)/ & ~/(?s:.*)({call}|{bare})(?s:.*)/"


def _is_writable(name: str) -> bool:
    return bool(name) and name == name.strip() and len(name) <= 200 and not set(name) & set("<>\n")


def _with_root(schema: Mapping[str, Any], root: Mapping[str, Any]) -> dict[str, Any]:
    """A schema cut out of `root`, with what its references point to. Those get a new place below `$defs`."""
    text = json.dumps(schema)
    if '"$ref"' not in text:
        return dict(schema)
    moved = {key: _moved(value) for key, value in root.items() if key != "x-guidance"}
    return {**_moved(schema), "$defs": {"root": moved}}


def _moved(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_moved(item) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    return {
        key: f"#/$defs/root{value.removeprefix('#')}"
        if key == "$ref" and isinstance(value, str) and value.startswith("#")
        else _moved(value)
        for key, value in schema.items()
    }


def _is_plain(schema: Mapping[str, Any]) -> bool:
    """Whether it names types, be it as alternatives, and restricts none of them but text."""
    parts = [part for key in ("anyOf", "oneOf") for part in schema.get(key, ())]
    if parts and "type" in schema:
        return False
    return all(
        isinstance(part, Mapping)
        and set(part) <= {"type", *_ANNOTATIONS, *_OF_TEXT, *(("anyOf", "oneOf") if part is schema else ())}
        and all(isinstance(value, str) for value in part.get("enum", ()))
        for part in (schema, *parts)
    )


def _unenforceable(where: str) -> BadSchema:
    return BadSchema(
        f"{where}: cannot be enforced in a tool call; leave it out, or leave out strict", param=where
    )
