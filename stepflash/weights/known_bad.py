"""Ways to quantise the released model that were reported to give broken output.

Entries are facts about formats and layers, matched against what the files hold. Only whether the rounding was
calibrated is taken from the receipt, which proves it no better than its signature does. They speak of the released
model only: other sizes have other edges.
"""

from __future__ import annotations

from dataclasses import dataclass

from stepflash.model.config import ModelConfig
from stepflash.weights.names import layer_of
from stepflash.weights.stored import StoredTensor


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownBad:
    """Weights of `layers` of a model with `num_layers` and `hidden_size`, rounded to the nearest of few bits."""

    name: str
    num_layers: int
    hidden_size: int
    layers: frozenset[int]
    max_bits: float
    reference: str


KNOWN_BAD = (
    KnownBad(
        name="4-bit edge layers rounded without calibration",
        num_layers=45,
        hidden_size=4096,
        layers=frozenset({0, 1, 2, 3, 4, 43, 44}),
        max_bits=4.5,
        reference="intel/auto-round#1624",
    ),
)
# Files of these methods are refused anyway, as they are not read; the reason is worth telling.
FOREIGN_METHODS = {
    "auto-round": "4 and 8 bit files of it that include the layers 0-4 and 43-46 gave broken output "
    "(intel/auto-round#1624)",
    "intel/auto-round": "4 and 8 bit files of it that include the layers 0-4 and 43-46 gave broken output "
    "(intel/auto-round#1624)",
}


def known_bad(config: ModelConfig, tensors: dict[str, StoredTensor], is_calibrated: bool) -> KnownBad | None:
    """The entry that a packed checkpoint fits.

    Args:
        is_calibrated: its rounding used calibration data, so that no entry speaks of it.
    """
    if is_calibrated:
        return None
    for entry in KNOWN_BAD:
        if (config.num_layers, config.hidden_size) != (entry.num_layers, entry.hidden_size):
            continue
        for name, tensor in tensors.items():
            if (
                tensor.packed is not None
                and layer_of(name) in entry.layers
                and tensor.packed.fmt.bits_per_weight <= entry.max_bits
            ):
                return entry
    return None
