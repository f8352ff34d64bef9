"""Packed storage: what the kernels read equals what the decoder reads (two independent ways to the same values)."""

from __future__ import annotations

import math
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor

from stepflash.engine.llm import LLM
from stepflash.engine.request import SamplingParams
from stepflash.errors import ConfigError
from stepflash.gguf_file import GGML_TYPES, TYPE_IDS, GGUFTensor
from stepflash.kernels import cuda_layout
from stepflash.kernels.formats import Format, parse_format, quantize, unpack
from stepflash.weights import gguf, packed
from stepflash.weights.checkpoint import open_checkpoint
from stepflash.weights.load import load_model
from stepflash.weights.packed import is_packable, pack_pieces, slabs
from stepflash.weights.quantized import PackedWeight, packed_weight_bytes, quantize_model
from stepflash.weights.stored import StoredTensor, TensorFile
from tests.weights.variants import block_scale, micro_config, micro_tensors, write_folder

MICRO = Path(__file__).parents[1] / "fixtures" / "micro"
IDS = torch.arange(3, 60) * 7 % 512


def stored(weight: Tensor, piece: int) -> StoredTensor:
    """A tensor that is read in pieces of any size."""
    return StoredTensor(
        name="x",
        shape=tuple(weight.shape),
        dtype_name="F32",
        num_bytes=weight.nbytes,
        origin="x",
        values=lambda: iter(weight.reshape(-1).split(piece)),
    )


@pytest.mark.parametrize("name", ["int4", "int8_g64", "fp8", "bf16"])
@pytest.mark.parametrize("shape", [(300, 192), (3, 160, 64)])
def test_packing_in_pieces_equals_packing_at_once(
    name: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "SLAB_ELEMENTS", 128 * 192)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    fmt = parse_format(name, shape[-1])
    tensor = stored(weight, 1000)
    assert len(list(slabs(tensor))) == 3
    assert torch.equal(torch.cat([slab.clone() for slab in slabs(tensor)]).flatten(), weight.flatten())
    assert torch.equal(torch.cat(list(pack_pieces(tensor, fmt))), quantize(weight, fmt).flatten())


@pytest.mark.parametrize("name", ["int4", "int8", "fp8", "bf16", "int4-g64"])
def test_packing_while_loading_equals_packing_a_loaded_model(name: str) -> None:
    loaded = load_model(MICRO, progress=False, quantization=name)
    assert torch.equal(
        loaded.logits(IDS), quantize_model(load_model(MICRO, progress=False), name).logits(IDS)
    )


def test_fp8_stays_fp8(tmp_path: Path) -> None:
    tensors = micro_tensors()
    for name in [name for name in tensors if ".moe." in name and tensors[name].ndim == 3]:
        tensors[name], tensors[name + "_scale_inv"] = block_scale(tensors[name])
    fp8 = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    checkpoint = open_checkpoint(write_folder(tmp_path, tensors, micro_config() | fp8))
    blocks = [tensor for tensor in checkpoint.tensors.values() if tensor.packed is not None]
    assert len(blocks) == 18
    assert all(unpacked(tensor).equal(decoded(tensor)) for tensor in blocks)
    model = load_model(tmp_path, progress=False, quantization="stored")
    formats = {w.fmt for w in model.modules() if isinstance(w, PackedWeight)}
    assert formats == {Format.FP8, Format.BF16}
    plain = load_model(tmp_path, progress=False, quantization="plain").logits(IDS)
    assert (model.logits(IDS) - plain).abs().median() < 0.05 * plain.std()


