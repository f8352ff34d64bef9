"""linear, norms and rotation: native against the PyTorch reference, and bit-identical whatever the batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stepflash.kernels import ops, reference
from stepflash.kernels.formats import Format, quantize, unpack

from .conftest import opcheck, random_packed

ALL = list(Format)
TOKENS = (1, 2, 3, 4, 5, 6, 7, 13, 17)


def close(actual: Tensor, expected: Tensor, bound: float) -> bool:
    """Largest difference, relative to the largest expected entry."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    return bool((actual.float() - expected.float()).abs().max() <= bound * expected.float().abs().max())


def k_of(fmt: Format, k: int) -> int:
    return k if fmt not in (Format.Q4_K, Format.Q6_K) else -(-k // 256) * 256


@pytest.mark.parametrize("fmt", ALL)
@pytest.mark.parametrize(("n", "k"), [(32, 64), (7, 300), (100, 320), (65, 1024)])
@torch.inference_mode()
def test_linear_matches_the_reference(fmt: Format, n: int, k: int) -> None:
    k = k_of(fmt, k)
    packed = random_packed(fmt, n, k)
    x = torch.randn(max(TOKENS), k).bfloat16()
    expected = reference.linear(x, [packed], [fmt], [n], dtype=torch.float32)
    for num_tokens in TOKENS:
        actual = ops.linear(x[:num_tokens], [packed], [fmt], [n], dtype=torch.float32)
        assert close(actual, expected[:num_tokens], 5e-6)


@pytest.mark.parametrize("fmt", ALL)
@torch.inference_mode()
def test_a_token_gets_the_same_bits_in_any_batch(fmt: Format) -> None:
    n, k = 96, 512
    packed, x = random_packed(fmt, n, k), torch.randn(40, k).bfloat16()
    alone = torch.cat(
        [ops.linear(x[i : i + 1], [packed], [fmt], [n], dtype=torch.float32) for i in range(40)]
    )
    for num_tokens in (2, 3, 5, 6, 9, 40):
        assert torch.equal(
            ops.linear(x[:num_tokens], [packed], [fmt], [n], dtype=torch.float32), alone[:num_tokens]
        )
    torch.set_num_threads(2)
    assert torch.equal(ops.linear(x, [packed], [fmt], [n], dtype=torch.float32), alone)


@pytest.mark.parametrize(
    ("name", "bound"), [("int8_g128", 0.012), ("int4_g32", 0.09), ("fp8", 0.035), ("bf16", 0.004)]
)
@torch.inference_mode()
def test_total_error_against_float_weights(name: str, bound: float) -> None:
    """Weight and activation rounding together, relative to the norm of the exact result."""
    weight, x = torch.randn(128, 1024), torch.randn(16, 1024)
    fmt = Format[name.upper()]
    actual = ops.linear(x, [quantize(weight, fmt)], [fmt], [128])
    exact = x.double() @ weight.double().T
    assert (actual - exact).norm() / exact.norm() < bound


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@torch.inference_mode()
def test_fused_prologue_and_epilogue(dtype: torch.dtype) -> None:
    formats, sizes, k = (
        [Format.INT4_G32, Format.BF16, Format.INT8_G64, Format.INT4_G32],
        [64, 24, 40, 33],
        384,
    )
    weights = [random_packed(f, n, k, i) for i, (f, n) in enumerate(zip(formats, sizes, strict=True))]
    x, residual = torch.randn(9, k).to(dtype), torch.randn(9, sum(sizes)).to(dtype)
    norm_weight, gate = torch.randn(k) * 0.1, torch.randn(9, 12).to(dtype)
    bound = 1e-2 if dtype == torch.bfloat16 else 2e-3  # a rounding of the normed input may fall the other way
    for options in (
        {"norm_weight": norm_weight, "eps": 1e-5},
        {"norm_weight": norm_weight.bfloat16(), "residual": residual},
        {"gate": gate, "residual": residual},
        {"dtype": torch.float32},
    ):
        actual = ops.linear(x, weights, formats, sizes, **options)
        assert close(actual, reference.linear(x, weights, formats, sizes, **options), bound), options


@torch.inference_mode()
def test_fused_norm_is_norm_then_linear() -> None:
    packed, x, w = (
        random_packed(Format.INT8_G32, 64, 256),
        torch.randn(5, 256).bfloat16(),
        torch.randn(256) * 0.1,
    )
    fused = ops.linear(x, [packed], [Format.INT8_G32], [64], norm_weight=w)
    assert torch.equal(fused, ops.linear(ops.rms_norm(x, w, 1e-5), [packed], [Format.INT8_G32], [64]))


@torch.inference_mode()
def test_strided_rows_and_no_tokens() -> None:
    packed, wide = random_packed(Format.INT8_G32, 64, 256), torch.randn(6, 1000).bfloat16()
    x = wide[:, 100:356]
    expected = ops.linear(x.contiguous(), [packed], [Format.INT8_G32], [64])
    assert torch.equal(ops.linear(x, [packed], [Format.INT8_G32], [64]), expected)
    assert ops.linear(x[:0], [packed], [Format.INT8_G32], [64]).shape == (0, 64)


@torch.inference_mode()
def test_extreme_activations() -> None:
    packed = random_packed(Format.INT4_G32, 32, 64)
    x = torch.zeros(3, 64).bfloat16()
    x[1] = 3e4
    x[2, 5] = -1e-30
    actual = ops.linear(x, [packed], [Format.INT4_G32], [32])
    assert torch.equal(actual[0], torch.zeros(32).bfloat16())
    assert close(actual, reference.linear(x, [packed], [Format.INT4_G32], [32]), 1e-2)


def test_wrong_arguments_are_refused() -> None:
    packed, x = random_packed(Format.INT8_G32, 64, 256), torch.randn(2, 256).bfloat16()
    with pytest.raises(RuntimeError, match="packed weight has"):
        ops.linear(x[:, :128], [packed], [Format.INT8_G32], [64])
    with pytest.raises(RuntimeError, match="unknown weight format"):
        ops.linear(x, [packed], [77], [64])
    with pytest.raises(RuntimeError, match="residual must be"):
        ops.linear(x, [packed], [Format.INT8_G32], [64], residual=x)
    with pytest.raises(RuntimeError, match="bfloat16 or float32"):
        ops.linear(x.half(), [packed], [Format.INT8_G32], [64])


@pytest.mark.parametrize("fmt", [Format.INT4_G32, Format.BF16])
def test_gradient_is_that_of_the_unpacked_weight(fmt: Format) -> None:
    packed = random_packed(fmt, 40, 64)
    x = torch.randn(3, 64, requires_grad=True)
    residual = torch.randn(3, 40, requires_grad=True)
    upstream = torch.randn(3, 40)
    ops.linear(x, [packed], [fmt], [40], residual=residual).backward(upstream)
    assert x.grad is not None
    assert torch.allclose(
        x.grad, upstream @ unpack(packed, fmt, 40, 64), atol=1e-2 if fmt == Format.BF16 else 1e-5
    )
    assert torch.equal(residual.grad, upstream)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("num_tokens", "size"), [(1, 64), (5, 100), (3, 1024), (70, 2048)])
