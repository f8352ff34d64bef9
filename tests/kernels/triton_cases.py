"""Cases for the Triton kernels, run by test_cuda.py in a process of its own: in Triton's interpreter on CPU tensors
where there is no CUDA device. The kernels are called directly; `ops` stays what it is on this machine.
"""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

from stepflash.engine.attend import PagedAttention
from stepflash.engine.batch import build_batch
from stepflash.engine.core import EngineConfig, EngineCore
from stepflash.engine.cuda_forward import FusedForward, ModelForward
from stepflash.engine.network import ModelNetwork
from stepflash.kernels import cuda, cuda_layout, ops, reference
from stepflash.kernels.formats import Format, unpack
from stepflash.model.transformer import Step3p5ForCausalLM
from stepflash.weights.load import load_model
from stepflash.weights.quantized import PackedWeight
from tests.engine.conftest import MICRO, drive, next_spans, request

from .conftest import random_packed

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KERNEL_FORMATS = [f for f in Format if cuda_layout.is_supported(f)]


def widen(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def bf16_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.9's interpreter rounds float32 to bf16 towards zero, and its dot takes bf16's bits for integers.

    Its dot is also numpy's, where a row's order of summation depends on its place; float64 hides that.
    """
    convert, tl = interpreter._convert_float, interpreter.tl

    def round_to_nearest(x: np.ndarray, source: Any, target: Any, mode: Any) -> np.ndarray:
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(x, source, target, mode)
        wide = torch.from_numpy(np.array(x).view(np.float32))
        return wide.bfloat16().view(torch.int16).numpy().view(np.uint16)

    def dot_of_values(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        assert a.dtype.scalar == b.dtype.scalar, "a device multiplies operands of one type"
        x, y = (widen(v.data) if v.dtype.scalar == tl.bfloat16 else v.data for v in (a, b))
        product = x.astype(np.float64) @ y.astype(np.float64)
        return interpreter.TensorHandle(product.astype(np.float32) + d.data, d.dtype.scalar)

    monkeypatch.setattr(interpreter, "_convert_float", round_to_nearest)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot_of_values)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many chunks from few keys, and few rows: the interpreter is slow."""
    monkeypatch.setattr(cuda, "CHUNK", 32)
    monkeypatch.setattr(cuda, "KEY_TILE", 32)  # 16 of float32: the least a device takes
    monkeypatch.setattr(cuda, "ATTENTION_ROWS", 16)


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(DEVICE, dtype)


# ---- registration ------------------------------------------------------------------------------------------


def test_registers_for_cuda_alone() -> None:
    names = ["rms_norm", "add_rms_norm", "linear", "route", "moe", "qk_norm_rope", "qkv_gate", "best_tokens"]
    names += ["cache_write", "paged_attention", "cached_attention"]
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    if DEVICE == "cpu":
        assert not any(has(f"stepflash::{name}", "CUDA") for name in names)
    cuda.register()
    cuda.register()
    assert all(has(f"stepflash::{name}", "CUDA") for name in names)
    x, weight = torch.randn(2, 8), torch.randn(8)  # what the CPU runs stays as it was
    torch.testing.assert_close(ops.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))


# ---- norms and rotation ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [64, 80])
def test_norms(dtype: torch.dtype, size: int) -> None:
    x, residual, weight = randn(5, size, dtype=dtype), randn(5, size, dtype=dtype), randn(size)
    torch.testing.assert_close(cuda.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))
    out, total = cuda.add_rms_norm(x, residual, weight, 1e-5)
    expected, expected_total = reference.add_rms_norm(x, residual, weight, 1e-5)
    torch.testing.assert_close(total, expected_total, rtol=0, atol=0)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("half", [8, 16])  # half of the dimensions turn, or all
