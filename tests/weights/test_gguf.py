"""GGUF weights: quantised tensors end to end (golden blocks), norms, fused q k v, the file's rotary table."""

import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from stepflash.errors import WeightsError
from stepflash.gguf_file import GGML_TYPES, TYPE_IDS, TensorToWrite, read_gguf, write_gguf
from stepflash.model.config import ModelConfig
from stepflash.weights.checkpoint import compare, open_checkpoint
from stepflash.weights.gguf import read_tensors
from stepflash.weights.load import load_model
from tests.weights.variants import (
    gguf_metadata,
    gguf_name,
    gguf_tensors,
    micro_tensors,
    to_write,
    write_micro_gguf,
)

GOLDEN = Path(__file__).parents[1] / "fixtures" / "gguf" / "dequantized.npz"


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q4_K", "Q5_K", "Q6_K"])
def test_quantised_tensor_from_file_to_numbers(tmp_path: Path, name: str) -> None:
    """Blocks that the `gguf` package decoded, repeated so that they cross the read buffer's edge several times."""
    with np.load(GOLDEN) as arrays:
        raw, wanted = arrays[f"{name}_raw"], arrays[name]
    repeats = 3 * (1 << 20) // raw.nbytes + 1
    rows, columns = len(raw) * repeats, wanted.shape[1]
    tensor = TensorToWrite((columns, rows), name, [raw.tobytes()] * repeats)
    path = tmp_path / "model.gguf"
    write_gguf(path, gguf_metadata(), {"blk.0.attn_q.weight": tensor})
    config = ModelConfig.from_gguf(read_gguf(path).metadata)
    stored = read_tensors(read_gguf(path), config).tensors["model.layers.0.self_attn.q_proj.weight"]
    assert (stored.shape, stored.dtype_name, stored.view) == ((rows, columns), name, None)
    found = torch.empty(rows, columns)
    stored.fill(found)
    np.testing.assert_array_equal(found.numpy(), np.tile(wanted, (repeats, 1)))


def test_whole_model_in_q8_0(tmp_path: Path) -> None:
    """Matrices quantised here by the definition of Q8_0; parameters must lie within half a step of the originals."""
    tensors = gguf_tensors("F32")
    steps = {}
    for name, tensor in micro_tensors().items():
        if tensor.ndim > 1 and not name.endswith("moe.gate.weight"):
            blocks = tensor.float().numpy().reshape(-1, 32)
            scale = (np.abs(blocks).max(1, keepdims=True) / 127).astype(np.float16)
            quants = np.rint(blocks / scale.astype(np.float32)).astype(np.int8)
            raw = np.concatenate([scale.view(np.uint8), quants.view(np.uint8)], axis=1)
            tensors[gguf_name(name)] = TensorToWrite(tuple(reversed(tensor.shape)), "Q8_0", [raw.tobytes()])
            steps[name] = torch.from_numpy(scale.astype(np.float32)).expand(-1, 32).reshape(tensor.shape)
    path = tmp_path / "micro-q8_0.gguf"
    write_gguf(path, gguf_metadata(), tensors)
    model = load_model(path, dtype="float32")
    originals = micro_tensors()
    for name, parameter in model.state_dict().items():
        error = (parameter - originals[name].float()).abs()
        # float16 rounding of the scale moves a value of up to 127 steps by 127 / 2048 of a step.
        assert bool((error <= steps[name] * 0.57).all()) if name in steps else error.max() < 1e-7, name


def test_norms_lose_their_one_without_losing_bits(tmp_path: Path) -> None:
    """A bf16 w survives 1 + w in float32 and back exactly, down to 2^-16; every such value is tried."""
    bits = torch.arange(0, 2**16, dtype=torch.int32).to(torch.int16)
    values = bits.view(torch.bfloat16).float()
    values = values[values.isfinite() & ((values.abs() >= 2**-16) | (values == 0)) & (values.abs() < 2)]
    path = tmp_path / "model.gguf"
    write_gguf(path, gguf_metadata(), {"output_norm.weight": to_write(values + 1, "F32")})
    gguf = read_gguf(path)
    stored = read_tensors(gguf, ModelConfig.from_gguf(gguf.metadata)).tensors["model.norm.weight"]
    found = torch.empty_like(values)
    stored.fill(found)
    assert len(values) > 4000
    assert torch.equal(found, values)


