"""Tools of the Responses API, as the model sees them and as the client knows them; pure.

The model knows functions by one flat name. Functions inside a namespace keep their own name where it is the only
one of its kind, else they get the namespace in front; calls go back under name and `namespace`. A custom tool,
whose input is free text, becomes a function with the one parameter `input`; a grammar for it is told to the model and
enforced. Tools that a provider would run
(web_search and the like) are left out: clients always send some.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from stepflash.chat.answer_format import AnswerFormat
from stepflash.chat.messages import Tool
from stepflash.chat.openai_messages import tools_from_openai
from stepflash.errors import BadSchema, RequestError
from stepflash.server.structured_output import grammar_format

CUSTOM_INPUT = "input"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientTool:
    """What a client calls a tool."""

    name: str
    namespace: str | None = None
    is_custom: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Toolbox:
    """The tools of a request; `clients` maps the model's names to the client's, `formats` to grammars of inputs."""

    tools: tuple[Tool, ...] = ()
    clients: Mapping[str, ClientTool] = field(default_factory=dict)
    formats: Mapping[str, AnswerFormat] = field(default_factory=dict)

    def client_tool(self, name: str) -> ClientTool:
        """What the client knows by the model's name; an unknown one, which the model made up, stays."""
        return self.clients.get(name, ClientTool(name=name))

    def model_name(self, name: str, namespace: str | None) -> str:
        """The model's name for what the client knows by name and namespace."""
        for shown, tool in self.clients.items():
            if (tool.name, tool.namespace) == (name, namespace):
                return shown
        return name

    def only(self, allowed: Sequence[tuple[str, str | None]]) -> Toolbox:
        """Those tools alone whose name and namespace are allowed."""
        kept = {shown: tool for shown, tool in self.clients.items() if (tool.name, tool.namespace) in allowed}
        formats = {shown: form for shown, form in self.formats.items() if shown in kept}
        tools = tuple(tool for tool in self.tools if tool.name in kept)
        return Toolbox(tools=tools, clients=kept, formats=formats)


def read_tools(tools: Sequence[Mapping[str, Any]]) -> Toolbox:
    """Read the list of tools.

    Raises:
        BadSchema: a function has no usable name or schema, or two have the same.
        RequestError: a field is of a wrong type.
    """
    found = list(_flattened(tools))
    num_of_name = Counter(tool.name for tool, _, _ in found)
    clients: dict[str, ClientTool] = {}
    read: list[Tool] = []
    formats: dict[str, AnswerFormat] = {}
    for tool, definition, path in found:
        is_alone = num_of_name[tool.name] == 1 or tool.namespace is None
        shown = tool.name if is_alone else f"{tool.namespace}.{tool.name}"
        if shown in clients:
            raise BadSchema(f"{path}: there is a tool called {shown!r} already", param=path)
        clients[shown] = tool
        read.append(_function(shown, definition, path))
        form = definition.get("format")
        if tool.is_custom and isinstance(form, Mapping) and form.get("type") == "grammar":
            formats[shown] = grammar_format(form, f"{path}.format")
    return Toolbox(tools=tuple(read), clients=clients, formats=formats)


def _flattened(tools: Sequence[Mapping[str, Any]]) -> Iterator[tuple[ClientTool, Mapping[str, Any], str]]:
    """Every function and custom tool with what the client calls it and where it stands."""
    for index, fields in enumerate(tools):
        path = f"tools[{index}]"
        match fields.get("type"):
            case "function" | "custom":
                yield _client_tool(fields, path), fields, path
            case "namespace":
                inner = fields.get("tools")
                if not isinstance(inner, list) or not isinstance(fields.get("name"), str):
                    raise RequestError(f"{path}: a namespace has a name and a list of tools", param=path)
                for position, item in enumerate(inner):
                    inner_path = f"{path}.tools[{position}]"
                    if not isinstance(item, Mapping):
                        raise RequestError(f"{inner_path}: must be an object", param=inner_path)
                    if item.get("type") in ("function", "custom"):
                        yield _client_tool(item, inner_path, fields["name"]), item, inner_path
            case str():
                continue
            case _:
                raise RequestError(f"{path}.type: must be a string", param=f"{path}.type")


def _client_tool(fields: Mapping[str, Any], path: str, namespace: str | None = None) -> ClientTool:
    name, callers = fields.get("name"), fields.get("allowed_callers")
    if isinstance(callers, list) and callers and "direct" not in callers:
        where = f"{path}.allowed_callers"
        raise RequestError(f"{where}: only 'direct' is supported: no program calls tools here", param=where)
    if not isinstance(name, str):
        raise BadSchema(f"{path}.name: must be a name", param=f"{path}.name")
    return ClientTool(name=name, namespace=namespace, is_custom=fields["type"] == "custom")


def _function(shown: str, fields: Mapping[str, Any], path: str) -> Tool:
    description, parameters = fields.get("description"), fields.get("parameters")
    if fields["type"] == "custom":
        description = "\n\n".join(part for part in (description, _grammar(fields)) if part)
        whole_input = {"type": "string", "description": "The whole input, as plain text."}
        parameters = {"type": "object", "properties": {CUSTOM_INPUT: whole_input}, "required": [CUSTOM_INPUT]}
    function = {"name": shown, "description": description, "parameters": parameters}
    function = {key: value for key, value in function.items() if value is not None}
    try:
        (tool,) = tools_from_openai([{"type": "function", "function": function}])
        tool = replace(tool, is_strict=fields.get("strict") is True, param=f"{path}.parameters")
    except BadSchema as error:
        message = str(error).replace("tools[0].function", path)
        raise BadSchema(message, param=(error.param or "").replace("tools[0].function", path)) from None
    return tool


def _grammar(fields: Mapping[str, Any]) -> str:
    """A custom tool's grammar in words."""
    form = fields.get("format")
    if not isinstance(form, Mapping) or form.get("type") != "grammar":
        return ""
    return f"The input must follow this {form.get('syntax')} grammar:\n{form.get('definition')}"
