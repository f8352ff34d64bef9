"""Golden: prompts written out by hand from the published format. Brute force: a renderer in plain Python."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepflash.chat.messages import Message, Tool, ToolCall
from stepflash.chat.template import ChatTemplate
from stepflash.chat.tokenizer import Tokenizer
from stepflash.errors import ConfigError, RequestError, WeightsError

BOS = "<\uff5cbegin\u2581of\u2581sentence\uff5c>"
ASK = "<|im_start|>assistant\n<think>\n"

TOOLS_BEFORE = """# Tools

You have access to the following functions in JSONSchema format:

<tools>
"""
TOOLS_AFTER = """
</tools>

If you choose to call a function ONLY reply in the following format with NO suffix:

<tool_call>
<function=example_function_name>
<parameter=example_parameter_1>
value_1
</parameter>
<parameter=example_parameter_2>
This is the value for the second parameter
that can span
multiple lines
</parameter>
</function>
</tool_call>

<IMPORTANT>
Reminder:
- Function calls MUST follow the specified format: an inner <function=...>
...
</function> block must be nested within <tool_call>
...
</tool_call> XML tags
- Required parameters MUST be specified
</IMPORTANT>"""

WEATHER = Tool(
    definition={
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Wetter in Köln & <anderswo>",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}},
                "additionalProperties": False,
            },
        },
    }
)
WEATHER_LINE = (
    '{"type": "function", "function": {"name": "weather", "description": "Wetter in Köln & <anderswo>", '
    '"parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "additionalProperties": false}}}'
)
CLOCK = Tool(definition={"function": {"parameters": {}, "name": "clock"}, "type": "function"})
CLOCK_LINE = '{"function": {"parameters": {}, "name": "clock"}, "type": "function"}'


def user(text: str) -> Message:
    return Message(role="user", content=text)


def assistant(text: str = "", **fields: Any) -> Message:
    return Message(role="assistant", content=text, **fields)


def system(text: str, name: str | None = None) -> Message:
    return Message(role="system", content=text, name=name)


def result(text: str) -> Message:
    return Message(role="tool", content=text, tool_call_id="not-rendered")


ALL_KINDS = ToolCall(
    name="f",
    id="not-rendered",
    arguments={
        "text": "a\n<b> & é",
        "empty": "",
        "yes": True,
        "no": False,
        "nothing": None,
        "int": -3,
        "float": 1.0,
        "list": [1, "é", True, None],
        "map": {"k": {"n": 0.5}},
        "nil": [],
    },
)
ALL_KINDS_TEXT = (
    "<tool_call>\n<function=f>\n"
    "<parameter=text>\na\n<b> & é\n</parameter>\n"
    "<parameter=empty>\n\n</parameter>\n"
    "<parameter=yes>\nTrue\n</parameter>\n"
    "<parameter=no>\nFalse\n</parameter>\n"
    "<parameter=nothing>\nNone\n</parameter>\n"
    "<parameter=int>\n-3\n</parameter>\n"
    "<parameter=float>\n1.0\n</parameter>\n"
    '<parameter=list>\n[1, "é", true, null]\n</parameter>\n'
    '<parameter=map>\n{"k": {"n": 0.5}}\n</parameter>\n'
    "<parameter=nil>\n[]\n</parameter>\n"
    "</function>\n</tool_call>"
)
NOW = ToolCall(name="clock", id="2")
NOW_TEXT = "<tool_call>\n<function=clock>\n</function>\n</tool_call>"

# name: (messages, tools, expected text between bos and the generation prompt)
GOLDEN: dict[str, tuple[list[Any], list[Tool], str]] = {
    "user only": ([user("Hi")], [], "<|im_start|>user\nHi<|im_end|>\n"),
    "system first": (
        [system("Be brief."), user("Hi")],
        [],
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n",
    ),
    "whitespace is content": ([user("  a\n\n")], [], "<|im_start|>user\n  a\n\n<|im_end|>\n"),
    "braces and markup are content": (
        [user("{{ 7*7 }} {% if %} <b>&amp;")],
        [],
        "<|im_start|>user\n{{ 7*7 }} {% if %} <b>&amp;<|im_end|>\n",
    ),
    "tools without system": (
        [user("Hi")],
        [WEATHER],
        f"<|im_start|>system\n{TOOLS_BEFORE}{WEATHER_LINE}{TOOLS_AFTER}<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n",
    ),
    "tools with system": (
        [system("Be brief."), user("Hi")],
        [WEATHER, CLOCK],
        f"<|im_start|>system\nBe brief.\n\n{TOOLS_BEFORE}{WEATHER_LINE}\n{CLOCK_LINE}{TOOLS_AFTER}<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n",
    ),
    "tools with empty system": (
        [system(""), user("Hi")],
        [CLOCK],
        f"<|im_start|>system\n\n\n{TOOLS_BEFORE}{CLOCK_LINE}{TOOLS_AFTER}<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n",
    ),
    "later system in place": (
        [user("Hi"), system("Now be rude.")],
        [],
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>system\nNow be rude.<|im_end|>\n",
    ),
    "later system with tools": (
        [user("Hi"), system("more")],
        [CLOCK],
        f"<|im_start|>system\n{TOOLS_BEFORE}{CLOCK_LINE}{TOOLS_AFTER}<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>system\nmore<|im_end|>\n",
    ),
    "observation": (
        [
            system("S", name="observation"),
            user("Hi"),
            system("it rains", name="observation"),
            system("x", name="y"),
        ],
        [],
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>observation\nit rains<|im_end|>\n<|im_start|>system\nx<|im_end|>\n",
    ),
    "old thought is dropped": (
        [user("1"), assistant("one", reasoning="hm"), user("2")],
        [],
        "<|im_start|>user\n1<|im_end|>\n<|im_start|>assistant\none<|im_end|>\n<|im_start|>user\n2<|im_end|>\n",
    ),
    "thought after the last query stays": (
        [user("1"), assistant("one", reasoning="hm")],
        [],
        "<|im_start|>user\n1<|im_end|>\n<|im_start|>assistant\n<think>\nhm\n</think>\none<|im_end|>\n",
    ),
    "given thought keeps its newlines": (
        [user("1"), assistant("\none", reasoning="\nhm\n")],
        [],
        "<|im_start|>user\n1<|im_end|>\n<|im_start|>assistant\n<think>\n\nhm\n\n</think>\n\none<|im_end|>\n",
    ),
    "empty thought is no thought": (
        [user("1"), assistant("one", reasoning="")],
        [],
        "<|im_start|>user\n1<|im_end|>\n<|im_start|>assistant\none<|im_end|>\n",
    ),
    "thought inside content": (
        [user("1"), assistant("<think>\nhm\n</think>\n\none")],
        [],
        "<|im_start|>user\n1<|im_end|>\n<|im_start|>assistant\n<think>\nhm\n</think>\none<|im_end|>\n",
    ),
    "thought inside content without opening tag": (
        [user("1"), assistant("hm\n\n</think>one")],
        [],
        "<|im_start|>user\n1<|im_end|>\n<|im_start|>assistant\n<think>\nhm\n</think>\none<|im_end|>\n",
    ),
    "thought inside content: last opening, first closing, text after last closing": (
        [user("1"), assistant("x<think>y<think>hm</think>lost</think>\none")],
        [],
        "<|im_start|>user\n1<|im_end|>\n<|im_start|>assistant\n<think>\nhm\n</think>\none<|im_end|>\n",
    ),
    "old thought inside content is dropped": (
        [user("1"), assistant("<think>\nhm\n</think>\none"), user("2")],
        [],
        "<|im_start|>user\n1<|im_end|>\n<|im_start|>assistant\none<|im_end|>\n<|im_start|>user\n2<|im_end|>\n",
    ),
    "given thought leaves content alone": (
        [user("1"), assistant("a</think>b", reasoning="hm")],
        [],
        "<|im_start|>user\n1<|im_end|>\n<|im_start|>assistant\n<think>\nhm\n</think>\na</think>b<|im_end|>\n",
    ),
    "no query at all: no thought": (
        [system("S"), assistant("one", reasoning="hm")],
        [],
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>assistant\none<|im_end|>\n",
    ),
    "wrapped tool result is no query": (
        [
            user("1"),
            assistant("one", reasoning="hm"),
            user("<tool_response>\n5\n</tool_response>"),
            assistant("two", reasoning="ah"),
        ],
        [],
        "<|im_start|>user\n1<|im_end|>\n<|im_start|>assistant\n<think>\nhm\n</think>\none<|im_end|>\n"
        "<|im_start|>user\n<tool_response>\n5\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n<think>\nah\n</think>\ntwo<|im_end|>\n",
    ),
    "half wrapped tool result is a query": (
        [user("1"), assistant("one", reasoning="hm"), user("<tool_response>5</tool_response> so?")],
        [],
        "<|im_start|>user\n1<|im_end|>\n<|im_start|>assistant\none<|im_end|>\n"
        "<|im_start|>user\n<tool_response>5</tool_response> so?<|im_end|>\n",
    ),
    "equal user messages are told apart by place": (
        [user("go on"), assistant("a", reasoning="r1"), user("go on"), assistant("b", reasoning="r2")],
        [],
        "<|im_start|>user\ngo on<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"
        "<|im_start|>user\ngo on<|im_end|>\n<|im_start|>assistant\n<think>\nr2\n</think>\nb<|im_end|>\n",
    ),
    "tool loop": (
        [
            user("1"),
            assistant("Let me look.", reasoning="hm", tool_calls=(ALL_KINDS, NOW)),
            result("eins"),
            result("zwei\n"),
            assistant(reasoning="again", tool_calls=(NOW,)),
            result(""),
            assistant("done", reasoning="good"),
        ],
        [],
        "<|im_start|>user\n1<|im_end|>\n"
        f"<|im_start|>assistant\n<think>\nhm\n</think>\nLet me look.{ALL_KINDS_TEXT}{NOW_TEXT}<|im_end|>\n"
        "<|im_start|>tool_response\n<tool_response>eins</tool_response><tool_response>zwei\n</tool_response><|im_end|>\n"
        f"<|im_start|>assistant\n<think>\nagain\n</think>\n{NOW_TEXT}<|im_end|>\n"
        "<|im_start|>tool_response\n<tool_response></tool_response><|im_end|>\n"
        "<|im_start|>assistant\n<think>\ngood\n</think>\ndone<|im_end|>\n",
    ),
    "content parts": (
        [
            {"role": "system", "content": [{"type": "text", "text": "S1"}, {"type": "text", "value": "S2"}]},
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "a"},
                    {"type": "image"},
                    {"type": "text", "text": "b "},
                    {"type": "text", "text": "c"},
                ],
            },
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"function": {"name": "clock", "arguments": {}}}],
            },
            {"role": "tool", "content": {"value": "noon"}},
            {"role": "assistant", "content": {"text": "t"}, "tool_calls": [{"name": "clock"}]},
        ],
        [],
        "<|im_start|>system\nS1S2<|im_end|>\n<|im_start|>user\na<im_patch>b c<|im_end|>\n"
        f"<|im_start|>assistant\n{NOW_TEXT}<|im_end|>\n"
        "<|im_start|>tool_response\n<tool_response>noon</tool_response><|im_end|>\n"
        f"<|im_start|>assistant\nt{NOW_TEXT}<|im_end|>\n",
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_builtin_template_renders_the_published_format(name: str) -> None:
    messages, tools, expected = GOLDEN[name]
    template = ChatTemplate.builtin()
    assert template.render(messages, tools).text == BOS + expected + ASK
    assert template.render(messages, tools).opens_thought
    assert template.render(messages, tools, add_generation_prompt=False).text == BOS + expected


def plain_python_turns(messages: list[Message], tools: list[Tool]) -> list[str]:
    """The turns of a prompt, by string building alone."""
    turns = []
    head = messages[0].content if messages[0].role == "system" else None
    if tools:
        lines = "\n".join(json.dumps(tool.definition, ensure_ascii=False) for tool in tools)
        turns.append(("system", ("" if head is None else head + "\n\n") + TOOLS_BEFORE + lines + TOOLS_AFTER))
    elif head is not None:
        turns.append(("system", head))
    queries = [
        index
        for index, message in enumerate(messages)
        if message.role == "user"
        and not (
            message.content.startswith("<tool_response>") and message.content.endswith("</tool_response>")
        )
    ]
    for index, message in enumerate(messages):
        if message.role == "system" and index == 0:
            continue
        if message.role == "tool":
            wrapped = f"<tool_response>{message.content}</tool_response>"
            if index > 0 and messages[index - 1].role == "tool":
                turns[-1] = ("tool_response", turns[-1][1] + wrapped)
            else:
                turns.append(("tool_response", wrapped))
            continue
        role, body = message.role, message.content
        if role == "system" and message.name == "observation":
            role = "observation"
        if role == "assistant":
            thought = message.reasoning
            if thought is None:
                thought = ""
                if "</think>" in body:
                    before = body[: body.index("</think>")]
                    thought = before[before.rfind("<think>") + 7 :] if "<think>" in before else before
                    thought = thought.strip("\n")
                    body = body[body.rindex("</think>") + 8 :].lstrip("\n")
            if thought and queries and index > max(queries):
                body = f"<think>\n{thought}\n</think>\n{body}"
            for call in message.tool_calls:
                body += f"<tool_call>\n<function={call.name}>\n"
                for key, value in call.arguments.items():
                    text = (
                        json.dumps(value, ensure_ascii=False)
                        if isinstance(value, dict | list)
                        else str(value)
                    )
                    body += f"<parameter={key}>\n{text}\n</parameter>\n"
                body += "</function>\n</tool_call>"
        turns.append((role, body))
    return [f"<|im_start|>{role}\n{body}<|im_end|>\n" for role, body in turns]


TEXTS = st.one_of(
    st.text(max_size=12),
    st.lists(
        st.sampled_from(
            ["<think>", "</think>", "\n", "a", "<tool_response>", "</tool_response>", "<|im_end|>", "{{"]
        ),
        max_size=7,
    ).map("".join),
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=5,
)
CALLS = st.builds(
    ToolCall, name=st.text(max_size=5), arguments=st.dictionaries(st.text(max_size=5), VALUES, max_size=3)
)
MESSAGES = st.one_of(
    st.builds(Message, role=st.sampled_from(["user", "tool"]), content=TEXTS),
    st.builds(
        Message, role=st.just("system"), content=TEXTS, name=st.sampled_from([None, "observation", "x"])
    ),
    st.builds(
        Message,
        role=st.just("assistant"),
        content=TEXTS,
        reasoning=st.none() | TEXTS,
        tool_calls=st.lists(CALLS, max_size=2).map(tuple),
    ),
)


@given(
    st.lists(MESSAGES, min_size=1, max_size=8),
    st.sampled_from([[], [WEATHER], [WEATHER, CLOCK]]),
    st.booleans(),
)
def test_builtin_template_and_its_cut_points_equal_plain_python(
    messages: list[Message], tools: list[Tool], ask: bool
) -> None:
    turns = plain_python_turns(messages, tools)
    rendered = ChatTemplate.builtin().render(messages, tools, add_generation_prompt=ask)
    assert rendered.text == BOS + "".join(turns) + (ASK if ask else "")
    cuts = [len(BOS)]
    for turn in turns:
        cuts.append(cuts[-1] + len(turn))
    assert list(rendered.cut_points) == cuts[1:]


def test_cut_points_are_shared_by_the_next_turn() -> None:
    template = ChatTemplate.builtin()
    messages = [system("S"), user("1"), assistant(reasoning="r", tool_calls=(NOW,)), result("x")]
    before = template.render(messages, [CLOCK])
    after = template.render([*messages, assistant("y", reasoning="q"), user("2")], [CLOCK])
    # The new question drops the thought, so exactly the head and the first question stay common.
    assert [cut for cut in before.cut_points if before.text[:cut] == after.text[:cut]] == list(
        before.cut_points[:2]
    )
    assert before.cut_points[:2] == after.cut_points[:2]


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_foreign_template_keeps_only_cut_points_that_are_prefixes() -> None:
    rendered = ChatTemplate({"default": CHATML}, source="test").render(
        [system("S"), user("a"), assistant("b")]
    )
    text = (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
    )
    assert rendered.text == text + "<|im_start|>assistant\n"
    assert [text[:cut] for cut in rendered.cut_points] == [text[:31], text[:60], text]

    counting = "{{ messages|length }}" + CHATML
    assert ChatTemplate({"default": counting}, source="test").render([user("a"), user("b")]).cut_points == (
        59,
    )


def test_foreign_template_that_refuses_some_prefixes_still_renders() -> None:
    strict = "{% if messages[-1].role != 'user' %}{{ raise_exception('end with user') }}{% endif %}" + CHATML
    rendered = ChatTemplate({"default": strict}, source="test").render([user("a"), assistant("b"), user("c")])
    assert len(rendered.cut_points) == 2
    with pytest.raises(RequestError, match=r"test.*end with user") as caught:
        ChatTemplate({"default": strict}, source="test").render([user("a"), assistant("b")])
    assert caught.value.param == "messages"


def test_same_bytes_as_builtin_give_the_builtin_cut_points() -> None:
    """With the old thought dropped, prefix probing alone would miss the cut after the first question's answer."""
    source = Path(__file__).parents[2].joinpath("stepflash/chat/step3p5.jinja").read_text(encoding="utf-8")
    messages = [user("1"), assistant("one", reasoning="hm"), user("2")]
    builtin = ChatTemplate.builtin()
    copied = ChatTemplate({"default": source}, source="copy", special_tokens=builtin.special_tokens)
    assert copied.render(messages) == builtin.render(messages)
    assert len(copied.render(messages).cut_points) == 3


