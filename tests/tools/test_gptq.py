"""Calibrated rounding: against brute force, against rounding to the nearest, and through interruptions."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from stepflash.errors import WeightsError
from stepflash.kernels.formats import quantize_groups
from stepflash.tools import quantize
from stepflash.tools.calibrate import Calibration, LayerRounder
from stepflash.tools.gptq import gptq, inverse_factor
from stepflash.tools.quantize import make_recipe, plan_tensors, quantize_checkpoint
from stepflash.tools.receipt import CALIBRATION_TEXTS, documents, measure
from stepflash.weights.checkpoint import open_checkpoint, select_mtp

MICRO = Path(__file__).parents[1] / "fixtures" / "micro"


def correlated(tokens: int, k: int, seed: int = 0) -> torch.Tensor:
    """Inputs whose columns share a few causes, as activations do."""
    generator = torch.Generator().manual_seed(seed)
    causes = torch.randn(tokens, k // 8, generator=generator)
    mixing = torch.randn(k // 8, k, generator=generator)
    return causes @ mixing + 0.3 * torch.randn(tokens, k, generator=generator)


def output_error(x: torch.Tensor, weight: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> float:
    values = codes.float() * scales.float().repeat_interleave(codes.shape[-1] // scales.shape[-1], -1)
    return float((x @ (values - weight).T).square().sum())


@pytest.mark.parametrize("group", [32, 128])
def test_output_error_is_below_that_of_the_nearest(group: int) -> None:
    weight = torch.randn(2, 24, 256, generator=torch.Generator().manual_seed(1))
    x = [correlated(600, 256, seed) for seed in (2, 3)]
    codes, scales = gptq(weight, inverse_factor(torch.stack([rows.T @ rows for rows in x])), group)
    for i in range(2):
        nearest = quantize_groups(weight[i], 4, group)
        assert output_error(x[i], weight[i], codes[i], scales[i]) < 0.5 * output_error(
            x[i], weight[i], *nearest
        )


def test_independent_inputs_give_the_nearest_codes() -> None:
    """With H = I there is nothing to make up for: GPTQ is rounding to the nearest with the same scales."""
    weight = torch.randn(1, 16, 64, generator=torch.Generator().manual_seed(4))
    codes, scales = gptq(weight, inverse_factor(torch.eye(64)[None]), 32)
    nearest_codes, nearest_scales = quantize_groups(weight[0], 4, 32)
    assert torch.equal(scales[0], nearest_scales)
    assert (codes[0] - nearest_codes).abs().max() <= 1  # the two divide in another order
    assert (codes[0] != nearest_codes).float().mean() < 0.01


def test_close_to_the_best_codes_there_are() -> None:
    """All roundings up or down of six weights, with the scale that GPTQ chose: it is near the best of the 64."""
    x = correlated(200, 8, 5)[:, :6]
    weight = torch.randn(1, 1, 6, generator=torch.Generator().manual_seed(6))
    hessian = x.T @ x
    codes, scales = gptq(weight, inverse_factor(hessian[None]), 6)
    scale = scales[0, 0, 0].float()
    down = (weight[0, 0] / scale).floor()
    errors = {}
    for ups in itertools.product((0, 1), repeat=6):
        candidate = (down + torch.tensor(ups)).clamp(-8, 7)
        delta = candidate * scale - weight[0, 0]
        errors[ups] = float(delta @ hessian @ delta)
    delta = codes[0, 0].float() * scale - weight[0, 0]
    ordered = sorted(errors.values())
    assert float(delta @ hessian @ delta) <= ordered[len(ordered) // 8]


def test_never_used_columns_and_few_tokens() -> None:
    x = correlated(3, 64)
    x[:, :10] = 0
    weight = torch.randn(1, 4, 64)
    codes, scales = gptq(weight, inverse_factor((x.T @ x)[None]), 64)
    assert bool(scales.isfinite().all())
    assert codes.abs().max() <= 8
    zero_codes, _ = gptq(weight, inverse_factor(torch.zeros(1, 64, 64)), 64)
    assert torch.equal(zero_codes[0], quantize_groups(weight[0], 4, 64)[0])
    with pytest.raises(WeightsError, match="NaN or infinite"):
        inverse_factor(torch.full((1, 64, 64), torch.nan))


def test_an_expert_that_nobody_chose_is_calibrated_on_those_that_come_nearest() -> None:
    source = open_checkpoint(MICRO)
    planned = plan_tensors(source, make_recipe(source.config, "int4"))
    ids, _ = documents(MICRO, None, CALIBRATION_TEXTS)
    run = Calibration(source, select_mtp(source, None), {t.stored.name: t.fmt for t in planned}, ids)
    run.next_layer = 3
    scores = torch.rand(300, 4, generator=torch.Generator().manual_seed(7))
    topk_ids = torch.zeros(300, 2, dtype=torch.long)
    topk_ids[:, 1] = 1
    topk_ids[:5, 1] = 2
    layer = LayerRounder(run)
    assert len(layer._tokens_of(0, scores, topk_ids)) == 300
    few = layer._tokens_of(2, scores, topk_ids)
    assert len(few) == 128
    assert set(range(5)) <= set(few.tolist())
    none = layer._tokens_of(3, scores, topk_ids)
    assert set(none.tolist()) == set(scores[:, 3].topk(128).indices.tolist())


def test_calibrated_micro_agrees_better_and_resumes_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_checkpoint(MICRO)
    nearest = make_recipe(source.config, "int4")
    recipe = replace(nearest, rounding="gptq")
    calibration = [ids[:64] for ids in documents(MICRO, None, CALIBRATION_TEXTS)[0][:40]]
    quantize_checkpoint(source, tmp_path / "nearest", nearest)
    tensors = quantize_checkpoint(source, tmp_path / "gptq", recipe, token_ids=calibration)
    texts, origin = documents(MICRO)
    kl = {
        name: measure(source, open_checkpoint(tmp_path / name), texts, origin).mean_kl
        for name in ("nearest", "gptq")
    }
    assert kl["gptq"] < 0.95 * kl["nearest"]

    write, count, stop = quantize._write_tensor, 0, 75  # in the middle of a layer

    def failing(*arguments: Any) -> dict[str, Any]:
        nonlocal count
        count += 1
        if count == stop:
            raise KeyboardInterrupt
        return write(*arguments)

    parts = tmp_path / "parts"
    monkeypatch.setattr(quantize, "_write_tensor", failing)
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(source, parts, recipe, token_ids=calibration)
    finished = {path.name: path.stat().st_mtime_ns for path in parts.glob("model-*.safetensors")}
    assert len(finished) > 2
    with pytest.raises(quantize.ConfigError, match="another source or recipe"):
        quantize_checkpoint(source, parts, recipe, token_ids=calibration[1:])
    resumed = quantize_checkpoint(source, parts, recipe, token_ids=calibration)
    assert resumed == tensors
    assert all((parts / name).stat().st_mtime_ns == stamp for name, stamp in finished.items())
    assert {path.name: path.read_bytes() for path in parts.iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "gptq").iterdir()
    }
