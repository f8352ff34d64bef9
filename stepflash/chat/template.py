"""Conversations to prompt text, by jinja2 templates run in a sandbox.

A checkpoint's own template wins; `step3p5.jinja` beside this file serves those without one. Templates see what
Hugging Face's `apply_chat_template` would show them, so any published template renders the same bytes here.

Besides the text, rendering tells where it may be cut between turns (`cut_points`), because a prompt that grows
by a turn shares everything before such a place with its predecessor, and a cache snapshot there will be used
again. The built-in template marks these places itself; for a foreign one they are found by experiment.
"""

from __future__ import annotations

import datetime
import functools
import itertools
import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from stepflash.chat.checkpoint_files import is_gguf, read_json_object, read_text, require_checkpoint
from stepflash.chat.messages import Message, Tool
from stepflash.chat.tokenizer import BOS_TEXT, Tokenizer
from stepflash.errors import ConfigError, RequestError
from stepflash.gguf_file import read_gguf

_BUILTIN_FILE = Path(__file__).with_name("step3p5.jinja")
_MAX_PROBES = 16  # renderings spent on finding the cut points of a foreign template


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendered:
    """A prompt. `cut_points` are ascending character offsets into `text`: after the block of system message and
    tools, and after each complete turn. The generation prompt lies behind the last of them."""

    text: str
    cut_points: tuple[int, ...]

    @property
    def opens_thought(self) -> bool:
        """Whether the answer begins inside `<think>`."""
        return self.text.rstrip().endswith("<think>")


class ChatTemplate:
    """The prompt format of a model. `source` says where it came from."""

    def __init__(
        self,
        templates: Mapping[str, str],
        *,
        source: str,
        special_tokens: Mapping[str, str] | None = None,
    ) -> None:
        """`templates` maps names to jinja2 text; "tool_use", if there, is for requests with tools, else "default".

        Raises:
            ConfigError: a template has a syntax error.
        """
        self.source = source
        self.special_tokens = {"bos_token": "", "eos_token": "", **(special_tokens or {})}
        environment = _environment()
        self.sources = dict(templates)
        self._templates = {}
        for name, text in templates.items():
            try:
                self._templates[name] = environment.from_string(text)
            except jinja2.TemplateSyntaxError as error:
                raise ConfigError(
                    f"chat template {source}: line {error.lineno}: {error.message}; mend the file or remove it "
                    "to use the built-in template"
                ) from error

    @classmethod
    def builtin(cls, special_tokens: Mapping[str, str] | None = None) -> ChatTemplate:
        """The Step-3.5 format. Without `special_tokens` bos is that of the released model."""
        return cls(
            {"default": read_text(_BUILTIN_FILE)},
            source=_BUILTIN_FILE.name,
            special_tokens=special_tokens or {"bos_token": BOS_TEXT},
        )

    @classmethod
    def from_pretrained(cls, path: str | Path, tokenizer: Tokenizer | None = None) -> ChatTemplate:
        """The template of a checkpoint folder or `.gguf` file, or the built-in one when it has none.

        Looked for in chat_template.jinja, then tokenizer_config.json, then a GGUF's metadata. `tokenizer`, the
        checkpoint's, gives the texts of special tokens; it is loaded when not given.

        Raises:
            WeightsError: the checkpoint or its tokenizer does not exist.
            ConfigError: a file is damaged or a template has a syntax error.
        """
        path = Path(path)
        require_checkpoint(path)
        special_tokens = (tokenizer or Tokenizer.from_pretrained(path)).special_tokens
        templates, source = _templates_of(path)
        if not templates:
            return cls.builtin(special_tokens)
        return cls(templates, source=source, special_tokens=special_tokens)

    @property
    def is_builtin(self) -> bool:
        return self.source == _BUILTIN_FILE.name

    def render(
        self,
        messages: Sequence[Message | Mapping[str, Any]],
        tools: Sequence[Tool | Mapping[str, Any]] = (),
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> Rendered:
        """Render a conversation.

        Args:
            messages: values, or mappings in the shape that Hugging Face templates expect.
            tools: rendered whole, key order kept.
            add_generation_prompt: end with the beginning of the assistant's turn.
            variables: more template variables, as in a client's `chat_template_kwargs`.
        Raises:
            RequestError: no messages, or the template refuses them.
        """
        if not messages:
            raise RequestError("messages is empty; a prompt needs at least one message", param="messages")
        dicts = [_message_dict(message) for message in messages]
        definitions = [dict(tool.definition if isinstance(tool, Tool) else tool) for tool in tools]

        def run(messages: list[dict[str, Any]], add_generation_prompt: bool, **marks: str) -> str:
            return self._run(messages, definitions, add_generation_prompt, {**(variables or {}), **marks})

        if self.is_builtin:
            mark = f"\0{secrets.token_hex(8)}\0"
            *turns, generation_prompt = run(dicts, add_generation_prompt, cut=mark).split(mark)
            return Rendered(
                text="".join(turns) + generation_prompt,
                cut_points=tuple(itertools.accumulate(len(turn) for turn in turns)),
            )
        text = run(dicts, add_generation_prompt)
        native = self._try_builtin(messages, tools, add_generation_prompt)
        if native is not None and native.text == text:
            return native
        return Rendered(text=text, cut_points=_probe_cut_points(text, dicts, run))

    def _try_builtin(
        self,
        messages: Sequence[Message | Mapping[str, Any]],
        tools: Sequence[Tool | Mapping[str, Any]],
        add_generation_prompt: bool,
    ) -> Rendered | None:
        """What the built-in template makes of it: if the text is the same, its cut points hold too."""
        try:
            return self._builtin.render(messages, tools, add_generation_prompt)
        except RequestError:
            return None

    @functools.cached_property
    def _builtin(self) -> ChatTemplate:
        return ChatTemplate.builtin(self.special_tokens)

    def _run(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]],
        add_generation_prompt: bool,
        variables: Mapping[str, Any],
    ) -> str:
        name = "tool_use" if tools and "tool_use" in self._templates else "default"
        template = self._templates.get(name) or next(iter(self._templates.values()))
        try:
            return template.render(
                **{
                    **self.special_tokens,
                    **variables,
                    "messages": messages,
                    "tools": tools or None,
                    "documents": None,
                    "add_generation_prompt": add_generation_prompt,
                }
            )
        # Besides jinja2's own errors a template raises what its expressions raise: None + "", missing keys, ...
        except (
            jinja2.TemplateError,
            TypeError,
            ValueError,
            LookupError,
            AttributeError,
            ArithmeticError,
        ) as error:
            message = str(error).strip() or type(error).__name__
            raise RequestError(
                f"the chat template {self.source} cannot render these messages: {message}", param="messages"
            ) from error


