"""A model whose weights are packed for the native kernels: five ops a layer, any format per weight.

`quantize_model` swaps the layers of a loaded model one at a time for versions of the same interface that hold
packed bytes and call the fused ops, so that at most one layer exists twice. The router and the norms stay
float32, the embedding is a lookup and stays as it is, and `protect` keeps chosen weights in a better format.
The result is for inference; a quantised layer gives a token the same bits whatever else is in the batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from stepflash.errors import ConfigError
from stepflash.kernels import cuda_layout, ops
from stepflash.kernels.formats import Format, packed_bytes, parse_format
from stepflash.model.attention import Attend, Attention
from stepflash.model.block import DecoderLayer
from stepflash.model.layers import MLP, RMSNorm
from stepflash.model.moe import MoE, Route
from stepflash.model.mtp import MTPLayer
from stepflash.model.rope import Rotation
from stepflash.model.transformer import Step3p5ForCausalLM

# The head gates are tiny and decide about whole heads.
DEFAULT_PROTECT: Mapping[str, str] = {"*.g_proj.weight": "bf16"}


class PackedWeight(nn.Module):
    """One weight [out_features, in_features], or [num_experts, ...] stacked, as packed bytes."""

    packed: Tensor

    def __init__(self, weight: Tensor, fmt: Format) -> None:
        matrices = weight if weight.dim() == 3 else weight.unsqueeze(0)
        self._fill(tuple(weight.shape), fmt, (ops.quantize(matrix, fmt) for matrix in matrices))

    @classmethod
    def from_pieces(cls, shape: tuple[int, ...], fmt: Format, pieces: Iterable[Tensor]) -> PackedWeight:
        """From the packed bytes of all matrices in order, uint8 in pieces of any size."""
        weight = cls.__new__(cls)
        weight._fill(shape, fmt, pieces)
        return weight

    def _fill(self, shape: tuple[int, ...], fmt: Format, pieces: Iterable[Tensor]) -> None:
        super().__init__()
        self.fmt = fmt
        self.shape = shape
        self.is_tiled = False
        size = (*shape[:-2], packed_bytes(fmt, *shape[-2:]))
        packed = ops.advise_huge_pages(torch.empty(size, dtype=torch.uint8))
        flat, done = packed.view(-1), 0
        for piece in pieces:
            flat[done : done + piece.numel()].copy_(piece.view(-1))
            done += piece.numel()
        assert done == flat.numel(), f"{done} packed bytes for {size}"
        self.register_buffer("packed", packed)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Moves; on a CUDA device the bytes lie as the kernels there want them (`kernels/cuda_layout.py`)."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.packed.device.type == "meta" or self.is_tiled == ops.wants_tiles(self.packed.device):
            return self
        n, k = self.shape[-2:]
        arrange = cuda_layout.to_panels if self.is_tiled else cuda_layout.from_panels
        self.packed = arrange(self.packed, self.fmt, n, k)
        self.is_tiled = not self.is_tiled
        return self

    @property
    def out_features(self) -> int:
        return int(self.shape[-2])

    @property
    def num_bytes(self) -> int:
        return self.packed.numel()


class Packer:
    """Turns named float weights into packed ones by the plan of one `quantize_model` call."""

    def __init__(self, default: str, protect: Mapping[str, str]) -> None:
        self.default = default
        self.protect = protect
        self.unused = set(protect)

    def format_name(self, name: str) -> str:
        for pattern, format_name in self.protect.items():
            if fnmatchcase(name, pattern):
                self.unused.discard(pattern)
                return format_name
        return self.default

    def refuse_unused(self) -> None:
        """Raise ConfigError if a pattern matched nothing: most likely a typing mistake."""
        if self.unused:
            raise ConfigError(f"protect has patterns that match no weight: {', '.join(sorted(self.unused))}")

    def pack(self, name: str, weight: Tensor) -> PackedWeight:
        try:
            fmt = parse_format(self.format_name(name), weight.shape[-1])
            return PackedWeight(weight.detach(), fmt)
        except ValueError as error:
            raise ConfigError(f"cannot quantise {name}: {error}") from error

    def swiglu(self, prefix: str, gate: Tensor, up: Tensor, down: Tensor) -> nn.ModuleList:
        """Gate, up, down of an MLP, a shared expert or stacked experts."""
        names = [f"{prefix}.{part}_proj.weight" for part in ("gate", "up", "down")]
        return nn.ModuleList(self.pack(name, w) for name, w in zip(names, (gate, up, down), strict=True))


def _packed(weights: Iterable[nn.Module]) -> tuple[list[Tensor], list[int], list[int]]:
    """Bytes, format codes and rows, as the ops take them."""
    found = [w for w in weights if isinstance(w, PackedWeight)]
    return [w.packed for w in found], [int(w.fmt) for w in found], [w.out_features for w in found]


class _Gathered(nn.Module):
    """Holds its weights as the ops take them, too: looking up parameters costs more than the calls' bookkeeping."""

    def _gather(self) -> None:
        raise NotImplementedError

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._gather()  # what `to` moved or replaced
        return self


