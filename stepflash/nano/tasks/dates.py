"""Weekdays, months, dates and leap years, each with a short trace."""

from __future__ import annotations

import calendar
from datetime import date, timedelta
from random import Random

from stepflash.nano.tasks.arithmetic import operate
from stepflash.nano.tasks.example import Example, Tier, single_turn

WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = tuple(calendar.month_name)[1:]


def weekday(rng: Random, tier: Tier) -> Example:
    """The weekday some days after or before another; weeks are taken off first, then one step a day."""
    start = rng.randrange(7)
    distance = rng.randint(1, 20 if tier == "easy" else 99)
    sign = 1 if rng.random() < (0.8 if tier == "easy" else 0.5) else -1
    direction = rng.choice(("after", "from") if sign > 0 else ("before",))
    pattern = rng.choice(
        (
            "What day is it {n} {unit} {direction} {day}?",
            "Which weekday comes {n} {unit} {direction} {day}?",
            "What day of the week is {n} {unit} {direction} {day}?",
            "If today is {day}, which day was it {n} {unit} ago?"
            if sign < 0
            else "If today is {day}, which day is it in {n} {unit}?",
        )
    )
    unit = "day" if distance == 1 else "days"
    weeks = distance // 7
    rest = distance - 7 * weeks
    lines = []
    if weeks:
        lines.append(f"7*{weeks}={7 * weeks}")
        lines += operate(distance, "-", 7 * weeks)[0]
    lines.append(f"0 {WEEKDAYS[start]}")
    lines += [f"{step} {WEEKDAYS[(start + sign * step) % 7]}" for step in range(1, rest + 1)]
    answer = WEEKDAYS[(start + sign * distance) % 7]
    question = pattern.format(n=distance, unit=unit, direction=direction, day=WEEKDAYS[start])
    return single_turn("weekday", tier, question, "\n".join(lines), answer)


def months(rng: Random, tier: Tier) -> Example:
    """The month some months after another (hard: also before, up to 30)."""
    start = rng.randrange(12)
    distance = rng.randint(1, 11 if tier == "easy" else 30)
    sign = 1 if tier == "easy" or rng.random() < 0.5 else -1
    word = "month" if distance == 1 else "months"
    pattern = rng.choice(
        ("Which month is {n} {word} {way} {month}?", "What month comes {n} {word} {way} {month}?")
    )
    lines = [f"{MONTHS[start]} {start + 1}"]
    if sign > 0:
        lines += operate(start + 1, "+", distance)[0]
        value = start + 1 + distance
        while value > 12:
            lines += operate(value, "-", 12)[0]
            value -= 12
    else:
        value = start + 1
        while value <= distance:
            lines += operate(value, "+", 12)[0]
            value += 12
        lines += operate(value, "-", distance)[0]
        value -= distance
    answer = MONTHS[value - 1]
    lines.append(f"{value} {answer}")
    question = pattern.format(
        n=distance, word=word, way="after" if sign > 0 else "before", month=MONTHS[start]
    )
    return single_turn("months", tier, question, "\n".join(lines), answer)


def days_between(rng: Random, tier: Tier) -> Example:
    """Days from one date to another: in one month (easy), in the same or the next month (hard)."""
    month = rng.choice((1, 3, 4, 5, 6, 7, 8, 9, 10, 11))  # February depends on the year
    length = calendar.monthrange(2025, month)[1]
    first = rng.randint(1, length - 1)
    name = MONTHS[month - 1]
    same = tier == "easy" or rng.random() < 0.3
    second = rng.randint(first + 1, length) if same else rng.randint(1, 28)
    other = name if same else MONTHS[month]
    start, end = (
        (f"{first} {name}", f"{second} {other}")
        if rng.random() < 0.5
        else (f"{name} {first}", f"{other} {second}")
    )
    pattern = rng.choice(
        ("How many days are there from {} to {}?", "How many days between {} and {}?", "Days from {} to {}?")
    )
    if same:
        lines, value = operate(second, "-", first)
    else:
        lines, rest = operate(length, "-", first)
        lines = [f"{name} has {length}", *lines]
        more, value = operate(rest, "+", second)
        lines += more
    return single_turn("days_between", tier, pattern.format(start, end), "\n".join(lines), str(value))


def date_after(rng: Random, tier: Tier) -> Example:
    """The date some days later: in the same month or the next (easy: up to 20 days; hard: up to 28)."""
    day = date(2025, 3, 1) + timedelta(
        days=rng.randrange(275)
    )  # no date that February makes depend on the year
    length = calendar.monthrange(2025, day.month)[1]
    name = MONTHS[day.month - 1]
    distance = rng.randint(1, 20 if tier == "easy" else 28)
    word = "day" if distance == 1 else "days"
    pattern = rng.choice(
        ("What date is {n} {word} after {date}?", "Which date comes {n} {word} after {date}?")
    )
    lines, value = operate(day.day, "+", distance)
    lines = [f"{name} has {length}", *lines]
    if value > length:
        lines.append(f"{value} more than {length}")
        lines += operate(value, "-", length)[0]
    else:
        lines.append(f"{value} fits")
    end = day + timedelta(days=distance)
    question = pattern.format(n=distance, word=word, date=f"{name} {day.day}")
    return single_turn("date_after", tier, question, "\n".join(lines), f"{MONTHS[end.month - 1]} {end.day}")


def leap_year(rng: Random, tier: Tier) -> Example:
    """Is it a leap year? Easy: 1901 to 2099, by the last two digits; hard: centuries as well."""
    year = (
        rng.randint(1901, 2099)
        if tier == "easy"
        else rng.choice((rng.randint(1000, 3000), 100 * rng.randint(10, 30)))
    )
    if rng.random() < 0.4:
        year -= year % 4
    pattern = rng.choice(
        ("Is {} a leap year?", "Was {} a leap year?", "Does {} have 366 days?", "Leap year or not: {}?")
    )
    part, lines = year % 100, []
    if part == 0:
        part = year // 100
        lines.append(f"century {part}")
    quotient, rest = divmod(part, 4)
    lines.append(f"{part}=4*{quotient}+{rest}")
    is_leap = rest == 0
    lines.append("rest 0, leap" if is_leap else f"rest {rest}, not leap")
    return single_turn("leap_year", tier, pattern.format(year), "\n".join(lines), "Yes" if is_leap else "No")
