"""The schedule's shape (property)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepflash.training.schedule import wsd


@given(st.floats(0, 1))
def test_rate_stays_in_range_and_never_jumps(progress: float) -> None:
    assert 0 < wsd(progress) <= 1
    assert wsd(min(1.0, progress + 1e-4)) == pytest.approx(wsd(progress), abs=0.02)


def test_warm_up_plateau_and_end() -> None:
    assert wsd(0.01, warmup=0.02) == pytest.approx(0.5)
    assert wsd(0.3) == 1.0
    assert wsd(1.0, floor=0.02) == pytest.approx(0.02)
    assert wsd(0.8, decay_from=0.6, floor=0.0) == pytest.approx(0.5)
