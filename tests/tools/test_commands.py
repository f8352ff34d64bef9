"""The commands plan and cost end to end: text, JSON, status; and the plots."""

import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from stepflash.cli import main
from stepflash.tools.hardware import MACHINES
from stepflash.tools.plot import svg_plot, text_plot
from stepflash.tools.weight_formats import FORMATS

FIXTURES = Path(__file__).parents[1] / "fixtures"
MICRO = str(FIXTURES / "micro")


@pytest.fixture(autouse=True)
def _plain_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.delenv("STEPFLASH_DEBUG", raising=False)


def run(*arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    status = main(arguments)
    output = capsys.readouterr()
    return status, output.out, output.err


def test_built_in_configuration_is_the_released_one() -> None:
    shipped = Path(__file__).parents[2] / "stepflash" / "tools" / "step-3.5-flash.json"
    assert json.loads(shipped.read_text()) == json.loads(
        (FIXTURES / "step-3.5-flash-config.json").read_text()
    )


def test_plan_of_a_128_gb_box(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run("plan", "--memory", "128GB", "--bandwidth", "273GB/s", capsys=capsys)
    assert status == 0
    assert "48 KiB a token + 66 MiB a sequence + 6 MiB" in out
    assert re.search(r"^q4_k_s +113\.0 GB +114\.7 GB +yes +160,222 +4 +32\.2 +47\.5 \(3\)", out, re.M)
    assert "bf16: refused, weights 398.8 GB > 121.0 GB usable of 128.0 GB" in out
    assert "llama-server -m step-3.5-flash-q4_k_s.gguf -c 32768" in out


def test_released_names_need_no_network(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_: pytest.fail("downloads"))
    for name in ("step-3.5-flash", "stepfun-ai/Step-3.5-Flash", "stepfun-ai/Step-3.5-Flash-FP8"):
        status, out, _ = run("plan", name, "--machine", "h200", capsys=capsys)
        assert status == 0
        assert "196,956,130,368 parameters" in out


def test_plan_of_a_hub_model_reads_its_configuration_only(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.hf_hub_download", lambda *names: asked.append(names) or f"{MICRO}/config.json"
    )
    assert run("plan", "owner/name", "--memory", "8GB", capsys=capsys)[0] == 0
    assert asked == [("owner/name", "config.json")]

    def fail(*_: str) -> str:
        raise OSError("no connection\nat all")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    status, _, err = run("plan", "owner/name", capsys=capsys)
    assert status == 2
    assert (
        err == "stepflash: error: owner/name: its config.json could not be read from the hub: no connection\n"
    )


def test_plan_of_everything(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run("plan", capsys=capsys)
    assert status == 0
    assert all(machine.name in out for machine in MACHINES.values())
    assert all(name in out for name in FORMATS)
    assert "1x H100: refused even in q4_k_s, weights 113.0 GB > 72.0 GB usable" in out


def test_plan_that_fits_nowhere_names_the_limit(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run("plan", "--machine", "8xh800", "--format", "fp8", "--split", "tensor", capsys=capsys)
    assert status == 1
    assert "1280 expert columns / 8 = 160, not a" in out
    assert "Nothing fits." in out


def test_plan_json(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("plan", "--machine", "h200", "--context", "262144", "--kv-dtype", "int8", "--json")
    status, out, _ = run(*arguments, capsys=capsys)
    assert status == 0
    (answer,) = json.loads(out)["machines"]
    assert answer["machine"]["memory_bytes"] == 141e9
    assert answer["recommended"] == "q4_k_s"
    plans = {plan["format"]: plan for plan in answer["plans"]}
    assert set(plans) == set(FORMATS)
    assert plans["q4_k_s"]["kv_bytes"] == (12 * 2**30 + 72 * 2**20) * 132 // 256
    assert [ceiling["num_drafts"] for ceiling in plans["q4_k_s"]["ceilings"]] == [0, 1, 2, 3]
    assert plans["bf16"]["limit"]["quantity"] == "weights"
    assert "-ctk q8_0" in answer["commands"][0]["line"]


def test_plan_of_a_folder_and_of_a_changed_preset(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run("plan", MICRO, "--memory", "1GB", "--json", capsys=capsys)
    assert status == 0
    report = json.loads(out)
    assert report["request"]["context"] == 4096  # all that the model has
    assert report["machines"][0]["plans"][0]["ceilings"] == []  # no bandwidth given
    assert MICRO in report["machines"][0]["commands"][-1]["line"]
    _, out, _ = run("plan", "--machine", "h100", "--gpus", "16", "--json", capsys=capsys)
    machine = json.loads(out)["machines"][0]["machine"]
    assert machine["bf16_rate"] == 989e12  # more of them are not slower
    assert (machine["count"], machine["memory_bytes"], machine["kind"]) == (16, 80e9, "gpu")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("plan", "--machine", "h300"), "machine must be one of mac-studio-128"),
        (("plan", "--memory", "much"), "--memory must be a positive number"),
        (("plan", "--bandwidth", "1TB/s"), "need --memory SIZE or --machine PRESET"),
        (("plan", "--gpus", "0", "--memory", "1GB"), "gpus must be at least 1"),
        (("plan", "--format", "int3"), "format must be one of bf16"),
        (("plan", "--context", "0"), "context and streams must be at least 1"),
        (("plan", "no-such-model"), "neither a file, nor a folder"),
        (("cost", "no-such-model"), "neither a file, nor a folder"),
        (("cost", "--acceptance", "2"), "acceptance must be between 0 and 1"),
        (("cost", "--gpus", "0", MICRO), "gpus must be at least 1, got 0"),
        (("cost", "--drafts", "-1", MICRO), "drafts must be between 0 and 16, got -1"),
        (("cost", "--speed", "0", MICRO), "speed must be positive, got 0"),
        (("cost", "--efficiency", "0"), "efficiency must be above 0 and at most 1, got 0"),
        (("cost", "--layer-latency-us", "-1"), "latency of a layer must be 0 or more, got -1"),
        (("cost", "--plot", "/no/such/folder/x.svg"), "x.svg: cannot write: No such file"),
        (("cost", "--bf16-tflops", "0"), "--bf16-tflops must be positive"),
        (("cost", "--gpu", "H300"), "invalid choice"),
    ],
)
def test_wrong_arguments(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = run(*arguments, capsys=capsys)
    assert status == 2
    assert out == ""
    assert message in err
    assert err.count("\n") == 1


def test_cost_json_shape(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run("cost", "--json", capsys=capsys)
    assert status == 0
    report = json.loads(out)
    assert set(report) == {"models", "assumptions"}
    assert [row["card_ratio"] for row in report["models"]] == [1.0, 6.0, 18.9, 18.9, 3.9, 1.2]
    assert all(abs(row["ratio"] / row["card_ratio"] - 1) < 0.15 for row in report["models"])
    step = report["models"][0]
    assert {point["context"]: point["cost"] for point in step["by_context"]}[131072] == 1.0
    assumptions = report["assumptions"]
    assert assumptions["chip"]["name"] == "H20"
    assert set(assumptions["sources"]) == set(assumptions) - {"sources", "sensitivity", "leave_one_out"}


def test_cost_prints_card_beside_estimate(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run("cost", capsys=capsys)
    assert status == 0
    assert re.search(r"^GLM-4\.7 +18\.9 +17\.0\d +-1\d\.\d%", out, re.M)
    assert "in-sample" in out
    assert "Only 128K has card values" in out


def test_cost_of_another_model_and_chip(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = tmp_path / "cost.svg"
    status, out, _ = run(
        "cost",
        str(FIXTURES / "step-3.5-flash-config.json"),
        "--gpu-memory",
        "192GB",
        "--gpu-bandwidth",
        "8TB/s",
        "--plot",
        str(plot),
        "--json",
        capsys=capsys,
    )
    assert status == 0
    report = json.loads(out)
    assert report["models"][-1]["ratio"] == 1.0  # the same model under another name
    assert report["models"][-1]["card_ratio"] is None
    assert report["assumptions"]["chip"]["bandwidth"] == 8e12
    assert report["models"][0]["dollars_per_million_tokens"] is None
    assert len(ET.fromstring(plot.read_text()).findall("{http://www.w3.org/2000/svg}polyline")) == 7


def test_text_plot_places_letters_on_a_logarithmic_axis() -> None:
    text = text_plot(
        ["1", "2", "3"], {"Steps": [1.0, 10.0, 100.0], "Other": [1.0, None, 1.0]}, height=5, column=4
    )
    rows = text.splitlines()
    # From the top: 100, 31.6, 10, 3.16, 1; both lines meet in the first column.
    assert [row[10:].rstrip() for row in rows[:5]] == ["          S", "", "      S", "", "  *       D"]
    assert rows[0].startswith("     100 |")


def test_plots_of_one_value() -> None:
    assert "S" in text_plot(["1"], {"a": [2.0]})
    ET.fromstring(svg_plot("a < b", ["1"], {"a & b": [2.0]}))
