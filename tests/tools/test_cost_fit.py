"""The grid and the leave-one-out check, on errors that are written down here."""

import math

import pytest

from stepflash.tools.cost_fit import GridPoint, leave_one_out
from stepflash.tools.decode_cost import Assumptions, card

NAMES = [entry.model.name for entry in card()[1:]]


def point(acceptance: float, *errors: float) -> GridPoint:
    return GridPoint(
        assumptions=Assumptions(acceptance=acceptance), log_errors=dict(zip(NAMES, errors, strict=True))
    )


def test_rms() -> None:
    # (0.3^2 + 4 x 0.1^2) / 5 = 0.026; without the first 0.1
    assert point(0.5, 0.3, 0.1, -0.1, 0.1, -0.1).rms() == pytest.approx(math.sqrt(0.026))
    assert point(0.5, 0.3, 0.1, -0.1, 0.1, -0.1).rms(without=NAMES[0]) == pytest.approx(0.1)


def test_tolerance_is_of_the_ratio() -> None:
    assert point(0.5, math.log(1.149), math.log(0.851), 0, 0, 0).is_within_tolerance()
    assert not point(0.5, math.log(1.151), 0, 0, 0, 0).is_within_tolerance()
    assert not point(0.5, 0, math.log(0.849), 0, 0, 0).is_within_tolerance()


def test_the_left_out_model_has_no_say() -> None:
    points = [
        point(0.1, 0.0, 0.2, 0.2, 0.2, 0.2),  # perfect for the first model, poor for the others
        point(0.2, math.log(2), 0.0, 0.0, 0.0, 0.0),  # twice too dear for the first, perfect for the others
        point(0.3, 0.0, math.inf, 0.0, 0.0, 0.0),  # cannot serve the second
    ]
    rows = {row["model"]: row for row in leave_one_out(points)}
    assert rows[NAMES[0]]["acceptance"] == 0.2
    assert rows[NAMES[0]]["predicted"] == pytest.approx(12.0)  # 2 x 6.0 of the card
    assert rows[NAMES[0]]["error"] == pytest.approx(1.0)
    assert rows[NAMES[1]]["acceptance"] == 0.3
    assert math.isinf(rows[NAMES[1]]["predicted"])
    assert rows[NAMES[2]]["acceptance"] == 0.1
