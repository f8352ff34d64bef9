"""Conversations in the dictionaries of OpenAI's chat format, to values and back; pure.

It is the shape in which people write conversations, so `LLM.chat`, data files and servers share this one
reading of it. Whatever is wrong is a `RequestError` whose text and `param` give the path of the field, such as
`messages[2].tool_calls[0].function.arguments`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from stepflash.chat.arguments import read_json, to_json
from stepflash.chat.messages import Message, Role, Tool, ToolCall
from stepflash.errors import BadSchema, RequestError

_ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}
_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}


def messages_from_openai(messages: Iterable[Message | Mapping[str, Any]]) -> tuple[Message, ...]:
    """Read a list of messages; `Message` values pass unchanged.

    Content parts are joined without a separator, `developer` is `system`, and a thought may be called
    `reasoning_content`, `reasoning` or, by claude-code-router, `thinking.content`.

    Raises:
        RequestError: a field is missing, of a wrong type, or not text.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Iterable):
        raise RequestError("messages must be a list of messages", param="messages")
    return tuple(
        message if isinstance(message, Message) else _message(message, f"messages[{index}]")
        for index, message in enumerate(messages)
    )


def message_to_openai(message: Message) -> dict[str, Any]:
    """Write one message; what `messages_from_openai` reads back as the same value."""
    fields: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.reasoning is not None:
        fields["reasoning_content"] = message.reasoning
    if message.tool_calls:
        fields["content"] = message.content or None
        fields["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": to_json(dict(call.arguments))},
            }
            for call in message.tool_calls
        ]
    if message.tool_call_id is not None:
        fields["tool_call_id"] = message.tool_call_id
    if message.name is not None:
        fields["name"] = message.name
    return fields


def tools_from_openai(tools: Iterable[Tool | Mapping[str, Any]]) -> tuple[Tool, ...]:
    """Read a list of tools; `Tool` values pass unchanged but are checked.

    The definition is kept whole, because the prompt shows it whole. A flat one, with the name beside `type` as
    in the Responses API, is put into the nested form that the model knows.

    Raises:
        BadSchema: a tool has no usable name or its parameters are no schema of an object, or two share a name.
        RequestError: the list or a tool is of a wrong type.
    """
    if isinstance(tools, str | Mapping) or not isinstance(tools, Iterable):
        raise RequestError("tools must be a list of tools", param="tools")
    read: dict[str, Tool] = {}
    for index, definition in enumerate(tools):
        path = f"tools[{index}]"
        tool = _tool(definition.definition if isinstance(definition, Tool) else definition, path)
        if tool.name in read:
            raise BadSchema(f"{path}: there is a tool called {tool.name!r} already", param=path)
        read[tool.name] = tool
    return tuple(read.values())


def _message(message: Any, path: str) -> Message:
    fields = _mapping(message, path)
    role = _ROLES.get(str(fields.get("role")))
    if role is None:
        known = ", ".join(_ROLES)
        raise _wrong(f"{path}.role", f"{fields.get('role')!r} is not one of {known}")
    is_assistant = role == "assistant"
    content = fields.get("content")
    if content is None and role in ("system", "user"):
        raise _wrong(f"{path}.content", "is missing")
    reasoning = _optional_text(fields, "reasoning_content", path)
    if reasoning is None and is_assistant:
        reasoning = _optional_text(fields, "reasoning", path)
    if reasoning is None and is_assistant and isinstance(thinking := fields.get("thinking"), Mapping):
        reasoning = _optional_text(thinking, "content", f"{path}.thinking")
    return Message(
        role=role,
        content=_text(content, f"{path}.content"),
        reasoning=reasoning if is_assistant else None,
        tool_calls=_tool_calls(fields, path) if is_assistant else (),
        tool_call_id=_optional_text(fields, "tool_call_id", path),
        name=_optional_text(fields, "name", path),
    )


