"""Input items of the Responses API, to messages; pure.

An assistant's message is spread over items here: the thought, the text, each call. Items that follow each other
are put together again, as the model wrote them; ids are never rendered, since they differ in every session.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from stepflash.chat.arguments import read_json
from stepflash.chat.messages import Message, Role, ToolCall
from stepflash.errors import RequestError
from stepflash.server.openai_responses_tools import CUSTOM_INPUT, Toolbox
from stepflash.server.sealed_thought import unseal

_ROLES: Mapping[str, Role] = {
    "user": "user",
    "system": "system",
    "developer": "system",
    "assistant": "assistant",
}
_TEXT_PARTS = {
    "input_text": "text",
    "output_text": "text",
    "text": "text",
    "reasoning_text": "text",
    "summary_text": "text",
    "refusal": "refusal",
}
MAX_LISTED = 100
_MEDIA_PARTS = ("input_image", "input_file", "input_audio")


def messages_from_items(
    items: Sequence[Any], toolbox: Toolbox, *, num_earlier: int = 0
) -> tuple[Message, ...]:
    """Read input items in order; the first `num_earlier` are not of this request.

    Raises:
        RequestError: a field is missing or of a wrong type, or an item or part is of a kind that is not supported;
            names it, as in `input[2].content[0].type`.
    """
    reader = _Reader(toolbox)
    for index, item in enumerate(items):
        path = f"input[{index - num_earlier}]"
        if not isinstance(item, Mapping):
            raise _wrong(path, "must be an object")
        reader.read(item, path)
    return tuple(reader.messages)


def listed_items(items: Sequence[Mapping[str, Any]], query: Mapping[str, str]) -> dict[str, Any]:
    """A page of stored items: `limit` of them in `order`, those behind the one whose id is `after`.

    Raises:
        RequestError: one of these is wrong.
    """
    order, limit, after = query.get("order", "desc"), query.get("limit", "20"), query.get("after")
    if order not in ("asc", "desc"):
        raise RequestError(f"order must be asc or desc, got {order[:80]!r}", param="order")
    if not re.fullmatch("[0-9]{1,3}", limit) or not 1 <= int(limit) <= MAX_LISTED:
        raise RequestError(f"limit must be between 1 and {MAX_LISTED}, got {limit[:80]!r}", param="limit")
    listed = [_listed(item, index) for index, item in enumerate(items)]
    if order == "desc":
        listed.reverse()
    if after is not None:
        ids = [item["id"] for item in listed]
        if after not in ids:
            raise RequestError(f"after: there is no item {after[:80]!r}", param="after")
        listed = listed[ids.index(after) + 1 :]
    page = listed[: int(limit)]
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": len(page) < len(listed),
    }


def _listed(item: Mapping[str, Any], index: int) -> dict[str, Any]:
    """A stored item as lists of items show it: with an id and a status, and text in parts."""
    listed = {"type": "message", "status": "completed", **item, "id": item.get("id") or f"item_{index}"}
    if listed["type"] == "message":
        is_answer = listed["role"] == "assistant"
        parts = listed["content"]
        if isinstance(parts, str):
            parts = [{"type": "output_text" if is_answer else "input_text", "text": parts}]
        if is_answer:
            parts = [{"annotations": [], "logprobs": [], **part} for part in parts]
        listed["content"] = parts
    return listed


class _Reader:
    """Collects messages; the last one grows while items of the assistant follow each other."""

    def __init__(self, toolbox: Toolbox) -> None:
        self._toolbox = toolbox
        self.messages: list[Message] = []

    def read(self, item: Mapping[str, Any], path: str) -> None:
        kind = item.get("type", "message" if "role" in item else None)
        match kind:
            case "message":
                self._message(item, path)
            case "reasoning":
                self._reasoning(item, path)
            case "function_call":
                arguments = _arguments(item.get("arguments"), f"{path}.arguments")
                self._call(item, path, arguments)
            case "custom_tool_call":
                self._call(item, path, {CUSTOM_INPUT: _string(item, "input", path)})
            case "function_call_output" | "custom_tool_call_output":
                text = _text(item.get("output"), f"{path}.output", leaves_out_media=True)
                call_id = _string(item, "call_id", path)
                self.messages.append(Message(role="tool", content=text, tool_call_id=call_id))
            case _:
                raise _wrong(f"{path}.type", f"{kind!r} is not supported")

    def _message(self, item: Mapping[str, Any], path: str) -> None:
        role = _ROLES.get(str(item.get("role")))
        if role is None:
            raise _wrong(f"{path}.role", f"{item.get('role')!r} is not one of {', '.join(_ROLES)}")
        text = _text(item.get("content"), f"{path}.content")
        last = self._last_of_assistant()
        if role == "assistant" and last is not None and (not last.content or last.tool_calls):
            self.messages[-1] = replace(last, content=last.content + text)
        else:
            self.messages.append(Message(role=role, content=text))

    def _reasoning(self, item: Mapping[str, Any], path: str) -> None:
        text = _text(item.get("content") or [], f"{path}.content") or unseal(item.get("encrypted_content"))
        if not text:  # of a model that shows no more than this
            text = _text(item.get("summary") or [], f"{path}.summary")
        self.messages.append(Message(role="assistant", reasoning=text or None))

    def _call(self, item: Mapping[str, Any], path: str, arguments: Mapping[str, Any]) -> None:
        name, namespace = _string(item, "name", path), item.get("namespace")
        shown = self._toolbox.model_name(name, namespace if isinstance(namespace, str) else None)
        call = ToolCall(name=shown, arguments=arguments, id=_string(item, "call_id", path))
        last = self._last_of_assistant()
        if last is None:
            self.messages.append(Message(role="assistant", tool_calls=(call,)))
        else:
            self.messages[-1] = replace(last, tool_calls=(*last.tool_calls, call))

    def _last_of_assistant(self) -> Message | None:
        last = self.messages[-1] if self.messages else None
        return last if last is not None and last.role == "assistant" else None


def _text(content: Any, path: str, *, leaves_out_media: bool = False) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise _wrong(path, "must be a string or a list of parts")
    texts = []
    for index, part in enumerate(content):
        part_path = f"{path}[{index}]"
        if not isinstance(part, Mapping):
            raise _wrong(part_path, "must be an object")
        kind = str(part.get("type"))
        if leaves_out_media and kind in _MEDIA_PARTS:
            # Refusing would end the whole session: the client cannot take the tool's output back.
            texts.append(f"[{kind} left out: this model reads text only]")
            continue
        key = _TEXT_PARTS.get(kind)
        if key is None:
            raise _wrong(f"{part_path}.type", f"{kind!r} is not supported: this model reads text only")
        texts.append(_string(part, key, part_path))
    return "".join(texts)


def _arguments(arguments: Any, path: str) -> Mapping[str, Any]:
    try:
        value = read_json(arguments) if isinstance(arguments, str) and arguments.strip() else {}
    except ValueError as error:
        raise _wrong(path, f"not valid JSON ({error})") from None
    if not isinstance(arguments, str) or not isinstance(value, Mapping):
        raise _wrong(path, "must be the JSON text of an object")
    return value


def _string(fields: Mapping[str, Any], key: str, path: str) -> str:
    value = fields.get(key)
    if not isinstance(value, str):
        raise _wrong(f"{path}.{key}", "must be a string")
    return value


def _wrong(path: str, problem: str) -> RequestError:
    return RequestError(f"{path}: {problem}", param=path)