class QuantLinear(_Gathered):
    """x [num_tokens, in_features] -> [num_tokens, out_features] in `dtype` (default: x's)."""

    def __init__(self, weight: PackedWeight, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.weight = weight
        self.dtype = dtype
        self._gather()

    def _gather(self) -> None:
        self._weight = _packed([self.weight])

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, *self._weight, dtype=self.dtype)


class FusedNorm(nn.Module):
    """RMSNorm as one op; shares the weight of the norm it replaces."""

    def __init__(self, norm: RMSNorm) -> None:
        super().__init__()
        self.eps = norm.eps
        self.weight = norm.weight

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)


class QuantAttention(_Gathered):
    """Norm, projections, head norms, rotation, attention, gate, output projection, residual."""

    def __init__(self, attention: Attention, norm: RMSNorm, prefix: str, packer: Packer) -> None:
        super().__init__()
        self.layer_idx = attention.layer_idx
        self.num_heads, self.num_kv_heads = attention.num_heads, attention.num_kv_heads
        self.head_dim, self.eps = attention.head_dim, norm.eps
        self.norm_weight, self.q_norm, self.k_norm = (
            norm.weight,
            attention.q_norm.weight,
            attention.k_norm.weight,
        )
        projections = (attention.q_proj, attention.k_proj, attention.v_proj, attention.g_proj)
        self.projections = nn.ModuleList(
            packer.pack(f"{prefix}.{name}_proj.weight", p.weight)
            for name, p in zip("qkvg", projections, strict=True)
        )
        self.o_proj = packer.pack(f"{prefix}.o_proj.weight", attention.o_proj.weight)
        self._gather()

    def _gather(self) -> None:
        self._output = _packed([self.o_proj])
        heads = (self.num_heads, self.num_kv_heads, self.head_dim)
        fused = _packed(self.projections)[:2]
        self._before = (self.norm_weight, *fused, *heads, self.q_norm, self.k_norm, self.eps)

    def fused_arguments(self) -> tuple[Any, ...]:
        """What comes before the rotation among the arguments of `cuda_layer.attention`."""
        weights, formats, _ = _packed(self.projections)
        return weights, formats, self.num_heads, self.head_dim, self.q_norm, self.k_norm, self.eps

    def forward(self, x: Tensor, cos_sin: Rotation, attend: Attend) -> Tensor:
        """x [num_tokens, hidden_size] -> x + attention(norm(x))."""
        cos, sin = cos_sin[0].squeeze(1), cos_sin[1].squeeze(1)
        q, k, v, gate = ops.qkv_gate(x, *self._before, cos, sin)
        attn_output = attend(self.layer_idx, q, k, v).flatten(1)
        return ops.linear(attn_output, *self._output, gate=gate, residual=x)


