"""The numbers in docs/plan.md and docs/decode-cost.md are those that the code gives."""

import re
from pathlib import Path

from stepflash.model.config import ModelConfig
from stepflash.tools.architectures import RELEASED_CONFIG
from stepflash.tools.cost_command import SWEEP, context_sweep, sensitivity
from stepflash.tools.cost_fit import grid, leave_one_out
from stepflash.tools.decode_cost import Assumptions, card, compare
from stepflash.tools.plan import Request, step_ceiling
from stepflash.tools.plot import svg_plot
from stepflash.tools.weight_formats import FORMATS, sizes, without_mtp

DOCS = Path(__file__).parents[2] / "docs"
CONFIG = ModelConfig.from_pretrained(RELEASED_CONFIG)


def cells(text: str, first: str) -> list[str]:
    """The cells after the first of the table row that starts with it."""
    row = next(line for line in text.splitlines() if line.startswith(f"| {first} |"))
    return [cell.strip() for cell in row.strip("| ").split("|")][1:]


def test_card_table() -> None:
    text = (DOCS / "decode-cost.md").read_text()
    for row in compare(card(), Assumptions()):
        _, known, ours, *error = cells(text, row["model"])
        assert float(known) == row["card_ratio"]
        assert ours == f"{row['ratio']:.2f}"
        if row["card_ratio"] != 1:
            assert error == [f"{100 * row['error']:+.1f} %"]


def test_worth_of_the_agreement() -> None:
    text = (DOCS / "decode-cost.md").read_text()
    points = grid()
    good = [point for point in points if point.is_within_tolerance()]
    assert f"grid of {len(points)} settings" in text
    assert f"{len(good)} are within 15 %" in text
    assert {(p.assumptions.chip.name, p.assumptions.efficiency) for p in good} == {("H20", 1.0)}
    predicted = {row["model"]: row["predicted"] for row in leave_one_out(points)}
    expected = {
        "DeepSeek V3.2": 5.74,
        "GLM-4.7": 16.0,
        "MiniMax M2.1": 4.14,
        "MiMo-V2 Flash": 1.17,
        "Kimi K2 Thinking": 36.4,
    }
    for name, value in expected.items():
        assert abs(predicted[name] / value - 1) < 5e-3
        assert f"{value:g}" in text


def test_sensitivity_figures() -> None:
    text = (DOCS / "decode-cost.md").read_text()
    errors = {row["change"]: row["rms_log_error"] for row in sensitivity(Assumptions())}
    paragraph = text.split("One change at a time")[1].split("Why Step")[0]
    for change, words in {
        "GPU H800": "H800",
        "GPU H200": "H200",
        "acceptance 0.7": "acceptance 0.7",
        "latency 0 us a layer": "no latency",
        "BF16 keys and values": "BF16 cache",
        "FP8 attention math": "FP8 attention math",
        "efficiency 60 %": "60 % efficiency",
        "reading and multiplying in turn": "no overlap",
        "busiest experts 1.5x the mean": "busiest experts 1.5x",
        "80 % of memory": "80 % of memory",
        "8 GB for activations": "8 GB for activations",
        "4-bit weights": "4-bit weights everywhere",
        "billed at the speed reached": "billing at the speed reached",
    }.items():
        found = re.search(rf"{re.escape(words)}\s+\((\d\.\d\d)\)", paragraph)
        assert found, words
        assert abs(float(found[1]) - errors[change]) <= 0.0051, change


def test_plot_is_current() -> None:
    sweep = context_sweep(card(), Assumptions())
    labels = [f"{context // 1024}K" for context in SWEEP]
    title = "Cost of a decoded token / Step 3.5 Flash at 128K, against context"
    assert (DOCS / "decode-cost.svg").read_text() == svg_plot(title, labels, sweep)


def test_weights_table_and_ceilings() -> None:
    text = (DOCS / "plan.md").read_text()
    for name in FORMATS:
        stored = sizes(CONFIG, FORMATS[name])
        assert cells(text, name) == [
            f"{sizes(without_mtp(CONFIG), FORMATS[name]).trunk / 1e9:.1f} GB",
            f"{(stored.trunk + stored.mtp) / 1e9:.1f} GB",
        ]
    speeds = [
        step_ceiling(CONFIG, FORMATS["q4_k_s"], Request(context=1), depth, 273e9).tokens_per_second
        for depth in range(4)
    ]
    assert "{:.1f}, {:.1f}, {:.1f} and {:.1f}".format(*speeds) in text.replace("\n", " ")
