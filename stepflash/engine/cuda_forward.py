"""The trunk and the prediction modules over a paged cache: by the model's own modules, or on a CUDA device in fewer
launches (`kernels/cuda_layer.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from stepflash.engine.attend import PagedAttention
from stepflash.engine.batch import TokenBatch
from stepflash.engine.kv_cache import KVCache
from stepflash.kernels import ops
from stepflash.kernels.cuda_layout import is_supported
from stepflash.model.rope import Rotation
from stepflash.model.transformer import Step3p5ForCausalLM
from stepflash.weights.quantized import PackedWeight, QuantDecoderLayer, QuantMTPLayer


class Forward(Protocol):
    """Hidden states [num_tokens, hidden_size] before the final norm."""

    def trunk(self, batch: TokenBatch) -> Tensor: ...

    def module(self, module: int, token_ids: Tensor, previous: Tensor, batch: TokenBatch) -> Tensor:
        """MTP module 1, 2 or 3; `previous` [num_tokens, hidden_size] is what the one before it left."""
        ...


class ModelForward:
    """The model's own modules."""

    def __init__(self, model: Step3p5ForCausalLM, cache: KVCache) -> None:
        self._model, self._cache = model, cache

    def trunk(self, batch: TokenBatch) -> Tensor:
        attend = PagedAttention(self._cache, batch)
        return self._model.forward(batch.input_ids, batch.positions, attend)

    def module(self, module: int, token_ids: Tensor, previous: Tensor, batch: TokenBatch) -> Tensor:
        attend = PagedAttention(self._cache, batch)
        return self._model.mtp_forward(module, token_ids, previous, batch.positions, attend)


class FusedForward:
    """Packed layers on a CUDA device."""

    def __init__(self, model: Step3p5ForCausalLM, cache: KVCache) -> None:
        self._model, self._cache = model, cache

    def trunk(self, batch: TokenBatch) -> Tensor:
        model = self._model
        hidden_states: Tensor = model.model.embed_tokens(batch.input_ids)
        return self.layers(model.trunk_layers(), hidden_states, batch)  # type: ignore[arg-type]

    def module(self, module: int, token_ids: Tensor, previous: Tensor, batch: TokenBatch) -> Tensor:
        model = self._model
        layer = model.mtp_layer(module)
        assert isinstance(layer, QuantMTPLayer)
        joined = layer.join(model.model.embed_tokens(token_ids), previous)
        return self.layers([layer], joined, batch)

    def layers(
        self, layers: Sequence[QuantDecoderLayer | QuantMTPLayer], x: Tensor, batch: TokenBatch
    ) -> Tensor:
        """x [num_tokens, hidden_size] through these layers."""
        from stepflash.kernels import cuda_layer  # needs Triton

        attend: Any = cuda_layer.attention
        feed: Any = cuda_layer.feed_forward

        rotations: dict[object, Rotation] = {}
        scaled = cuda_layer.times_gain(x, layers[0].attention.norm_weight)
        for layer, following in zip(layers, [*layers[1:], None], strict=True):
            attention, experts = layer.attention, layer.feed_forward
            if layer.rope not in rotations:
                cos, sin = self._model.rotation(layer.rope, batch.positions)
                rotations[layer.rope] = cos.squeeze(1), sin.squeeze(1)
            place = self._cache.layers[attention.layer_idx]
            cached = cuda_layer.Cached(
                place.keys, place.values, batch.slot_mapping(place.group), batch.block_tables[place.group],
                batch.context_lens, batch.cu_seqlens, place.window or 0, place.scale, place.first_slot, place.k_scale,
                place.v_scale,
            )  # fmt: skip
            output = attention.o_proj
            x, scaled = attend(
                x, scaled, *attention.fused_arguments(), *rotations[layer.rope], cached=cached,
                output=output.packed, output_format=int(output.fmt), gain=experts.norm_weight,
            )  # fmt: skip
            gain = None if following is None else following.attention.norm_weight
            x, scaled = feed(x, scaled, experts.eps, *experts.native_arguments(), gain=gain)
        return x


def forward_of(model: Step3p5ForCausalLM, cache: KVCache) -> Forward:
    """The faster one that this model and cache allow."""
    is_fused = ops.wants_tiles(cache.device) and all(_has_kernels(layer) for layer in model.model.layers)
    return FusedForward(model, cache) if is_fused else ModelForward(model, cache)


def _has_kernels(layer: nn.Module) -> bool:
    if not isinstance(layer, QuantDecoderLayer | QuantMTPLayer):
        return False
    experts = layer.feed_forward
    if not all(is_supported(w.fmt) for w in layer.modules() if isinstance(w, PackedWeight)):
        return False
    pairs: Any = zip(experts.experts, experts.shared, strict=False)
    return all((a.fmt, a.shape[1:]) == (b.fmt, b.shape) for a, b in pairs)
