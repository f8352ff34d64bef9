"""Calling tools: choose one of those listed, fill its arguments, use what it returns.

The thought before a call names the tool and copies the arguments once (`get_weather city=Paris`), so that the call
itself is a second, easy copy. After a result the thought repeats it and the answer uses it.
"""

from __future__ import annotations

from random import Random

from stepflash.chat.messages import Message, Tool, ToolCall
from stepflash.nano.tasks.arithmetic import add, multiply
from stepflash.nano.tasks.chat import fact, small_talk
from stepflash.nano.tasks.example import Example, Tier
from stepflash.nano.tasks.pools import city, file_name, phrase
from stepflash.nano.tasks.tool_catalog import (
    CALCULATOR,
    FURTHER,
    LIST_FILES,
    NATURAL,
    READ_FILE,
    RUN_PYTHON,
    SEARCH,
    TIME,
    WEATHER,
    WRITE_FILE,
    Arguments,
    Kind,
    calculate,
    calculation,
    made_up,
    renamed,
)

RENAMED_SHARE = 0.35  # natural tools that appear under other names than their usual ones


def _natural(rng: Random, tier: Tier) -> Kind:
    kind = rng.choice(NATURAL if tier == "easy" else (*NATURAL, *FURTHER))
    return renamed(rng, kind) if rng.random() < RENAMED_SHARE else kind


def _listed(rng: Random, tier: Tier, *wanted: Kind, distractors: int | None = None) -> tuple[Tool, ...]:
    """The wanted tools among distractors with other names, in random order."""
    count = rng.randint(0, 2) if tier == "easy" else rng.randint(1, 3)
    tools = {kind.tool.name: kind.tool for kind in wanted}
    descriptions = {kind.tool.definition["function"]["description"] for kind in wanted}
    size = len(tools) + (count if distractors is None else distractors)
    while len(tools) < size:
        kind = made_up(rng, tier) if rng.random() < 0.25 else rng.choice((*NATURAL, *FURTHER))
        if kind in NATURAL and rng.random() < RENAMED_SHARE:
            kind = renamed(rng, kind)
        description = kind.tool.definition["function"]["description"]
        if description not in descriptions:  # the same tool under another name would fit as well
            descriptions.add(description)
            tools.setdefault(kind.tool.name, kind.tool)
    listed = list(tools.values())
    rng.shuffle(listed)
    return tuple(listed)


def _call(name: str, arguments: Arguments) -> Message:
    thought = " ".join([name, *(f"{key}={value}" for key, value in arguments.items())])
    return Message(
        role="assistant", reasoning=thought, tool_calls=(ToolCall(name=name, arguments=arguments),)
    )


def _example(task: str, tier: Tier, tools: tuple[Tool, ...], *messages: Message) -> Example:
    return Example(task=task, tier=tier, tools=tools, messages=messages)


def _user(text: str) -> Message:
    return Message(role="user", content=text)


def _returned(text: str) -> Message:
    return Message(role="tool", content=text)


def _say(thought: str, text: str) -> Message:
    return Message(role="assistant", reasoning=thought, content=text)


def tool_call(rng: Random, tier: Tier) -> Example:
    """One natural request, one call."""
    kind = _natural(rng, tier)
    text, arguments = kind.request(rng)
    return _example(
        "tool_call", tier, _listed(rng, tier, kind), _user(text), _call(kind.tool.name, arguments)
    )


def tool_made_up(rng: Random, tier: Tier) -> Example:
    """One call of a tool that was never seen; the other listed tools are made up as well."""
    kind = made_up(rng, tier)
    others = [made_up(rng, tier) for _ in range(rng.randint(0, 1 if tier == "easy" else 3))]
    tools = _listed(rng, tier, kind, *others, distractors=0)
    text, arguments = kind.request(rng)
    return _example("tool_made_up", tier, tools, _user(text), _call(kind.tool.name, arguments))


def tool_answer(rng: Random, tier: Tier) -> Example:
    """A call, its result, and the answer."""
    kind = made_up(rng, tier) if rng.random() < 0.25 else _natural(rng, tier)
    text, arguments = kind.request(rng)
    output, answer = kind.result(rng, arguments)
    tools = _listed(rng, tier, kind)
    call = _call(kind.tool.name, arguments)
    return _example(
        "tool_answer", tier, tools, _user(text), call, _returned(output), _say(f"result {output}", answer)
    )


def tool_chain(rng: Random, tier: Tier) -> Example:
    """Two calls in a row: the second needs the first (calculator twice, list then read, read then write, ...)."""
    return rng.choice(
        (_calculate_twice, _list_then_read, _read_then_write, _two_cities, _read_then_calculate)
    )(rng, tier)


def _chain(rng: Random, tier: Tier, kinds: tuple[Kind, ...], *messages: Message) -> Example:
    distractors = rng.randint(0, 1) if tier == "easy" else rng.randint(1, 2)
    return _example("tool_chain", tier, _listed(rng, tier, *kinds, distractors=distractors), *messages)