def test_hugging_face_template_environment() -> None:
    def render(text: str, **variables: Any) -> str:
        return ChatTemplate({"default": text}, source="test").render([user("a")], variables=variables).text

    assert render("{{ {'b': 'é<', 'a': [1.0, none]} | tojson }}") == '{"b": "é<", "a": [1.0, null]}'
    assert render("{{ {'b': 1} | tojson(indent=1) }}") == '{\n "b": 1\n}'
    assert render("  {% if true %}\nx\n  {% endif %}\ny") == "x\ny"
    assert render("{% generation %}x{% endgeneration %}{% for i in range(9) %}{% break %}{% endfor %}") == "x"
    assert render("{{ tools is none }}{{ enable_thinking }}", enable_thinking=False) == "TrueFalse"
    assert len(render("{{ strftime_now('%Y') }}")) == 4


@pytest.mark.parametrize(
    "text",
    [
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ none + 'a' }}",
        "{{ a.b.c }}",
        "{{ 1 // 0 }}",
    ],
)
def test_template_failures_are_request_errors(text: str) -> None:
    with pytest.raises(RequestError, match="test cannot render"):
        ChatTemplate({"default": text}, source="test").render([user("a")])


def test_bad_requests_of_the_builtin_template() -> None:
    with pytest.raises(RequestError, match="messages is empty"):
        ChatTemplate.builtin().render([])
    with pytest.raises(RequestError, match=r"messages\[1\]: no such role: wizard"):
        ChatTemplate.builtin().render([user("a"), {"role": "wizard", "content": "b"}])