def _templates_of(path: Path) -> tuple[dict[str, str], str]:
    """Templates by name and the place where they were found; empty when the checkpoint has none."""
    if is_gguf(path):
        prefix = "tokenizer.chat_template"
        metadata = read_gguf(path).metadata
        named = {
            key.removeprefix(prefix).removeprefix(".") or "default": str(value)
            for key, value in metadata.items()
            if key == prefix or key.startswith(prefix + ".")
        }
        return named, f"{path.name}:{prefix}"
    file = path / "chat_template.jinja"
    if file.is_file():
        return {"default": read_text(file)}, file.name
    value = read_json_object(path / "tokenizer_config.json").get("chat_template")
    source = "tokenizer_config.json:chat_template"
    if value is None:
        return {}, source
    if isinstance(value, str):
        return {"default": value}, source
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        named = {str(item.get("name")): item.get("template") for item in value}
        if named and all(isinstance(text, str) for text in named.values()):
            return named, source
    raise ConfigError(
        f"{path / 'tokenizer_config.json'}: chat_template must be a string or a list of named strings"
    )


def _message_dict(message: Message | Mapping[str, Any]) -> dict[str, Any]:
    """A message as templates see it; what is not set has no key."""
    if not isinstance(message, Message):
        return dict(message)
    fields: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.reasoning is not None:
        fields["reasoning_content"] = message.reasoning
    if message.tool_calls:
        fields["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": dict(call.arguments)},
            }
            for call in message.tool_calls
        ]
    if message.tool_call_id is not None:
        fields["tool_call_id"] = message.tool_call_id
    if message.name is not None:
        fields["name"] = message.name
    return fields


def _probe_cut_points(
    text: str, messages: list[dict[str, Any]], run: Callable[[list[dict[str, Any]], bool], str]
) -> tuple[int, ...]:
    """Cut points of a template that does not tell: the renderings of the first messages that begin `text`.

    A template may drop things from earlier turns, so each candidate is checked and only real prefixes are kept.
    Long conversations are probed at their first message and at the most recent ones.
    """
    sizes = {1, *range(max(1, len(messages) - _MAX_PROBES + 2), len(messages) + 1)}
    cuts = set()
    for size in sizes:
        try:
            prefix = run(messages[:size], False)
        except RequestError:  # some templates refuse a conversation that ends here
            continue
        if prefix and text.startswith(prefix):
            cuts.add(len(prefix))
    return tuple(sorted(cuts))


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`, which Hugging Face uses for training masks: just its body."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own convention

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """Jinja2 as Hugging Face sets it up for chat templates."""

    def to_json(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def strftime_now(format: str) -> str:
        return datetime.datetime.now().strftime(format)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment
