"""Small Python expressions and snippets: what do they give?

The answer is always what Python itself gives (`evaluate`, `execute` on code that only this file writes); the thought
walks through it in the order in which a reader would.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from random import Random

from stepflash.nano.tasks.arithmetic import operate
from stepflash.nano.tasks.example import Example, Tier, single_turn
from stepflash.nano.tasks.pools import ANIMALS, FRUITS, SPELLING

Code = tuple[str, list[str]]  # source and thought


def evaluate(source: str) -> str:
    """repr of an expression that a generator wrote."""
    return repr(eval(source, {}))


def execute(source: str) -> str:
    """What a snippet that a generator wrote prints, without the last newline."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(source, {})
    return printed.getvalue().removesuffix("\n")


def python_expression(rng: Random, tier: Tier) -> Example:
    """One call, slice or operator (easy); longer operands (hard)."""
    source, thought = rng.choice(EXPRESSIONS)(rng, tier)
    pattern = rng.choice(
        (
            "What is {} in Python?",
            "What does Python give for {}?",
            "Evaluate in Python: {}",
            "Python: {}",
            ">>> {}",
        )
    )
    return single_turn(
        "python_expression", tier, pattern.format(source), "\n".join(thought), evaluate(source)
    )


def python_snippet(rng: Random, tier: Tier) -> Example:
    """Two to five lines with a variable, a branch or a loop: what is printed?"""
    source, thought = rng.choice(SNIPPETS)(rng, tier)
    pattern = rng.choice(
        (
            "What does this print?\n{}",
            "What is the output of this Python code?\n{}",
            "{}\nWhat is printed?",
            "Run this in your head:\n```python\n{}\n```",
        )
    )
    return single_turn("python_snippet", tier, pattern.format(source), "\n".join(thought), execute(source))


def _numbers(rng: Random, tier: Tier, low: int = 2) -> list[int]:
    length = rng.randint(low, 4) if tier == "easy" else rng.randint(4, 7)
    return [rng.randint(0, 9 if tier == "easy" else 99) for _ in range(length)]


def _running_sum(numbers: list[int]) -> list[str]:
    total, lines = 0, ["0"]
    for number in numbers:
        lines.append(f"{total}+{number}={total + number}")
        total += number
    return lines


def _length(rng: Random, tier: Tier) -> Code:
    if rng.random() < 0.5:
        numbers = _numbers(rng, tier)
        return f"len({numbers})", [f"{number} {index}" for index, number in enumerate(numbers, 1)]
    word = rng.choice(SPELLING)
    return f'len("{word}")', [f"{word}: {' '.join(word)}", " ".join(f"{c}{i}" for i, c in enumerate(word, 1))]


def _sum(rng: Random, tier: Tier) -> Code:
    numbers = _numbers(rng, tier)
    return f"sum({numbers})", _running_sum(numbers)


def _sum_range(rng: Random, tier: Tier) -> Code:
    stop = rng.randint(2, 5 if tier == "easy" else 9)
    start = rng.choice((0, 0, 1)) if tier == "easy" else rng.randint(0, stop)
    arguments = f"{start}, {stop}" if start else f"{stop}"
    return f"sum(range({arguments}))", _running_sum(list(range(start, stop)))


def _range(rng: Random, tier: Tier) -> Code:
    start, step = rng.randint(0, 5), 1 if tier == "easy" else rng.randint(2, 4)
    stop = start + rng.randint(1, 5 if tier == "easy" else 14)
    values = list(range(start, stop, step))
    arguments = f"{start}, {stop}" if start or step > 1 else f"{stop}"
    arguments += f", {step}" if step > 1 else ""
    return f"list(range({arguments}))", [f"from {start} below {stop}", " ".join(map(str, values))]


def _index(rng: Random, tier: Tier) -> Code:
    numbers = _numbers(rng, tier)
    index = rng.randrange(len(numbers))
    lines = [f"{position}: {number}" for position, number in enumerate(numbers)]
    if rng.random() < 0.3:
        return f"{numbers}[-1]", [*lines, "last"]
    return f"{numbers}[{index}]", lines[: index + 1]


