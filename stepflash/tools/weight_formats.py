"""How many bytes a model takes in each weight format, stored and read for a step.

A format is a table of bits a weight, scales included, for the kinds of tensors that are treated differently.
Norms are counted with the matrices: they are a few hundred kilobytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from stepflash.model import cost
from stepflash.model.config import ModelConfig

FP8_BLOCK = 128
RELEASED_Q4_K_S_BYTES, RELEASED_PARAMETERS = 111.5e9, 196_956_130_368  # the released file's size and weights


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFormat:
    """Bits for each weight of routed experts, other matrices (LM head included), router and embedding.

    block: weights that share a scale along a matrix's columns; a split of the columns must keep them together.
    is_square: the same along the rows (FP8 blocks of 128 x 128).
    engines: programs that run it; `mtp_bits` of the prediction modules.
    """

    name: str
    experts: float
    matrices: float
    router: float
    embedding: float
    mtp_bits: float
    engines: tuple[str, ...]
    block: int = 1
    is_square: bool = False
    note: str = ""


def _int(bits: int, group: int) -> WeightFormat:
    width = bits + 16 / group  # one float16 scale for each group
    name = f"int{bits}-g{group}" if bits == 4 else f"int{bits}"
    return WeightFormat(
        name=name,
        experts=width,
        matrices=width,
        router=32,
        embedding=16,
        mtp_bits=width,
        engines=("stepflash",),
        block=group,
        note=f"groups of {group} with a float16 scale; embedding BF16, router float32",
    )


def _gguf(name: str, width: float, block: int, note: str) -> WeightFormat:
    return WeightFormat(
        name=name,
        experts=width,
        matrices=width,
        router=width,
        embedding=width,
        mtp_bits=width,
        engines=("llama.cpp", "stepflash"),
        block=block,
        note=note,
    )


# Best quality first: the planner takes the first that fits.
FORMATS = {
    fmt.name: fmt
    for fmt in (
        WeightFormat(
            name="bf16",
            experts=16,
            matrices=16,
            router=16,
            embedding=16,
            mtp_bits=16,
            engines=("vllm", "sglang", "stepflash"),
            note="as released",
        ),
        WeightFormat(
            name="fp8",
            experts=8 + 32 / FP8_BLOCK**2,
            matrices=16,
            router=16,
            embedding=16,
            mtp_bits=16,
            engines=("vllm", "sglang", "stepflash"),
            block=FP8_BLOCK,
            is_square=True,
            note="as released: routed experts only, a float32 scale for each 128 x 128 block",
        ),
        _gguf("q8_0", 8.5, 32, "GGUF; blocks of 32 with a float16 scale"),
        _int(8, 128),
        _gguf("q4_k_s", RELEASED_Q4_K_S_BYTES * 8 / RELEASED_PARAMETERS, 256, "GGUF; 4.53 bits as measured"),
        _int(4, 32),
        _int(4, 64),
        _int(4, 128),
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Bytes of a model in one format."""

    experts: float
    matrices: float
    router: float
    embedding: float
    mtp_modules: tuple[float, ...]

    @property
    def trunk(self) -> float:
        return self.experts + self.matrices + self.router + self.embedding

    @property
    def mtp(self) -> float:
        return sum(self.mtp_modules)


def sizes(config: ModelConfig, fmt: WeightFormat) -> Sizes:
    """Stored bytes by kind of tensor."""
    embedding = config.vocab_size * config.hidden_size
    num_moe = sum(layer.is_moe for layer in config.trunk_layers)
    routed = num_moe * config.num_experts * 3 * config.hidden_size * config.moe_intermediate_size
    router = num_moe * config.num_experts * (config.hidden_size + 1)
    matrices = config.num_parameters() - embedding - routed - router
    return Sizes(
        experts=routed * fmt.experts / 8,
        matrices=matrices * fmt.matrices / 8,
        router=router * fmt.router / 8,
        embedding=embedding * fmt.embedding / 8,
        mtp_modules=tuple(
            cost.num_mtp_parameters(config, module) * fmt.mtp_bits / 8
            for module in range(1, config.num_mtp_layers + 1)
        ),
    )


def touched_fraction(num_experts: int, num_experts_per_tok: int, num_tokens: float) -> float:
    """Share of a layer's experts that `num_tokens` tokens meet if each picks evenly and on its own.

    Neighbouring tokens really share experts more often, so this is an upper bound of what is read.
    """
    return 1.0 - math.pow(1.0 - num_experts_per_tok / num_experts, num_tokens)


def weight_bytes_read(config: ModelConfig, fmt: WeightFormat, num_tokens: int, num_drafts: int) -> float:
    """Weight bytes that one step reads when it computes `num_tokens` tokens and runs `num_drafts` modules."""
    stored = sizes(config, fmt)
    fraction = touched_fraction(config.num_experts, config.num_experts_per_tok, num_tokens)
    return stored.matrices + stored.router + stored.experts * fraction + sum(stored.mtp_modules[:num_drafts])
