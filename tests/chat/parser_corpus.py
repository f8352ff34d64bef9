"""The bug list of other parsers for this format as a corpus: outputs, and what they mean, written by hand."""

from dataclasses import dataclass
from typing import Any

from stepflash.chat.messages import FinishReason, Tool
from stepflash.chat.parser import LOOKAHEAD_CHARS


def tool(name: str, **properties: Any) -> Tool:
    schema = {"type": "object", "properties": properties}
    return Tool(definition={"type": "function", "function": {"name": name, "parameters": schema}})


TOOLS = (
    tool("clock"),
    tool("weather", city={"type": "string"}, state={"type": "string"}, days={"type": "integer"}),
    tool("area", shape={"type": "string"}, dimensions={"type": "object"}, precision={"type": "integer"}),
    tool(
        "types",
        i={"type": "integer"},
        n={"type": "number"},
        b={"type": "boolean"},
        s={"type": "string"},
        o={"type": "object"},
        a={"type": "array"},
        u={"anyOf": [{"type": "integer"}, {"type": "null"}]},
        l={"type": ["array", "string"]},
    ),
    tool("write", path={"type": "string"}, content={"type": "string"}),
)


@dataclass(frozen=True)
class Case:
    """One output and what it means. `calls` are (name, arguments, repaired), `cut_arguments` those of a last call
    that was cut off."""

    text: str
    reasoning: str | None = None
    content: str | None = None
    calls: tuple[tuple[str, dict[str, Any], bool], ...] = ()
    cut_arguments: str = ""
    thinks: bool = True
    reason: FinishReason = "stop"


def call(name: str, *parameters: tuple[str, str]) -> str:
    """A call as the chat template writes it."""
    body = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in parameters)
    return f"<tool_call>\n<function={name}>\n{body}</function>\n</tool_call>"


DALLAS = call("weather", ("city", "Dallas"), ("state", "TX"))
DALLAS_CALL = ("weather", {"city": "Dallas", "state": "TX"}, False)
DALLAS_MENDED = ("weather", {"city": "Dallas", "state": "TX"}, True)
CLOCK = call("clock")
CLOCK_CALL = ("clock", {}, False)
CLOCK_MENDED = ("clock", {}, True)


def answer(text: str, content: str | None = None, *calls: tuple[str, dict[str, Any], bool]) -> Case:
    """An output whose thought is "hm"."""
    return Case(f"hm\n</think>\n{text}", "hm", content, calls)


LONG = "x" * LOOKAHEAD_CHARS

THOUGHTS = {
    "usual": Case("hm\n</think>\n\nA", "hm", "\nA"),
    "no newlines": Case("This is a thought</think>This is the rest", "This is a thought", "This is the rest"),
    "inner newlines": Case("This\nThat</think>rest\nThat", "This\nThat", "rest\nThat"),
    "exactly one newline on each side": Case("\n a \n b\n\n\n</think>\n\nX", "\n a \n b\n\n", "\nX"),
    "no content": Case("hm</think>", "hm"),
    "only the newline of the tag": Case("hm\n</think>\n", "hm"),
    "whitespace is content without calls": Case("hm\n</think>\n\n ", "hm", "\n "),
    "no closing tag": Case("This is a thought", "This is a thought"),
    "no closing tag, trailing newline": Case("This is a thought\n", "This is a thought"),
    "no closing tag, two newlines": Case("This is a thought\n\n", "This is a thought\n"),
    "nothing": Case(""),
    "one newline": Case("\n"),
    "empty thought": Case("</think>This is the rest", None, "This is the rest"),
    "empty thought with newlines": Case("\n</think>\nA", None, "A"),
    "echoed tag": Case("<think>hm</think>\nA", "hm", "A"),
    "echoed tag with newlines": Case("<think>\nhm\n</think>\nA", "hm", "A"),
    "echoed tag after whitespace": Case("\n<think>hm</think>\nA", "hm", "A"),
    "echoed tag, no end": Case("<think>hm", "hm"),
    "echoed tag, empty": Case("<think>\n</think>\n"),
    "text before the tag": Case("Intro<think>r</think>\nA", "r", "IntroA"),
    "text and newline before the tag": Case("\nIntro\n<think>r</think>\nAnswer", "r", "\nIntro\nAnswer"),
    "text before the tag, only a newline after": Case("Intro<think>r</think>\n", "r", "Intro"),
    "text before the tag, no end": Case("before<think>still thinking\n", "still thinking", "before"),
    "text before the tag, two newlines": Case("Intro<think>r</think>\n\nA", "r", "Intro\nA"),
    "longest text before the tag": Case(
        "x" * LOOKAHEAD_CHARS + "<think>r</think>A", "r", "x" * LOOKAHEAD_CHARS + "A"
    ),
    "later opening tag is thought": Case(
        "x" * LOOKAHEAD_CHARS + "y<think>r</think>A", "x" * LOOKAHEAD_CHARS + "y<think>r", "A"
    ),
    "tag after the end is content": Case(
        "r</think>Use <think> and </think>!", "r", "Use <think> and </think>!"
    ),
    "second opening tag is thought": Case("<think>a<think>b</think>c", "a<think>b", "c"),
    "parts of tags": Case("a < b </thin k> </think</think>A </think", "a < b </thin k> </think", "A </think"),
    "end inside the tag": Case("hm\n</thin", "hm\n</thin"),
    "unicode": Case(
        "\U0001f914\u2028\u00e9\n</think>\n\u65e5\u672c", "\U0001f914\u2028\u00e9", "\u65e5\u672c"
    ),
    "carriage returns are kept": Case("hm\r\n</think>\r\nA", "hm\r", "\r\nA"),
    "not thinking": Case("Just text\n", None, "Just text\n", thinks=False),
    "not thinking, thought in between": Case("Intro<think>\nr\n</think>\nA", "r", "IntroA", thinks=False),
    "not thinking, thought at once": Case("\n<think>\nr\n</think>\n\nA", "r", "\nA", thinks=False),
    "not thinking, thought without end": Case("A\n<think>r\n", "r", "A\n", thinks=False),
    "not thinking, second thought is content": Case(
        "<think>r</think>a<think>", "r", "a<think>", thinks=False
    ),
    "not thinking, stray closing tag": Case("a</think>b", None, "a</think>b", thinks=False),
    "not thinking, tag in a value": Case(
        call("write", ("path", "p"), ("content", "<think>x</think>")),
        calls=(("write", {"path": "p", "content": "<think>x</think>"}, False),),
        thinks=False,
    ),
    "length": Case("hm", "hm", reason="length"),
}

