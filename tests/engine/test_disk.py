"""The prefix cache across a restart: same tokens, same hits, and never data of another model."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from stepflash.engine import disk
from stepflash.engine.core import EngineCore
from stepflash.engine.disk import origin
from stepflash.errors import ConfigError
from tests.engine.conftest import drive, request

NewCore = Callable[..., EngineCore]
Golden = tuple[list[int], list[int]]


@pytest.mark.parametrize("dtype", [None, torch.int8])
def test_a_restarted_engine_continues_where_the_old_one_was(
    new_core: NewCore, golden: Golden, tmp_path: Path, dtype: torch.dtype | None
) -> None:
    prompt, expected = golden
    file = tmp_path / "new-folder" / "prefix.safetensors"
    old = new_core(prefix_cache_path=file, kv_dtype=dtype)
    first = drive(
        old, request("a", prompt, max_tokens=40, draft_depth=3), request("b", prompt[:50], draft_depth=0)
    )
    again = drive(old, request("c", prompt + first["a"].token_ids, max_tokens=30, draft_depth=3))["c"]
    old.close()
    assert [path.name for path in file.parent.iterdir()] == ["prefix.safetensors"]

    new = new_core(prefix_cache_path=file, kv_dtype=dtype)
    new.check_integrity()
    assert new.stats().num_snapshots == old.stats().num_snapshots
    assert new.stats().kv_used_bytes == old.stats().kv_used_bytes
    done = drive(new, request("c", prompt + first["a"].token_ids, max_tokens=30, draft_depth=3))["c"]
    assert done.token_ids == again.token_ids
    if dtype is None:
        assert first["a"].token_ids + done.token_ids == expected[:70]
    assert done.stats.num_cached_tokens == 192
    assert (
        drive(new, request("d", prompt[:50], draft_depth=0, max_tokens=2))["d"].stats.num_cached_tokens == 48
    )
    new.prefix.clear()  # type: ignore[union-attr]
    assert new.cache.used_bytes == 0


def test_a_smaller_cache_takes_the_most_recent_prefixes(
    new_core: NewCore, golden: Golden, tmp_path: Path
) -> None:
    file = tmp_path / "prefix.safetensors"
    old = new_core(prefix_cache_path=file)
    for i in range(6):
        drive(old, request(f"r{i}", golden[0][i : i + 80], max_tokens=2))
    old.close()
    new = new_core(prefix_cache_path=file, max_num_seqs=1, max_model_len=256, kv_cache_bytes=1_600_000)
    new.check_integrity()
    assert 0 < new.stats().num_snapshots < old.stats().num_snapshots
    last = drive(new, request("r5", golden[0][5:85], max_tokens=2))["r5"]
    assert last.stats.num_cached_tokens == 72
    limited = new_core(prefix_cache_path=file, prefix_cache_disk_bytes=200_000)
    limited.close()
    assert 0 < file.stat().st_size < 300_000


def test_a_file_of_another_model_is_refused(new_core: NewCore, golden: Golden, tmp_path: Path) -> None:
    file = tmp_path / "prefix.safetensors"
    core = new_core(prefix_cache_path=file)
    drive(core, request("a", golden[0], max_tokens=2))
    core.close()
    good = file.read_bytes()
    with pytest.raises(
        ConfigError, match=r"prefix\.safetensors: .*computed with block_size 8, not 16 as here"
    ):
        new_core(prefix_cache_path=file, block_size=16)
    model = core.runner.model
    before = origin(model, core.cache).digest
    with torch.no_grad():
        norm = model.model.norm.weight
        norm[0] += 1
        assert origin(model, core.cache).digest != before
        with pytest.raises(ConfigError, match="computed by another model or configuration"):
            new_core(prefix_cache_path=file)
        norm[0] -= 1
    assert origin(model, core.cache).digest == before
    assert file.read_bytes() == good
    assert new_core(prefix_cache_path=file).stats().num_snapshots > 0
    # Told before any work is done, not after it.
    with pytest.raises(ConfigError, match=r"cannot be saved.*File exists"):
        new_core(prefix_cache_path=file / "cache")
    file.unlink()
    file.mkdir()
    with pytest.raises(ConfigError, match=r"cannot be saved: .*prefix\.safetensors is a folder"):
        new_core(prefix_cache_path=file)
    weights = tmp_path / "model.safetensors"
    save_file({"weight": torch.ones(3)}, weights, {"format": "pt"})
    with pytest.raises(ConfigError, match=r"model\.safetensors: this is no prefix cache"):
        new_core(prefix_cache_path=weights)
    assert weights.exists()


def test_a_damaged_file_is_put_aside_and_the_cache_starts_empty(
    new_core: NewCore, golden: Golden, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file, aside = tmp_path / "prefix.safetensors", tmp_path / "prefix.safetensors.damaged"
    core = new_core(prefix_cache_path=file)
    tokens = drive(core, request("a", golden[0], max_tokens=2))["a"].token_ids
    core.close()
    good = file.read_bytes()
    header_bytes = 8 + int.from_bytes(good[:8], "little")
    generator = random.Random(0)
    places = [header_bytes, header_bytes + 1000, len(good) - 40, len(good) - 1]
    places += [generator.randrange(header_bytes, len(good)) for _ in range(20)]
    flipped = [
        good[:place] + bytes([good[place] ^ 1 << generator.randrange(8)]) + good[place + 1 :]
        for place in places
    ]
    # Digits of the digest and of the tree: whatever they say now, they are not believed.
    for name in (b"digest", b"parents"):
        at = good.index(name) + 15
        flipped.append(good[:at] + (b"7" if good[at : at + 1] != b"7" else b"8") + good[at + 1 :])
    # An end before the beginning.
    at = good.index(b'"dtype": "U8"')
    begin = good.index(b"data_offsets", at)
    end = good.index(b"]", begin)
    flipped.append(good[:begin] + b'data_offsets": [0, -9'.ljust(end - begin) + good[end:])
    cut = [b"", good[:5], good[:8], good[:300], good[:header_bytes], good[:-100], good[:-1]]
    other = [b"\0" * 5000, b"my notes\n" * 1000, generator.randbytes(5000), (1).to_bytes(8, "little") + b"7"]
    for data in (*flipped, *cut, *other):
        file.write_bytes(data)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            core = new_core(prefix_cache_path=file)
        (record,) = caplog.records
        assert record.message.startswith(f"{file}: damaged prefix cache (")
        assert record.message.endswith("it is prefix.safetensors.damaged now, and the cache starts empty")
        if data in flipped[: len(places) + 2]:
            assert "its bytes do not match its checksum" in record.message
        assert aside.read_bytes() == data
        assert not file.exists()
        assert core.stats().num_snapshots == core.cache.used_bytes == 0
        core.check_integrity()
    # It is a cache like any other, and saved under the name that the old one had.
    assert drive(core, request("a", golden[0], max_tokens=2))["a"].token_ids == tokens
    core.close()
    assert new_core(prefix_cache_path=file).stats().num_snapshots > 0


def test_what_was_restored_of_a_file_that_proves_wrong_is_let_go(
    new_core: NewCore, golden: Golden, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole file whose last snapshot has not all its states: no kind of damage, but a writer that was wrong."""
    file = tmp_path / "prefix.safetensors"
    core = new_core(prefix_cache_path=file)
    for i in range(3):
        drive(core, request(f"r{i}", golden[0][i : i + 80], max_tokens=2))
    encode = disk.encode

    def forgetful(link: disk.Link, *others: Any) -> Iterator[memoryview]:
        link.carries[-1] = link.carries[-1][:-1]
        return encode(link, *others)

    monkeypatch.setattr(disk, "encode", forgetful)
    core.close()
    new = new_core(prefix_cache_path=file)
    assert new.stats().num_snapshots == new.cache.used_bytes == 0
    new.check_integrity()
    assert not file.exists()


def test_a_save_that_fails_keeps_the_old_file(
    new_core: NewCore, golden: Golden, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "prefix.safetensors"
    core = new_core(prefix_cache_path=file)
    drive(core, request("a", golden[0], max_tokens=2))
    core.close()
    good = file.read_bytes()
    drive(core, request("b", golden[0][5:], max_tokens=2))

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk, "encode", full)
    with pytest.raises(OSError, match="No space left"):
        core.close()
    assert file.read_bytes() == good
    assert [path.name for path in tmp_path.iterdir()] == ["prefix.safetensors"]