def _slice(rng: Random, tier: Tier) -> Code:
    numbers = _numbers(rng, tier, 3)
    start = rng.randrange(len(numbers))
    stop = rng.randint(start, len(numbers))
    lines = [f"{position}: {number}" for position, number in enumerate(numbers)]
    kind = rng.randrange(3)
    if kind == 0:
        return f"{numbers}[:{stop}]", [*lines, f"below {stop}"]
    if kind == 1:
        return f"{numbers}[{start}:]", [*lines, f"from {start}"]
    return f"{numbers}[{start}:{stop}]", [*lines, f"from {start} below {stop}"]


def _extreme(rng: Random, tier: Tier) -> Code:
    numbers, name = _numbers(rng, tier), rng.choice(("max", "min"))
    choose: Callable[[int, int], int] = max if name == "max" else min
    best, lines = numbers[0], [name, str(numbers[0])]
    for number in numbers[1:]:
        best = choose(best, number)
        lines.append(f"{number} >{best}")
    return f"{name}({numbers})", lines


def _sorted(rng: Random, tier: Tier) -> Code:
    numbers = _numbers(rng, tier)
    rest, lines = list(numbers), ["up"]
    while len(rest) > 1:
        best = min(rest)
        rest.remove(best)
        lines.append(f"{best} | {' '.join(map(str, rest))}")
    return f"sorted({numbers})", lines


def _repeat(rng: Random, tier: Tier) -> Code:
    text, times = rng.choice(ANIMALS), rng.randint(2, 3 if tier == "easy" else 5)
    if rng.random() < 0.5:
        values = _numbers(rng, "easy")[:2]
        return f"{values} * {times}", [f"{times} times"]
    return f'"{text} " * {times}', [f"{times} times"]


def _concatenate(rng: Random, tier: Tier) -> Code:
    if rng.random() < 0.5:
        return f"{_numbers(rng, tier)} + {_numbers(rng, tier)}", ["join lists"]
    words = [rng.choice(FRUITS) for _ in range(2 if tier == "easy" else 4)]
    return f'" ".join({words})', ["join with a space"]


def _split(rng: Random, tier: Tier) -> Code:
    words = [rng.choice(ANIMALS) for _ in range(rng.randint(2, 3 if tier == "easy" else 6))]
    separator = rng.choice((" ", ","))
    argument = '","' if separator == "," else ""
    return f'"{separator.join(words)}".split({argument})', [
        f"{index} {word}" for index, word in enumerate(words, 1)
    ]


def _contains(rng: Random, tier: Tier) -> Code:
    numbers = _numbers(rng, tier)
    wanted = rng.choice(numbers) if rng.random() < 0.5 else rng.randint(0, 9)
    lines = [f"{number} {'yes' if number == wanted else 'no'}" for number in numbers]
    return f"{wanted} in {numbers}", [f"find {wanted}", *lines]


def _relation(left: int, right: int) -> str:
    if left == right:
        return f"{left} equals {right}"
    return f"{left} is {'less' if left < right else 'more'} than {right}"


def _compare(rng: Random, tier: Tier) -> Code:
    limit = 20 if tier == "easy" else 999
    left, right = rng.randint(0, limit), rng.randint(0, limit)
    if rng.random() < 0.2:
        right = left
    relation = "same" if left == right else "less" if left < right else "more"
    return f"{left} {rng.choice(('<', '>', '==', '!=', '<=', '>='))} {right}", [
        f"{left} is {relation} {right}"
    ]


def _divmod(rng: Random, tier: Tier) -> Code:
    right = rng.randint(2, 9)
    left = rng.randint(1, 9 * right if tier == "easy" else 99 * right)
    quotient, rest = divmod(left, right)
    return f"{left} {rng.choice(('//', '%'))} {right}", [f"{left}={right}*{quotient}+{rest}"]


def _dictionary(rng: Random, tier: Tier) -> Code:
    keys = rng.sample(FRUITS, 2 if tier == "easy" else 4)
    table = {key: rng.randint(0, 99) for key in keys}
    wanted = rng.choice(keys)
    return f'{table}["{wanted}"]', [f"{wanted}: {table[wanted]}"]