CALLS = {
    "single": answer(DALLAS, None, DALLAS_CALL),
    "everything in one burst": Case(f"hm\n</think>\n\nSure.\n{DALLAS}", "hm", "\nSure.\n", (DALLAS_CALL,)),
    "no whitespace at all": answer(
        "<tool_call><function=weather><parameter=city>Dallas</parameter><parameter=state>TX</parameter></function></tool_call>",
        None,
        DALLAS_CALL,
    ),
    "much whitespace": answer(
        "\n\n <tool_call>\n\n\t<function=clock>  \n\n </function> \n\n</tool_call>\n \n", None, CLOCK_CALL
    ),
    "parameterless": answer(CLOCK, None, CLOCK_CALL),
    "with content": answer(f"Sure! Let me check.{DALLAS}", "Sure! Let me check.", DALLAS_CALL),
    "newline before the call is content": answer(f"Sure!\n{DALLAS}", "Sure!\n", DALLAS_CALL),
    "back to back": answer(f"{DALLAS}{CLOCK}", None, DALLAS_CALL, CLOCK_CALL),
    "newline between": answer(f"{DALLAS}\n{CLOCK}\n", None, DALLAS_CALL, CLOCK_CALL),
    "text between": answer(f"hello{DALLAS}hi{CLOCK}", "hellohi", DALLAS_CALL, CLOCK_CALL),
    "text after": answer(f"{DALLAS}\nDone.\n", "\nDone.\n", DALLAS_CALL),
    "same tool twice": answer(f"{CLOCK}\n{CLOCK}", None, CLOCK_CALL, CLOCK_CALL),
    "undeclared tool: text": answer(call("other", ("k", "5")), None, ("other", {"k": "5"}, False)),
    "undeclared parameter: text": answer(
        call("weather", ("zip", "5")), None, ("weather", {"zip": "5"}, False)
    ),
    "interior newlines": answer(
        call("write", ("content", "\n  a\n\nb\n")), None, ("write", {"content": "\n  a\n\nb\n"}, False)
    ),
    "value on the tag's line": answer(
        "<tool_call><function=write><parameter=content>a\nb</parameter></function></tool_call>",
        None,
        ("write", {"content": "a\nb"}, False),
    ),
    "empty string": answer(call("weather", ("city", "")), None, ("weather", {"city": ""}, False)),
    "empty string, one newline": answer(
        "<tool_call><function=weather><parameter=city>\n</parameter></function></tool_call>",
        None,
        ("weather", {"city": ""}, False),
    ),
    "empty string, nothing": answer(
        "<tool_call><function=weather><parameter=city></parameter></function></tool_call>",
        None,
        ("weather", {"city": ""}, False),
    ),
    "types": answer(
        call(
            "types",
            ("i", "42"),
            ("n", "3.14"),
            ("b", "true"),
            ("s", "42"),
            ("o", '{"k": [1, null]}'),
            ("a", "[true, null]"),
            ("u", "null"),
            ("l", '["x"]'),
        ),
        None,
        (
            "types",
            {
                "i": 42,
                "n": 3.14,
                "b": True,
                "s": "42",
                "o": {"k": [1, None]},
                "a": [True, None],
                "u": None,
                "l": ["x"],
            },
            False,
        ),
    ),
    "types, Python spelling": answer(
        call("types", ("b", "True"), ("o", "{'k': 'v'}"), ("a", "(1, None)"), ("u", "None"), ("s", "None")),
        None,
        ("types", {"b": True, "o": {"k": "v"}, "a": [1, None], "u": None, "s": "None"}, False),
    ),
    "types that do not fit": answer(
        call("types", ("i", "4.5"), ("n", "nan"), ("b", "maybe"), ("o", "{broken"), ("a", "[1"), ("l", "[x")),
        None,
        ("types", {"i": "4.5", "n": "nan", "b": False, "o": "{broken", "a": "[1", "l": "[x"}, False),
    ),
    "integral number": answer(call("types", ("n", "3.0")), None, ("types", {"n": 3}, False)),
    "spellings of numbers": answer(
        call("types", ("n", "1e3"), ("i", "+7"), ("b", "FALSE"))
        + call("types", ("n", "-0.5"), ("i", "007"), ("a", "[]"), ("o", "{}")),
        None,
        ("types", {"n": 1000, "i": 7, "b": False}, False),
        ("types", {"n": -0.5, "i": 7, "a": [], "o": {}}, False),
    ),
    "null, any case, any type": answer(
        call("types", ("s", "NULL"), ("i", "Null"), ("l", "null")),
        None,
        ("types", {"s": None, "i": None, "l": None}, False),
    ),
    "almost null": answer(
        call("types", ("s", "nullable")) + call("types", ("s", "null\n")) + call("types", ("s", "nul")),
        None,
        ("types", {"s": "nullable"}, False),
        ("types", {"s": "null\n"}, False),
        ("types", {"s": "nul"}, False),
    ),
    "markup in a value": answer(
        call("write", ("content", "<html>\n<b>&amp; 1 < 2 </b>\n</html>")),
        None,
        ("write", {"content": "<html>\n<b>&amp; 1 < 2 </b>\n</html>"}, False),
    ),
    "closing tags as prose in a value": answer(
        call("write", ("content", "write </tool_call> and </function> and </parameter> last"), ("path", "p")),
        None,
        (
            "write",
            {"content": "write </tool_call> and </function> and </parameter> last", "path": "p"},
            False,
        ),
    ),
    "a header in a value": answer(
        call(
            "write",
            ("content", "<tool_call>\n<function=x> is how\na call <function=y> begins"),
            ("path", "p"),
        ),
        None,
        (
            "write",
            {"content": "<tool_call>\n<function=x> is how\na call <function=y> begins", "path": "p"},
            False,
        ),
    ),
    "whole calls in a value": answer(
        call("write", ("content", f"{CLOCK}\nand\n{DALLAS}\n."), ("path", "p")),
        None,
        ("write", {"content": f"{CLOCK}\nand\n{DALLAS}\n.", "path": "p"}, False),
    ),
    "a call that writes a call, in a value": answer(
        call("write", ("content", call("write", ("content", CLOCK))), ("path", "p")),
        None,
        ("write", {"content": call("write", ("content", CLOCK)), "path": "p"}, False),
    ),
    "XML parameters in a value": answer(
        call("write", ("content", '<parameter name="a">1</parameter>\n<other/>')),
        None,
        ("write", {"content": '<parameter name="a">1</parameter>\n<other/>'}, False),
    ),
    "unicode in a value": answer(
        call("write", ("content", '\u65e5\u672c \U0001f600 "\\\u2028\t\x01')),
        None,
        ("write", {"content": '\u65e5\u672c \U0001f600 "\\\u2028\t\x01'}, False),
    ),
    "literal tag in prose": answer("Use <tool_call> to call.", "Use <tool_call> to call."),
    "literal tag in prose, then a call": answer(
        f"Use <tool_call> so:\n{CLOCK}", "Use <tool_call> so:\n", CLOCK_CALL
    ),
    "literal header in prose": answer(
        "Write <tool_call><function=clock> and so on", "Write <tool_call><function=clock> and so on"
    ),
    "literal closing tags in prose": answer("</tool_call> </function>", "</tool_call> </function>"),
    "literal tag at the end": answer("The tag is <tool_call>", "The tag is <tool_call>"),
    "unwrapped header of an undeclared tool": answer(
        "<function=x>\n</function>", "<function=x>\n</function>"
    ),
    "comparison": answer("a <b and c<", "a <b and c<"),
    "duplicate parameter: first counts": answer(
        call("weather", ("city", "A"), ("city", "B"), ("days", "2")),
        None,
        ("weather", {"city": "A", "days": 2}, True),
    ),
}

