"""Inspecting and verifying: what was damaged on purpose must be found, and nothing in a sound checkpoint."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from stepflash.gguf_file import write_gguf
from stepflash.weights.load import load_model
from stepflash.weights.verify import (
    Verification,
    check_predictions,
    group_of,
    inspect_checkpoint,
    measure,
    verify_checkpoint,
)
from tests.weights.variants import (
    MICRO,
    block_scale,
    gguf_metadata,
    gguf_tensors,
    golden,
    micro_tensors,
    to_write,
    write_folder,
    write_micro_gguf,
)


def problems(verification: Verification) -> list[tuple[str, str]]:
    return [(f.level, f.subject) for f in verification.findings if f.level != "note"]


def test_inspect_counts_what_is_in_the_headers() -> None:
    """Sums against the tensors themselves, read by the safetensors library."""
    inspection = inspect_checkpoint(MICRO)
    tensors = micro_tensors()
    assert inspection.comparison.fits
    assert inspection.num_found == len(tensors)
    experts = [t for name, t in tensors.items() if ".moe." in name and t.ndim == 3]
    (line,) = [stored for stored in inspection.stored if stored.group == "routed experts"]
    assert (line.dtype_name, line.num_tensors) == ("BF16", 18)
    assert line.num_parameters == sum(t.numel() for t in experts)
    assert line.num_bytes == sum(t.nbytes for t in experts)
    assert sum(stored.num_tensors for stored in inspection.stored) == len(tensors)
    assert sum(stored.num_bytes for stored in inspection.stored) == sum(t.nbytes for t in tensors.values())


def test_every_parameter_belongs_to_a_group() -> None:
    assert {group_of(name, 8) for name in micro_tensors()} == {
        *(
            "norms",
            "embedding",
            "LM head",
            "attention",
            "dense MLP",
            "router",
            "routed experts",
            "shared experts",
        ),
        *("MTP module 1", "MTP module 2", "MTP module 3"),
    }
    assert group_of("model.layers.3.moe.gate.weight", 45) == "router"
    assert group_of("model.layers.3.moe.gate_proj.weight", 45) == "routed experts"


def test_inspect_describes_what_does_not_fit(tmp_path: Path) -> None:
    tensors = micro_tensors()
    del tensors["model.norm.weight"]
    tensors["model.layers.0.self_attn.q_norm.weight"] = torch.zeros(31)
    tensors["extra"] = torch.zeros(1)
    comparison = inspect_checkpoint(write_folder(tmp_path, tensors)).comparison
    assert comparison.missing == ["model.norm.weight"]
    assert comparison.wrong_shape == [("model.layers.0.self_attn.q_norm.weight", (32,), (31,))]
    assert [name.split(" ")[0] for name in comparison.unexpected] == ["extra"]


def test_sound_checkpoints_pass(tmp_path: Path) -> None:
    for path in (MICRO, write_micro_gguf(tmp_path / "micro.gguf", "BF16")):
        progress: list[tuple[int, int]] = []
        verification = verify_checkpoint(path, lambda done, total, log=progress: log.append((done, total)))
        assert verification.passed
        assert verification.num_tensors == len(micro_tensors())
        assert progress[-1] == (verification.num_bytes, verification.num_bytes)
        expected = [("warning", "rope_freqs.weight")] if path != MICRO else []
        assert problems(verification) == expected  # the variant's rotary table is all ones


def damaged(name: str, change: str) -> dict[str, Tensor]:
    tensors = micro_tensors()
    tensor = tensors[name].clone()
    flat = tensor.view(-1)
    if change == "nan":
        flat[3] = float("nan")
    elif change == "infinite":
        flat[:2] = float("inf")
    elif change == "zero":
        flat.zero_()
    elif change == "huge":
        flat[5] = 1e6
    tensors[name] = tensor
    return tensors


@pytest.mark.parametrize(
    ("name", "change", "level", "message"),
    [
        ("model.layers.5.moe.up_proj.weight", "nan", "error", "1 NaN and 0 infinite of 65536 values"),
        ("model.layers.9.eh_proj.weight", "infinite", "error", "0 NaN and 2 infinite of 32768 values"),
        ("model.layers.2.moe.router_bias", "nan", "error", "1 NaN"),
        ("model.layers.2.moe.router_bias", "huge", "warning", "selection bias as large as 1e+06"),
        ("model.layers.1.mlp.down_proj.weight", "zero", "warning", "all values are zero"),
        ("lm_head.weight", "huge", "warning", "values as large as"),
    ],
)
def test_damaged_values_are_found(tmp_path: Path, name: str, change: str, level: str, message: str) -> None:
    verification = verify_checkpoint(write_folder(tmp_path, damaged(name, change)))
    assert problems(verification) == [(level, name)]
    assert any(message in finding.message for finding in verification.findings)
    assert verification.passed == (level == "warning")


@pytest.mark.parametrize(
    ("value", "level", "message"),
    [
        (float("nan"), "error", "1 NaN or infinite values"),
        (-0.01, "error", "zero or negative"),
        (0.0, "warning", "zero or negative"),
        (40.0, "warning", "block scales as large as 40"),
    ],
)
def test_bad_fp8_scales_are_found(tmp_path: Path, value: float, level: str, message: str) -> None:
    name = "model.layers.5.moe.up_proj.weight"
    tensors = micro_tensors()
    tensors[name], scales = block_scale(tensors[name])
    scales[2, 0, 0] = value
    tensors[name + "_scale_inv"] = scales
    verification = verify_checkpoint(write_folder(tmp_path, tensors))
    assert (level, name) in problems(verification)
    assert any(message in finding.message for finding in verification.findings if finding.subject == name)


@pytest.mark.parametrize(("offset", "message"), [(1.0, "1 was already added"), (-1.0, "1 was missing")])
@pytest.mark.parametrize("kind", ["safetensors", "gguf"])
def test_norms_with_a_wrong_one_are_found(tmp_path: Path, offset: float, message: str, kind: str) -> None:
    if kind == "gguf":
        path = tmp_path / "micro.gguf"
        tensors = gguf_tensors("F32")
        for name in tensors:
            if name.endswith("norm.weight"):
                values = torch.frombuffer(bytearray(next(iter(tensors[name].chunks))), dtype=torch.float32)
                tensors[name] = to_write(values + offset, "F32")
        write_gguf(path, gguf_metadata(), tensors)
    else:
        shifted = {
            n: t.float() + offset if n.endswith("norm.weight") else t for n, t in micro_tensors().items()
        }
        path = write_folder(tmp_path, shifted)
    verification = verify_checkpoint(path)
    assert not verification.passed
    (finding,) = [finding for finding in verification.findings if finding.level == "error"]
    assert message in finding.message


def test_missing_mtp_modules_are_noted(tmp_path: Path) -> None:
    trunk = {
        n: t
        for n, t in micro_tensors().items()
        if not n.startswith(tuple(f"model.layers.{i}." for i in (8, 9, 10)))
    }
    verification = verify_checkpoint(write_folder(tmp_path, trunk))
    assert verification.passed
    assert "the configuration announces 3 MTP modules, the files hold 0" in [
        f.message for f in verification.findings
    ]


def test_statistics_against_torch() -> None:
    torch.manual_seed(0)
    values = torch.randn(1000)
    values[7], values[8] = float("nan"), float("-inf")
    found = measure(values.to(torch.bfloat16).split(77))
    finite = values.to(torch.bfloat16).double()
    finite = finite[finite.isfinite()]
    assert (found.count, found.num_nan, found.num_infinite) == (1000, 1, 1)
    assert found.mean == pytest.approx(finite.mean().item())
    assert found.rms == pytest.approx(finite.square().mean().sqrt().item())
    assert found.largest == finite.abs().max().item()
    assert found.share_negative == pytest.approx((finite < 0).double().mean().item())


def test_predictions_on_text_that_the_model_wrote_itself() -> None:
    """Micro's greedy continuation is what it finds likely: every top-1 hit is known from the golden logits."""
    ids = golden("transformers-logits-f32", "ids").long()
    logits = golden("transformers-logits-f32", "logits")
    wanted = logits[:-1].log_softmax(-1).gather(-1, ids[1:, None]).mean().item()
    predictions = check_predictions(load_model(MICRO, dtype="float32"), ids)
    assert len(predictions.mean_logprobs) == 4
    assert predictions.mean_logprobs[0] == pytest.approx(wanted, abs=1e-4)
    assert predictions.top1[0] == pytest.approx((logits[:-1].argmax(-1) == ids[1:]).float().mean().item())
    assert predictions.uniform_logprob == -math.log(512)
    assert not predictions.passed  # random weights are no better than chance
    with pytest.raises(ValueError, match="give at least 16"):
        check_predictions(load_model(MICRO), ids[:3])


def test_predictions_pass_for_a_model_that_predicts() -> None:
    """Weights made so that token t is followed by t + 1: embedding i points where head i + 1 points."""
    model = load_model(MICRO, dtype="float32", mtp=False, memory_map=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        torch.manual_seed(0)
        directions = torch.nn.functional.normalize(torch.randn(512, 128), dim=-1)
        model.model.embed_tokens.weight.copy_(directions)
        model.lm_head.weight.copy_(20 * directions.roll(1, 0))
    predictions = check_predictions(model, torch.arange(100))
    assert predictions.passed
    assert predictions.top1 == [1.0]


def test_config_of_micro_is_untouched() -> None:
    """The fixture is shared by many tests; none may have written to it."""
    assert json.loads((MICRO / "config.json").read_text())["num_hidden_layers"] == 8