EXPRESSIONS: tuple[Callable[[Random, Tier], Code], ...] = (
    _length,
    _sum,
    _sum_range,
    _range,
    _index,
    _slice,
    _extreme,
    _sorted,
    _repeat,
    _concatenate,
    _split,
    _contains,
    _compare,
    _divmod,
    _dictionary,
)


def _assign(rng: Random, tier: Tier) -> Code:
    name, value = rng.choice("xyanm"), rng.randint(1, 20)
    source, thought = [f"{name} = {value}"], [f"{name}={value}"]
    for _ in range(1 if tier == "easy" else 3):
        operator = rng.choice("+-*")
        number = rng.randint(1, min(value, 20) or 1) if operator == "-" else rng.randint(2, 9)
        if operator == "-" and value < number:
            operator = "+"
        source.append(
            f"{name} {operator}= {number}" if rng.random() < 0.6 else f"{name} = {name} {operator} {number}"
        )
        lines, value = operate(value, operator, number)
        thought += [*lines, f"{name}={value}"]
    return "\n".join([*source, f"print({name})"]), thought


def _two_variables(rng: Random, tier: Tier) -> Code:
    left, right = rng.randint(2, 30), rng.randint(2, 9)
    operator = rng.choice("+*") if left < right else rng.choice("+-*")
    lines, _ = operate(left, operator, right)
    return f"a = {left}\nb = {right}\nprint(a {operator} b)", [f"a={left} b={right}", *lines]


def _branch(rng: Random, tier: Tier) -> Code:
    value, limit = rng.randint(0, 20), rng.randint(0, 20)
    comparison = rng.choice("<>")
    yes, no = rng.sample(("yes", "no", "big", "small", "red", "blue", "hot", "cold"), 2)
    holds = value < limit if comparison == "<" else value > limit
    source = f'x = {value}\nif x {comparison} {limit}:\n    print("{yes}")\nelse:\n    print("{no}")'
    return source, [_relation(value, limit), "if" if holds else "else"]


def _loop_print(rng: Random, tier: Tier) -> Code:
    count = rng.randint(2, 3 if tier == "easy" else 6)
    factor = rng.randint(2, 5) if tier == "hard" or rng.random() < 0.5 else 1
    body = f"i * {factor}" if factor > 1 else "i"
    thought = [f"{i}*{factor}={i * factor}" if factor > 1 else f"i={i}" for i in range(count)]
    return f"for i in range({count}):\n    print({body})", thought


def _loop_sum(rng: Random, tier: Tier) -> Code:
    numbers = _numbers(rng, tier)
    return f"total = 0\nfor n in {numbers}:\n    total += n\nprint(total)", _running_sum(numbers)


def _loop_count(rng: Random, tier: Tier) -> Code:
    numbers, limit = _numbers(rng, tier), rng.randint(2, 7 if tier == "easy" else 70)
    count, thought = 0, [f"more than {limit}"]
    for number in numbers:
        count += number > limit
        thought.append(f"{number} {'yes' if number > limit else 'no'} {count}")
    return f"k = 0\nfor n in {numbers}:\n    if n > {limit}:\n        k += 1\nprint(k)", thought


def _function(rng: Random, tier: Tier) -> Code:
    argument, number = rng.randint(1, 12 if tier == "easy" else 99), rng.randint(2, 9)
    operator, name = rng.choice("+*"), rng.choice("fgh")
    lines, _ = operate(argument, operator, number)
    return f"def {name}(x):\n    return x {operator} {number}\nprint({name}({argument}))", [
        f"x={argument}",
        *lines,
    ]


def _append(rng: Random, tier: Tier) -> Code:
    numbers, extra = _numbers(rng, tier), rng.randint(0, 9)
    if rng.random() < 0.6:
        return f"a = {numbers}\na.append({extra})\nprint(a)", [f"add {extra} at the end"]
    return f"a = {numbers}\na.pop()\nprint(a)", [f"remove {numbers[-1]} at the end"]


SNIPPETS: tuple[Callable[[Random, Tier], Code], ...] = (
    _assign,
    _two_variables,
    _branch,
    _loop_print,
    _loop_sum,
    _loop_count,
    _function,
    _append,
)
