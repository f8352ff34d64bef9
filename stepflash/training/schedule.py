"""Learning rate over a run: warm-up, stable, decay (WSD), so that a run can be stopped or extended."""

from __future__ import annotations


def wsd(progress: float, *, warmup: float = 0.02, decay_from: float = 0.6, floor: float = 0.02) -> float:
    """Share of the peak rate at `progress` in [0, 1]: linear up, flat, then linear down to `floor`."""
    if progress < warmup:
        return max(progress / warmup, 1e-3)
    if progress <= decay_from:
        return 1.0
    return floor + (1.0 - floor) * max(0.0, (1.0 - progress) / (1.0 - decay_from))