@torch.inference_mode()
def test_rms_norm(dtype: torch.dtype, num_tokens: int, size: int) -> None:
    x, residual, weight = (
        torch.randn(num_tokens, size).to(dtype),
        torch.randn(num_tokens, size).to(dtype),
        torch.randn(size),
    )
    bound = 8e-3 if dtype == torch.bfloat16 else 1e-6
    assert close(ops.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5), bound)
    normed, total = ops.add_rms_norm(x, residual, weight, 1e-5)
    expected, expected_total = reference.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(total, expected_total)
    assert close(normed, expected, bound)
    assert ops.rms_norm(x.view(num_tokens, 2, -1), weight[: size // 2], 1e-5).shape == (
        num_tokens,
        2,
        size // 2,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(128, 128), (128, 64), (32, 16), (64, 48), (32, 0)])
@torch.inference_mode()
def test_qk_norm_rope(dtype: torch.dtype, head_dim: int, rotary_dim: int) -> None:
    num_tokens, num_heads, num_kv_heads = 11, 6, 2
    fused = torch.randn(num_tokens, (num_heads + 2 * num_kv_heads) * head_dim + 5).to(dtype)
    q = fused[:, : num_heads * head_dim].unflatten(1, (num_heads, head_dim))
    k = fused[:, num_heads * head_dim : (num_heads + num_kv_heads) * head_dim].unflatten(
        1, (num_kv_heads, head_dim)
    )
    angles = torch.rand(num_tokens, rotary_dim // 2) * 100
    args = (torch.randn(head_dim) * 0.1, torch.randn(head_dim) * 0.1, 1e-5, angles.cos(), angles.sin())
    for actual, expected in zip(
        ops.qk_norm_rope(q, k, *args), reference.qk_norm_rope(q, k, *args), strict=True
    ):
        assert close(actual, expected, 8e-3 if dtype == torch.bfloat16 else 2e-6)


@pytest.mark.parametrize("num_tokens", [1, 6])
@torch.inference_mode()
def test_qkv_gate_is_its_parts(num_tokens: int) -> None:
    heads, kv_heads, dim, hidden = 6, 2, 32, 96
    formats, sizes = (
        [Format.INT4_G32] * 3 + [Format.BF16],
        [heads * dim, kv_heads * dim, kv_heads * dim, heads],
    )
    weights = [random_packed(f, n, hidden, i) for i, (f, n) in enumerate(zip(formats, sizes, strict=True))]
    x, norm_weight = torch.randn(num_tokens, hidden).bfloat16(), torch.randn(hidden) * 0.1
    angles = torch.rand(num_tokens, dim // 4)
    rest = (torch.randn(dim) * 0.1, torch.randn(dim) * 0.1, 1e-5, angles.cos(), angles.sin())
    q, k, v, gate = ops.qkv_gate(x, norm_weight, weights, formats, heads, kv_heads, dim, *rest)
    fused = ops.linear(x, weights, formats, sizes, norm_weight=norm_weight)
    raw = [part.view(num_tokens, -1, dim) for part in torch.split(fused, sizes, 1)[:3]]
    expected_q, expected_k = ops.qk_norm_rope(raw[0], raw[1], *rest)
    assert torch.equal(q, expected_q)
    assert torch.equal(k, expected_k)
    assert torch.equal(v, raw[2])
    assert torch.equal(gate, fused[:, -heads:])
    expected = reference.qkv_gate(x, norm_weight, weights, formats, heads, kv_heads, dim, *rest)
    for actual, plain in zip((q, k, v, gate), expected, strict=True):
        assert close(actual, plain, 2e-2)


def test_gradients_of_norms_and_rotation() -> None:
    x = torch.randn(4, 2, 32, requires_grad=True)
    weight = torch.randn(32, requires_grad=True)
    angles = torch.rand(4, 8)
    q, k = ops.qk_norm_rope(x, x, weight, weight, 1e-5, angles.cos(), angles.sin())
    (q.square().sum() + k.sum() + ops.rms_norm(x, weight, 1e-5).sin().sum()).backward()
    x2, weight2 = x.detach().requires_grad_(), weight.detach().requires_grad_()
    normed = x2 * torch.rsqrt(x2.square().mean(-1, keepdim=True) + 1e-5) * (1 + weight2)
    a, b, rest = normed.split([8, 8, 16], -1)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    turned = torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)
    (turned.square().sum() + turned.sum() + normed.sin().sum()).backward()
    assert torch.allclose(x.grad, x2.grad, atol=1e-5)
    assert torch.allclose(weight.grad, weight2.grad, atol=1e-4)


def test_opcheck() -> None:
    op = torch.ops.stepflash
    packed, x = random_packed(Format.INT8_G32, 40, 64), torch.randn(3, 64)
    weight, angles = torch.randn(64), torch.rand(3, 16)
    heads = torch.randn(3, 2, 64)
    opcheck(op.linear, (x, [packed], [2], [40], weight, 1e-5, None, torch.randn(3, 40), None))
    opcheck(op.linear, (x.requires_grad_(), [packed, packed], [2, 2], [40, 40], None, 1e-5, None, None, None))
    opcheck(op.rms_norm, (x, weight, 1e-5))
    opcheck(op.add_rms_norm, (x, torch.randn(3, 64), weight, 1e-5))
    opcheck(op.qk_norm_rope, (heads, heads.clone(), weight, weight, 1e-5, angles.cos(), angles.sin()))
