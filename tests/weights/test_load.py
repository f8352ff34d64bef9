"""Loading: golden logits from every layout of the same weights; refusals; memory measured in a fresh process."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from stepflash.errors import WeightsError
from stepflash.weights.load import load_model
from stepflash.weights.random_checkpoint import Size, write_random_checkpoint
from tests.weights.variants import (
    MICRO,
    block_scale,
    golden,
    micro_config,
    micro_tensors,
    write_folder,
    write_micro_gguf,
)

MTP_LAYERS = tuple(f"model.layers.{i}." for i in (8, 9, 10))


def assert_golden(path: Path, **options: Any) -> None:
    """Trunk and MTP log-probabilities equal those of independent implementations to 2e-4."""
    model = load_model(path, dtype="float32", **options)
    ids = golden("transformers-logits-f32", "ids").long()
    wanted = golden("transformers-logits-f32", "logits").log_softmax(-1)
    assert (model.logits(ids).log_softmax(-1) - wanted).abs().max() < 2e-4
    if model.config.num_mtp_layers:
        wanted = golden("mtp-logits-f32", "mtp_logits").log_softmax(-1)
        found = model.mtp_logits(ids).log_softmax(-1)
        assert torch.equal(found.isnan(), wanted.isnan())
        assert (found - wanted).nan_to_num().abs().max() < 2e-4


def split_experts(tensors: dict[str, Tensor], spelling: str) -> dict[str, Tensor]:
    split: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if ".moe." in name and tensor.ndim == 3:
            at, _, rest = name.partition(".moe.")
            split |= {f"{at}.moe.{spelling.format(e)}.{rest}": expert for e, expert in enumerate(tensor)}
        else:
            split[name] = tensor
    return split


def test_released_layout_gives_the_golden_logits() -> None:
    assert_golden(MICRO)


@pytest.mark.parametrize("spelling", ["experts.{}", "{}"])
def test_split_experts_give_the_golden_logits(tmp_path: Path, spelling: str) -> None:
    assert_golden(write_folder(tmp_path, split_experts(micro_tensors(), spelling), num_shards=3))


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model."])
def test_wrapped_names_and_config_give_the_golden_logits(tmp_path: Path, prefix: str) -> None:
    tensors = {name.replace("model.", prefix, 1): tensor for name, tensor in micro_tensors().items()}
    tensors["vision_model.conv1.weight"] = torch.ones(3)
    wrapper = {"model_type": "step3p7", "text_config": micro_config(), "eos_token_id": [1, 2]}
    assert_golden(write_folder(tmp_path, tensors, wrapper))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_stored_dtypes_give_the_golden_logits(tmp_path: Path, dtype: torch.dtype) -> None:
    # Micro's bf16 weights of ordinary size are float16 numbers too; the smallest lose bits far below 2e-4.
    assert_golden(
        write_folder(tmp_path, {name: tensor.to(dtype) for name, tensor in micro_tensors().items()})
    )


def test_gguf_gives_the_golden_logits(tmp_path: Path) -> None:
    assert_golden(write_micro_gguf(tmp_path / "micro.gguf"))
    assert_golden(write_micro_gguf(tmp_path / "micro-bf16.gguf", "BF16"))


def test_fp8_equals_the_same_numbers_stored_plainly(tmp_path: Path) -> None:
    """Experts and some attention in FP8, the rest bf16: logits equal those of the weights decoded in the test."""
    fp8, plain = {}, {}
    for name, tensor in micro_tensors().items():
        fp8[name] = plain[name] = tensor
        if (".moe." in name and tensor.ndim == 3) or name == "model.layers.4.self_attn.o_proj.weight":
            fp8[name], scale = block_scale(tensor)
            fp8[name + "_scale_inv"] = scale
            # Every matrix of micro is one block of at most 128 rows and columns.
            assert scale.shape[-2:] == (1, 1)
            plain[name] = fp8[name].float() * scale
    config = micro_config() | {
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}
    }
    from_fp8 = load_model(write_folder(tmp_path / "fp8", fp8, config), dtype="float32")
    from_plain = load_model(write_folder(tmp_path / "plain", plain), dtype="float32")
    ids = torch.arange(64)
    assert torch.equal(from_fp8.logits(ids), from_plain.logits(ids))
    from_bf16 = load_model(MICRO, dtype="float32").logits(ids)
    assert not torch.equal(from_fp8.logits(ids), from_bf16)


def test_dtypes_of_the_parameters() -> None:
    for dtype in ("bfloat16", "float16", "float32"):
        model = load_model(MICRO, dtype=dtype)
        wide = {name for name, p in model.named_parameters() if p.dtype == torch.float32}
        assert {p.dtype for p in model.parameters()} == {torch.float32, getattr(torch, dtype)}
        if dtype != "float32":
            norms = {name for name in micro_tensors() if "norm" in name}
            router = {name for name in micro_tensors() if name.endswith(("moe.gate.weight", "router_bias"))}
            assert wide == norms | router
    with pytest.raises(ValueError, match="dtype is 'int8'"):
        load_model(MICRO, dtype="int8")


def test_mapped_weights_never_write_to_the_file() -> None:
    before = (MICRO / "model-00001.safetensors").read_bytes()
    model = load_model(MICRO)
    copy = load_model(MICRO, memory_map=False)
    with torch.no_grad():
        for mapped, copied in zip(model.parameters(), copy.parameters(), strict=True):
            assert torch.equal(mapped, copied)
            mapped.zero_()
    assert (MICRO / "model-00001.safetensors").read_bytes() == before
    assert any(parameter.any() for parameter in load_model(MICRO).parameters())


# ---- MTP modules --------------------------------------------------------------------------------------------


def test_mtp_modules_can_be_left_out_or_required(tmp_path: Path) -> None:
    assert load_model(MICRO, mtp=True).config.num_mtp_layers == 3
    without = load_model(MICRO, mtp=False)
    assert without.config.num_mtp_layers == 0
    assert not any(name.startswith(MTP_LAYERS) for name in without.state_dict())
    trunk = {name: t for name, t in micro_tensors().items() if not name.startswith(MTP_LAYERS)}
    folder = write_folder(tmp_path, trunk)
    assert_golden(folder)
    assert load_model(folder).config.num_mtp_layers == 0
    with pytest.raises(WeightsError, match="has no MTP modules"):
        load_model(folder, mtp=True)


def test_only_the_first_mtp_module_is_there(tmp_path: Path) -> None:
    tensors = {name: t for name, t in micro_tensors().items() if not name.startswith(MTP_LAYERS[1:])}
    model = load_model(write_folder(tmp_path, tensors), dtype="float32")
    assert model.config.num_mtp_layers == 1
    ids = golden("transformers-logits-f32", "ids").long()
    wanted = golden("mtp-logits-f32", "mtp_logits")[:1, :255]
    assert (model.mtp_logits(ids)[:, :255].log_softmax(-1) - wanted.log_softmax(-1)).abs().max() < 2e-4


@pytest.mark.parametrize("mtp", [True, False, None])
def test_gguf_with_and_without_mtp(tmp_path: Path, mtp: bool | None) -> None:
    embedded = write_micro_gguf(tmp_path / "with.gguf")
    absent = write_micro_gguf(tmp_path / "without.gguf", mtp=False)
    assert load_model(embedded, mtp=mtp).config.num_mtp_layers == (0 if mtp is False else 3)
    if mtp:
        with pytest.raises(WeightsError, match="has no MTP modules"):
            load_model(absent, mtp=mtp)
    else:
        assert load_model(absent, mtp=mtp).config.num_mtp_layers == 0


# ---- refusals -----------------------------------------------------------------------------------------------


def test_left_over_and_missing_tensors_are_both_listed(tmp_path: Path) -> None:
    tensors = micro_tensors()
    tensors["model.layers.3.self_attn.k_projection.weight"] = tensors.pop(
        "model.layers.3.self_attn.k_proj.weight"
    )
    del tensors["model.layers.10.enorm.weight"]
    with pytest.raises(WeightsError) as caught:
        load_model(write_folder(tmp_path, tensors))
    message = str(caught.value)
    assert (
        "2 tensors missing: model.layers.3.self_attn.k_proj.weight, model.layers.10.enorm.weight" in message
    )
    assert "1 unexpected: model.layers.3.self_attn.k_projection.weight in model-0000" in message
    assert "\n" not in message


def test_long_lists_are_shortened(tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in micro_tensors().items() if "self_attn" not in name}
    with pytest.raises(WeightsError) as caught:
        load_model(write_folder(tmp_path, tensors))
    assert "77 tensors missing" in str(caught.value)  # 7 in each of 11 layers
    assert "and 72 more" in str(caught.value)
    assert len(str(caught.value)) < 600


def test_wrong_shape_names_tensor_expected_and_found(tmp_path: Path) -> None:
    tensors = micro_tensors() | {"lm_head.weight": torch.zeros(500, 128)}
    with pytest.raises(WeightsError, match=r"lm_head.weight is \[500, 128\], expected \[512, 128\]"):
        load_model(write_folder(tmp_path, tensors))


def test_one_expert_too_few(tmp_path: Path) -> None:
    name = "model.layers.5.moe.up_proj.weight"
    tensors = split_experts(micro_tensors(), "experts.{}")
    del tensors["model.layers.5.moe.experts.7.up_proj.weight"]
    with pytest.raises(WeightsError, match=rf"{name} is \[7, 64, 128\], expected \[8, 64, 128\]"):
        load_model(write_folder(tmp_path, tensors))


def test_rope_freqs_needs_a_gguf() -> None:
    with pytest.raises(WeightsError, match="has no rope_freqs tensor"):
        load_model(MICRO, rope_freqs="file")
    with pytest.raises(ValueError, match="rope_freqs is 'nonsense'"):
        load_model(MICRO, rope_freqs="nonsense")


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_text("hello, I am no model at all")
    with pytest.raises(WeightsError, match="not a GGUF file"):
        load_model(tmp_path / "model.gguf")


# ---- memory -------------------------------------------------------------------------------------------------

# The same load goes before: it brings in imports, code pages and compiled products. What it left in the heap is given
# back, or it would hide the buffers of the second one. Writing 5 to clear_refs resets the peak.
MEASURE = """
import ctypes, sys
from stepflash.weights.load import load_model
def status(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) * 1024
path, dtype = sys.argv[1:]
load_model(path, dtype=dtype, memory_map=False)
ctypes.CDLL(None).malloc_trim(0)
before = status("VmRSS:")
open("/proc/self/clear_refs", "w").write("5")
model = load_model(path, dtype=dtype, memory_map=False)
print(status("VmHWM:") - before, sum(parameter.nbytes for parameter in model.parameters()))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_peak_memory_stays_within_five_percent(tmp_path: Path) -> None:
    """A model of 260 MB in float32, experts from FP8 and the rest from bf16 shards."""
    size = Size(
        hidden=512, layers=8, dense=2, experts=32, top_k=4, expert_inter=192, shared_inter=192, inter=512, heads=4,
        sliding_heads=6, kv_heads=2, head_dim=64, window=32, vocab=2048, context=4096, rope_original=256,
    )  # fmt: skip
    folder = tmp_path / "model"
    write_random_checkpoint(folder, size, shard_bytes=32 << 20)
    make_fp8(folder)
    command = [sys.executable, "-c", MEASURE, str(folder), "float32"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=300)
    peak_bytes, model_bytes = map(int, result.stdout.split())
    assert model_bytes > 250e6
    assert peak_bytes < 1.05 * model_bytes


def make_fp8(folder: Path) -> None:
    """Store the routed experts of a folder in FP8, with scales that have no meaning but the right shape."""
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    for path in sorted(folder.glob("*.safetensors")):
        tensors = load_file(path)
        for name in [name for name, tensor in tensors.items() if tensor.ndim == 3]:
            rows, columns = tensors[name].shape[1:]
            scales = torch.ones(len(tensors[name]), -(-rows // 128), -(-columns // 128))
            tensors |= {name: tensors[name].to(torch.float8_e4m3fn), name + "_scale_inv": scales}
            weight_map[name + "_scale_inv"] = path.name
        save_file(tensors, path)
    index.write_text(json.dumps({"weight_map": weight_map}))
