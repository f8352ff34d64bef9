"""Golden: the corpus, whose results are written by hand. Property: every way of cutting a text into pieces gives
the same events."""

import json
import random
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from stepflash.chat.messages import (
    ContentDelta,
    Event,
    Finish,
    FinishReason,
    ReasoningDelta,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
    fold_events,
    join_events,
)
from stepflash.chat.parser import OutputParser, parse
from tests.chat.parser_corpus import CLOCK, CORPUS, DALLAS, TOOLS, call


class Ids:
    """Predictable identifiers, counted per parser."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> str:
        self.count += 1
        return f"id{self.count}"


def read(
    pieces: list[str], thinks: bool = True, reason: FinishReason = "stop", tools: Any = TOOLS
) -> list[Event]:
    """The joined events of a text that arrives in pieces, with call ids taken away."""
    parser = OutputParser(tools, in_reasoning=thinks)
    events = [event for piece in pieces for event in parser.push(piece)]
    events += parser.finish(reason)
    ids = [event.id for event in events if isinstance(event, ToolCallStart)]
    assert len(set(ids)) == len(ids)
    return join_events(
        ToolCallStart(event.index, "", event.name) if isinstance(event, ToolCallStart) else event
        for event in events
    )


def check_contract(events: list[Event]) -> None:
    """What every encoder relies on."""
    assert isinstance(events[-1], Finish)
    is_whole = events[-1].reason in ("stop", "tool_calls")
    assert sum(isinstance(event, Finish) for event in events) == 1
    open_call: int | None = None
    num_calls = 0
    fragments = ""
    for event in events:
        match event:
            case ToolCallStart(index, _, name):
                assert open_call is None
                assert index == num_calls
                assert name
                open_call, num_calls, fragments = index, num_calls + 1, ""
            case ToolCallArguments(index, fragment):
                assert index == open_call
                assert fragment
                fragments += fragment
            case ToolCallEnd(index):
                assert index == open_call
                pairs = json.loads(fragments, object_pairs_hook=list)
                assert len({key for key, _ in pairs}) == len(pairs)
                open_call = None
            case ReasoningDelta(text) | ContentDelta(text):
                assert text
                assert open_call is None
            case Finish():
                if open_call is not None:
                    assert not is_whole
                    with pytest.raises(ValueError):  # so that nobody takes it for a whole call
                        json.loads(fragments)


@pytest.mark.parametrize("name", CORPUS)
def test_corpus(name: str) -> None:
    case = CORPUS[name]
    events = read([case.text], case.thinks, case.reason)
    check_contract(events)
    message = fold_events(events)
    assert message.reasoning == case.reasoning
    assert message.content == case.content
    assert [(made.name, made.arguments) for made in message.tool_calls] == [made[:2] for made in case.calls]
    repaired = [event.repaired for event in events if isinstance(event, ToolCallEnd)]
    assert repaired == [made[2] for made in case.calls]
    arguments = [event for event in events if isinstance(event, ToolCallArguments)]
    cut = "".join(event.fragment for event in arguments if event.index == len(case.calls))
    assert cut == case.cut_arguments
    assert message.finish_reason == ("tool_calls" if case.calls and case.reason == "stop" else case.reason)


@pytest.mark.parametrize("name", CORPUS)
def test_every_two_pieces_and_every_character_alone(name: str) -> None:
    case = CORPUS[name]
    whole = read([case.text], case.thinks, case.reason)
    for middle in range(len(case.text) + 1):
        assert read([case.text[:middle], case.text[middle:]], case.thinks, case.reason) == whole
    assert read(list(case.text), case.thinks, case.reason) == whole
    assert read(["", *case.text, ""], case.thinks, case.reason) == whole


@pytest.mark.parametrize("name", CORPUS)
def test_random_pieces(name: str) -> None:
    case, rng = CORPUS[name], random.Random(name)
    whole = read([case.text], case.thinks, case.reason)
    for _ in range(20):
        cuts = sorted(rng.choices(range(len(case.text) + 1), k=rng.randint(1, 12)))
        pieces = [case.text[a:b] for a, b in pairwise([0, *cuts, len(case.text)])]
        assert read(pieces, case.thinks, case.reason) == whole


def test_parse_is_the_fold_of_the_stream() -> None:
    text = f"hm\n</think>\nhello{DALLAS}hi{CLOCK}"
    message = parse(text, TOOLS, new_id=Ids())
    assert (message.reasoning, message.content, message.finish_reason) == ("hm", "hellohi", "tool_calls")
    assert [made.id for made in message.tool_calls] == ["id1", "id2"]
    assert message.as_message().tool_calls == message.tool_calls
    assert message.as_message().reasoning == "hm"


def test_the_order_of_events() -> None:
    events = read([f"hm</think>hello{call('types', ('s', 'a'), ('i', '1'))}hi{CLOCK}"])
    assert events == [
        ReasoningDelta("hm"),
        ContentDelta("hello"),
        ToolCallStart(0, "", "types"),
        ToolCallArguments(0, '{"s": "a", "i": 1}'),
        ToolCallEnd(0),
        ContentDelta("hi"),
        ToolCallStart(1, "", "clock"),
        ToolCallArguments(1, "{}"),
        ToolCallEnd(1),
        Finish("tool_calls"),
    ]


def test_text_is_passed_on_as_soon_as_it_is_decided() -> None:
    parser = OutputParser(TOOLS)
    assert parser.push("I have to think about this one for") == []  # could still be a preface of <think>
    assert parser.push(" a while") == [ReasoningDelta("I have to think about this one for a while")]
    assert parser.push("\n") == []
    assert parser.push("x</thi") == [ReasoningDelta("\nx")]
    assert parser.in_reasoning
    assert parser.push("nk>") == []
    assert not parser.in_reasoning
    assert parser.push("\n") == []
    assert parser.push("Use <tool_call>") == [ContentDelta("Use ")]
    assert parser.push(" x") == [ContentDelta("<tool_call> x")]


def test_string_arguments_stream_and_others_wait() -> None:
    parser = OutputParser(TOOLS, in_reasoning=False, new_id=Ids())
    assert parser.push("<tool_call>\n<function=types>\n") == []
    assert parser.push("<parameter=s>\n") == [
        ToolCallStart(0, "id1", "types"),
        ToolCallArguments(0, '{"s": '),
    ]
    assert parser.push("nul") == []  # null is not text
    assert parser.push("l and") == [ToolCallArguments(0, '"null and')]
    assert parser.push(" <b>\n") == [ToolCallArguments(0, " <b>")]
    assert parser.push('"') == [ToolCallArguments(0, '\\n\\"')]
    assert parser.push("</parameter>") == []  # may be part of the value
    assert parser.push("\n<parameter=a>\n[1,") == [ToolCallArguments(0, '", "a": ')]
    assert parser.push(" 2]\n</parameter>\n</function>\n") == [ToolCallArguments(0, "[1, 2]")]
    assert parser.push("</tool_call>") == [ToolCallArguments(0, "}"), ToolCallEnd(0)]


def test_without_tools_calls_are_text_arguments_and_none_switches_them_off() -> None:
    text = f"hm</think>{call('types', ('i', '5'))}"
    message = parse(text)
    assert [dict(made.arguments) for made in message.tool_calls] == [{"i": "5"}]
    assert [made.name for made in parse(f"hm\n{CLOCK}").tool_calls] == ["clock"]
    message = parse(text, tools=None)
    assert not message.tool_calls
    assert message.content == call("types", ("i", "5"))
    assert message.finish_reason == "stop"
    assert parse(f"hm\n{CLOCK}", tools=None).reasoning == f"hm\n{CLOCK}"


def test_default_ids_are_unique() -> None:
    ids = {made.id for _ in range(50) for made in parse(f"</think>{CLOCK}{CLOCK}").tool_calls}
    assert len(ids) == 100


TAGS = """<think> </think> <tool_call> </tool_call> </function> </parameter> <function=weather> <function=clock>
    <function=nope> <function\x00weather> <functionclock> <parameter=city> <parameter=days> <parameter=zip>
    <parameter=parameter=city> </ < </thi <tool <function <parameter= > <parameter=city"""
FRAGMENTS = st.sampled_from(
    [tag.replace("\0", " ") for tag in TAGS.split()]
    + [
        "\n",
        "\n\n",
        " ",
        "a",
        "null",
        "5",
        "Dallas",
        "text < more",
        "\u00e9",
        DALLAS,
        CLOCK,
        DALLAS[:60],
        CLOCK[5:],
    ]
)
SOUP = st.lists(FRAGMENTS | st.text(max_size=4), max_size=25).map("".join)


@given(SOUP, st.booleans(), st.sampled_from(["stop", "length"]), st.randoms(use_true_random=False))
@example("<tool_call><function=clock></function>< ", True, "stop", random.Random(0))
def test_any_pieces_of_any_text_give_the_same_events(
    text: str, thinks: bool, reason: FinishReason, rng: random.Random
) -> None:
    whole = read([text], thinks, reason)
    check_contract(whole)
    cuts = sorted(rng.choices(range(len(text) + 1), k=rng.randint(1, 10)))
    assert read([text[a:b] for a, b in pairwise([0, *cuts, len(text)])], thinks, reason) == whole
    assert read(list(text), thinks, reason) == whole


@given(
    st.lists(st.sampled_from(sorted(CORPUS)), max_size=4), st.booleans(), st.randoms(use_true_random=False)
)
def test_concatenated_cases_in_any_pieces(names: list[str], thinks: bool, rng: random.Random) -> None:
    text = "".join(CORPUS[name].text for name in names)
    whole = read([text], thinks)
    check_contract(whole)
    cuts = sorted(rng.choices(range(len(text) + 1), k=rng.randint(1, 10)))
    assert read([text[a:b] for a, b in pairwise([0, *cuts, len(text)])], thinks) == whole


PIECES = st.sampled_from(["<", ">", "</", "thin", "tool", "\n", "x", "=", "<funct"])
NO_TAGS = (st.text(max_size=30) | st.lists(PIECES, max_size=20).map("".join)).filter(
    lambda text: not any(tag in text for tag in ("<think>", "</think>", "<tool_call>", "<function"))
)


@given(NO_TAGS, NO_TAGS, st.booleans())
def test_text_without_tags_is_never_lost(thought: str, content: str, calls: bool) -> None:
    message = parse(f"{thought}\n</think>\n{content}", TOOLS if calls else None)
    assert message.reasoning == (thought or None)
    assert message.content == (content or None)
    assert parse(content, TOOLS, in_reasoning=False).content == (content or None)
    assert parse(thought + "\n", TOOLS).reasoning == (thought or None)


@given(
    st.text(max_size=60).filter(lambda text: text.lower() != "null"), st.integers(), st.lists(st.integers())
)
def test_written_calls_are_read_back(content: str, number: int, array: list[int]) -> None:
    text = call("types", ("s", content), ("i", str(number)), ("a", json.dumps(array)))
    (made,) = parse(text, TOOLS, in_reasoning=False).tool_calls
    assert made.arguments == {"s": content, "i": number, "a": array}


def test_long_output_takes_linear_time() -> None:
    """A value of 10,000 tags, character by character in the thought and at once in the answer."""
    value = "<a></a>\n" * 5_000
    text = call("write", ("content", value))
    (made,) = parse(f"hm</think>{text}", TOOLS).tool_calls
    assert made.arguments["content"] == value
    events = read([text[index : index + 3] for index in range(0, len(text), 3)])
    assert fold_events(events).tool_calls[0].arguments["content"] == value
