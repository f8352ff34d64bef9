"""How many bytes a model takes in each weight format, stored and read for a step, tensor by tensor.

Nothing is estimated: the formats that stepflash writes are counted with the very functions that decide what
`stepflash quantize` and `stepflash convert` write, so that a plan and a file agree to the byte.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

from stepflash.model.config import ModelConfig
from stepflash.weights.names import ExpectedTensor, expected, layer_of, scale_shape

FP8_BLOCK = 128
EDGE = "int8"  # of the packed formats: bf16, the default of `stepflash quantize`, would add up to 19 GB


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFormat:
    """One way to store a model.

    made_by: `released` as it is downloaded, `convert` (GGUF) or `quantize` (packed safetensors).
    engines: programs that run it.
    block: weights that share a scale along a matrix's columns; a split of the columns must keep them together.
    is_square: the same along the rows (FP8 blocks of 128 x 128).
    """

    name: str
    made_by: str
    engines: tuple[str, ...]
    block: int = 1
    is_square: bool = False
    note: str = ""


def _packed(name: str, block: int, note: str) -> WeightFormat:
    return WeightFormat(name=name, made_by="quantize", engines=("stepflash",), block=block, note=note)


def _gguf(name: str, block: int, note: str) -> WeightFormat:
    return WeightFormat(
        name=name, made_by="convert", engines=("llama.cpp", "stepflash"), block=block, note=note
    )


_INT4 = "groups of {} with a float16 scale; layers at both ends, head and modules 8 bits (--edge int8)"
# Best quality first: the planner takes the first that fits.
FORMATS = {
    fmt.name: fmt
    for fmt in (
        WeightFormat(
            name="bf16", made_by="released", engines=("vllm", "sglang", "stepflash"), note="as released"
        ),
        WeightFormat(
            name="fp8",
            made_by="released",
            engines=("vllm", "sglang", "stepflash"),
            block=FP8_BLOCK,
            is_square=True,
            note="as released: routed experts only, a float32 scale for each 128 x 128 block",
        ),
        _gguf("q8_0", 32, "GGUF; blocks of 32 with a float16 scale"),
        _packed("int8", 128, "groups of 128 with a float16 scale; embedding and head gates BF16"),
        _packed("int4-g32", 32, _INT4.format(32)),
        _gguf("q4_k_s", 256, "GGUF; 4.53 bits on average"),
        _packed("int4-g64", 64, _INT4.format(64)),
        _packed("int4-g128", 128, _INT4.format(128)),
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Bytes of a model in one format; `matrices` is the rest: attention, dense and shared experts, LM head, norms.

    layers: of each trunk layer; the embedding and what follows the last layer are not in them.
    """

    experts: float
    matrices: float
    router: float
    embedding: float
    layers: tuple[float, ...]
    mtp_modules: tuple[float, ...]

    @property
    def trunk(self) -> float:
        return self.experts + self.matrices + self.router + self.embedding

    @property
    def mtp(self) -> float:
        return sum(self.mtp_modules)

    @property
    def after_layers(self) -> float:
        """The last norm and the LM head."""
        return self.trunk - self.embedding - sum(self.layers)


def without_mtp(config: ModelConfig) -> ModelConfig:
    """The trunk alone, as a file without prediction modules has it."""
    return replace(config, num_mtp_layers=0, layers=config.trunk_layers)


@lru_cache(maxsize=256)
def sizes(config: ModelConfig, fmt: WeightFormat) -> Sizes:
    """Stored bytes by kind of tensor, of a file with all modules of `config`."""
    num_bytes = {"released": _released, "convert": _converted, "quantize": _quantized}[fmt.made_by](
        config, fmt
    )
    kinds = dict.fromkeys(("experts", "matrices", "router", "embedding"), 0.0)
    layers = [0.0] * (config.num_layers + config.num_mtp_layers)
    for row in expected(config):
        layer, size = layer_of(row.released), num_bytes(row)
        if layer is None or layer < config.num_layers:
            kinds[_kind(row)] += size
        if layer is not None:
            layers[layer] += size
    trunk, modules = layers[: config.num_layers], layers[config.num_layers :]
    return Sizes(**kinds, layers=tuple(trunk), mtp_modules=tuple(modules))


def _kind(row: ExpectedTensor) -> str:
    if row.released.endswith("embed_tokens.weight"):
        return "embedding"
    if row.released.endswith(("moe.gate.weight", "moe.router_bias")):
        return "router"
    return "experts" if len(row.shape) == 3 else "matrices"


def _released(config: ModelConfig, fmt: WeightFormat) -> Callable[[ExpectedTensor], float]:
    """The two released repositories."""

    def num_bytes(row: ExpectedTensor) -> float:
        if fmt.name == "fp8" and len(row.shape) == 3:
            return math.prod(row.shape) + 4 * math.prod(scale_shape(row.shape, (FP8_BLOCK, FP8_BLOCK)))
        return 2 * math.prod(row.shape)

    return num_bytes


def _converted(config: ModelConfig, fmt: WeightFormat) -> Callable[[ExpectedTensor], float]:
    """`stepflash convert --to gguf`, which is llama.cpp's choice of types."""
    from stepflash.gguf_file import GGML_TYPES, TYPE_IDS, tensor_num_bytes
    from stepflash.weights.gguf_export import tensor_types

    types = tensor_types(config, fmt.name)
    return lambda row: tensor_num_bytes(row.shape[::-1], GGML_TYPES[TYPE_IDS[types[row.gguf]]])


def _quantized(config: ModelConfig, fmt: WeightFormat) -> Callable[[ExpectedTensor], float]:
    """`stepflash quantize --format NAME --edge int8`; floats as in a BF16 checkpoint with float32 routers."""
    from stepflash.kernels.formats import parse_format
    from stepflash.tools.quantize import make_recipe
    from stepflash.weights.names import keeps_float32
    from stepflash.weights.packed import is_packable, num_packed_bytes

    recipe = make_recipe(config, fmt.name, edge=EDGE)

    def num_bytes(row: ExpectedTensor) -> float:
        if is_packable(row.released):
            name = recipe.format_name(row.released)
            return num_packed_bytes(row.shape, parse_format(name, row.shape[-1]))
        return math.prod(row.shape) * (4 if keeps_float32(row.released) else 2)

    return num_bytes


def touched_fraction(num_experts: int, num_experts_per_tok: int, num_tokens: float) -> float:
    """Share of a layer's experts that `num_tokens` tokens meet if each picks evenly and on its own.

    Neighbouring tokens really share experts more often, so this is an upper bound of what is read.
    """
    return 1.0 - math.pow(1.0 - num_experts_per_tok / num_experts, num_tokens)


def weight_bytes_read(config: ModelConfig, fmt: WeightFormat, num_tokens: float, num_drafts: int) -> float:
    """Weight bytes that one step reads when it computes `num_tokens` tokens and runs `num_drafts` modules."""
    stored = sizes(config, fmt)
    fraction = touched_fraction(config.num_experts, config.num_experts_per_tok, num_tokens)
    return stored.matrices + stored.router + stored.experts * fraction + sum(stored.mtp_modules[:num_drafts])