class QuantExperts(_Gathered):
    """Norm, router, routed experts, shared expert (or dense MLP), residual: one op."""

    def __init__(
        self, moe: MoE | None, mlp: MLP, mlp_name: str, norm: RMSNorm, prefix: str, packer: Packer
    ) -> None:
        super().__init__()
        self.norm_weight, self.eps = norm.weight, norm.eps
        self.shared = packer.swiglu(
            f"{prefix}.{mlp_name}", mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight
        )
        self.shared_limit = mlp.limit
        self.experts = nn.ModuleList()
        self.router_weight = self.router_bias = None
        self.layer_idx, self.top_k, self.scaling_factor, self.limit = 0, 0, 1.0, None
        if moe is not None:
            self.layer_idx, self.top_k = moe.layer_idx, moe.top_k
            self.scaling_factor, self.limit = moe.scaling_factor, moe.limit
            self.router_weight = nn.Parameter(
                moe.gate.weight.detach().float().contiguous(), requires_grad=False
            )
            self.router_bias = nn.Parameter(
                moe.router_bias.detach().float().contiguous(), requires_grad=False
            )
            self.experts = packer.swiglu(
                f"{prefix}.moe", moe.gate_proj.weight, moe.up_proj.weight, moe.down_proj.weight
            )
        self.num_experts = moe.gate.weight.shape[0] if moe is not None else 0
        self._gather()

    def _gather(self) -> None:
        self._weights = self._arguments()
        self._run: Any = partial(ops.moe, norm_weight=self.norm_weight, eps=self.eps, **self._weights)

    def _arguments(self) -> dict[str, Any]:
        """The weights as arguments of `ops.moe`, in its order."""
        shared, shared_formats, shared_sizes = _packed(self.shared)
        experts, expert_formats, expert_sizes = _packed(self.experts)
        return {
            "router_weight": self.router_weight,
            "router_bias": self.router_bias,
            "top_k": self.top_k,
            "scaling_factor": self.scaling_factor,
            "experts": experts,
            "expert_formats": expert_formats,
            "num_experts": self.num_experts,
            "expert_size": expert_sizes[0] if expert_sizes else 0,
            "limit": self.limit,
            "shared": shared,
            "shared_formats": shared_formats,
            "shared_size": shared_sizes[0],
            "shared_limit": self.shared_limit,
        }

    def native_arguments(self) -> tuple[Any, ...]:
        """The weights as `set_feed_forward` of the native network and `cuda_layer.feed_forward` take them."""
        return tuple(self._weights.values())

    def forward(self, x: Tensor, route: Route | None = None) -> Tensor:
        """x [num_tokens, hidden_size] -> x + feed_forward(norm(x))."""
        topk_ids, topk_weights = self._replayed(x, route) if route is not None else (None, None)
        out: Tensor = self._run(x, topk_ids=topk_ids, topk_weights=topk_weights, residual=x)
        return out

    def _replayed(self, x: Tensor, route: Route) -> tuple[Tensor | None, Tensor | None]:
        """The routing that `route` wants, as in `stepflash.model.moe`."""
        if self.router_weight is None or self.router_bias is None:
            return None, None
        normed = ops.rms_norm(x, self.norm_weight, self.eps)
        scores = torch.sigmoid(normed.float() @ self.router_weight.T)
        own, _ = ops.route(normed, self.router_weight, self.router_bias, self.top_k, self.scaling_factor)
        topk_ids = route(self.layer_idx, scores, own)
        chosen = scores.gather(-1, topk_ids)
        weights = chosen / (chosen.sum(-1, keepdim=True) + 1e-20) * self.scaling_factor
        return topk_ids.contiguous(), weights.contiguous()


