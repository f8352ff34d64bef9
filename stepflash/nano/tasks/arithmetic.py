"""Sums, differences, products, quotients and expressions, worked out digit by digit.

A trace has one line per column, from the right: `4+8+1=13 >33` is a true equation and, after `>`, the digits of the
result known so far, so that each line needs only the line before it. Facts of the tables (up to 9 + 9 and 9 x 9) are
one line, `7+8=15`. Every line of a trace is true; the tests evaluate them.
"""

from __future__ import annotations

from random import Random

from stepflash.nano.tasks.example import Example, Tier, single_turn

QUESTIONS = ("What is {}?", "Compute {}.", "Calculate {}.", "{}", "{} = ?", "How much is {}?", "Work out {}.")
WORDS = {"+": "plus", "-": "minus", "*": "times", "/": "divided by"}


def operate(left: int, operator: str, right: int) -> tuple[list[str], int]:
    """Lines that work out `left operator right`, and its value.

    Raises:
        ValueError: a negative operand, an inexact division, or an unknown operator.
    """
    if left < 0 or right < 0:
        raise ValueError(f"operands of a trace must not be negative: {left} {operator} {right}")
    if operator == "+":
        return _add(left, right)
    if operator == "-":
        return _subtract(left, right)
    if operator == "*":
        return _multiply(left, right)
    if operator == "/":
        return _divide(left, right)
    raise ValueError(f"unknown operator {operator!r}; known are + - * /")


def _digits(number: int) -> list[int]:
    """Decimal digits, the ones first."""
    return [int(digit) for digit in reversed(str(number))]


def _add(left: int, right: int) -> tuple[list[str], int]:
    value = left + right
    if left < 10 and right < 10:
        return [f"{left}+{right}={value}"], value
    if left < right:
        left, right = right, left
    lines = [f"{left}+{right}:"]
    left_digits, right_digits = _digits(left), _digits(right)
    right_digits += [0] * (len(left_digits) - len(right_digits))
    carry, known = 0, ""
    for column, (upper, lower) in enumerate(zip(left_digits, right_digits, strict=True)):
        total = upper + lower + carry
        is_last = column == len(left_digits) - 1
        known = (str(total) if is_last else str(total % 10)) + known
        lines.append(f"{upper}+{lower}{'+1' if carry else ''}={total} >{known}")
        carry = total // 10
    return lines, value


def _subtract(left: int, right: int) -> tuple[list[str], int]:
    value = left - right
    if value < 0:
        lines, positive = _subtract(right, left)
        return [f"{left}-{right}=-({right}-{left})", *lines, f"{left}-{right}=-{positive}"], value
    if right < 10 and (left < 10 or (left < 20 and value < 10)):
        return [f"{left}-{right}={value}"], value
    lines = [f"{left}-{right}:"]
    left_digits, right_digits = _digits(left), _digits(right)
    right_digits += [0] * (len(left_digits) - len(right_digits))
    borrow, known = 0, ""
    for column, (upper, lower) in enumerate(zip(left_digits, right_digits, strict=True)):
        borrowed = upper - lower - borrow < 0
        minuend = upper + 10 * borrowed
        digit = minuend - lower - borrow
        known = f"{digit}{known}"
        if column == len(left_digits) - 1:
            known = str(int(known))
        lines.append(f"{minuend}-{lower}{'-1' if borrow else ''}={digit} >{known}")
        borrow = int(borrowed)
    return lines, value