def _calculate_twice(rng: Random, tier: Tier) -> Example:
    first = calculation(rng, 11, 99 if tier == "easy" else 999)
    operator, word = rng.choice((("+", "add"), ("*", "multiply by"), ("-", "subtract")))
    number = rng.randint(2, 99)
    value = calculate(first)
    second = f"{value}{operator}{number}" if not value.startswith("-") else f"{number}+{value[1:]}"
    if value.startswith("-"):  # keep to the shape a+b, a-b, a*b of non-negative numbers
        left, right = first.split("-")
        first = f"{right}-{left}"
        value = calculate(first)
        second = f"{value}{operator}{number}"
    final = calculate(second)
    text = rng.choice(
        (
            f"Compute {first}, then {word} {number}.",
            f"What is {first}? Then {word} {number}.",
            f"{first}, and then {word} {number}",
        )
    )
    name = CALCULATOR.tool.name
    return _chain(
        rng,
        tier,
        (CALCULATOR,),
        _user(text),
        _call(name, {"expression": first}),
        _returned(value),
        _call(name, {"expression": second}),
        _returned(final),
        _say(f"result {final}", f"The result is {final}."),
    )


def _list_then_read(rng: Random, tier: Tier) -> Example:
    folder, name = rng.choice(("docs", "src", "data", "home")), file_name(rng).rpartition("/")[2]
    path, content = f"{folder}/{name}", phrase(rng)
    text = rng.choice(
        (
            f"Read the only file in {folder}.",
            f"List {folder} and read the file in it.",
            f"What does the file in {folder} say?",
        )
    )
    return _chain(
        rng,
        tier,
        (LIST_FILES, READ_FILE),
        _user(text),
        _call(LIST_FILES.tool.name, {"path": folder}),
        _returned(name),
        _call(READ_FILE.tool.name, {"path": path}),
        _returned(content),
        _say(f"result {content}", f"{path} says: {content}"),
    )


def _read_then_write(rng: Random, tier: Tier) -> Example:
    source, target, content = file_name(rng), file_name(rng), phrase(rng)
    text = rng.choice(
        (
            f"Copy {source} to {target}.",
            f"Read {source} and write its text to {target}.",
            f"Copy the text of {source} into {target}",
        )
    )
    return _chain(
        rng,
        tier,
        (READ_FILE, WRITE_FILE),
        _user(text),
        _call(READ_FILE.tool.name, {"path": source}),
        _returned(content),
        _call(WRITE_FILE.tool.name, {"path": target, "content": content}),
        _returned("ok"),
        _say("result ok", f"I wrote {target}."),
    )


def _two_cities(rng: Random, tier: Tier) -> Example:
    kind = rng.choice((WEATHER, TIME))
    first, second = city(rng), city(rng)
    what = "weather" if kind is WEATHER else "time"
    text = rng.choice(
        (
            f"What is the {what} in {first} and in {second}?",
            f"Compare the {what} in {first} and {second}.",
            f"The {what} in {first} and {second}, please.",
        )
    )
    (one, first_says), (two, second_says) = (kind.result(rng, {"city": place}) for place in (first, second))
    name = kind.tool.name
    return _chain(
        rng,
        tier,
        (kind,),
        _user(text),
        _call(name, {"city": first}),
        _returned(one),
        _call(name, {"city": second}),
        _returned(two),
        _say(f"results {one} and {two}", f"{first_says} {second_says}"),
    )


def _read_then_calculate(rng: Random, tier: Tier) -> Example:
    path, expression = file_name(rng), calculation(rng, 11, 999)
    value = calculate(expression)
    text = rng.choice(
        (
            f"Work out the sum in {path}.",
            f"Read {path} and compute what it says.",
            f"{path} holds an expression. What is its value?",
        )
    )
    return _chain(
        rng,
        tier,
        (READ_FILE, CALCULATOR),
        _user(text),
        _call(READ_FILE.tool.name, {"path": path}),
        _returned(expression),
        _call(CALCULATOR.tool.name, {"expression": expression}),
        _returned(value),
        _say(f"result {value}", f"{expression} = {value}"),
    )


_ABLE = {kind.tool.definition["function"]["description"] for kind in (CALCULATOR, RUN_PYTHON, SEARCH)}


def tool_none(rng: Random, tier: Tier) -> Example:
    """No listed tool is needed: answer directly. Only a courtesy is certain not to need any tool at all."""
    plain = rng.choice((fact, small_talk, small_talk, add, multiply))(rng, "easy")
    while True:
        tools = _listed(rng, tier, distractors=rng.randint(1, 2) if tier == "easy" else rng.randint(2, 4))
        if plain.task == "small_talk" or not _ABLE & {
            tool.definition["function"]["description"] for tool in tools
        }:
            break
    question, answer = plain.messages
    said = Message(role="assistant", content=answer.content, reasoning=f"no tool fits\n{answer.reasoning}")
    return _example("tool_none", tier, tools, question, said)