def test_syntax_error_names_the_file_and_line() -> None:
    with pytest.raises(ConfigError, match=r"x\.jinja: line 2"):
        ChatTemplate({"default": "a\n{% if %}"}, source="x.jinja")


def test_from_pretrained_order(step_folder: Path, tmp_path: Path) -> None:
    for file in step_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    template = ChatTemplate.from_pretrained(tmp_path, Tokenizer.from_pretrained(tmp_path))
    assert template.is_builtin
    assert template.render([user("a")]).text == f"{BOS}<|im_start|>user\na<|im_end|>\n{ASK}"

    config = tmp_path / "tokenizer_config.json"
    config.write_text(
        json.dumps({"bos_token": BOS, "chat_template": "config {{ bos_token }}"}), encoding="utf-8"
    )
    assert ChatTemplate.from_pretrained(tmp_path).render([user("a")]).text == f"config {BOS}"

    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    config.write_text(json.dumps({"chat_template": named}), encoding="utf-8")
    template = ChatTemplate.from_pretrained(tmp_path)
    assert template.render([user("a")]).text == "plain"
    assert template.render([user("a")], [CLOCK]).text == "tools"

    (tmp_path / "chat_template.jinja").write_text("file é", encoding="utf-8")
    assert ChatTemplate.from_pretrained(tmp_path).render([user("a")]).text == "file é"

    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"chat_template\.jinja"):
        ChatTemplate.from_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    config.write_text(json.dumps({"chat_template": 3}), encoding="utf-8")
    with pytest.raises(ConfigError, match="chat_template must be"):
        ChatTemplate.from_pretrained(tmp_path)
    with pytest.raises(WeightsError, match="no such folder"):
        ChatTemplate.from_pretrained(tmp_path / "nowhere")


def test_gguf_template(step_gguf: Path) -> None:
    template = ChatTemplate.from_pretrained(step_gguf)
    assert template.source == "model.gguf:tokenizer.chat_template"
    assert template.render([user("a")]).text == f"gguf {BOS}"
