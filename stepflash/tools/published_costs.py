"""Two published cost formulas, as checks of the sizes that the decode-cost model starts from.

`paper_cost` is the one that the model card refers to (arXiv 2507.19427); `prefill_flops_tables` repeats the
columns of the Step 3.5 Flash report that follow from plain counts of operations. Its decode columns do not
follow from these counts (they imply a linear term several times larger), so they are not repeated. Of its 30B
ablation, whose sizes are not public, `ablation_table` repeats what needs no sizes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from stepflash.errors import ConfigError
from stepflash.model.config import ModelConfig
from stepflash.tools.architectures import RELEASED_CONFIG, Architecture, from_config, load_json
from stepflash.tools.hardware import Chip


@dataclass(frozen=True, slots=True, kw_only=True)
class PaperCost:
    """Dollars for a million tokens, by part."""

    attention: float
    linear: float

    @property
    def total(self) -> float:
        return self.attention + self.linear


def paper_cost(model: Architecture, chip: Chip, context: int) -> PaperCost:
    """max(attention operations, cache bytes) + linear operations, each at its unit price on `chip`.

    arXiv 2507.19427: unit price = rent a second / rate, FP8 cache and FP8 rates. Neither a latency target, nor
    memory, nor speculation enters; the cache is counted without scales.

    Raises:
        ConfigError: the rent of the chip is not known.
    """
    if chip.dollars_per_hour is None:
        raise ConfigError(f"the rent of {chip.name} is not known")
    rent = chip.dollars_per_hour / 3600 * 1e6
    overhead = sum(
        count * min(context, layer.attention.attends or context) * layer.attention.fp8_overhead_bytes
        for count, layer in model.layers
    )
    kv_bytes = model.kv_bytes_read(context, kv_bytes=1) - overhead
    attention = max(model.attention_flops(context) / chip.fp8_rate, kv_bytes / chip.bandwidth)
    return PaperCost(
        attention=rent * attention, linear=rent * 2 * model.num_active_parameters() / chip.fp8_rate
    )


def prefill_flops(model: Architecture, context: int) -> float:
    """Operations of a prompt of `context` tokens for each token, without LM head.

    Two for each active parameter; in full attention a token meets half of the context on average, in a
    sliding layer the whole window.
    """
    attention = sum(
        count * layer.attention.flops_per_key * (layer.attention.attends or context / 2)
        for count, layer in model.layers
    )
    return 2 * model.num_active_parameters(with_head=False) + attention


# (variant, sliding heads, all layers full), report value at 64K and 256K; the baseline has 64 sliding heads.
REPORT_PREFILL = (
    ("96 heads in sliding layers", 96, False, (1.08, 1.04)),
    ("full attention in all 45 layers", 64, True, (2.07, 3.00)),
)
REPORT_CONTEXTS = (65536, 262144)


def prefill_flops_tables() -> list[dict[str, Any]]:
    """Relative prefill operations of two changes to the layout: the report's values beside the counts."""

    def variant(heads: int, is_full: bool) -> Architecture:
        raw = load_json(RELEASED_CONFIG)
        raw["attention_other_setting"]["num_attention_heads"] = heads
        if is_full:
            raw["layer_types"] = ["full_attention"] * raw["num_hidden_layers"] + raw["layer_types"][-3:]
        return from_config(ModelConfig.from_dict(raw), "variant")

    base = variant(64, False)
    return [
        {
            "change": name,
            "context": context,
            "report": known,
            "computed": prefill_flops(variant(heads, is_full), context) / prefill_flops(base, context),
        }
        for name, heads, is_full, values in REPORT_PREFILL
        for context, known in zip(REPORT_CONTEXTS, values, strict=True)
    ]


# Table 1 of the report, 30B-A3B: relative operations of attention with all layers full, and with every second one;
# the base has one full layer in four.
REPORT_ABLATION = {"decode": (2.68, 1.58), "prefill": (2.90, 1.65)}
ABLATION_LAYERS = 48


def ablation_table(num_layers: int = ABLATION_LAYERS) -> list[dict[str, Any]]:
    """Every second layer full, from the report's value for all layers full: the sizes cancel.

    If each full layer costs the same more than a sliding one, the relative operations are linear in their number:
    from one in four (1) to all of them. Layers count from a full one, as in the released model.
    """
    quarter, half = -(-num_layers // 4), -(-num_layers // 2)
    return [
        {
            "phase": phase,
            "all_full": all_full,
            "report": report,
            "computed": 1 + (all_full - 1) * (half - quarter) / (num_layers - quarter),
        }
        for phase, (all_full, report) in REPORT_ABLATION.items()
    ]