MENDED = {
    "no wrapper": answer(DALLAS[12:-13], None, DALLAS_MENDED),
    "no opening wrapper": answer(f"Now: {DALLAS[12:]}\nok", "Now: \nok", DALLAS_MENDED),
    "no closing wrapper": answer(DALLAS[:-13], None, DALLAS_MENDED),
    "no closing wrapper, next call": answer(f"{DALLAS[:-13]}\n{CLOCK}", None, DALLAS_MENDED, CLOCK_CALL),
    "no closing wrapper, text": answer(f"{DALLAS[:-13]} Done.", " Done.", DALLAS_MENDED),
    "two functions in one wrapper": answer(
        "<tool_call>\n<function=clock>\n</function>\n<function=clock>\n</function>\n</tool_call>",
        None,
        CLOCK_MENDED,
        CLOCK_MENDED,
    ),
    "no </parameter>": answer(
        "<tool_call>\n<function=weather>\n<parameter=city>\nDallas\n<parameter=state>\nTX\n</function>\n</tool_call>",
        None,
        DALLAS_MENDED,
    ),
    "no </parameter>, one line": answer(
        "<tool_call><function=weather><parameter=city>Dallas<parameter=state>TX</function></tool_call>",
        None,
        DALLAS_MENDED,
    ),
    "no </function>": answer(DALLAS.replace("</function>\n", ""), None, DALLAS_MENDED),
    "no </function>, next call": answer(
        DALLAS.replace("</function>\n", "") + CLOCK, None, DALLAS_MENDED, CLOCK_CALL
    ),
    "no </function> and no </tool_call>": answer(
        DALLAS.replace("</function>\n</tool_call>", ""), None, DALLAS_MENDED
    ),
    "no </function> and no </tool_call>, next call": answer(
        DALLAS.replace("</function>\n</tool_call>", "") + CLOCK, None, DALLAS_MENDED, CLOCK_CALL
    ),
    "no closing tag at all": answer(
        "<tool_call>\n<function=weather>\n<parameter=city>\nDallas\n",
        None,
        ("weather", {"city": "Dallas"}, True),
    ),
    "only </tool_call>": answer(
        "<tool_call>\n<function=weather>\n<parameter=city>\nDallas\n</tool_call>",
        None,
        ("weather", {"city": "Dallas"}, True),
    ),
    "header alone": answer("<tool_call>\n<function=clock>", None, CLOCK_MENDED),
    "<function NAME>": answer(DALLAS.replace("=weather", " weather"), None, DALLAS_MENDED),
    "<functionNAME>": answer(DALLAS.replace("=weather", "weather"), None, DALLAS_MENDED),
    "<functionNAME> of an undeclared tool": answer(
        "<tool_call>\n<functionother>\n</function>", "<tool_call>\n<functionother>\n</function>"
    ),
    "<function=NAME without end": answer(DALLAS.replace("=weather>", "=weather"), None, DALLAS_MENDED),
    "<parameter=KEY without end": answer(DALLAS.replace("=city>", "=city"), None, DALLAS_MENDED),
    "<parameter=parameter=KEY>": answer(DALLAS.replace("=city>", "=parameter=city>"), None, DALLAS_MENDED),
    "<parameter=parameter=KEY> undeclared": answer(
        call("weather", ("parameter=zip", "1")), None, ("weather", {"parameter=zip": "1"}, False)
    ),
    "<parameter KEY>": answer(DALLAS.replace("=city>", " city>"), None, DALLAS_MENDED),
    'quoted "NAME"': answer(DALLAS.replace("=weather", '="weather"'), None, DALLAS_MENDED),
    'name="NAME"': answer(DALLAS.replace("=weather", ' name="weather"'), None, DALLAS_MENDED),
    "<parameter=TOOL> for the function": answer(
        DALLAS.replace("<function=", "<parameter="), None, DALLAS_MENDED
    ),
    "text inside a function": answer(
        DALLAS.replace("</function>", "</parameter>oops</function>"),
        None,
        ("weather", {"city": "Dallas", "state": "TX\n</parameter>\n</parameter>oops"}, True),
    ),
    "cut inside a tag": Case(
        "hm</think><tool_call>\n<function=weather>\n<parameter=city>\nDallas\n</para",
        "hm",
        cut_arguments='{"city": "Dallas',
        reason="length",
    ),
    "cut inside a value": Case(
        f"hm</think>{CLOCK}<tool_call>\n<function=weather>\n<parameter=city>\nDal",
        "hm",
        calls=(CLOCK_CALL,),
        cut_arguments='{"city": "Dal',
        reason="length",
    ),
    "cut behind what may be the value's text": Case(
        "hm</think><tool_call>\n<function=weather>\n<parameter=city>\nDal</function>",
        "hm",
        cut_arguments='{"city": "Dal</function>',
        reason="length",
    ),
    "cut in front of the parameters": Case(
        "hm</think><tool_call>\n<function=weather>\n", "hm", cut_arguments="{", reason="length"
    ),
    "cut behind the function": Case(
        "hm</think><tool_call>\n<function=clock>\n</function>\n",
        "hm",
        calls=(("clock", {}, True),),
        reason="length",
    ),
    "cut inside the next parameter's tag": Case(
        "hm</think><tool_call>\n<function=weather>\n<parameter=city>\nDallas\n</parameter>\n<parameter=sta",
        "hm",
        cut_arguments='{"city": "Dallas"',
        reason="length",
    ),
    "an opening tag and no call behind it": answer(f"{CLOCK}<tool_call><", None, CLOCK_CALL),
    "an opening tag and no call behind it, cut": Case(
        f"hm</think>{CLOCK}\n<tool_call>\n<", "hm", calls=(CLOCK_CALL,), reason="length"
    ),
    "cut inside the function's tag": Case(
        "hm</think>So:<tool_call>\n<function=wea", "hm", "So:", reason="length"
    ),
}

