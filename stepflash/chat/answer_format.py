"""What an answer must look like, and that as a grammar: JSON, JSON of a schema, a regular expression, a Lark grammar.

Every keyword of a schema either holds of the answer or is refused; only annotations (`title`, formats that nobody
defined, ...) mean nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from llguidance import regex_to_lark

from stepflash.chat.grammar import check_grammar
from stepflash.errors import BadSchema

FormatKind = Literal["json_schema", "regex", "lark"]

# Between the tokens of JSON: nothing, a space, or a line break with its indentation. Unbounded white space is what
# small models fall into and do not leave.
WHITESPACE = r"([ ]|\n[ \t]{0,24})?"
KNOWN_FORMATS = frozenset(
    {"date", "time", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"}
)
MAX_DEPTH = 64
_VALUES = ("enum", "const", "default", "examples")  # keywords that hold values, not schemas
_NAMED = ("properties", "patternProperties", "$defs", "definitions")  # ... that hold schemas by name


@dataclass(frozen=True, slots=True)
class AnswerFormat:
    """`definition` is a JSON schema or the text of the grammar; `param` is the field that it came from."""

    kind: FormatKind
    definition: Any
    param: str

    def check(self) -> None:
        """
        Raises:
            BadSchema: it is no such thing, or asks for what cannot be enforced; names `param`.
        """
        if self.kind != "json_schema" and not isinstance(self.definition, str):
            raise BadSchema(f"{self.param}: must be a string", param=self.param)
        check_grammar(self.grammar(), self.param)

    def grammar(self) -> str:
        """As a Lark grammar of its own."""
        match self.kind:
            case "json_schema":
                return f"start: {json_rule(self.definition, self.param)}"
            case "regex":
                return f"start: /{regex_to_lark(self.definition, 'dw')}/"
            case "lark":
                return str(self.definition)


JSON_OBJECT: Mapping[str, Any] = {"type": "object"}


def json_rule(schema: Any, param: str, *, is_lenient: bool = False) -> str:
    """A JSON schema as it stands in a rule of a Lark grammar. `is_lenient` passes over keywords that cannot be
    enforced instead of refusing them.

    Raises:
        BadSchema: no schema, or nested too deeply.
    """
    if schema is True:
        schema = {}
    if not isinstance(schema, Mapping):
        raise BadSchema(f"{param}: must be a JSON schema, which is an object", param=param)
    options = {"whitespace_pattern": WHITESPACE, "lenient": is_lenient}
    return "%json " + json.dumps({**_without_annotations(schema, param, MAX_DEPTH), "x-guidance": options})


def _without_annotations(schema: Any, param: str, depth: int) -> Any:
    """The schema without what llguidance would refuse though it restricts nothing."""
    if depth == 0:
        raise BadSchema(f"{param}: nested more than {MAX_DEPTH} levels deep", param=param)
    if isinstance(schema, list):
        return [_without_annotations(item, param, depth - 1) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    kept: dict[str, Any] = {}
    for key, value in schema.items():
        if key in _VALUES:
            kept[key] = value
        elif key in _NAMED and isinstance(value, Mapping):
            kept[key] = {name: _without_annotations(part, param, depth - 1) for name, part in value.items()}
        elif key != "x-guidance" and (
            key != "format" or not isinstance(value, str) or value in KNOWN_FORMATS
        ):
            kept[key] = _without_annotations(value, param, depth - 1)
    return kept


def joined(main: str, parts: Mapping[str, str]) -> str:
    """One grammar: Lark text that refers to other Lark texts as `@name`; each has rule names of its own."""
    if not parts:
        return main
    grammars = [{"name": "main", "lark_grammar": main}]
    grammars += [{"name": name, "lark_grammar": grammar} for name, grammar in parts.items()]
    return json.dumps({"grammars": grammars})