def _multiply(left: int, right: int) -> tuple[list[str], int]:
    value = left * right
    if left < right:
        left, right = right, left
    if left < 10 or right == 0:
        return [f"{left}*{right}={value}"], value
    if right < 10:
        lines = [f"{left}*{right}:"]
        carry, known, digits = 0, "", _digits(left)
        for column, digit in enumerate(digits):
            total = digit * right + carry
            known = (str(total) if column == len(digits) - 1 else str(total % 10)) + known
            lines.append(f"{digit}*{right}{f'+{carry}' if carry else ''}={total} >{known}")
            carry = total // 10
        return lines, value
    ones, tens = right % 10, right - right % 10
    high_lines, high = _multiply(left, right // 10)
    high_lines = [*high_lines, f"{left}*{tens}={high * 10}"]
    if right >= 100:
        raise ValueError(f"the smaller factor must be below 100, got {right}")
    if ones == 0:
        return high_lines, value
    low_lines, low = _multiply(left, ones)
    sum_lines, _ = _add(low, high * 10)
    return [f"{left}*{right}={left}*{ones}+{left}*{tens}", *low_lines, *high_lines, *sum_lines], value


def _divide(left: int, right: int) -> tuple[list[str], int]:
    if right == 0 or left % right:
        raise ValueError(f"only exact divisions have a trace, got {left}/{right}")
    value = left // right
    if value == 0 or (value < 10 and right < 10):
        return [f"{left}/{right}={value}"], value
    lines, rest, known = [f"{left}/{right}:"], 0, ""
    for digit in reversed(_digits(left)):
        part = rest * 10 + digit
        if part < right and not known:
            rest = part
            continue
        quotient, rest = divmod(part, right)
        known += str(quotient)
        lines.append(f"{part}/{right}={quotient} r{rest} >{known}")
    return lines, value


def ask(rng: Random, expression: str, *, allow_words: bool = True) -> str:
    """A question for the value of `expression`, which has one space around each operator."""
    style = rng.random()
    if style < 0.55:
        expression = expression.replace(" ", "")
    elif style < 0.7 and allow_words and "(" not in expression:
        expression = " ".join(WORDS.get(part, part) for part in expression.split(" "))
    elif style < 0.8:
        expression = expression.replace("*", "x")
    return rng.choice(QUESTIONS).format(expression)


def _number(rng: Random, max_digits: int) -> int:
    digits = rng.randint(1, max_digits)
    return rng.randint(0 if digits == 1 else 10 ** (digits - 1), 10**digits - 1)


def add(rng: Random, tier: Tier) -> Example:
    """Two numbers of up to 3 digits (easy) or 5 (hard)."""
    digits = 3 if tier == "easy" else 5
    return _binary("add", rng, tier, _number(rng, digits), "+", _number(rng, digits))


def subtract(rng: Random, tier: Tier) -> Example:
    """Two numbers of up to 3 digits (easy) or 5 (hard, sometimes with a negative result)."""
    digits = 3 if tier == "easy" else 5
    left, right = _number(rng, digits), _number(rng, digits)
    if left < right and (tier == "easy" or rng.random() < 0.7):
        left, right = right, left
    return _binary("subtract", rng, tier, left, "-", right)


def multiply(rng: Random, tier: Tier) -> Example:
    """Up to 3 digits by one digit (easy); up to 4 by 1 or 3 by 2 digits (hard)."""
    if tier == "easy":
        left, right = _number(rng, 3), rng.randint(2, 9)
    elif rng.random() < 0.5:
        left, right = _number(rng, 4), rng.randint(2, 9)
    else:
        left, right = rng.randint(10, 400), rng.randint(11, 99)
    if rng.random() < 0.3:
        left, right = right, left
    return _binary("multiply", rng, tier, left, "*", right)


def divide(rng: Random, tier: Tier) -> Example:
    """Exact quotients of up to 2 digits (easy) or 4 (hard) by one digit."""
    divisor = rng.randint(2, 9)
    quotient = _number(rng, 2 if tier == "easy" else 4)
    return _binary("divide", rng, tier, quotient * divisor, "/", divisor)


def _binary(task: str, rng: Random, tier: Tier, left: int, operator: str, right: int) -> Example:
    lines, value = operate(left, operator, right)
    return single_turn(task, tier, ask(rng, f"{left} {operator} {right}"), "\n".join(lines), str(value))


def expression(rng: Random, tier: Tier) -> Example:
    """Two operations on numbers below 50 (easy), or three on numbers below 200 (hard), with brackets."""
    while True:
        text, lines, value = _tree(rng, 2 if tier == "easy" else 3, 50 if tier == "easy" else 200)
        if 0 <= value < (1000 if tier == "easy" else 20000):
            return single_turn(
                "expression", tier, ask(rng, text, allow_words=False), "\n".join(lines), str(value)
            )


def _tree(rng: Random, operations: int, limit: int) -> tuple[str, list[str], int]:
    """Text, trace and value of a random expression; -1 when a step would be negative or too large."""
    if operations == 0:
        value = rng.randint(2, limit)
        return str(value), [], value
    operator = rng.choice("++--*")
    left_operations = rng.choice((0, operations - 1))
    left_text, left_lines, left = _tree(rng, left_operations, limit)
    right_text, right_lines, right = _tree(rng, operations - 1 - left_operations, limit)
    if operator == "*" and operations - 1 - left_operations == 0:
        right = rng.randint(2, 9)
        right_text = str(right)
    too_large = operator == "*" and min(left, right) >= 100
    if left < 0 or right < 0 or too_large or (operator == "-" and left < right):
        return "", [], -1
    if operator == "*" and _is_sum(left_text):
        left_text = f"({left_text})"
    if _is_sum(
        right_text
    ):  # brackets even after `+`: a trace works from the left unless brackets say otherwise
        right_text = f"({right_text})"
    lines, value = operate(left, operator, right)
    return f"{left_text} {operator} {right_text}", [*left_lines, *right_lines, *lines], value


def _is_sum(text: str) -> bool:
    """Whether an operator `+` or `-` stands outside all brackets."""
    depth = 0
    for character in text:
        depth += (character == "(") - (character == ")")
        if depth == 0 and character in "+-":
            return True
    return False