@pytest.mark.parametrize("quantised", [False, True])
def test_fused_qkv_is_taken_apart(tmp_path: Path, quantised: bool) -> None:
    """Newer converters may store blk.i.attn_qkv: q rows, then k rows, then v rows."""
    tensors = gguf_tensors("F32")
    parts = [tensors.pop(f"blk.4.attn_{part}.weight") for part in "qkv"]
    shape = (128, sum(part.shape[1] for part in parts))
    assert shape == (128, 4 * 32 + 2 * 64)
    if quantised:
        raw = random.Random(0).randbytes(shape[1] * 4 * 34)
        raw = b"".join(b"\0\x3c" + raw[i + 2 : i + 34] for i in range(0, len(raw), 34))  # every scale 1.0
        tensors["blk.4.attn_qkv.weight"] = TensorToWrite(shape, "Q8_0", [raw])
        wanted = (
            torch.frombuffer(bytearray(raw), dtype=torch.int8)
            .view(shape[1], 4, 34)[:, :, 2:]
            .reshape(-1, 128)
        )
    else:
        tensors["blk.4.attn_qkv.weight"] = TensorToWrite(shape, "F32", [c for p in parts for c in p.chunks])
        names = [f"model.layers.4.self_attn.{part}_proj.weight" for part in "qkv"]
        wanted = torch.cat([micro_tensors()[name] for name in names])
    path = tmp_path / "model.gguf"
    write_gguf(path, gguf_metadata(), tensors)
    state = load_model(path, dtype="float32").state_dict()
    found = torch.cat([state[f"model.layers.4.self_attn.{part}_proj.weight"] for part in "qkv"])
    assert torch.equal(found, wanted.float())


def test_unsupported_quantisation_names_tensor_and_type(tmp_path: Path) -> None:
    tensors = gguf_tensors("F32")
    for name in ("IQ4_NL", "MXFP4"):
        ggml_type = GGML_TYPES[TYPE_IDS[name]]
        raw = bytes(128 // ggml_type.block_size * ggml_type.block_bytes * 192)
        tensors["blk.9.ffn_up.weight"] = TensorToWrite((128, 192), name, [raw])
        path = tmp_path / "model.gguf"
        write_gguf(path, gguf_metadata(), tensors)
        with pytest.raises(WeightsError, match=rf"'blk.9.ffn_up.weight' is quantised as {name}, which"):
            load_model(path)


def test_unknown_and_missing_tensors_are_listed_by_their_own_names(tmp_path: Path) -> None:
    tensors = gguf_tensors("F32")
    tensors["blk.3.attn_sinks.weight"] = to_write(torch.ones(4), "F32")
    del tensors["blk.3.exp_probs_b.bias"]
    path = tmp_path / "model.gguf"
    write_gguf(path, gguf_metadata(), tensors)
    checkpoint = open_checkpoint(path)
    comparison = compare(checkpoint, checkpoint.config)
    assert comparison.missing == ["model.layers.3.moe.router_bias"]
    assert comparison.unexpected == ["blk.3.attn_sinks.weight"]
    with pytest.raises(WeightsError, match="does not fit its configuration"):
        load_model(path)


def test_rotary_table_is_recomputed_by_default_and_the_files_own_on_request(tmp_path: Path) -> None:
    """Frequencies from the formula of spec 2.4: 5e6^(-2j/16) over the file's divisor, sliding layers untouched."""
    tensors = gguf_tensors("F32")
    divisors = [1.0 + 0.25 * j for j in range(16)]  # longer than needed, as in real files (spec 6.3)
    tensors["rope_freqs.weight"] = to_write(torch.tensor(divisors), "F32")
    path = tmp_path / "model.gguf"
    write_gguf(path, gguf_metadata(), tensors)
    recomputed = load_model(write_micro_gguf(tmp_path / "micro.gguf")).rope_frequencies
    for rope, frequencies in load_model(path).rope_frequencies.items():
        assert torch.equal(frequencies, recomputed[rope])
    for rope, frequencies in load_model(path, rope_freqs="file").rope_frequencies.items():
        if rope.scaling is None:
            assert torch.equal(frequencies, recomputed[rope])
        else:
            wanted = [math.pow(5e6, -2 * j / 16) / divisors[j] for j in range(8)]
            assert frequencies.tolist() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("values", [[1.0] * 4, [0.0] * 16, [float("nan")] * 16])
def test_unusable_rotary_table_is_refused(tmp_path: Path, values: list[float]) -> None:
    tensors = gguf_tensors("F32") | {"rope_freqs.weight": to_write(torch.tensor(values), "F32")}
    path = tmp_path / "model.gguf"
    write_gguf(path, gguf_metadata(), tensors)
    load_model(path)
    with pytest.raises(WeightsError, match="rope_freqs"):
        load_model(path, rope_freqs="file")


def test_split_gguf_loads(tmp_path: Path) -> None:
    tensors = gguf_tensors("BF16")
    names = sorted(tensors)
    for number in range(3):
        metadata = (gguf_metadata() if number == 0 else {"general.architecture": "step35"}) | {
            "split.no": number,
            "split.count": 3,
            "split.tensors.count": len(names),
        }
        part = {name: tensors[name] for name in names[number::3]}
        write_gguf(tmp_path / f"micro-{number + 1:05d}-of-00003.gguf", metadata, part)
    model = load_model(tmp_path / "micro-00001-of-00003.gguf", dtype="bfloat16")
    whole = load_model(write_micro_gguf(tmp_path / "micro.gguf", "BF16"), dtype="bfloat16").state_dict()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in model.state_dict().items())
