"""GGUF container: bytes laid out by hand, a file of the `gguf` package (golden), and 1,000 damaged files."""

import random
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepflash.errors import WeightsError
from stepflash.gguf_file import (
    GGML_TYPES,
    TensorToWrite,
    TypedValue,
    read_gguf,
    tensor_num_bytes,
    write_gguf,
)

GOLDEN = Path(__file__).parent / "fixtures" / "gguf"


def pack_string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def hand_made_file(
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    type_id: int = 0,
    shape: tuple[int, ...] = (3, 2),
    offset: int = 0,
    data: bytes = struct.pack("<6f", *range(6)),
) -> bytes:
    """One key and one tensor, every field written out by the layout in ggml's docs/gguf.md."""
    header = magic + struct.pack("<IQQ", version, 1, 1)
    header += pack_string("general.architecture") + struct.pack("<I", 8) + pack_string("step35")
    header += pack_string("blk.0.weight") + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    header += struct.pack("<IQ", type_id, offset)
    return header + b"\0" * (-len(header) % 32) + data


def write(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("version", [2, 3])
def test_reads_a_file_laid_out_by_hand(tmp_path: Path, version: int) -> None:
    gguf = read_gguf(write(tmp_path, hand_made_file(version=version)))
    assert gguf.metadata == {"general.architecture": "step35"}
    tensor = gguf.tensors["blk.0.weight"]
    assert (tensor.shape, tensor.type_name, tensor.num_bytes, tensor.num_elements) == ((3, 2), "F32", 24, 6)
    assert tensor.path.read_bytes()[tensor.offset :] == struct.pack("<6f", *range(6))


def test_reads_what_the_gguf_package_wrote() -> None:
    """tests/fixtures/gguf/make_golden.py wrote the file with the `gguf` package 0.19.0."""
    gguf = read_gguf(GOLDEN / "container.gguf")
    assert gguf.metadata == {
        "general.architecture": "step35",
        "general.alignment": 64,
        "test.u8": 200,
        "test.i8": -100,
        "test.u16": 60000,
        "test.i16": -30000,
        "test.u32": 4000000000,
        "test.i32": -2000000000,
        "test.u64": 2**60,
        "test.i64": -(2**60),
        "test.f32": 0.5,
        "test.f64": 0.1,
        "test.bool": True,
        "test.string": "Grüße 步",
        "test.ints": [64, 96, 96, 96],
        "test.floats": [0.0, 7.0, 16.0],
        "test.bools": [False, True, True],
        "test.strings": ["", "a", "Ġthe"],
    }
    assert gguf.alignment == 64
    shapes = {name: (tensor.shape, tensor.type_name) for name, tensor in gguf.tensors.items()}
    assert shapes == {"a": ((3,), "F32"), "b": ((32, 2), "Q8_0"), "c": ((5, 4, 3), "F16")}
    for tensor, first in ((gguf.tensors["a"], "<f"), (gguf.tensors["c"], "<e")):
        raw = tensor.path.read_bytes()[tensor.offset : tensor.offset + tensor.num_bytes]
        assert struct.unpack_from(first, raw) == (1.0,)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a GGUF file: only 0 bytes"),
        (hand_made_file(magic=b"\x93NUM"), "not a GGUF file"),
        (hand_made_file(version=1), "version 1 is not supported"),
        (hand_made_file(version=3 << 24), "big-endian"),
        (hand_made_file(type_id=999), "tensor 'blk.0.weight' has the unknown quantisation type 999"),
        (hand_made_file(type_id=8), "rows of 3 elements are not whole Q8_0 blocks of 32"),
        (hand_made_file(shape=(1, 1, 1, 1, 1)), "has 5 dimensions"),
        (hand_made_file(shape=(0, 2)), "empty shape"),
        (hand_made_file(shape=(2**62, 2**62)), "truncated: tensor 'blk.0.weight' ends at byte"),
        (hand_made_file(offset=7), "not a multiple of the alignment"),
        (hand_made_file()[:-1], "truncated: tensor 'blk.0.weight' ends at byte"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**63, 0), "claims"),
        (
            b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + pack_string("k") + struct.pack("<IIQ", 9, 0, 1 << 23),
            "claims 8388608",
        ),
        (hand_made_file().replace(b"step35", b"\xff" * 6), None),
        (hand_made_file().replace(b"blk", b"\xff\xff\xff"), "tensor name is not UTF-8"),
    ],
)
def test_bad_file_gives_one_clear_line(tmp_path: Path, content: bytes, message: str | None) -> None:
    path = write(tmp_path, content)
    if message is None:  # text values are shown, never looked up, so bad bytes in them do no harm
        assert read_gguf(path).metadata["general.architecture"] == "\ufffd" * 6
        return
    with pytest.raises(WeightsError) as caught:
        read_gguf(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file_and_folder_are_weights_errors(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.gguf", tmp_path):
        with pytest.raises(WeightsError, match="cannot read"):
            read_gguf(path)


@pytest.mark.parametrize("twice", ["key", "tensor"])
def test_duplicates_are_refused(tmp_path: Path, twice: str) -> None:
    pair = pack_string("k") + struct.pack("<IB", 0, 1)
    entry = pack_string("t") + struct.pack("<IQIQ", 1, 1, 24, 0)
    pairs, entries = (2, 1) if twice == "key" else (1, 2)
    header = b"GGUF" + struct.pack("<IQQ", 3, entries, pairs) + pair * pairs + entry * entries
    path = write(tmp_path, header + b"\0" * 64)
    with pytest.raises(WeightsError, match="appears twice"):
        read_gguf(path)


def test_overlapping_tensors_are_refused(tmp_path: Path) -> None:
    entries = b"".join(pack_string(name) + struct.pack("<IQIQ", 1, 9, 0, 0) for name in "ab")
    header = b"GGUF" + struct.pack("<IQQ", 3, 2, 0) + entries
    path = write(tmp_path, header + b"\0" * 200)
    with pytest.raises(WeightsError, match="tensors 'a' and 'b' overlap"):
        read_gguf(path)


def make_sample(path: Path) -> None:
    metadata: dict[str, Any] = {
        "general.architecture": "step35",
        "step35.block_count": 4,
        "step35.attention.head_count": [4, 6, 6, 6],
        "step35.attention.sliding_window_pattern": [False, True, True, True],
        "step35.rope.freq_base": 5e6,
        "tokenizer.ggml.tokens": [f"token {i}" for i in range(50)],
        "big": TypedValue("u64", 2**40),
    }
    tensors = {
        f"blk.{i}.weight": TensorToWrite((32, i + 1), "Q8_0", [bytes([i]) * 34 * (i + 1)]) for i in range(5)
    }
    write_gguf(path, metadata, tensors)


def test_a_thousand_damaged_files_end_cleanly(tmp_path: Path) -> None:
    """Flipped bytes, huge integers, cuts and insertions: an error or a sane result, little memory, no hang."""
    path = tmp_path / "sample.gguf"
    make_sample(path)
    good = path.read_bytes()
    rng = random.Random(7)
    messages: list[str] = []
    tracemalloc.start()
    for _ in range(1000):
        data = bytearray(good)
        kind = rng.randrange(4)
        if kind == 0:
            for _ in range(rng.randint(1, 8)):
                data[rng.randrange(len(data))] = rng.randrange(256)
        elif kind == 1:
            position = rng.randrange(len(data) - 8)
            data[position : position + 8] = struct.pack("<Q", rng.choice([0, 2**31, 2**32, 2**63, 2**64 - 1]))
        elif kind == 2:
            del data[rng.randrange(len(data)) :]
        else:
            position = rng.randrange(len(data))
            data[position:position] = rng.randbytes(rng.randint(1, 16))
        path.write_bytes(data)
        try:
            gguf = read_gguf(path)
        except WeightsError as error:
            messages.append(str(error))
        else:
            assert all(tensor.offset + tensor.num_bytes <= len(data) for tensor in gguf.tensors.values())
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert not any("\n" in message for message in messages)
    assert len(messages) > 500  # a flipped byte inside a name or in tensor data is still a valid file
    assert peak_bytes < 4 << 20


scalars = st.one_of(
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(width=32, allow_nan=False),
    st.text(max_size=20),
)


@settings(max_examples=50)
@given(
    metadata=st.dictionaries(
        st.text(min_size=1, max_size=20).filter(lambda key: key != "general.alignment"),
        scalars
        | st.lists(st.text(max_size=5), min_size=1)
        | st.lists(st.integers(-5, 2**31 - 1), min_size=1),
    ),
    shapes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), max_size=4),
    alignment=st.sampled_from([8, 32, 4096]),
)
def test_written_files_read_back(
    tmp_path_factory: pytest.TempPathFactory,
    metadata: dict[str, Any],
    shapes: list[tuple[int, int]],
    alignment: int,
) -> None:
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    contents = {f"t{i}": random.Random(i).randbytes(4 * a * b) for i, (a, b) in enumerate(shapes)}
    tensors = {
        name: TensorToWrite(shape, "F32", [content[:4], content[4:]])
        for (name, content), shape in zip(contents.items(), shapes, strict=True)
    }
    write_gguf(path, metadata, tensors, alignment)
    gguf = read_gguf(path)
    gguf.metadata.pop("general.alignment", None)
    assert gguf.metadata == metadata
    assert list(gguf.tensors) == list(contents)
    for name, tensor in gguf.tensors.items():
        assert tensor.offset % alignment == 0
        assert path.read_bytes()[tensor.offset : tensor.offset + tensor.num_bytes] == contents[name]


