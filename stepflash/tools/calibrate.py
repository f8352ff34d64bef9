"""Calibrated rounding of a checkpoint, one layer at a time.

The calibration tokens run through the layers as they come out of the quantiser, so that a layer is rounded for the
inputs it will really have. Experts are read, rounded and dropped one by one: in memory are the packed layer, a few
matrices as floats and the activations. After each layer the activations are all that the next one needs, and all that
is saved for an interrupted run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from stepflash.errors import WeightsError
from stepflash.kernels.formats import Format, pack_groups, packed_bytes, unpack
from stepflash.model.attention import PackedAttention
from stepflash.model.block import DecoderLayer
from stepflash.model.config import ModelConfig
from stepflash.model.layers import MLP, clamped_swiglu
from stepflash.model.moe import MoE
from stepflash.model.rope import inverse_frequencies, rotation
from stepflash.tools.gptq import gptq, inverse_factor
from stepflash.weights.checkpoint import Checkpoint
from stepflash.weights.load import materialize, put
from stepflash.weights.packed import content_digest, is_packable, pack_slab
from stepflash.weights.stored import StoredTensor

# An expert that fewer calibration tokens chose also sees those that come nearest to choosing it.
MIN_EXPERT_TOKENS = 128
HESSIAN_ELEMENTS = 1 << 24  # of the matrices that are rounded at once


class Calibration:
    """The state of a calibrated run: which layer is next, and the activations before it.

    Args:
        formats: of every packable tensor by released name, None for what stays a float.
        token_ids: documents, [num_tokens] int64 each.
    """

    def __init__(
        self,
        source: Checkpoint,
        config: ModelConfig,
        formats: Mapping[str, Format | None],
        token_ids: Sequence[Tensor],
    ) -> None:
        self.source, self.config, self.formats = source, config, formats
        lengths = [len(document) for document in token_ids]
        self.ids = torch.cat(list(token_ids))
        self.positions = torch.cat([torch.arange(n) for n in lengths])
        boundaries = torch.tensor([0, *lengths]).cumsum(0).tolist()
        self.attend = PackedAttention(config.layers, boundaries, "cpu")
        self.next_layer = 0
        self.hidden: Tensor | None = None

    @property
    def digest(self) -> str:
        """SHA-256 of the tokens: two runs with another calibration are not the same run."""
        return content_digest([self.ids, self.positions])

    def round_layer(self) -> dict[str, Tensor]:
        """Round the next trunk layer; the packed bytes of its matrices by released name."""
        with torch.inference_mode():
            if self.hidden is None:
                table = materialize(
                    self.source.tensors["model.embed_tokens.weight"], torch.bfloat16, memory_map=True
                )
                self.hidden = F.embedding(self.ids, table).float()
            layer = LayerRounder(self)
            self.hidden = layer.run(self.hidden)
        self.next_layer += 1
        return layer.packed


class Inputs:
    """What stacked matrices read, [num_tokens, k] each; those that read the same share the factor."""

    def __init__(self, rows: Sequence[Tensor]) -> None:
        self.rows = rows

    @cached_property
    def factor(self) -> Tensor:
        return inverse_factor(torch.stack([rows.T @ rows for rows in self.rows]))


class LayerRounder:
    """Rounds the next layer of a run; `round_stacked` says how, and benchmarks compare other ways there."""

    def __init__(self, run: Calibration) -> None:
        self.index, self.tensors, self.formats = run.next_layer, run.source.tensors, run.formats
        self.attend, self.positions = run.attend, run.positions
        self.prefix = f"model.layers.{self.index}"
        self.packed: dict[str, Tensor] = {}
        with torch.device("meta"):
            self.layer = DecoderLayer(run.config, self.index).eval()
        for name in [name for name, _ in self.layer.named_parameters()]:
            if not is_packable(name):
                stored = self.tensors[f"{self.prefix}.{name}"]
                put(self.layer, name, materialize(stored, torch.float32))

    def run(self, hidden: Tensor) -> Tensor:
        """hidden [num_tokens, hidden_size] -> after the rounded layer."""
        layer = self.layer
        cos_sin = rotation(inverse_frequencies(layer.rope), self.positions)
        normed = layer.input_layernorm(hidden)
        inputs = Inputs([normed])
        for name in ("q_proj", "k_proj", "v_proj", "g_proj"):
            self.round(f"self_attn.{name}", inputs)
        del inputs
        before: list[Tensor] = []

        def take(module: object, inputs: tuple[Tensor]) -> None:
            if not before:
                before.append(inputs[0])
                self.round("self_attn.o_proj", Inputs(inputs))

        hook = layer.self_attn.o_proj.register_forward_pre_hook(take)
        hidden = hidden + layer.self_attn(normed, cos_sin, self.attend)
        hook.remove()
        before.clear()
        normed = layer.post_attention_layernorm(hidden)
        if layer.moe is None:
            return hidden + self.round_mlp("mlp", layer.mlp, normed)
        return (
            hidden
            + self.round_experts(layer.moe, normed)
            + self.round_mlp("share_expert", layer.share_expert, normed)
        )

    def round_mlp(self, name: str, mlp: MLP, x: Tensor) -> Tensor:
        inputs = Inputs([x])
        for part in ("gate_proj", "up_proj"):
            self.round(f"{name}.{part}", inputs)
        del inputs
        hidden = clamped_swiglu(mlp.gate_proj(x), mlp.up_proj(x), mlp.limit)
        self.round(f"{name}.down_proj", Inputs([hidden]))
        return mlp.down_proj(hidden)  # type: ignore[no-any-return]

    def round(self, name: str, inputs: Inputs) -> None:
        """Round one matrix for its inputs and put its new values into the layer."""
        full = f"{self.prefix}.{name}.weight"
        weight = materialize(self.tensors[full], torch.float32)
        self.packed[full] = self._empty(full)
        rounded = self.round_stacked(full, weight[None], inputs, self.packed[full][None])
        put(self.layer, f"{name}.weight", rounded[0])

    def round_experts(self, moe: MoE, x: Tensor) -> Tensor:
        """The routed experts, one batch after another; returns their sum over the tokens that chose them."""
        scores = moe.gate(x)
        topk_ids, topk_weights = moe.choose(x)
        names = [f"{self.prefix}.moe.{part}_proj.weight" for part in ("gate", "up", "down")]
        num_experts, width, hidden_size = self.tensors[names[0]].shape
        batch = max(HESSIAN_ELEMENTS // max(width, hidden_size) ** 2, 1)
        readers = [_matrices(self.tensors[name], batch) for name in names]
        # Filled in place: long-lived pieces between the temporaries of every expert would keep the heap from
        # giving memory back.
        packed = [self._empty(name) for name in names]
        total = torch.zeros_like(x)
        for first, gate, up, down in zip(range(0, num_experts, batch), *readers, strict=True):
            experts = range(first, min(first + batch, num_experts))
            tokens = [self._tokens_of(expert, scores, topk_ids) for expert in experts]
            inputs = Inputs([x[rows] for rows in tokens])
            here = slice(experts.start, experts.stop)
            gate = self.round_stacked(names[0], gate, inputs, packed[0][here])
            up = self.round_stacked(names[1], up, inputs, packed[1][here])
            hidden = [
                clamped_swiglu(F.linear(rows, gate[i]), F.linear(rows, up[i]), moe.limit)
                for i, rows in enumerate(inputs.rows)
            ]
            down = self.round_stacked(names[2], down, Inputs(hidden), packed[2][here])
            for i, expert in enumerate(experts):
                # Tokens that only helped to calibrate have weight 0.
                weights = (topk_weights * (topk_ids == expert))[tokens[i]].sum(-1, keepdim=True)
                total.index_add_(0, tokens[i], F.linear(hidden[i], down[i]) * weights)
        self.packed.update(zip(names, packed, strict=True))
        return total

    def _tokens_of(self, expert: int, scores: Tensor, topk_ids: Tensor) -> Tensor:
        """Rows of the tokens that chose an expert; if they are few, also of those that score it highest."""
        chose = (topk_ids == expert).any(-1)
        missing = min(MIN_EXPERT_TOKENS, len(chose)) - int(chose.sum())
        if missing > 0:
            others = scores[:, expert].masked_fill(chose, -1.0)
            chose[others.topk(missing).indices] = True
        return chose.nonzero().flatten()

    def _empty(self, name: str) -> Tensor:
        """Room for the packed bytes of a tensor: [num_bytes], or [num_experts, num_bytes]."""
        fmt, shape = self.formats[name], self.tensors[name].shape
        assert fmt is not None, f"{name} is planned as packed"
        return torch.empty(*shape[:-2], packed_bytes(fmt, *shape[-2:]), dtype=torch.uint8)

    def round_stacked(self, name: str, weight: Tensor, inputs: Inputs, out: Tensor) -> Tensor:
        """Pack stacked matrices [batch, n, k] into `out` [batch, num_bytes]; returns the values they stand for."""
        fmt = self.formats[name]
        assert fmt is not None, f"{name} is planned as packed"
        if fmt.is_int4:
            try:
                codes, scales = gptq(weight, inputs.factor, fmt.group)
            except ValueError as error:
                raise WeightsError(f"{self.tensors[name].origin}: {error}") from error
            packed = (pack_groups(c, s, fmt) for c, s in zip(codes, scales, strict=True))
        else:
            packed = (pack_slab(self.tensors[name], matrix, fmt) for matrix in weight)
        for target, data in zip(out, packed, strict=True):
            target.copy_(data)
        return torch.stack([unpack(data, fmt, *weight.shape[1:]) for data in out])


def _matrices(stored: StoredTensor, batch: int) -> Iterator[Tensor]:
    """Stacked matrices [num, n, k] as float32 [batch, n, k], read once from front to back."""
    num, n, k = stored.shape
    pieces = stored.values()
    rest = torch.empty(0)
    for first in range(0, num, batch):
        out = torch.empty(min(batch, num - first), n, k)
        flat, done = out.view(-1), 0
        while done < flat.numel():
            if not rest.numel():
                rest = next(pieces).view(-1)
            taken = min(rest.numel(), flat.numel() - done)
            flat[done : done + taken].copy_(rest[:taken])
            rest = rest[taken:]
            done += taken
        assert done == math.prod(out.shape)
        yield out
