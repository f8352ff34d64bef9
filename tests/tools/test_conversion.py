"""Conversion: bit-exact round trips (property, exhaustive), ggml's bytes (golden), the README's size, errors."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from stepflash.chat.template import ChatTemplate
from stepflash.chat.tokenizer import Tokenizer
from stepflash.cli import main
from stepflash.errors import ConfigError, WeightsError
from stepflash.gguf_file import GGML_TYPES, TYPE_IDS, TypedValue, read_gguf, tensor_num_bytes, write_gguf
from stepflash.model.config import ModelConfig
from stepflash.tools.conversion import convert
from stepflash.weights import gguf_export, safetensors_export
from stepflash.weights.checkpoint import open_checkpoint, with_mtp_modules
from stepflash.weights.dequantize import dequantize
from stepflash.weights.gguf import read_tensors
from stepflash.weights.load import load_model
from stepflash.weights.names import expected
from stepflash.weights.quantize_gguf import encode, encode_pieces
from stepflash.weights.random_checkpoint import Size, write_random_checkpoint
from tests.weights.variants import block_scale, gguf_metadata, golden, to_write

FIXTURES = Path(__file__).parents[1] / "fixtures"
MICRO = FIXTURES / "micro"
SMALL = Size(
    hidden=256, layers=6, dense=1, experts=4, top_k=2, expert_inter=256, shared_inter=256, inter=256, heads=4,
    sliding_heads=8, kv_heads=4, head_dim=64, window=16, vocab=320, context=512, rope_original=128, mtp=2,
)  # fmt: skip


def all_tensors(folder: Path) -> dict[str, Tensor]:
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert torch.equal(bits(found[name]), bits(tensor)), name


def released_config() -> ModelConfig:
    return ModelConfig.from_pretrained(FIXTURES / "step-3.5-flash-config.json")


def with_float32(folder: Path) -> Path:
    """Micro with float32 weights that no shorter format holds, and norms of every size."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for name, tensor in all_tensors(MICRO).items():
        noise = torch.randn(tensor.shape, generator=generator)
        tensors[name] = tensor.float() + noise * 1e-3
        if name.endswith("norm.weight"):
            tensors[name] = noise * 10.0 ** torch.randint(-12, 2, tensor.shape, generator=generator)
    save_file(tensors, folder / "model.safetensors")
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (folder / file).write_bytes((MICRO / file).read_bytes())
    return folder


# ---- round trips --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gguf_type", ["bf16", "f32"])
def test_bf16_checkpoint_comes_back_bit_for_bit(tmp_path: Path, gguf_type: str) -> None:
    convert(MICRO, tmp_path / "m.gguf", "gguf", gguf_type)
    convert(tmp_path / "m.gguf", tmp_path / "back", "safetensors", "bf16", shard_bytes=1 << 20)
    assert len(list((tmp_path / "back").glob("model-*-of-*.safetensors"))) > 3
    assert_same(all_tensors(tmp_path / "back"), all_tensors(MICRO))
    assert ModelConfig.from_pretrained(tmp_path / "back") == ModelConfig.from_pretrained(MICRO)


def test_float32_checkpoint_comes_back_bit_for_bit(tmp_path: Path) -> None:
    source = with_float32(tmp_path / "f32")
    convert(source, tmp_path / "m.gguf", "gguf", "f32")
    convert(tmp_path / "m.gguf", tmp_path / "back", "safetensors", "f32")
    assert_same(all_tensors(tmp_path / "back"), all_tensors(source))


def test_every_bf16_norm_weight_comes_back(tmp_path: Path) -> None:
    """All 65,280 finite bf16 numbers, -0 and subnormal ones included."""
    patterns = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    values = patterns[patterns.float().isfinite()].float()
    assert len(values) == 65280
    config = replace(ModelConfig.from_pretrained(MICRO), hidden_size=len(values))
    row = next(row for row in expected(config) if row.released == "model.norm.weight")
    kept = gguf_export.norm_to_keep(row, values)
    assert kept is not None
    metadata = gguf_metadata() | {"step35.embedding_length": len(values), **kept}
    write_gguf(tmp_path / "m.gguf", metadata, {"output_norm.weight": to_write(values + 1, "F32")})
    gguf = read_gguf(tmp_path / "m.gguf")
    stored = read_tensors(gguf, config).tensors["model.norm.weight"]
    found = torch.empty(len(values))
    stored.fill(found)
    assert torch.equal(bits(found), bits(values))