def test_writer_refuses_wrong_bytes_and_leaves_no_file(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    with pytest.raises(ValueError, match="3 bytes given, 8 expected"):
        write_gguf(path, {}, {"t": TensorToWrite((2,), "F32", [b"abc"])})
    with pytest.raises(ValueError, match="no GGUF type"):
        write_gguf(path, {"mixed": [1, "a"]}, {})
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(WeightsError, match="cannot write"):
        write_gguf(tmp_path / "absent" / "model.gguf", {}, {})


def split_model(folder: Path, announced: int = 2) -> list[Path]:
    paths = [folder / f"m-{number:05d}-of-00002.gguf" for number in (1, 2)]
    for number, path in enumerate(paths):
        metadata = {
            "general.architecture": "step35",
            "split.no": TypedValue("u16", number),
            "split.count": TypedValue("u16", 2),
            "split.tensors.count": announced,
        }
        write_gguf(path, metadata, {f"t{number}": TensorToWrite((4,), "F32", [bytes([number]) * 16])})
    return paths


def test_split_model_is_read_as_one(tmp_path: Path) -> None:
    paths = split_model(tmp_path)
    gguf = read_gguf(paths[0])
    assert [tensor.path for tensor in gguf.tensors.values()] == paths
    assert gguf.paths == tuple(paths)
    with pytest.raises(WeightsError, match="give the first part"):
        read_gguf(paths[1])
    paths[1].rename(tmp_path / "elsewhere.gguf")
    with pytest.raises(WeightsError, match=r"m-00002-of-00002.gguf: absent"):
        read_gguf(paths[0])
    with pytest.raises(WeightsError, match="part of a model split into 2 files"):
        read_gguf(tmp_path / "elsewhere.gguf")


def test_split_model_with_a_wrong_count_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="hold 2 tensors, but 5 are announced"):
        read_gguf(split_model(tmp_path, announced=5)[0])


def test_block_sizes_of_the_real_model() -> None:
    """int4 weights of the README: 111.5 GB over 196.96e9 parameters = 4.53 bits, Q4_K is 4.5 bits."""
    q4_k = next(ggml_type for ggml_type in GGML_TYPES.values() if ggml_type.name == "Q4_K")
    assert tensor_num_bytes((4096, 1280, 288), q4_k) * 8 / (4096 * 1280 * 288) == 4.5
