"""Quantised models against the plain network on the micro checkpoint: same interface, near or equal results."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from stepflash.errors import ConfigError
from stepflash.kernels import cuda_layout, ops
from stepflash.kernels.formats import Format, parse_format, quantize, unpack
from stepflash.model.transformer import Step3p5ForCausalLM
from stepflash.weights.load import load_model
from stepflash.weights.quantized import PackedWeight, packed_weight_bytes, quantize_model

MICRO = Path(__file__).parents[1] / "fixtures" / "micro"
IDS = torch.arange(3, 60) * 7 % 512


def micro(dtype: str = "bfloat16") -> Step3p5ForCausalLM:
    return load_model(MICRO, dtype, progress=False)


def divergence(actual: Tensor, expected: Tensor) -> float:
    """Median Kullback-Leibler divergence from the expected next-token distributions, in nats.

    The median: on random weights a token whose experts change places is far away whatever the precision.
    """
    p, q = expected.log_softmax(-1), actual.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).median())


def rounded_twin(name: str) -> Step3p5ForCausalLM:
    """The plain float32 network, its weights replaced by the values that the packed ones stand for."""
    model = micro("float32")
    for key, parameter in model.named_parameters():
        if key.endswith(("_proj.weight", "lm_head.weight", "output.weight")):
            fmt = parse_format("bf16" if "g_proj" in key else name, parameter.shape[-1])
            n, k = parameter.shape[-2:]
            parameter.data.copy_(unpack(quantize(parameter.data.bfloat16(), fmt), fmt, n, k))
    return model


@pytest.mark.parametrize(("name", "bound"), [("bf16", 3e-3), ("fp8", 3e-3), ("int8", 0.06), ("int4", 0.06)])
def test_predictions_are_those_of_the_rounded_weights(name: str, bound: float) -> None:
    twin = rounded_twin(name)
    expected, expected_mtp = twin.logits(IDS), twin.mtp_logits(IDS)
    model = quantize_model(micro(), name)
    actual, actual_mtp = model.logits(IDS), model.mtp_logits(IDS)
    assert actual.dtype == torch.float32
    assert divergence(actual, expected) < bound
    for module in range(3):
        known = len(IDS) - module - 1
        assert divergence(actual_mtp[module, :known], expected_mtp[module, :known]) < bound


def test_packed_bf16_loses_no_more_than_plain_bf16() -> None:
    exact = micro("float32").logits(IDS)
    plain, packed = micro().logits(IDS), quantize_model(micro(), "bf16").logits(IDS)
    assert divergence(packed, exact) < divergence(plain, exact)


def test_routes_can_be_watched_and_replayed() -> None:
    model = quantize_model(micro(), "int8")
    seen: dict[int, Tensor] = {}

    def watch(layer_idx: int, scores: Tensor, topk_ids: Tensor) -> Tensor:
        seen[layer_idx] = topk_ids
        return topk_ids

    positions, attend = model._one_document(IDS)
    with torch.inference_mode():
        free = model(IDS, positions, attend)
        watched = model(IDS, positions, attend, watch)
        swapped = model(IDS, positions, attend, lambda layer, scores, ids: (ids + 1) % scores.shape[1])
    assert sorted(seen) == [i for i, layer in enumerate(model.config.trunk_layers) if layer.is_moe]
    assert torch.allclose(watched, free, atol=2e-2 * free.abs().max())
    assert (swapped - free).abs().max() > 0.1 * free.abs().max()


def test_protected_weights_keep_their_format() -> None:
    model = quantize_model(
        micro(), "int4", {"model.layers.[01].*": "int8", "*.g_proj.weight": "bf16", "lm_head.*": "bf16"}
    )
    first, third = model.model.layers[0], model.model.layers[3]
    assert all(w.fmt.is_int8 for w in first.modules() if isinstance(w, PackedWeight))
    assert [w.fmt for w in third.attention.projections] == [Format.INT4_G32] * 3 + [Format.BF16]
    assert model.lm_head.weight.fmt == Format.BF16
    assert 0 < packed_weight_bytes(model) < packed_weight_bytes(quantize_model(micro(), "bf16"))


def test_mistakes_are_named() -> None:
    with pytest.raises(ConfigError, match=r"cannot quantise .*q_proj.*unknown weight format 'int3'"):
        quantize_model(micro(), "int3")
    with pytest.raises(ConfigError, match=r"match no weight: model\.layer\.0"):
        quantize_model(micro(), "int8", {"model.layer.0.*": "bf16"})


def test_a_move_rearranges_the_bytes_for_a_device_and_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the kernels of the device it moves to wanted tiles; what the modules hold for the ops follows."""
    model = load_model(MICRO, "bfloat16", quantization="int4", progress=False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weight = model.lm_head.weight
    assert isinstance(weight, PackedWeight)
    monkeypatch.setattr(ops, "wants_tiles", lambda device: True)
    model.to("cpu")
    assert weight.is_tiled
    assert torch.equal(
        weight.packed, cuda_layout.from_panels(before["lm_head.weight.packed"], weight.fmt, *weight.shape)
    )
    assert model.lm_head._weight[0][0] is weight.packed  # type: ignore[operator, index]
    again = weight.packed
    model.to("cpu")
    assert weight.packed is again
    monkeypatch.setattr(ops, "wants_tiles", lambda device: False)
    model.to("cpu")
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