def test_qk_norm_rope_of_a_fused_projection(half: int) -> None:
    fused = randn(3, (6 + 2 + 2) * 32, dtype=torch.bfloat16)
    q, k = fused[:, : 6 * 32].view(3, 6, 32), fused[:, 6 * 32 : 8 * 32].view(3, 2, 32)
    angle = randn(3, half)
    args = (q, k, randn(32), randn(32), 1e-5, angle.cos(), angle.sin())
    for actual, expected in zip(cuda.qk_norm_rope(*args), reference.qk_norm_rope(*args), strict=True):
        torch.testing.assert_close(actual, expected)


# ---- packed weights ----------------------------------------------------------------------------------------


def tiled(packed: Tensor, fmt: int, n: int, k: int) -> Tensor:
    """As the kernels of a device take it."""
    return cuda_layout.from_panels(packed, Format(fmt), n, k).to(DEVICE)


def tiled_moe(case: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `moe` with its weights as the kernels of a device take them."""
    hidden, fmt = case["x"].shape[1], case["shared_formats"][0]
    shapes = [(case["shared_size"], hidden)] * 2 + [(hidden, case["shared_size"])]
    return case | {
        part: [tiled(w, fmt, *shape) for w, shape in zip(case[part], shapes, strict=False)]
        for part in ("experts", "shared")
    }


def exact_linear(x: Tensor, packed: Tensor, fmt: Format, n: int) -> Tensor:
    """bf16 activations times the values that the packed weight stands for, in float64."""
    return x.bfloat16().double() @ unpack(packed, fmt, n, x.shape[-1]).double().T


@pytest.mark.parametrize("fmt", KERNEL_FORMATS, ids=lambda f: f.name)
@pytest.mark.parametrize(("n", "k"), [(40, 72), (96, 272)])  # neither is a whole number of panels and blocks
def test_linear_in_every_format(fmt: Format, n: int, k: int) -> None:
    x, residual = randn(3, k), randn(3, n + 8)
    packed = [random_packed(fmt, rows, k, seed=rows).to(DEVICE) for rows in (n, 8)]
    tiles = [tiled(p, fmt, rows, k) for p, rows in zip(packed, (n, 8), strict=True)]
    out = cuda.linear(x, tiles, [fmt, fmt], [n, 8], residual=residual)
    exact = torch.cat([exact_linear(x, p, fmt, rows) for p, rows in zip(packed, (n, 8), strict=True)], 1)
    torch.testing.assert_close(out.double(), exact + residual, rtol=1e-5, atol=1e-5)


def test_linear_with_norm_gate_and_dtype() -> None:
    x, norm, gate = randn(3, 64, dtype=torch.bfloat16), randn(64), randn(3, 4, dtype=torch.bfloat16)
    packed = [random_packed(Format.BF16, 32, 64).to(DEVICE)]
    args = ([0], [32], norm, 1e-5, gate, None, torch.float32)
    actual = cuda.linear(x, [tiled(packed[0], 0, 32, 64)], *args)
    # One more rounding to bf16 may fall either way.
    torch.testing.assert_close(actual, reference.linear(x, packed, *args), rtol=2e-2, atol=2e-2)


def test_every_byte_code_of_fp8() -> None:
    from stepflash.kernels.formats import pack_fp8

    codes = torch.arange(256, dtype=torch.uint8)
    codes[codes & 0x7F == 0x7F] = 0  # NaN
    weight = codes.view(2, 128).repeat(16, 1).view(torch.float8_e4m3fn)
    packed = tiled(pack_fp8(weight, torch.full((1, 1), 0.5)), Format.FP8, 32, 128)
    out = cuda.linear(torch.eye(128, device=DEVICE), [packed], [Format.FP8], [32])
    torch.testing.assert_close(out.cpu(), weight.float().T * 0.5, rtol=0, atol=0)


def moe_case(fmt: Format, num_tokens: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, object]:
    hidden, size, experts = 64, 48, 6
    shapes = [(size, hidden), (size, hidden), (hidden, size)]
    routed = [
        torch.stack([random_packed(fmt, *shape, seed=7 * i + e) for e in range(experts)])
        for i, shape in enumerate(shapes)
    ]
    shared = [random_packed(fmt, *shape, seed=90 + i) for i, shape in enumerate(shapes)]
    return {
        "x": randn(num_tokens, hidden, dtype=dtype), "norm_weight": randn(hidden) * 2, "eps": 1e-5,
        "router_weight": randn(experts, hidden), "router_bias": randn(experts) * 0.1, "top_k": 2,
        "scaling_factor": 3.0, "experts": [w.to(DEVICE) for w in routed], "expert_formats": [int(fmt)] * 3,
        "num_experts": experts, "expert_size": size, "limit": 0.5, "shared": [w.to(DEVICE) for w in shared],
        "shared_formats": [int(fmt)] * 3, "shared_size": size, "shared_limit": 1.0,
        "residual": randn(num_tokens, hidden, dtype=dtype),
    }  # fmt: skip


# Integer formats: the reference rounds activations to int8 too, the kernel only to bf16.
@pytest.mark.parametrize(
    ("fmt", "tolerance"),
    [(Format.BF16, 1e-3), (Format.FP8, 1e-3), (Format.INT8_G32, 2e-2), (Format.INT4_G64, 2e-2)],
)
def test_moe(fmt: Format, tolerance: float) -> None:
    case = moe_case(fmt, 9, torch.float32)
    actual, expected = cuda.moe(**tiled_moe(case)), reference.moe(**case)  # type: ignore[arg-type]
    error = (actual - expected).norm() / (expected - case["residual"]).norm()  # type: ignore[operator]
    assert error < tolerance
    unclamped = reference.moe(**case | {"limit": None, "shared_limit": None})  # type: ignore[arg-type]
    assert (unclamped - expected).abs().max() > 0.1  # the limits do matter here
    actual = cuda.moe(**tiled_moe(case) | {"limit": None, "shared_limit": None})  # type: ignore[arg-type]
    assert (actual - unclamped).norm() / (unclamped - case["residual"]).norm() < tolerance  # type: ignore[operator]


def test_moe_of_replayed_routes_and_parts_alone() -> None:
    case = moe_case(Format.BF16, 5)
    ids = torch.tensor([[0, 5], [5, 0], [5, 5], [3, 0], [5, 3]], device=DEVICE)  # unused, and one twice
    case |= {"topk_ids": ids, "topk_weights": torch.rand(5, 2, device=DEVICE), "residual": None}
    for parts in ({}, {"shared": []}, {"experts": [], "norm_weight": None}):
        some = case | parts
        torch.testing.assert_close(
            cuda.moe(**tiled_moe(some)).float(),
            reference.moe(**some).float(),
            rtol=1e-2,
            atol=1e-2,  # type: ignore[arg-type]
        )


def test_a_token_gets_the_same_bits_in_any_batch() -> None:
    case = moe_case(Format.BF16, 40)
    together = cuda.moe(**tiled_moe(case))  # type: ignore[arg-type]
    for t in (0, 17, 39):
        alone = case | {name: case[name][t : t + 1] for name in ("x", "residual")}  # type: ignore[index]
        assert torch.equal(cuda.moe(**tiled_moe(alone))[0], together[t])  # type: ignore[arg-type]


def test_gguf_formats_take_the_reference() -> None:
    x, packed = randn(2, 256), [random_packed(Format.Q4_K, 32, 256).to(DEVICE)]
    args = (x, packed, [Format.Q4_K], [32])
    assert torch.equal(cuda.linear(*args), reference.linear(*args))


def test_qkv_gate() -> None:
    formats = [Format.BF16] * 4
    sizes = [4 * 16, 2 * 16, 2 * 16, 4]
    packed = [random_packed(Format.BF16, n, 64, seed=n).to(DEVICE) for n in sizes]
    angle = randn(3, 8)
    args = (
        randn(3, 64), randn(64), packed, formats, 4, 2, 16, randn(16), randn(16), 1e-5, angle.cos(), angle.sin(),
    )  # fmt: skip
    own = list(args)
    own[2] = [tiled(p, 0, n, 64) for p, n in zip(packed, sizes, strict=True)]
    for actual, expected in zip(cuda.qkv_gate(*own), reference.qkv_gate(*args), strict=True):
        assert actual.shape == expected.shape
        assert actual.is_contiguous()
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


# ---- attention ---------------------------------------------------------------------------------------------


class Cache:
    """Random keys and values of some sequences in blocks of random order; what is not written is NaN."""

    def __init__(self, lengths: list[int], dtype: torch.dtype, block_size: int = 8, heads: int = 2) -> None:
        needed = [math.ceil(n / block_size) for n in lengths]
        shape = (sum(needed) + 1, block_size, heads, 32)
        stale = 77 if dtype == torch.int8 else math.nan
        self.keys, self.values = (torch.full(shape, stale, dtype=dtype, device=DEVICE) for _ in range(2))
        self.scales: list[Tensor | None] = [None, None]
        if dtype == torch.int8:
            self.scales = [torch.full(shape[:3], math.nan, device=DEVICE) for _ in range(2)]
        order = torch.randperm(shape[0]).tolist()
        self.table = torch.full((len(lengths), max(needed) + 3), -7, dtype=torch.int32)
        for s, (length, count) in enumerate(zip(lengths, needed, strict=True)):
            self.table[s, :count] = torch.tensor([order.pop() for _ in range(count)])
            place = torch.arange(length)
            slots = (self.table[s].long()[place // block_size] * block_size + place % block_size).to(DEVICE)
            k, v = randn(length, heads, 32), randn(length, heads, 32)
            reference.cache_write(k, v, self.keys, self.values, slots, *self.scales)
        self.table = self.table.to(DEVICE)


def attend(
    cache: Cache, q: Tensor, lengths: list[int], counts: list[int], gate: Tensor | None = None,
    window: int = 0, first_key: int = 0, plain: bool = False,
) -> Tensor:  # fmt: skip
    lens = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    bounds = torch.tensor([0, *torch.tensor(counts).cumsum(0)], dtype=torch.int32, device=DEVICE)
    run = reference.paged_attention if plain else cuda.paged_attention
    return run(
        q, cache.keys, cache.values, cache.table, lens, bounds, window, q.shape[-1] ** -0.5, first_key, gate,
        *cache.scales,
    )  # fmt: skip


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("window", [0, 20])
@pytest.mark.parametrize("counts", [[1, 1, 1], [4, 0, 2], [41, 1, 20]], ids=["decode", "verify", "prefill"])
def test_attention(dtype: torch.dtype, window: int, counts: list[int]) -> None:
    lengths = [41, 5, 60]
    cache = Cache(lengths, dtype)
    q = randn(sum(counts), 6, 32, dtype=torch.float32 if dtype == torch.float32 else torch.bfloat16)
    gate = randn(sum(counts), 6) if window else None
    actual = attend(cache, q, lengths, counts, gate, window)
    expected = attend(cache, q, lengths, counts, gate, window, plain=True)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8], ids=str)
@pytest.mark.parametrize("window", [0, 20])
def test_attention_over_what_fills_up_a_captured_pass(dtype: torch.dtype, window: int) -> None:
    """As engine/cuda_graphs.py does: the first token again as a sequence of its own, then sequences without tokens,
    and the tables of both groups side by side. It changes no bit of the others."""
    lengths, rest = [41, 5, 60], [0] * 5
    cache = Cache(lengths, dtype)
    q = randn(9, 8, 32)
    q[8] = q[0]
    tables = torch.full((9, 2, cache.table.shape[1]), -9, dtype=torch.int32, device=DEVICE)
    tables[:3, 0], tables[3, 0] = cache.table, cache.table[0]
    lens = torch.tensor([*lengths, 41 - 4 + 1, *rest], dtype=torch.int32, device=DEVICE)
    bounds = torch.tensor([0, 4, 5, 8, 9, *(n + 9 for n in rest)], dtype=torch.int32, device=DEVICE)
    options = (window, 0.2, 0, None, *cache.scales)
    filled = cuda.paged_attention(q, cache.keys, cache.values, tables[:, 0], lens, bounds, *options)
    alone = cuda.paged_attention(q[:8], cache.keys, cache.values, cache.table, lens[:3], bounds[:4], *options)
    assert torch.equal(filled[:8], alone)
    assert torch.equal(filled[8], filled[0])


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("window", [0, 20])
def test_keys_before_the_first_are_never_seen(window: int) -> None:
    lengths, counts = [50, 6], [50, 6]
    cache, q = Cache(lengths, torch.float32), randn(56, 6, 32)
    actual = attend(cache, q, lengths, counts, window=window, first_key=3)
    torch.testing.assert_close(
        actual, attend(cache, q, lengths, counts, window=window, first_key=3, plain=True)
    )
    assert not actual[:3].any()


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [0, 40])
def test_a_query_gets_the_same_bits_split_or_not_and_in_any_batch(dtype: torch.dtype, window: int) -> None:
    """Alone its keys are split over programs, in a prefill one program merges the chunks."""
    lengths = [90, 33]
    cache, q = Cache(lengths, dtype), randn(123, 4, 32, dtype=dtype)
    together = attend(cache, q, lengths, lengths, window=window)
    for position in (0, 31, 32, 63, 89):
        alone = attend(cache, q[position : position + 1], [position + 1], [1], window=window)
        assert torch.equal(alone[0], together[position])
    pair = attend(cache, q[[88, 89, 122]], lengths, [2, 1], window=window)
    assert torch.equal(pair, together[[88, 89, 122]])


@pytest.mark.parametrize("heads", [16, 24])  # groups of 8 and of 12, as in full and sliding layers
def test_attention_with_the_tiles_of_a_device(heads: int) -> None:
    lengths, counts = [1100, 40], [4, 1]
    cache, q = Cache(lengths, torch.bfloat16, block_size=16), randn(5, heads, 32, dtype=torch.bfloat16)
    for window in (0, 512):
        actual = attend(cache, q, lengths, counts, window=window)
        expected = attend(cache, q, lengths, counts, window=window, plain=True)
        torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_cache_write(dtype: torch.dtype) -> None:
    fused = randn(5, 3 * 2 * 24, dtype=torch.bfloat16)
    k, v = fused[:, 48:96].view(5, 2, 24), fused[:, 96:].view(5, 2, 24)
    slots = torch.tensor([9, -1, 0, 15, 4], device=DEVICE)
    caches = []
    for write in (cuda.cache_write, reference.cache_write):
        tensors = [torch.zeros(2, 8, 2, 24, dtype=dtype, device=DEVICE) for _ in range(2)]
        if dtype == torch.int8:
            tensors += [torch.zeros(2, 8, 2, device=DEVICE) for _ in range(2)]
        write(k, v, *tensors[:2], slots, *tensors[2:])
        caches.append(tensors)
    for actual, expected in zip(*caches, strict=True):
        assert actual.any()
        assert torch.equal(actual, expected)


@pytest.mark.usefixtures("small_tiles")
def test_cached_attention_writes_first() -> None:
    cache, q = Cache([20], torch.float32), randn(2, 4, 32)
    k, v = randn(2, 2, 32), randn(2, 2, 32)
    place = torch.tensor([18, 19])
    slots = cache.table[0].cpu().long()[place // 8] * 8 + place % 8
    lens, bounds = (torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in ([20], [0, 2]))
    copies = cache.keys.clone(), cache.values.clone()
    rest = (slots.to(DEVICE), cache.table, lens, bounds, 0, 0.2)
    actual = cuda.cached_attention(q, k, v, cache.keys, cache.values, *rest)
    torch.testing.assert_close(actual, reference.cached_attention(q, k, v, *copies, *rest))
    assert torch.equal(cache.keys.nan_to_num(7), copies[0].nan_to_num(7))


def test_best_tokens() -> None:
    logits = randn(6, 5000)
    logits[1, [700, 4100]] = 9.0  # the lower of two
    logits[2, 4999] = 99.0  # beyond the limit
    logits[3, 77] = math.nan
    logits[4] = -math.inf
    ids, values = cuda.best_tokens(logits, 4500)
    expected_ids, expected = reference.best_tokens(logits, 4500)
    assert ids.tolist() == expected_ids.tolist()
    assert ids[1] == 700
    assert not values[3].isfinite()
    rows = [0, 1, 2, 4, 5]
    assert values[rows].tolist() == expected[rows].tolist()


# ---- the engine --------------------------------------------------------------------------------------------


def rearranged(model: torch.nn.Module) -> dict[int, Tensor]:
    """Gives every packed weight of a model to the kernels of a device; what the references take, by id of those."""
    model.to(DEVICE)
    panels = {}
    for weight in [module for module in model.modules() if isinstance(module, PackedWeight)]:
        n, k = weight.shape[-2:]
        if not weight.is_tiled:
            weight.packed = cuda_layout.from_panels(weight.packed, weight.fmt, n, k)
        panels[id(weight.packed)] = cuda_layout.to_panels(weight.packed, weight.fmt, n, k)
    for module in model.modules():
        if hasattr(module, "_gather"):
            module._gather()
    return panels


def core_of_ops(model: Step3p5ForCausalLM, config: EngineConfig) -> EngineCore:
    """One that runs the model's modules, launch by launch, wherever it is."""
    core = EngineCore(model, config)
    core.runner.network = network = ModelNetwork(model, core.cache)
    network._forward = ModelForward(model, core.cache)
    return core


@pytest.mark.slow
def test_what_the_engine_asks_of_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two requests in one batch, in chunks, with drafts; every call is made twice, caches and all."""
    calls = dict.fromkeys(("rms_norm", "linear", "moe", "qkv_gate", "cached_attention"), 0)
    model = load_model(MICRO, "float32", "cpu", progress=False, quantization="bf16")
    panels: dict[int, Tensor] = {}

    def compared(name: str) -> Any:
        plain, kernel = getattr(reference, name), getattr(cuda, name)

        def run(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            own = list(args)
            if name == "cached_attention":
                own[3:5] = args[3].clone(), args[4].clone()
            stored = [
                panels.get(id(x), x) if not isinstance(x, list) else [panels.get(id(y), y) for y in x]
                for x in args
            ]
            named = {
                k: [panels.get(id(y), y) for y in x] if isinstance(x, list) else x for k, x in kwargs.items()
            }
            actual, expected = kernel(*own, **kwargs), plain(*stored, **named)
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
            if name == "cached_attention":
                torch.testing.assert_close(own[3:5], list(args[3:5]), rtol=0, atol=0)
            return expected

        return run

    for name in calls:
        monkeypatch.setattr(ops, name, compared(name))
    panels |= rearranged(model)  # modules take hold of the ops as they now are
    config = EngineConfig(
        max_num_seqs=2, max_num_batched_tokens=16, max_model_len=64, kv_cache_bytes=1 << 20, block_size=8
    )
    requests = [request("long", list(range(3, 23)), max_tokens=3), request("short", [5, 9], max_tokens=2)]
    drive(core_of_ops(model, config), *requests)
    assert min(calls.values()) > 0


@pytest.mark.parametrize(
    ("quantization", "kv_dtype"), [("bf16", torch.bfloat16), ("int8", torch.int8), ("int4", torch.float32)]
)
def test_layers_in_few_launches(
    monkeypatch: pytest.MonkeyPatch, quantization: str, kv_dtype: torch.dtype
) -> None:
    """Layers one by one against the separate ops, chunks and decoding; a sequence alone gets the same bits."""
    for name in ("linear", "moe", "qkv_gate", "cached_attention"):
        monkeypatch.setattr(ops, name, getattr(cuda, name))
    model = load_model(MICRO, "float32", "cpu", progress=False, quantization=quantization)
    rearranged(model)
    options = {"max_num_seqs": 2, "max_model_len": 64, "block_size": 7, "kv_dtype": kv_dtype}
    cores = [EngineCore(model, EngineConfig(**options)) for _ in range(3)]  # type: ignore[arg-type]
    sequences = [[core.cache.open() for _ in range(2)] for core in cores]
    done = [[0, 0] for _ in cores]
    for lengths in ((9, 2), (1, 3)):
        spans = [
            next_spans(core, seqs, so_far, lengths, random.Random(1))
            for core, seqs, so_far in zip(cores, sequences, done, strict=True)
        ]
        for layer in [layer for i, layer in enumerate(model.model.layers) if i in (0, 3, 4)]:
            x = randn(sum(lengths), model.config.hidden_size)
            batch = build_batch(cores[0].cache, spans[0])
            with torch.inference_mode():
                turn = model.rotation(layer.rope, batch.positions)
                expected = layer(x, turn, PagedAttention(cores[0].cache, batch))
                together, *alone = (
                    FusedForward(model, core.cache).layers([layer], rows, build_batch(core.cache, some))
                    for core, rows, some in (
                        (cores[1], x, spans[1]),
                        (cores[2], x[: lengths[0]], spans[2][:1]),
                        (cores[2], x[lengths[0] :], spans[2][1:]),
                    )
                )
            assert torch.equal(together, torch.cat(alone))
            # Of tokens: where two experts nearly tie, another rounding of x may choose the other one.
            errors = (together - expected).norm(dim=1) / (expected - x).norm(dim=1)
            assert errors.median() < 1e-2


@pytest.mark.slow
@pytest.mark.parametrize(("quantization", "close"), [(None, 1e-3), ("bf16", 1.0)])
def test_tokens_differ_only_where_logits_nearly_tie(
    monkeypatch: pytest.MonkeyPatch, quantization: str | None, close: float
) -> None:
    """A whole run on the kernels, one on the references. In float32 logits differ by 3e-5 where the best two are
    0.02 apart and more, so the tokens are the same. Packed weights take activations that are rounded to bf16: mostly
    1e-6, but where a rounding flips 0.03 to 0.6, beside gaps of 0.08; then a token may be the other of the two."""
    config = EngineConfig(
        max_num_seqs=2, max_num_batched_tokens=16, max_model_len=64, kv_cache_bytes=1 << 20, block_size=8
    )
    asked = [
        request("0", list(range(3, 23)), max_tokens=5, seed=0, draft_depth=0),
        request("1", [5, 9], max_tokens=5, seed=1, draft_depth=0),
    ]
    seen: list[dict[tuple[int, int], Tensor]] = []
    tokens = []
    for is_kernels in (False, True):
        for name in (
            "rms_norm", "add_rms_norm", "linear", "moe", "qk_norm_rope", "qkv_gate", "cached_attention",
        ):  # fmt: skip
            monkeypatch.setattr(ops, name, getattr(cuda if is_kernels else reference, name))
        model = load_model(MICRO, "float32", "cpu", progress=False, quantization=quantization)
        if is_kernels:
            rearranged(model)
        core = core_of_ops(model, config)
        choose, logits_of = core.sampler.choose, {}

        def record(
            logits: Tensor, rows: Any, *rest: Any, choose: Any = choose, logits_of: Any = logits_of
        ) -> Any:
            logits_of.update(
                {(r.state.seed, r.position): x.cpu().clone() for r, x in zip(rows, logits, strict=True)}
            )
            return choose(logits, rows, *rest)

        monkeypatch.setattr(core.sampler, "choose", record)
        tokens.append({name: done.token_ids for name, done in drive(core, *asked).items()})
        seen.append(logits_of)
    for number, one in enumerate(asked):
        plain, kernels = (run[one.request_id] for run in tokens)
        for i, (expected, found) in enumerate(zip(plain, kernels, strict=True)):
            a, b = (logits[number, len(one.prompt_token_ids) + i] for logits in seen)
            difference = float((a - b).abs().max())
            assert difference < close
            if expected != found:
                assert quantization is not None
                assert float(a[expected] - a[found]) <= 2 * difference
                break  # from here on they read different texts