def test_which_norm_weights_need_no_help() -> None:
    """1 + w has 23 bits behind the point and w has 8 in all: exact from 2^-16 up, on both sides of zero."""
    config = ModelConfig.from_pretrained(MICRO)
    row = next(row for row in expected(config) if row.released == "model.norm.weight")
    patterns = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    plain = patterns[(patterns.abs() >= 2**-16) & (patterns.abs() < 2**16)]
    assert gguf_export.norm_to_keep(row, plain) is None
    for value in (2**-24 * 1.5, -0.0, 1e-30):
        assert gguf_export.norm_to_keep(row, torch.tensor([value])) is not None


def test_logits_are_those_of_the_source(tmp_path: Path) -> None:
    """The golden logits of transformers, through both formats."""
    ids = golden("transformers-logits-f32", "ids").long()
    wanted = golden("transformers-logits-f32", "logits").log_softmax(-1)
    convert(MICRO, tmp_path / "m.gguf", "gguf", "bf16")
    convert(tmp_path / "m.gguf", tmp_path / "back", "safetensors")
    for path in (tmp_path / "m.gguf", tmp_path / "back"):
        model = load_model(path, dtype="float32")
        assert (model.logits(ids).log_softmax(-1) - wanted).abs().max() < 2e-4
    from_file = load_model(tmp_path / "m.gguf", dtype="float32", rope_freqs="file")
    assert (from_file.logits(ids).log_softmax(-1) - wanted).abs().max() < 2e-4  # the table is the right one


def test_fp8_source_is_decoded(tmp_path: Path) -> None:
    source = tmp_path / "fp8"
    source.mkdir()
    tensors = all_tensors(MICRO)
    for name in [name for name in tensors if name.endswith("moe.up_proj.weight")]:
        tensors[name], tensors[name + "_scale_inv"] = block_scale(tensors[name])
    save_file(tensors, source / "model.safetensors")
    raw = json.loads((MICRO / "config.json").read_text()) | {"quantization_config": {"quant_method": "fp8"}}
    (source / "config.json").write_text(json.dumps(raw))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (source / file).write_bytes((MICRO / file).read_bytes())
    written = convert(source, tmp_path / "out", "safetensors", "f32")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert written.notes == ()
    decoded = load_model(source, dtype="float32").state_dict()
    found = all_tensors(tmp_path / "out")
    assert all(torch.equal(found[name], tensor.float()) for name, tensor in decoded.items())
    assert "F8_E4M3" in convert(source, tmp_path / "bf16", "safetensors").notes[0]


@pytest.mark.parametrize("to", ["gguf", "safetensors"])
def test_modules_can_be_dropped(tmp_path: Path, to: str) -> None:
    out = tmp_path / ("m.gguf" if to == "gguf" else "m")
    convert(MICRO, out, to, keep_mtp=False)
    assert not any(".8." in name for name in open_checkpoint(out).tensors)
    model = load_model(out)
    assert model.config.num_mtp_layers == 0
    assert model.config == with_mtp_modules(ModelConfig.from_pretrained(MICRO), 0)


# ---- configuration, tokenizer ---------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [ModelConfig.from_pretrained(MICRO), released_config()])
def test_config_survives_both_formats(config: ModelConfig, tmp_path: Path) -> None:
    raw = json.loads(json.dumps(safetensors_export.config_from_model(config, "bf16")))
    assert ModelConfig.from_dict(raw) == config
    metadata = gguf_export.model_metadata(config, "bf16", "m") | {
        "tokenizer.ggml.bos_token_id": config.bos_token_id,
        "stepflash.eos_token_ids": TypedValue("u32", list(config.eos_token_ids)),
    }
    write_gguf(tmp_path / "m.gguf", metadata, {})
    found = ModelConfig.from_gguf(read_gguf(tmp_path / "m.gguf").metadata)
    assert found == config


def test_what_a_gguf_cannot_say_is_refused() -> None:
    config = ModelConfig.from_pretrained(MICRO)
    dense_again = replace(config.layers[5], is_moe=False)
    layers = (*config.layers[:5], dense_again, *config.layers[6:])
    with pytest.raises(ConfigError, match="layer 5 cannot be described by a GGUF"):
        gguf_export.model_metadata(replace(config, layers=layers), "f32", "m")