def _init_quantized(target: DecoderLayer, source: DecoderLayer, prefix: str, packer: Packer) -> None:
    nn.Module.__init__(target)
    target.rope = source.rope
    target.attention = QuantAttention(source.self_attn, source.input_layernorm, f"{prefix}.self_attn", packer)
    mlp, name = (source.mlp, "mlp") if source.moe is None else (source.share_expert, "share_expert")
    target.feed_forward = QuantExperts(source.moe, mlp, name, source.post_attention_layernorm, prefix, packer)


class QuantDecoderLayer(DecoderLayer):
    """A decoder layer over packed weights."""

    attention: QuantAttention
    feed_forward: QuantExperts

    def __init__(self, source: DecoderLayer, prefix: str, packer: Packer) -> None:
        _init_quantized(self, source, prefix, packer)

    def forward(self, x: Tensor, cos_sin: Rotation, attend: Attend, route: Route | None = None) -> Tensor:
        return self.feed_forward.forward(self.attention.forward(x, cos_sin, attend), route)


class QuantMTPLayer(MTPLayer):
    """A prediction module over packed weights."""

    attention: QuantAttention
    feed_forward: QuantExperts

    def __init__(self, source: MTPLayer, prefix: str, packer: Packer) -> None:
        _init_quantized(self, source, prefix, packer)
        self.enorm, self.hnorm = FusedNorm(source.enorm), FusedNorm(source.hnorm)  # type: ignore[assignment]
        self.eh_proj = QuantLinear(packer.pack(f"{prefix}.eh_proj.weight", source.eh_proj.weight))  # type: ignore[assignment]
        head = source.transformer["shared_head"]
        self.head_norm = FusedNorm(head.norm)  # type: ignore[arg-type]
        name = f"{prefix}.transformer.shared_head.output.weight"
        self.head = QuantLinear(packer.pack(name, head.output.weight), torch.float32)  # type: ignore[union-attr, arg-type]

    def forward(self, x: Tensor, cos_sin: Rotation, attend: Attend, route: Route | None = None) -> Tensor:
        return self.feed_forward.forward(self.attention.forward(x, cos_sin, attend), route)

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        return self.head.forward(self.head_norm.forward(hidden_states))


@torch.no_grad()
def quantize_model(
    model: Step3p5ForCausalLM, format_name: str, protect: Mapping[str, str] | None = None
) -> Step3p5ForCausalLM:
    """Packs the weights of a loaded bf16 or float32 model in place, layer by layer, and returns it.

    Args:
        format_name: `bf16`, `fp8`, `int8`, `int4`, `int8_g64`, `int4_g128`, ...; see `formats.parse_format`.
        protect: shell patterns over released tensor names to formats, the first match wins, for example
            {"model.layers.[0-4].*": "int8"}; None is DEFAULT_PROTECT.
    Raises:
        ConfigError: an unknown format, a pattern that matches nothing, or a weight that cannot be packed.
    """
    packer = Packer(format_name, DEFAULT_PROTECT if protect is None else protect)
    pack_network(model, packer)
    if protect is not None:
        packer.refuse_unused()
    return model


def pack_network(model: Step3p5ForCausalLM, packer: Packer) -> None:
    """Swap layers and heads one by one for versions over the weights that `packer` makes."""
    layers = model.model.layers
    for index, layer in enumerate(layers):
        prefix = f"model.layers.{index}"
        quantized = QuantMTPLayer if isinstance(layer, MTPLayer) else QuantDecoderLayer
        layers[index] = quantized(layer, prefix, packer).eval()  # type: ignore[arg-type]
    head = packer.pack("lm_head.weight", model.lm_head.weight)
    model.lm_head = QuantLinear(head, torch.float32)  # type: ignore[assignment]
    model.model.norm = FusedNorm(model.model.norm)  # type: ignore[assignment]
    model.requires_grad_(False)


def packed_weight_bytes(model: nn.Module) -> int:
    """Bytes of all packed weights."""
    return sum(module.num_bytes for module in model.modules() if isinstance(module, PackedWeight))
