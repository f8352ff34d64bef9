"""Safetensors folders: bad files (one clear line each), damaged headers (property), FP8 and experts (brute force)."""

import json
import random
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from stepflash.errors import WeightsError
from stepflash.weights.safetensors import fp8_block, read_folder, read_header
from tests.weights.variants import block_scale, micro_tensors, write_folder


def raw_file(path: Path, header: Any, data: bytes = b"") -> Path:
    """A file with any header, valid or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(begin: int, end: int, shape: list[Any] | None = None, dtype: str = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


def test_header_of_the_safetensors_library_is_read(tmp_path: Path) -> None:
    tensors = {
        "a": torch.arange(6.0).view(2, 3),
        "b": torch.ones(5, dtype=torch.bfloat16),
        "c": torch.zeros(0, 4),
    }
    path = tmp_path / "x.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    entries = {item.name: item for item in read_header(path)}
    assert {name: item.shape for name, item in entries.items()} == {"a": (2, 3), "b": (5,), "c": (0, 4)}
    content = path.read_bytes()
    for name, tensor in tensors.items():
        found = content[entries[name].offset :][: entries[name].num_bytes]
        assert found == tensor.flatten().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": entry(0, 8)}, b"\0" * 7, "truncated: its header describes"),
        ({"a": entry(0, 8)}, b"\0" * 9, "1 bytes after the last tensor"),
        ({"a": entry(0, 8), "b": entry(4, 12)}, b"\0" * 12, "overlaps another or leaves a gap"),
        ({"a": entry(0, 8), "b": entry(9, 12)}, b"\0" * 12, "'b' overlaps another or leaves a gap"),
        ({"a": entry(8, 0, [8])}, b"", "no valid data_offsets"),
        ({"a": entry(0, 8, dtype="Q4")}, b"\0" * 8, "'a' has the unknown dtype 'Q4'"),
        ({"a": entry(0, 8, [4], "F32")}, b"\0" * 8, "takes 8 bytes, but F32 [4] needs 16"),
        ({"a": entry(0, 8, [-8])}, b"\0" * 8, "no valid shape"),
        ({"a": entry(0, 1, [True])}, b"\0", "no valid shape"),
        ({"a": entry(0, 8, [2**62, 2**62])}, b"\0" * 8, "takes 8 bytes"),
        ({"a": [1]}, b"", "'a' is not an object"),
        ([1], b"", "not a JSON object"),
        (b'{"a": 1, "a": 2}', b"", "'a' appears twice"),
        (b"{" * 100_000, b"", "not valid JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", b"", "not valid JSON"),
        (b"\xff\xfe", b"", "not valid JSON"),
    ],
)
def test_bad_header_gives_one_clear_line(tmp_path: Path, header: Any, data: bytes, message: str) -> None:
    path = raw_file(tmp_path / "x.safetensors", header, data)
    with pytest.raises(WeightsError) as caught:
        read_header(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content", [b"", b"\1\0\0", struct.pack("<Q", 2**63) + b"{}", struct.pack("<Q", 10**9)]
)
def test_bad_header_length_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match="damaged or truncated"):
        read_header(path)


def test_a_thousand_damaged_headers_end_cleanly(tmp_path: Path) -> None:
    good_path = tmp_path / "good.safetensors"
    save_file({f"layer.{i}.weight": torch.ones(i + 1, 3) for i in range(8)}, good_path)
    good = good_path.read_bytes()
    header_end = 8 + struct.unpack_from("<Q", good)[0]
    path = tmp_path / "bad.safetensors"
    rng = random.Random(3)
    messages = []
    tracemalloc.start()
    for _ in range(1000):
        data = bytearray(good)
        kind = rng.randrange(4)
        if kind == 0:
            for _ in range(rng.randint(1, 6)):
                data[rng.randrange(header_end)] = rng.randrange(256)
        elif kind == 1:
            data[0:8] = struct.pack("<Q", rng.choice([0, 1, 2**16, 2**31, 2**63, 2**64 - 1, header_end]))
        elif kind == 2:
            del data[rng.randrange(len(data)) :]
        else:
            position = rng.randrange(8, header_end)
            data[position:position] = rng.choice([b"9" * 30, b"[" * 500, b'"', b"\\u0000", b"-", b"\0"])
        path.write_bytes(data)
        try:
            read_header(path)
        except WeightsError as error:
            messages.append(str(error))
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(messages) > 800  # a changed letter in a name is still a valid file
    assert not any("\n" in message for message in messages)
    assert peak_bytes < 4 << 20


# ---- folders ------------------------------------------------------------------------------------------------


def index_of(folder: Path) -> dict[str, str]:
    return json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]


def set_index(folder: Path, weight_map: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def truncate_shard(folder: Path) -> None:
    path = folder / "model-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def remove_shard(folder: Path) -> None:
    (folder / "model-00002.safetensors").unlink()


def unlist_tensor(folder: Path) -> None:
    set_index(folder, {name: shard for name, shard in index_of(folder).items() if name != "lm_head.weight"})


def list_absent_tensor(folder: Path) -> None:
    set_index(folder, index_of(folder) | {"extra.weight": "model-00001.safetensors"})


def put_tensor_in_both(folder: Path) -> None:
    save_file({"lm_head.weight": torch.ones(2)}, folder / "model-00003.safetensors")
    set_index(folder, index_of(folder) | {"extra.weight": "model-00003.safetensors"})


def escape_folder(folder: Path) -> None:
    set_index(folder, index_of(folder) | {"lm_head.weight": "../model-00001.safetensors"})


def break_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("{nonsense")


def remove_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").unlink()


def only_pickles(folder: Path) -> None:
    for path in [*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"]:
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate_shard, "model-00002.safetensors: truncated: its header describes"),
        (remove_shard, "model-00002.safetensors: absent, but model.safetensors.index.json lists it"),
        (unlist_tensor, "holds tensor 'lm_head.weight', which model.safetensors.index.json lists nowhere"),
        (list_absent_tensor, "model-00001.safetensors: tensor 'extra.weight' is absent"),
        (put_tensor_in_both, "model-00003.safetensors: holds tensor 'lm_head.weight', which"),
        (escape_folder, "mapped to '../model-00001.safetensors', which is not a file name"),
        (break_index, "model.safetensors.index.json: not valid JSON"),
        (remove_index, "2 safetensors files but no model.safetensors.index.json"),
        (only_pickles, "convert them to safetensors (pickles can run code)"),
    ],
)
def test_bad_folder_gives_one_clear_line(
    tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    folder = write_folder(tmp_path / "model", micro_tensors())
    damage(folder)
    with pytest.raises(WeightsError) as caught:
        read_folder(folder, {})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_single_file_without_index(tmp_path: Path) -> None:
    save_file({"lm_head.weight": torch.ones(2, 3)}, tmp_path / "model.safetensors")
    assert list(read_folder(tmp_path, {}).tensors) == ["lm_head.weight"]


@pytest.mark.parametrize("shape", [(256, 384), (200, 300), (3, 200, 130), (2, 64, 64)])
def test_fp8_blocks_are_multiplied_by_their_scale(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """Each value by hand: fp8 * scale[row // 128, column // 128], stacked or not, edges not whole blocks."""
    torch.manual_seed(0)
    weight, scale = block_scale(torch.randn(shape))
    save_file({"x.weight": weight, "x.weight_scale_inv": scale}, tmp_path / "model.safetensors")
    stored = read_folder(tmp_path, {}).tensors["x.weight"]
    found = torch.empty(shape)
    stored.fill(found)
    wanted = torch.empty(shape)
    for index in torch.cartesian_prod(*[torch.arange(n) for n in shape]).tolist():
        *expert, row, column = index
        wanted[tuple(index)] = weight[tuple(index)].float() * scale[(*expert, row // 128, column // 128)]
    assert torch.equal(found, wanted)
    assert stored.num_bytes == weight.nbytes + scale.nbytes


def test_fp8_without_scale_and_with_a_wrong_one(tmp_path: Path) -> None:
    weight, scale = block_scale(torch.randn(256, 384))
    save_file({"x.weight": weight}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"'x.weight' is FP8, but x.weight_scale_inv is absent"):
        read_folder(tmp_path, {})
    save_file(
        {"x.weight": weight, "x.weight_scale_inv": scale[:, :2].contiguous()}, tmp_path / "model.safetensors"
    )
    with pytest.raises(WeightsError, match=r"'x.weight_scale_inv' has shape \[2, 2\], expected \[2, 3\]"):
        read_folder(tmp_path, {})


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scale_that_is_no_number_names_its_tensor(tmp_path: Path, bad: float) -> None:
    weight, scale = block_scale(torch.randn(256, 384))
    scale[1, 2] = bad
    save_file({"x.weight": weight, "x.weight_scale_inv": scale}, tmp_path / "model.safetensors")
    stored = read_folder(tmp_path, {}).tensors["x.weight"]
    with pytest.raises(WeightsError, match=r"scale 'x.weight_scale_inv' has 1 NaN or infinite values"):
        stored.fill(torch.empty(256, 384))


def test_scale_beside_a_plain_weight_is_unexpected(tmp_path: Path) -> None:
    save_file(
        {"x.weight": torch.ones(4, 4), "x.weight_scale_inv": torch.ones(1, 1)}, tmp_path / "model.safetensors"
    )
    assert read_folder(tmp_path, {}).unexpected == ["x.weight_scale_inv"]


@pytest.mark.parametrize("spelling", ["experts.{}", "{}"])
@pytest.mark.parametrize("fp8", [False, True])
def test_split_experts_are_stacked(tmp_path: Path, spelling: str, fp8: bool) -> None:
    experts = torch.randn(12, 130, 256)  # more than ten: order is by number, not by text
    tensors = {}
    for e, expert in enumerate(experts):
        name = f"model.layers.3.moe.{spelling.format(e)}.up_proj.weight"
        if fp8:
            tensors[name], tensors[name + "_scale_inv"] = block_scale(expert)
        else:
            tensors[name] = expert.to(torch.bfloat16).contiguous()
    save_file(tensors, tmp_path / "model.safetensors")
    folder = read_folder(tmp_path, {})
    stored = folder.tensors["model.layers.3.moe.up_proj.weight"]
    assert (stored.shape, folder.unexpected) == ((12, 130, 256), [])
    found = torch.empty(12, 130, 256)
    stored.fill(found)
    # e4m3 has 4 significant bits: half a step is 1/16 of the value.
    assert torch.allclose(found, experts, rtol=1 / 15 if fp8 else 1 / 250, atol=2e-2 if fp8 else 0)
    assert (stored.scales is not None) == fp8


def test_missing_expert_and_double_spelling_are_refused(tmp_path: Path) -> None:
    name = "model.layers.3.moe.experts.{}.up_proj.weight"
    save_file({name.format(e): torch.ones(2, 2) for e in (0, 1, 3)}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"expert 2 of model.layers.3.moe.up_proj.weight is absent"):
        read_folder(tmp_path, {})
    both = {name.format(0): torch.ones(2, 2), "model.layers.3.moe.up_proj.weight": torch.ones(1, 2, 2)}
    save_file(both, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match="both stacked and split"):
        read_folder(tmp_path, {})


def test_vision_tower_of_a_wrapper_is_set_aside(tmp_path: Path) -> None:
    save_file(
        {"vision_model.conv1.weight": torch.ones(2), "lm_head.weight": torch.ones(2)},
        tmp_path / "model.safetensors",
    )
    folder = read_folder(tmp_path, {})
    assert (list(folder.tensors), folder.vision) == (["lm_head.weight"], ["vision_model.conv1.weight"])


def test_quantization_config(tmp_path: Path) -> None:
    assert fp8_block(tmp_path, {}) == (128, 128)
    fp8 = {"quant_method": "fp8", "weight_block_size": [64, 128]}
    assert fp8_block(tmp_path, {"text_config": {"quantization_config": fp8}}) == (64, 128)
    with pytest.raises(WeightsError, match="quantised with 'awq'"):
        fp8_block(tmp_path, {"quantization_config": {"quant_method": "awq"}})
    with pytest.raises(WeightsError, match="not two positive integers"):
        fp8_block(tmp_path, {"quantization_config": {"quant_method": "fp8", "weight_block_size": None}})


def test_unsupported_dtype_is_named(tmp_path: Path) -> None:
    save_file({"lm_head.weight": torch.ones(2, dtype=torch.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"'lm_head.weight' is stored as I8; supported: F32, F16, BF16"):
        read_folder(tmp_path, {})