def test_tokenizer_and_template_survive(tmp_path: Path) -> None:
    convert(MICRO, tmp_path / "m.gguf", "gguf", "bf16")
    convert(tmp_path / "m.gguf", tmp_path / "back", "safetensors")
    own, text = (
        Tokenizer.from_pretrained(MICRO),
        "def f(x): return x+1  # caf\u00e9 \u6b65<|im_end|>\n\n12345",
    )
    messages = [{"role": "user", "content": "hi"}]
    for path in (tmp_path / "m.gguf", tmp_path / "back"):
        tokenizer = Tokenizer.from_pretrained(path)
        assert tokenizer.encode(text) == own.encode(text)
        assert (tokenizer.eos_token_ids, tokenizer.bos_token_id) == (own.eos_token_ids, own.bos_token_id)
        assert ChatTemplate.from_pretrained(path).render(messages) == ChatTemplate.from_pretrained(
            MICRO
        ).render(messages)
    metadata = read_gguf(tmp_path / "m.gguf").metadata
    assert metadata["tokenizer.ggml.pre"] == "gpt-2"
    assert metadata["tokenizer.ggml.eos_token_id"] == own.token_id("<|im_end|>")
    # What llama.cpp builds from the keys that it reads is the same tokenizer.
    del metadata["tokenizer.huggingface.json"]
    from stepflash.chat.gguf_tokenizer import backend_from_gguf

    assert backend_from_gguf(metadata, source="m").encode(text).ids == own.encode(text)


# ---- quantised types ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("type_name", ["Q8_0", "Q4_K", "Q5_K", "Q6_K"])
def test_bytes_are_those_of_ggml(type_name: str) -> None:
    """tests/fixtures/gguf/quantized.npz: `ggml_quantize_chunk` of llama.cpp b11434 (x86-64) on 64 rows of 256."""
    stored = np.load(FIXTURES / "gguf" / "quantized.npz")
    values, wanted = torch.from_numpy(stored["values"]), torch.from_numpy(stored[type_name])
    assert torch.equal(encode(values, type_name).view(wanted.shape), wanted)
    pieces = [values.view(-1)[:1000], values.view(-1)[1000:1100], values.view(-1)[1100:]]
    assert torch.equal(torch.cat(list(encode_pieces(pieces, type_name))).view(wanted.shape), wanted)
    # Not only equal but good: relative to plain rounding with the same number of bits.
    decoded = dequantize(wanted, type_name)[:16]
    steps = {"Q8_0": 127, "Q4_K": 7.5, "Q5_K": 15.5, "Q6_K": 31}[type_name]
    rounding = values[:16].abs().max() / steps / 12**0.5
    assert (decoded - values[:16]).square().mean().sqrt() < rounding


def test_q4_k_s_of_the_released_model_has_the_published_size() -> None:
    """README: 111.5 GB. llama.cpp's quantiser makes the same choices."""
    config = with_mtp_modules(released_config(), 0)
    types = gguf_export.tensor_types(config, "q4_k_s")
    total = sum(
        tensor_num_bytes(row.shape[::-1], GGML_TYPES[TYPE_IDS[types[row.gguf]]]) for row in expected(config)
    )
    assert total / 1e9 == pytest.approx(111.5, abs=0.5)
    assert types["output.weight"] == "Q6_K"
    assert {name for name, kind in types.items() if kind == "Q5_K"} == {
        *(f"blk.{i}.attn_v.weight" for i in range(4)),
        *(f"blk.{i}.ffn_down.weight" for i in range(3)),
        *(f"blk.{i}.ffn_down_{part}.weight" for i in (3, 4) for part in ("exps", "shexp")),
    }


def test_rotary_table_is_for_the_dimensions_that_turn() -> None:
    """Spec 2.4's vector for 64 of 128 dimensions; llama.cpp wants 64 entries and uses the first 32."""
    table = gguf_export.rotary_divisors(released_config())
    assert table is not None
    assert table.tolist() == pytest.approx(
        [1.0] * 14 + [1.1384, 1.3745, 1.5764, 1.7337, 1.8476, 1.9256, 1.9773] + [2.0] * 11 + [1.0] * 32,
        abs=1e-4,
    )


def test_quantised_file_loads(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path / "small", SMALL)
    sizes = {}
    for type_name in ("q8_0", "q4_k_s"):
        out = tmp_path / f"{type_name}.gguf"
        sizes[type_name] = convert(tmp_path / "small", out, "gguf", type_name).num_bytes
        assert out.stat().st_size > sizes[type_name]
        model = load_model(out, dtype="float32").state_dict()
        for name, tensor in all_tensors(tmp_path / "small").items():
            error = (model[name] - tensor.float()).norm() / tensor.float().norm()
            assert error < {"q8_0": 0.01, "q4_k_s": 0.09}[type_name], name
    assert sizes["q4_k_s"] < 0.6 * sizes["q8_0"]


