"""Dates against the datetime and calendar modules. Kind: brute force."""

from __future__ import annotations

import calendar
import re
from datetime import date, timedelta

from tests.nano.tasks.drawing import answer, draw, question, thought
from tests.nano.tasks.test_arithmetic import EQUATION

WEEKDAYS = list(calendar.day_name)
MONTHS = list(calendar.month_name)[1:]


def number_in(text: str) -> int:
    match = re.search(r"\d+", text)
    assert match
    return int(match[0])


def test_weekday() -> None:
    for example in draw("weekday"):
        start = WEEKDAYS.index(re.search("|".join(WEEKDAYS), question(example))[0])  # type: ignore[index]
        distance = number_in(question(example))
        if re.search("before|ago", question(example)):
            distance = -distance
        day = date(2024, 1, 1) + timedelta(days=start + distance)  # a Monday
        assert answer(example) == day.strftime("%A")


def test_months() -> None:
    for example in draw("months"):
        start = MONTHS.index(question(example).split(" ")[-1][:-1])
        distance = number_in(question(example)) * (-1 if " before " in question(example) else 1)
        assert answer(example) == MONTHS[(start + distance) % 12]


def dates_in(text: str) -> list[date]:
    found = re.findall(rf"(\d*) ?({'|'.join(MONTHS)}) ?(\d*)", text)
    return [date(2025, MONTHS.index(month) + 1, int(before or after)) for before, month, after in found]


def test_days_between() -> None:
    for example in draw("days_between"):
        start, end = dates_in(re.sub(r"^\D*\d+ days|^Days", "", question(example)))
        assert int(answer(example)) == (end - start).days


def test_date_after() -> None:
    for example in draw("date_after"):
        distance, _, rest = question(example).partition(" after ")
        (start,) = dates_in(rest)
        assert dates_in(answer(example)) == [start + timedelta(days=number_in(distance))]


def test_leap_year() -> None:
    for example in draw("leap_year"):
        year = int(re.findall(r"\d{4}", question(example))[0])
        assert answer(example) == ("Yes" if calendar.isleap(year) else "No")


def test_equations_in_thoughts_hold() -> None:
    for task in ("weekday", "months", "days_between", "date_after", "leap_year"):
        checked = 0
        for example in draw(task):
            for line in thought(example).split("\n"):
                if match := EQUATION.fullmatch(line):
                    assert eval(match[1]) == eval(match[2]), line
                    checked += 1
        assert checked > 100
