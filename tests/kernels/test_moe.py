"""The fused feed-forward block against the PyTorch reference and against dense float mathematics."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from stepflash.kernels import ops, reference
from stepflash.kernels.formats import Format, unpack

from .conftest import opcheck, random_packed

ALL = list(Format)
POSITIONAL = (
    "norm_weight", "eps", "router_weight", "router_bias", "top_k", "scaling_factor", "experts", "expert_formats",
    "num_experts", "expert_size", "limit", "shared", "shared_formats", "shared_size", "shared_limit", "topk_ids",
    "topk_weights", "residual",
)  # fmt: skip
DEFAULTS: dict[str, Any] = dict.fromkeys(POSITIONAL) | {
    "eps": 1e-5, "top_k": 0, "scaling_factor": 1.0, "experts": (), "expert_formats": (), "num_experts": 0,
    "expert_size": 0, "shared": (), "shared_formats": (), "shared_size": 0,
}  # fmt: skip


def expected_moe(x: Tensor, options: dict[str, Any]) -> Tensor:
    return reference.moe(x, *((DEFAULTS | options)[name] for name in POSITIONAL))


def routed(
    hidden: int, size: int, num_experts: int, top_k: int, formats: list[Format], seed: int = 0
) -> dict[str, Any]:
    shapes = ((size, hidden), (size, hidden), (hidden, size))
    experts = [
        torch.stack([random_packed(f, n, k, seed + 10 * e + i) for e in range(num_experts)])
        for i, (f, (n, k)) in enumerate(zip(formats, shapes, strict=True))
    ]
    generator = torch.Generator().manual_seed(seed)
    return {
        "router_weight": torch.randn(num_experts, hidden, generator=generator) / hidden**0.5,
        "router_bias": torch.randn(num_experts, generator=generator) * 0.1,
        "top_k": top_k, "scaling_factor": 3.0, "experts": experts, "expert_formats": formats,
        "num_experts": num_experts, "expert_size": size,
    }  # fmt: skip


def shared(hidden: int, size: int, formats: list[Format], seed: int = 500) -> dict[str, Any]:
    shapes = ((size, hidden), (size, hidden), (hidden, size))
    weights = [
        random_packed(f, n, k, seed + i) for i, (f, (n, k)) in enumerate(zip(formats, shapes, strict=True))
    ]
    return {"shared": weights, "shared_formats": formats, "shared_size": size}


def close(actual: Tensor, expected: Tensor, bound: float) -> bool:
    assert actual.dtype == expected.dtype
    return bool((actual.float() - expected.float()).norm() <= bound * expected.float().norm())


@pytest.mark.parametrize("fmt", ALL)
@torch.inference_mode()
def test_moe_of_every_format(fmt: Format) -> None:
    hidden, size = 256, 256
    options = routed(hidden, size, 8, 3, [fmt] * 3) | shared(hidden, size, [fmt] * 3)
    x = torch.randn(19, hidden)
    expected = expected_moe(x, options)
    for num_tokens in (1, 2, 5, 19):
        # An activation whose rounding falls the other way changes an int8 result by about a per mille.
        assert close(ops.moe(x[:num_tokens], **options), expected[:num_tokens], 2e-3)


@pytest.mark.parametrize(("hidden", "size", "shared_size"), [(64, 96, 32), (100, 70, 70), (128, 40, 300)])
@torch.inference_mode()
def test_odd_sizes_and_mixed_formats(hidden: int, size: int, shared_size: int) -> None:
    routed_formats = [Format.INT4_G32, Format.INT4_G32, Format.INT8_G128]
    options = routed(hidden, size, 5, 2, routed_formats) | shared(
        hidden, shared_size, [Format.BF16, Format.BF16, Format.INT4_G64]
    )
    x = torch.randn(7, hidden).bfloat16()
    options |= {"norm_weight": torch.randn(hidden) * 0.1, "residual": x}
    assert close(ops.moe(x, **options), expected_moe(x, options), 5e-3)


@pytest.mark.parametrize(("limit", "shared_limit"), [(0.05, None), (None, 0.05), (0.02, 0.1)])
@torch.inference_mode()
def test_clamps(limit: float | None, shared_limit: float | None) -> None:
    formats = [Format.BF16] * 3
    base = routed(64, 64, 4, 2, formats) | shared(64, 64, formats)
    options = base | {"limit": limit, "shared_limit": shared_limit}
    x = torch.randn(6, 64)
    actual = ops.moe(x, **options)
    assert close(actual, expected_moe(x, options), 2e-3)
    assert not close(actual, expected_moe(x, base), 1e-2)  # the limits bite


@torch.inference_mode()
def test_against_dense_float_mathematics() -> None:
    """Spec 3.2 and 3.3 written out for one token at a time, in float64 with the unpacked weights."""
    hidden, size, formats, limit = 64, 96, [Format.BF16] * 3, 0.5
    options = routed(hidden, size, 6, 2, formats) | shared(hidden, size, formats) | {"limit": limit}
    gate, up, down = (
        unpack(w, Format.BF16, n, k).double()
        for w, (n, k) in zip(
            options["experts"], ((size, hidden), (size, hidden), (hidden, size)), strict=True
        )
    )
    shared_gate, shared_up, shared_down = (
        unpack(w, Format.BF16, n, k).double()
        for w, (n, k) in zip(options["shared"], ((size, hidden), (size, hidden), (hidden, size)), strict=True)
    )
    x = torch.randn(5, hidden).bfloat16().float()
    actual = ops.moe(x, **options)
    for token, row in enumerate(x.double()):
        p = torch.sigmoid(options["router_weight"].double() @ row)
        chosen = (p + options["router_bias"]).argsort(descending=True)[:2]
        total = shared_down @ (torch.nn.functional.silu(shared_gate @ row) * (shared_up @ row))
        for e in chosen.tolist():
            silu = torch.nn.functional.silu(gate[e] @ row)
            h = torch.minimum(silu, torch.tensor(limit)) * (up[e] @ row).clamp(-limit, limit)
            total = total + 3.0 * p[e] / p[chosen].sum() * (down[e] @ h)
        assert (actual[token] - total).norm() / total.norm() < 5e-3


@torch.inference_mode()
def test_dense_mlp_is_a_shared_expert_alone() -> None:
    formats = [Format.INT8_G64] * 3
    options = shared(128, 200, formats)
    x = torch.randn(9, 128).bfloat16()
    assert close(ops.moe(x, **options), expected_moe(x, options), 5e-3)


@pytest.mark.parametrize("fmt", [Format.INT4_G32, Format.BF16, Format.FP8])
@torch.inference_mode()
def test_a_token_gets_the_same_bits_in_any_batch(fmt: Format) -> None:
    options = (
        routed(128, 128, 8, 3, [fmt] * 3) | shared(128, 64, [fmt] * 3) | {"norm_weight": torch.zeros(128)}
    )
    x = torch.randn(33, 128).bfloat16()
    alone = torch.cat([ops.moe(x[i : i + 1], **options, residual=x[i : i + 1]) for i in range(33)])
    for num_tokens in (2, 4, 17, 33):
        assert torch.equal(ops.moe(x[:num_tokens], **options, residual=x[:num_tokens]), alone[:num_tokens])
    torch.set_num_threads(2)
    assert torch.equal(ops.moe(x, **options, residual=x), alone)


@torch.inference_mode()
def test_replayed_routing_with_one_busy_expert_and_empty_ones() -> None:
    options = routed(64, 64, 6, 2, [Format.INT8_G32] * 3)
    x = torch.randn(12, 64)
    ids = torch.tensor([[4, 1]] * 12)
    replay = {"topk_ids": ids, "topk_weights": torch.rand(12, 2), "router_weight": None}
    assert close(ops.moe(x, **(options | replay)), expected_moe(x, options | replay), 2e-3)
    chosen, weights = ops.route(x, options["router_weight"], options["router_bias"], 2, 3.0)
    again = options | {"topk_ids": chosen, "topk_weights": weights}
    assert torch.equal(ops.moe(x, **again), ops.moe(x, **options))


@pytest.mark.parametrize(
    ("num_tokens", "hidden", "num_experts", "top_k"), [(1, 64, 8, 8), (5, 100, 17, 3), (40, 256, 64, 8)]
)
@torch.inference_mode()
def test_route(num_tokens: int, hidden: int, num_experts: int, top_k: int) -> None:
    x, weight, bias = (
        torch.randn(num_tokens, hidden),
        torch.randn(num_experts, hidden),
        torch.randn(num_experts),
    )
    for b in (bias, None):
        ids, weights = ops.route(x, weight, b, top_k, 3.0)
        expected_ids, expected_weights = reference.route(x, weight, b, top_k, 3.0)
        assert torch.equal(ids, expected_ids)
        assert torch.allclose(weights, expected_weights, rtol=1e-5, atol=1e-6)
        assert torch.allclose(weights.sum(-1), torch.full((num_tokens,), 3.0))


@torch.inference_mode()
def test_ties_go_to_the_lowest_expert() -> None:
    ids, _ = ops.route(torch.ones(2, 32), torch.zeros(9, 32), None, 3, 1.0)
    assert ids.tolist() == [[0, 1, 2]] * 2


def test_gradient_flows_to_input_and_router() -> None:
    options = routed(64, 64, 4, 2, [Format.BF16] * 3) | shared(64, 64, [Format.BF16] * 3)
    options["router_weight"].requires_grad_()
    x = torch.randn(3, 64, requires_grad=True)
    ops.moe(x, **options).sum().backward()
    grads = [x.grad, options["router_weight"].grad]
    x2, weight2 = x.detach().requires_grad_(), options["router_weight"].detach().requires_grad_()
    expected_moe(x2, options | {"router_weight": weight2}).sum().backward()
    for actual, expected in zip(grads, (x2.grad, weight2.grad), strict=True):
        assert actual is not None
        assert expected.abs().max() > 0
        assert torch.equal(actual, expected)


def test_wrong_arguments_are_refused() -> None:
    options = routed(64, 64, 4, 2, [Format.BF16] * 3)
    x = torch.randn(3, 64)
    with pytest.raises(RuntimeError, match="has 9 of 4 experts"):
        ops.moe(x, **(options | {"topk_ids": torch.full((3, 2), 9), "topk_weights": torch.rand(3, 2)}))
    with pytest.raises(RuntimeError, match="router_weight must be"):
        ops.moe(x, **(options | {"router_weight": torch.zeros(5, 64)}))
    with pytest.raises(RuntimeError, match="top_k"):
        ops.moe(x, **(options | {"top_k": 5}))
    with pytest.raises(RuntimeError, match="packed weight has"):
        ops.moe(x, **(options | {"expert_size": 128}))


def test_opcheck() -> None:
    options = DEFAULTS | routed(64, 64, 4, 2, [Format.INT8_G32] * 3) | shared(64, 64, [Format.INT8_G32] * 3)
    options["expert_formats"], options["shared_formats"] = [2] * 3, [2] * 3
    for x, extra in itertools.product(
        (torch.randn(3, 64), torch.randn(2, 64, requires_grad=True)), ({}, {"experts": []})
    ):
        opcheck(torch.ops.stepflash.moe, (x, *((options | extra)[name] for name in POSITIONAL)))
    opcheck(torch.ops.stepflash.route, (torch.randn(3, 64), options["router_weight"], None, 2, 1.0))