def _text(content: Any, path: str) -> str:
    """Content as a string: one already, nothing, or a list of parts."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise _wrong(path, "must be a string or a list of parts")
    texts = []
    for index, part in enumerate(content):
        part_path = f"{path}[{index}]"
        if isinstance(part, str):
            texts.append(part)
            continue
        fields = _mapping(part, part_path)
        key = _TEXT_PARTS.get(str(fields.get("type")))
        if key is None:
            raise _wrong(
                f"{part_path}.type", f"{fields.get('type')!r} is not supported: this model reads text only"
            )
        if not isinstance(fields.get(key), str):
            raise _wrong(f"{part_path}.{key}", "must be a string")
        texts.append(fields[key])
    return "".join(texts)


def _tool_calls(message: Mapping[str, Any], path: str) -> tuple[ToolCall, ...]:
    listed = message.get("tool_calls")
    if listed is None:
        legacy = message.get("function_call")
        listed = [] if legacy is None else [{"function": legacy}]
    if not isinstance(listed, list):
        raise _wrong(f"{path}.tool_calls", "must be a list")
    calls = []
    for index, item in enumerate(listed):
        call_path = f"{path}.tool_calls[{index}]"
        fields = _mapping(item, call_path)
        function = _mapping(fields.get("function"), f"{call_path}.function")
        name = function.get("name")
        if not isinstance(name, str) or not name:
            raise _wrong(f"{call_path}.function.name", "must be a name")
        arguments = _arguments(function.get("arguments"), f"{call_path}.function.arguments")
        calls.append(
            ToolCall(name=name, arguments=arguments, id=_optional_text(fields, "id", call_path) or "")
        )
    return tuple(calls)


def _arguments(arguments: Any, path: str) -> Mapping[str, Any]:
    """OpenAI's clients send JSON text; an object is accepted too, and nothing is an empty one."""
    if isinstance(arguments, str):
        try:
            arguments = read_json(arguments) if arguments.strip() else {}
        except ValueError as error:
            raise _wrong(path, f"not valid JSON ({error})") from None
    if arguments is None:
        return {}
    if not isinstance(arguments, Mapping):
        raise _wrong(path, f"must be a JSON object, not {type(arguments).__name__}")
    return arguments


def _tool(definition: Any, path: str) -> Tool:
    fields = _mapping(definition, path)
    kind = fields.get("type", "function")
    if kind != "function":
        raise _wrong(f"{path}.type", f"{kind!r} is not supported, only 'function'")
    if "function" not in fields and "name" in fields:
        inner = {key: value for key, value in fields.items() if key != "type"}
        fields = {"type": "function", "function": inner}
    function = _mapping(fields.get("function"), f"{path}.function")
    name, parameters = function.get("name"), function.get("parameters")
    if (
        not isinstance(name, str)
        or not name
        or any(letter.isspace() or letter in "<>=\"'" for letter in name)
    ):
        where = f"{path}.function.name"
        raise BadSchema(f"{where}: {name!r} is no name: use letters, digits, '_' and '-'", param=where)
    where = f"{path}.function.parameters"
    if parameters is not None and not isinstance(parameters, Mapping):
        raise BadSchema(f"{where}: must be a JSON schema, which is an object", param=where)
    if parameters and parameters.get("type", "object") != "object":
        raise BadSchema(f"{where}.type: must be 'object', not {parameters['type']!r}", param=where)
    properties = (parameters or {}).get("properties")
    if properties is not None and not isinstance(properties, Mapping):
        raise BadSchema(f"{where}.properties: must be an object", param=where)
    return Tool(definition=fields, is_strict=function.get("strict") is True, param=where)


def _mapping(value: Any, path: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise _wrong(path, f"must be an object, not {type(value).__name__}")
    return value


def _optional_text(fields: Mapping[str, Any], key: str, path: str) -> str | None:
    value = fields.get(key)
    if value is not None and not isinstance(value, str):
        raise _wrong(f"{path}.{key}", f"must be a string, not {type(value).__name__}")
    return value


def _wrong(path: str, problem: str) -> RequestError:
    return RequestError(f"{path}: {problem}", param=path)