IN_THOUGHT = {
    "unfinished thought with a call": Case(
        f"I should look.\n{DALLAS}", "I should look.", calls=(DALLAS_CALL,)
    ),
    "unfinished thought with two calls": Case(
        f"hm{DALLAS}\n{CLOCK}\n", "hm", calls=(DALLAS_CALL, CLOCK_CALL)
    ),
    "only a call": Case(CLOCK, calls=(CLOCK_CALL,)),
    "unfinished thought with a mended call": Case(f"hm\n{DALLAS[:-13]}", "hm", calls=(DALLAS_MENDED,)),
    "unfinished thought with an unwrapped call": Case(f"hm\n{DALLAS[12:]}", "hm", calls=(DALLAS_MENDED,)),
    "finished thought about a call": Case(f"hm\n{CLOCK}\n</think>\nA", f"hm\n{CLOCK}", "A"),
    "finished thought about a call, then the call": Case(
        f"hm\n{CLOCK}\n</think>\n{DALLAS}", f"hm\n{CLOCK}", calls=(DALLAS_CALL,)
    ),
    "thought goes on after a call": Case(f"hm\n{CLOCK}\nBut no", f"hm\n{CLOCK}\nBut no"),
    "thought goes on, then the call": Case(
        f"hm\n{CLOCK}\nBut no.\n{DALLAS}", f"hm\n{CLOCK}\nBut no.", calls=(DALLAS_CALL,)
    ),
    "thought about an undeclared tool": Case(f"hm\n{call('other')}", f"hm\n{call('other')}"),
    "thought about tags": Case(
        "a <tool_call> and <function=clock> here", "a <tool_call> and <function=clock> here"
    ),
    "closing tag inside a call's value": Case(
        "<tool_call>\n<function=write>\n<parameter=content>\nx</think>A",
        "<tool_call>\n<function=write>\n<parameter=content>\nx",
        "A",
    ),
    "cut call is not made": Case(
        "hm\n<tool_call>\n<function=weather>\n<parameter=city>\nDal",
        "hm\n<tool_call>\n<function=weather>\n<parameter=city>\nDal",
        reason="length",
    ),
    "whole call before the cut is made": Case(f"hm\n{DALLAS}\n", "hm", calls=(DALLAS_CALL,), reason="length"),
    "not thinking, unfinished thought": Case(
        f"{CLOCK}<think>hm\n{DALLAS}", "hm", calls=(CLOCK_CALL, DALLAS_CALL), thinks=False
    ),
}

CORPUS = {**THOUGHTS, **CALLS, **MENDED, **IN_THOUGHT}
