"""Messages and tools of the Anthropic API, to values; pure.

A message is a string or a list of blocks; both ways of writing the same text give the same value, because clients
change from one to the other between turns and the prompt must stay the same to the token. `cache_control` may
stand anywhere and changes nothing: the cache finds the common prefix by itself.

  * Blocks of text are joined by an empty line in what others say, and by nothing in what the model said, where
    they are pieces of one text.
  * Each tool result is a message of its own. A `<system-reminder>` behind a result belongs to that result: as a
    message of the user it would end the task, and the template would drop the thoughts so far.
  * Documents whose source is text, and search results, are text with a title; other media cannot be read.
  * A tool with `defer_loading` is not in the head of the prompt. Its definition stands in the tool result that
    refers to it, so that finding a tool leaves the prompt before it as it was.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from stepflash.chat.canonical import canonical_tools
from stepflash.chat.messages import Message, Tool, ToolCall
from stepflash.chat.openai_messages import tools_from_openai
from stepflash.errors import BadSchema, RequestError
from stepflash.server.sealed_thought import unseal

REMINDER = "<system-reminder>"
TEXT_ONLY = "this model reads text only"


@dataclass(frozen=True, slots=True, kw_only=True)
class OfferedTools:
    """The tools of a request: those in the head of the prompt, and those that wait to be found."""

    listed: tuple[Tool, ...] = ()
    deferred: tuple[Tool, ...] = ()

    @property
    def all(self) -> tuple[Tool, ...]:
        return (*self.listed, *self.deferred)


def tools_from_anthropic(tools: Sequence[Mapping[str, Any]]) -> OfferedTools:
    """Read the list of tools.

    Raises:
        RequestError: a tool runs on the provider's servers, or has no usable name or schema, or two share a name.
    """
    definitions = []
    for index, tool in enumerate(tools):
        if tool.get("type") not in (None, "custom"):
            raise _wrong(
                f"tools.{index}.type",
                f"{tool['type']!r} is not supported: this model knows no tool without a description and an "
                "input_schema, and the server runs none",
            )
        if tool.get("input_schema") is None:
            raise _wrong(f"tools.{index}.input_schema", "field required")
        callers = tool.get("allowed_callers")
        if isinstance(callers, list) and callers and "direct" not in callers:
            raise _wrong(
                f"tools.{index}.allowed_callers", "only 'direct' is supported: there is no code execution"
            )
        description, schema = tool.get("description"), tool["input_schema"]
        if tool.get("input_examples") and isinstance(schema, Mapping):
            schema = {**schema, "examples": tool["input_examples"]}
        function = {
            "name": tool.get("name"),
            **({"description": description} if isinstance(description, str) else {}),
            "parameters": schema,
        }
        definitions.append({"type": "function", "function": function})
    try:
        read = tools_from_openai(definitions)
    except BadSchema as error:
        message = str(error).replace(".function.parameters", ".input_schema").replace(".function.", ".")
        raise BadSchema(re.sub(r"^tools\[(\d+)\]", r"tools.\1", message), param=error.param) from None
    read = tuple(
        replace(tool, is_strict=fields.get("strict") is True, param=f"tools.{index}.input_schema")
        for index, (tool, fields) in enumerate(zip(read, tools, strict=True))
    )
    is_deferred = [bool(tool.get("defer_loading")) for tool in tools]
    return OfferedTools(
        listed=tuple(tool for tool, waits in zip(read, is_deferred, strict=True) if not waits),
        deferred=tuple(tool for tool, waits in zip(read, is_deferred, strict=True) if waits),
    )


def messages_from_anthropic(
    system: str | Sequence[Mapping[str, Any]] | None,
    messages: Sequence[Mapping[str, Any]],
    tools: OfferedTools,
) -> tuple[Message, ...]:
    """Read `system` and `messages`; system messages may stand anywhere.

    Raises:
        RequestError: a field is missing or of a wrong type, or a block cannot be read; names it as Anthropic does,
            `messages.1.content.0.type`.
    """
    head = _text(system or "", "system")
    read = [Message(role="system", content=head)] if head else []
    for index, fields in enumerate(messages):
        path = f"messages.{index}"
        role = fields.get("role")
        content = fields.get("content")
        if not isinstance(content, str | list):
            raise _wrong(f"{path}.content", "must be a string or a list of blocks")
        if role == "user":
            read += _user_messages(content, f"{path}.content", tools)
        elif role == "assistant":
            read.append(_assistant_message(content, f"{path}.content"))
        elif role == "system":
            read.append(Message(role="system", content=_text(content, f"{path}.content")))
        else:
            raise _wrong(f"{path}.role", f"{role!r} is not one of user, assistant, system")
    return tuple(read)


def _user_messages(content: str | list[Any], path: str, tools: OfferedTools) -> list[Message]:
    if isinstance(content, str):
        return [Message(role="user", content=content)]
    read: list[Message] = []
    for index, item in enumerate(content):
        block_path = f"{path}.{index}"
        block = _block(item, block_path)
        if block["type"] == "tool_result":
            text = _result_text(block, block_path, tools)
            call_id = block.get("tool_use_id")
            read.append(
                Message(role="tool", content=text, tool_call_id=call_id if isinstance(call_id, str) else None)
            )
            continue
        text = _block_text(block, block_path)
        last = read[-1] if read else None
        if last and (last.role == "user" or text.lstrip().startswith(REMINDER)):
            read[-1] = Message(
                role=last.role, content=_joined([last.content, text]), tool_call_id=last.tool_call_id
            )
        elif text:
            read.append(Message(role="user", content=text))
    return read or [Message(role="user")]


def _result_text(block: Mapping[str, Any], path: str, tools: OfferedTools) -> str:
    content = block.get("content")
    if content is None:
        content = ""
    if not isinstance(content, str | list):
        raise _wrong(f"{path}.content", "must be a string or a list of blocks")
    if isinstance(content, list):
        texts: list[str] = []
        found: list[str] = []
        for index, item in enumerate(content):
            part_path = f"{path}.content.{index}"
            part = _block(item, part_path)
            if part["type"] == "tool_reference":
                found.append(str(part.get("tool_name")))
            elif part["type"] == "image" or (part["type"] == "document" and not _is_text_document(part)):
                # Refusing would end the whole session: the client cannot take the result back.
                texts.append(f"[{part['type']} left out: {TEXT_ONLY}]")
            else:
                texts.append(_block_text(part, part_path))
        if found:
            texts.append(_definitions(found, tools))
        content = _joined(texts)
    if block.get("is_error") and not content.lstrip().lower().startswith(("error", "<tool_use_error>")):
        content = f"Error: {content}"
    return content


def _definitions(names: Sequence[str], tools: OfferedTools) -> str:
    """Tools that were found, shown as in the head of the prompt."""
    by_name = {tool.name: tool for tool in canonical_tools(tools.all)}
    lines = [
        json.dumps(dict(by_name[name].definition), ensure_ascii=False) for name in names if name in by_name
    ]
    missing = [name for name in names if name not in by_name]
    text = "These functions can be called now:\n<tools>\n" + "\n".join(lines) + "\n</tools>" if lines else ""
    return _joined([text, f"Not available: {', '.join(missing)}" if missing else ""])


def _assistant_message(content: str | list[Any], path: str) -> Message:
    if isinstance(content, str):
        return Message(role="assistant", content=content)
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[ToolCall] = []
    for index, item in enumerate(content):
        block_path = f"{path}.{index}"
        block = _block(item, block_path)
        match block["type"]:
            case "thinking" | "redacted_thinking":
                thoughts.append(_thought(block))
            case "tool_use":
                calls.append(_call(block, block_path))
            case _:
                texts.append(_block_text(block, block_path))
    reasoning = "\n".join(thought for thought in thoughts if thought)
    return Message(
        role="assistant", content="".join(texts), reasoning=reasoning or None, tool_calls=tuple(calls)
    )


def _thought(block: Mapping[str, Any]) -> str:
    """The text of a thought: shown, hidden by us in the signature, or of another model and then lost."""
    shown = block.get("thinking")
    if isinstance(shown, str) and shown:
        return shown
    return unseal(block.get("signature", block.get("data")))


def _call(block: Mapping[str, Any], path: str) -> ToolCall:
    name, arguments, call_id = block.get("name"), block.get("input"), block.get("id")
    if not isinstance(name, str) or not name:
        raise _wrong(f"{path}.name", "must be a name")
    if not isinstance(arguments, Mapping):
        raise _wrong(f"{path}.input", "must be an object")
    return ToolCall(name=name, arguments=arguments, id=call_id if isinstance(call_id, str) else "")


def _text(content: str | Sequence[Any], path: str) -> str:
    if isinstance(content, str):
        return content
    blocks = [(_block(item, f"{path}.{index}"), f"{path}.{index}") for index, item in enumerate(content)]
    return _joined([_block_text(block, block_path) for block, block_path in blocks])


def _joined(texts: Sequence[str]) -> str:
    return "\n\n".join(text for text in texts if text)


def _block(item: Any, path: str) -> Mapping[str, Any]:
    if not isinstance(item, Mapping):
        raise _wrong(path, "must be an object")
    if not isinstance(item.get("type"), str):
        raise _wrong(f"{path}.type", "field required")
    return item


def _block_text(block: Mapping[str, Any], path: str) -> str:
    """The text of a block that is text, a document of text or a search result."""
    match block["type"]:
        case "text":
            if not isinstance(block.get("text"), str):
                raise _wrong(f"{path}.text", "must be a string")
            text: str = block["text"]
            return text
        case "document" if _is_text_document(block):
            source = block["source"]
            text = source.get("data") if source["type"] == "text" else source.get("content")
            parts = [block.get("title"), block.get("context"), _content_text(text, f"{path}.source")]
            return _joined([part for part in parts if isinstance(part, str)])
        case "search_result":
            parts = [
                block.get("title"),
                block.get("source"),
                _content_text(block.get("content"), f"{path}.content"),
            ]
            return _joined([part for part in parts if isinstance(part, str)])
    raise _wrong(f"{path}.type", f"{block['type']!r} is not supported here: {TEXT_ONLY}")


def _is_text_document(block: Mapping[str, Any]) -> bool:
    source = block.get("source")
    return isinstance(source, Mapping) and source.get("type") in ("text", "content")


def _content_text(content: Any, path: str) -> str:
    if not isinstance(content, str | list):
        raise _wrong(path, "must be a string or a list of blocks")
    return _text(content, path)


def _wrong(path: str, problem: str) -> RequestError:
    return RequestError(f"{path}: {problem}", param=path)