# ---- memory and errors ------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("to", "type_name"), [("gguf", "q8_0"), ("safetensors", "f32")])
def test_memory_does_not_grow_with_the_model(tmp_path: Path, to: str, type_name: str) -> None:
    """Peak of a process that converts 130 MB against one that converts 40 MB, already more than any piece."""
    # Not ru_maxrss: Linux starts it at the size of the parent.
    code = """
import re, sys
from pathlib import Path
from stepflash.tools.conversion import convert
convert(sys.argv[1], Path(sys.argv[2]), sys.argv[3], sys.argv[4])
print(int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024)
"""
    peaks, sizes = {}, {}
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for name, size in {"a": replace(SMALL, experts=16), "b": replace(SMALL, experts=64)}.items():
        write_random_checkpoint(tmp_path / name, size)
        out = tmp_path / f"{name}-out{'.gguf' if to == 'gguf' else ''}"
        command = [sys.executable, "-W", "ignore", "-c", code, str(tmp_path / name), str(out), to, type_name]
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=120, env=environment, check=True
        )
        peaks[name] = int(result.stdout)
        sizes[name] = sum(file.stat().st_size for file in (tmp_path / name).glob("*.safetensors"))
    assert sizes["b"] - sizes["a"] > 80e6
    assert peaks["b"] - peaks["a"] < 30e6


def test_places_that_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for place, to, message in (
        (out, "gguf", "name of a .gguf file"),
        (tmp_path / "x.gguf", "safetensors", "name of a folder"),
        (MICRO, "safetensors", "is the model itself"),
    ):
        with pytest.raises(WeightsError, match=message):
            convert(MICRO, place, to, overwrite=True)
    with pytest.raises(ConfigError, match="safetensors has no type 'q8_0'"):
        convert(MICRO, out, "safetensors", "q8_0")
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(WeightsError, match="exists; --overwrite"):
        convert(MICRO, out, "safetensors")
    convert(MICRO, out, "safetensors", shard_bytes=1 << 20, overwrite=True)
    convert(MICRO, out, "safetensors", overwrite=True)
    assert [file.name for file in out.glob("*.safetensors")] == ["model-00001-of-00001.safetensors"]
    assert (out / "mine.txt").read_text() == "mine"
    assert_same(all_tensors(out), all_tensors(MICRO))


@pytest.mark.parametrize("to", ["gguf", "safetensors"])
def test_bad_weights_leave_nothing_behind(tmp_path: Path, to: str) -> None:
    source = tmp_path / "bad"
    source.mkdir()
    tensors: dict[str, Any] = all_tensors(MICRO)
    tensors["model.layers.3.moe.up_proj.weight"][1, 2, 3] = math.nan
    save_file(tensors, source / "model.safetensors")
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (source / file).write_bytes((MICRO / file).read_bytes())
    out = tmp_path / ("m.gguf" if to == "gguf" else "m")
    with pytest.raises(WeightsError, match=r"model.layers.3.moe.up_proj.weight .* NaN or infinite"):
        convert(source, out, to)
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


def test_rounding_of_float32_matrices_is_told(tmp_path: Path) -> None:
    wide = tmp_path / "wide"
    assert not convert(MICRO, wide, "safetensors", "f32").notes
    assert convert(wide, tmp_path / "m.gguf", "gguf", "bf16").notes == (
        "matrices of F32 were rounded to BF16; --type f32 keeps every bit",
    )
    assert not convert(wide, tmp_path / "f32.gguf", "gguf", "f32").notes
    assert not convert(MICRO, tmp_path / "same.gguf", "gguf", "bf16").notes


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(MICRO), str(tmp_path / "m.gguf"), "--to", "gguf", "--type", "q8_0"]) == 0
    output = capsys.readouterr()
    assert output.out == f"{tmp_path / 'm.gguf'}: 0.002812 B parameters, 0.00302 GB, 8.59 bits a weight\n"
    assert main(["convert", str(MICRO), str(tmp_path / "m.gguf"), "--to", "gguf"]) == 2
    assert "exists; --overwrite" in capsys.readouterr().err
