"""How well the card's ratios are predicted by assumptions that were fitted without them.

The fitted assumptions are searched over a fixed grid. Leaving one model out, the grid point that explains the
other four best predicts the fifth: the only out-of-sample check that a table of five ratios allows.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

from stepflash.tools.decode_cost import Assumptions, card, compare
from stepflash.tools.hardware import CHIPS

GPUS = ("H20", "H800", "H200")
ACCEPTANCES = (0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
LATENCIES_US = (0.0, 25.0, 50.0, 75.0, 100.0, 125.0, 150.0)
EFFICIENCIES = (0.5, 0.7, 0.85, 1.0)
TOLERANCE = 0.15


@dataclass(frozen=True, slots=True, kw_only=True)
class GridPoint:
    """log(estimate / card) of each model but the first, by name; infinite if a model cannot be served."""

    assumptions: Assumptions
    log_errors: dict[str, float]

    def rms(self, without: str | None = None) -> float:
        kept = [error**2 for name, error in self.log_errors.items() if name != without]
        return math.sqrt(sum(kept) / len(kept))

    def is_within_tolerance(self) -> bool:
        return all(abs(math.expm1(error)) <= TOLERANCE for error in self.log_errors.values())


def grid() -> list[GridPoint]:
    """The card's errors at every point."""
    entries = card()
    points = []
    for gpu, acceptance, latency, efficiency in itertools.product(
        GPUS, ACCEPTANCES, LATENCIES_US, EFFICIENCIES
    ):
        assumptions = Assumptions(
            chip=CHIPS[gpu], acceptance=acceptance, layer_latency_us=latency, efficiency=efficiency
        )
        errors = {
            row["model"]: math.log(row["ratio"] / row["card_ratio"]) if row["ratio"] else math.inf
            for row in compare(entries, assumptions)[1:]
        }
        points.append(GridPoint(assumptions=assumptions, log_errors=errors))
    return points


def leave_one_out(points: list[GridPoint]) -> list[dict[str, Any]]:
    """For each model: what the fit to the others chose, and what it predicts for this one, as JSON values."""
    rows = []
    for entry in card()[1:]:
        name = entry.model.name
        best = min(points, key=lambda point: point.rms(without=name))
        chosen = best.assumptions
        assert entry.ratio is not None
        rows.append(
            {
                "model": name,
                "card_ratio": entry.ratio,
                "predicted": entry.ratio * math.exp(best.log_errors[name]),
                "error": math.expm1(best.log_errors[name]),
                "gpu": chosen.chip.name,
                "acceptance": chosen.acceptance,
                "layer_latency_us": chosen.layer_latency_us,
                "efficiency": chosen.efficiency,
                "rms_log_error_of_others": best.rms(without=name),
            }
        )
    return rows