@pytest.mark.parametrize("type_name", ["Q8_0", "Q4_K", "Q6_K"])
def test_gguf_blocks_are_rearranged_not_rounded(type_name: str, tmp_path: Path) -> None:
    k, num_rows, num_experts = 512, 40, 3
    kind = GGML_TYPES[TYPE_IDS[type_name]]
    num_bytes = k * num_rows * num_experts // kind.block_size * kind.block_bytes
    raw = torch.randint(0, 256, (num_bytes,), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    blocks = raw.view(-1, kind.block_bytes)
    for at in {"Q8_0": (0,), "Q4_K": (0, 2), "Q6_K": (208,)}[
        type_name
    ]:  # float16 scales: no NaN, no infinity
        blocks[:, at + 1] &= 0x3B
    file = tmp_path / "blocks"
    file.write_bytes(b"head" + raw.numpy().tobytes())
    entry = GGUFTensor(
        "blk.0.ffn_up_exps.weight", (k, num_rows, num_experts), TYPE_IDS[type_name], file, 4, num_bytes
    )
    tensor = gguf._stored("model.layers.0.moe.up_proj.weight", entry, TensorFile(file), None)
    assert tensor.shape == (num_experts, num_rows, k)
    assert torch.equal(unpacked(tensor), decoded(tensor))


def test_a_gpu_has_no_kernels_for_all_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Q4_K becomes int8 there; `wants_tiles` is what tells that a device is one."""
    num_bytes = 512 * 64 // 256 * 144
    raw = torch.randint(0, 0x3B, (num_bytes,), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    file = tmp_path / "blocks"
    file.write_bytes(raw.numpy().tobytes())
    name = "model.layers.0.mlp.up_proj.weight"
    entry = GGUFTensor("blk.0.ffn_up.weight", (512, 64), TYPE_IDS["Q4_K"], file, 0, num_bytes)
    tensor = gguf._stored(name, entry, TensorFile(file), None)
    packer = packed.StoredPacker({name: tensor}, packed.STORED, {})
    assert packer.pack(name, torch.empty(0)).fmt == Format.Q4_K
    monkeypatch.setattr(packed.ops, "wants_tiles", lambda device: True)
    weight = packer.pack(name, torch.empty(0))
    assert (weight.fmt, weight.is_tiled) == (Format.INT8_G128, True)
    values = unpack(cuda_layout.to_panels(weight.packed, weight.fmt, 64, 512), weight.fmt, 64, 512)
    torch.testing.assert_close(values, decoded(tensor), rtol=0, atol=float(values.abs().max()) / 200)


def test_llm_keeps_the_stored_format(tmp_path: Path) -> None:
    tensors = micro_tensors()
    name = "model.layers.3.moe.up_proj.weight"
    tensors[name], tensors[name + "_scale_inv"] = block_scale(tensors[name])
    fp8 = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    write_folder(tmp_path, tensors, micro_config() | fp8)
    llm = LLM(tmp_path)
    formats = {n: w.fmt for n, w in llm.model.named_modules() if isinstance(w, PackedWeight)}
    # One of a pair of two formats would not do; what only proposes is in int8, head gates excepted.
    assert {formats[f"model.layers.3.feed_forward.experts.{i}"] for i in (0, 1)} == {Format.BF16}
    drafts = {f for n, f in formats.items() if n.startswith("model.layers.9.")}
    assert Format.BF16 in drafts
    assert all(f.is_int8 for f in drafts - {Format.BF16})
    assert len(drafts) > 1
    assert llm.generate([[1, 2, 3]], SamplingParams(max_tokens=3), progress=False)[0].token_ids
    assert packed_weight_bytes(LLM(tmp_path, quantization="plain").model) == 0
    assert packed_weight_bytes(LLM(MICRO).model) > 0
    assert packed_weight_bytes(LLM(MICRO, dtype="float32").model) == 0


def test_errors_name_the_tensor_and_the_choice() -> None:
    with pytest.raises(ConfigError, match=r"model\.layers\.0\..*unknown weight format 'int3'"):
        load_model(MICRO, progress=False, quantization="int3")
    with pytest.raises(ConfigError, match="q4_k is read from GGUF files, not made here"):
        load_model(MICRO, progress=False, quantization="q4_k")
    with pytest.raises(ConfigError, match="match no weight: nothing"):
        load_model(MICRO, progress=False, quantization="int8", protect={"nothing*": "bf16"})
    assert not is_packable("model.embed_tokens.weight")
    assert not is_packable("model.layers.3.moe.gate.weight")


def decoded(tensor: StoredTensor) -> Tensor:
    out = torch.empty(tensor.shape)
    tensor.fill(out)
    return out


def unpacked(tensor: StoredTensor) -> Tensor:
    assert tensor.packed is not None
    data = torch.cat([piece.clone() for piece in tensor.packed.pieces()])
    num_matrices = math.prod(tensor.shape[:-2])
    n, k = tensor.shape[-2:]
    return unpack(data.view(num_matrices, -1), tensor.packed.fmt, n, k).view(tensor.shape)


def test_a_packed_model_moves_whole() -> None:
    """What the ops are given moves with the parameters: `meta` stands in for a device that is not here."""
    model = load_model(MICRO, progress=False, quantization="int4", device="meta")
    layer = model.model.layers[-1]
    given = [*layer.attention._before[1], *layer.attention._output[0], *layer.feed_forward._weights["shared"]]  # type: ignore[union-attr, index]
    given += [layer.attention._before[0], *model.lm_head._weight[0]]  # type: ignore[union-attr, index, list-item]
    assert all(tensor.is_meta for tensor in [*given, *model.parameters(), *model.buffers()])
    assert layer.feed_forward(torch.empty(3, model.config.hidden_size, device="meta")).is_meta  # type: ignore[operator, union-attr]


def test_each_weight_is_moved_before_the_next_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Host memory need not hold a packed model that goes to a GPU."""
    alive: list[weakref.ref[Tensor]] = []
    most = 0
    from_pieces = PackedWeight.from_pieces.__func__  # type: ignore[attr-defined]

    def watched(cls: type[PackedWeight], *args: object) -> PackedWeight:
        nonlocal most
        weight: PackedWeight = from_pieces(cls, *args)
        alive.append(weakref.ref(weight.packed))
        most = max(most, sum(ref() is not None for ref in alive))
        return weight

    monkeypatch.setattr(PackedWeight, "from_pieces", classmethod(watched))
    model = load_model(MICRO, device="meta", quantization="int8", progress=False)
    assert len(alive) > 20
    assert most == 1
    assert all(tensor.is_meta for tensor in model.state_dict().values())
