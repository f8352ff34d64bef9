"""Saving while the engine works: nothing waits for it, whatever ends the process leaves a file that is right."""

from __future__ import annotations

import itertools
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stepflash.engine import disk, saver
from stepflash.engine.core import EngineCore
from stepflash.engine.disk import Origin
from stepflash.engine.kv_cache import FULL, SLIDING, CacheLimits, KVCache
from stepflash.engine.prefix import PrefixCache
from stepflash.engine.saver import Saver
from stepflash.errors import ConfigError
from stepflash.model.config import ModelConfig
from tests.engine.conftest import MICRO, drive, request

NewCore = Callable[..., EngineCore]
Golden = tuple[list[int], list[int]]
CONFIG = ModelConfig.from_pretrained(MICRO)
SIZE = 4
ORIGIN = Origin("digest", {"block_size": str(SIZE)})


@pytest.fixture
def without_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saver, "COPY_SHARE", 1e9)
    monkeypatch.setattr(saver, "SAVE_SECONDS", 0.0)


# The file against memory, without a network: the rows of a block are a function of the tokens up to its end.


class Memory:
    """A prefix cache whose blocks say which tokens they belong to, and its saver."""

    def __init__(self, path: Path, kv_cache_bytes: int, max_bytes: int = 1 << 30) -> None:
        limits = CacheLimits(
            block_size=SIZE,
            max_num_seqs=1,
            max_model_len=64,
            max_batched_tokens=8,
            max_deferred_tokens=1,
            num_modules=3,
            dtype=torch.int8,
        )
        self.cache = KVCache(CONFIG, limits, kv_cache_bytes=kv_cache_bytes)
        self.prefix = PrefixCache(self.cache)
        self.saver = Saver(path, self.cache, self.prefix, ORIGIN, max_bytes)

    def remember(self, token_ids: list[int], boundary: int) -> None:
        """What the engine does with a prompt: compute it, keep a snapshot, let go."""
        match = self.prefix.match([*token_ids, 0])
        first = match.snapshot.first if match.snapshot else 0
        blocks = self.cache.open(match.full, match.snapshot.block_ids if match.snapshot else (), first)
        for group in (FULL, SLIDING):
            self.cache.grow(blocks, group, boundary)
        for i in range(match.num_tokens // SIZE, boundary // SIZE):
            ids = {FULL: blocks.full[i], SLIDING: blocks.sliding[i - blocks.sliding_first]}
            for _, tensor, group in disk.stores(self.cache):
                tensor[ids[group]] = stamp(token_ids[: (i + 1) * SIZE])
        kept = self.cache.sliding_before(blocks, boundary)
        assert kept is not None
        node = self.prefix.insert(token_ids, blocks.full[: boundary // SIZE])
        carry = torch.full((1, 2), float(stamp(token_ids[:boundary])))
        self.prefix.add_snapshot(node, *kept, (carry, carry + 1, carry + 2))
        self.cache.close(blocks)

    def known(self) -> set[tuple[int, ...]]:
        """The tokens of every snapshot. Fails where a block is not what they make it."""
        found = set()
        for node in self.prefix.snapshots():
            assert node.snapshot is not None
            path = [t for n in disk.window_nodes(node, 0) for t in n.token_ids]
            found.add(tuple(path))
            self.check(FULL, [n.block_id for n in disk.window_nodes(node, 0)], path, 0)
            self.check(SLIDING, list(node.snapshot.block_ids), path, node.snapshot.first)
            for k, carry in enumerate(node.snapshot.carries):
                assert carry.tolist() == [[stamp(path) + k] * 2]
        for group in (FULL, SLIDING):
            self.cache.pools[group].check_integrity([], self.prefix.keepers(group))
        return found

    def check(self, group: int, block_ids: list[int], path: list[int], first: int) -> None:
        assert first + len(block_ids) == len(path) // SIZE
        for i, block_id in enumerate(block_ids, first + 1):
            for _, tensor, of in disk.stores(self.cache):
                if of == group:
                    assert (tensor[block_id] == stamp(path[: i * SIZE])).all()


def stamp(path: list[int]) -> int:
    return hash(tuple(path)) % 127


def newest(path: Path, folder: Path) -> set[tuple[int, ...]]:
    """What a process would find that starts now, with all the memory it likes."""
    copy = folder / "copy"
    copy.write_bytes(path.read_bytes())
    return Memory(copy, 16 << 20).known()


tokens = st.lists(st.integers(0, 1), min_size=4, max_size=40)
act = st.one_of(
    st.tuples(st.just("remember"), tokens),
    st.tuples(st.just("turn"), st.integers(1, 12)),
    st.tuples(st.just("settle")),
    st.tuples(st.just("evict"), st.integers(0, 1), st.integers(1, 40)),
    st.tuples(st.just("flush")),
    st.tuples(st.just("restart")),
)


@settings(max_examples=60)
@given(
    acts=st.lists(act, min_size=4, max_size=40),
    room=st.sampled_from([300_000, 4 << 20]),
    max_bytes=st.sampled_from([1, 60_000, 300_000, 1 << 30]),
    copy_bytes=st.sampled_from([1, 4000, 1 << 20]),
    link_bytes=st.sampled_from([1, 10_000, 1 << 20]),
)
def test_whatever_happens_the_file_says_what_memory_said(
    tmp_path_factory: pytest.TempPathFactory,
    acts: list[tuple[object, ...]],
    room: int,
    max_bytes: int,
    copy_bytes: int,
    link_bytes: int,
) -> None:
    folder = tmp_path_factory.mktemp("saver")
    path = folder / "cache"
    said: set[tuple[int, ...]] = set()
    with pytest.MonkeyPatch.context() as patch:
        sizes = {"COPY_BYTES": copy_bytes, "LINK_BYTES": link_bytes, "MAX_LINKS": 9}
        for name, value in {"COPY_SHARE": 1e9, "SAVE_SECONDS": 0.0, **sizes}.items():
            patch.setattr(saver, name, value)
        patch.setattr(disk.os, "fsync", lambda descriptor: None)
        memory = Memory(path, room, max_bytes)
        for kind, *values in acts:
            if kind == "remember":
                ids: list[int] = values[0]  # type: ignore[assignment]
                boundary = len(ids) // SIZE * SIZE
                memory.remember(ids, boundary)
                said.add(tuple(ids[:boundary]))
            elif kind == "turn":
                for _ in range(values[0]):  # type: ignore[call-overload]
                    memory.saver.turn()
            elif kind == "settle":
                memory.saver.settle()
            elif kind == "evict":
                pool = memory.cache.pools[values[0]]  # type: ignore[index]
                memory.prefix.evict(values[0], pool.num_free + values[1])  # type: ignore[arg-type, operator]
            else:
                memory.saver.flush()
                assert not memory.saver.has_news
                assert [p.name for p in folder.iterdir() if p.name != "copy"] == ["cache"]
                found = newest(path, folder)
                assert found <= said
                if max_bytes == 1 << 30:
                    assert memory.known() <= found
                assert path.stat().st_size <= max_bytes + 40_000  # but for its headers
                if kind == "restart":
                    before = memory.known()
                    memory = Memory(path, room, max_bytes)
                    if max_bytes == 1 << 30:
                        assert before <= memory.known()
        memory.saver.settle()
        if path.exists():
            assert newest(path, folder) <= said


@pytest.fixture
def chain(tmp_path: Path, without_pauses: None) -> tuple[bytes, list[int], list[set[tuple[int, ...]]]]:
    """A file of four links, where each of them ends, and what is known up to there."""
    memory = Memory(tmp_path / "chain", 4 << 20)
    ends, known = [0], [set[tuple[int, ...]]()]
    for i in range(4):
        memory.remember([1] * (8 * i) + [i] * 12, 8 * i + 12)
        memory.saver.flush()
        ends.append((tmp_path / "chain").stat().st_size)
        known.append(memory.known())
    return (tmp_path / "chain").read_bytes(), ends, known


def test_a_file_that_was_cut_anywhere_has_what_was_whole(
    chain: tuple[bytes, list[int], list[set[tuple[int, ...]]]], tmp_path: Path
) -> None:
    """Also if garbage is appended to, as a killed process leaves it, and whoever comes next writes on."""
    data, ends, known = chain
    path = tmp_path / "cut"
    chance = random.Random(3)
    cuts = {e + d for e in ends for d in (-33, -32, -1, 0, 1, 7, 8, 9, 40) if 0 <= e + d <= len(data)}
    for cut in sorted(cuts | {chance.randrange(len(data)) for _ in range(40)}):
        path.write_bytes(data[:cut])
        whole = sum(end <= cut for end in ends) - 1
        memory = Memory(path, 4 << 20)
        assert memory.known() == known[whole]
        memory.remember([9] * 8, 8)
        memory.saver.flush()
        assert newest(path, tmp_path) == known[whole] | {(9,) * 8}


def test_a_byte_that_changed_puts_the_file_aside_or_hides_what_stands_behind_it(
    chain: tuple[bytes, list[int], list[set[tuple[int, ...]]]], tmp_path: Path
) -> None:
    data, ends, known = chain
    path = tmp_path / "changed"
    chance = random.Random(4)
    places = [end + i for end in ends[:-1] for i in range(12)] + [
        chance.randrange(len(data)) for _ in range(150)
    ]
    num_aside = 0
    for place in places:
        byte = data[place] ^ 1 << chance.randrange(8)
        path.write_bytes(data[:place] + bytes([byte]) + data[place + 1 :])
        found = Memory(path, 4 << 20).known()
        if path.exists():
            assert found in known[1:-1]
        else:
            assert not found
            num_aside += 1
    assert num_aside > 100


def test_links_that_do_not_belong_together_are_put_aside(
    chain: tuple[bytes, list[int], list[set[tuple[int, ...]]]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    data, ends, _ = chain
    links = [data[a:b] for a, b in itertools.pairwise(ends)]
    path = tmp_path / "mixed"
    for order in ([0, 2], [0, 1, 1], [1], [0, 1, 3, 2], [0, 0]):
        path.write_bytes(b"".join(links[i] for i in order))
        assert not Memory(path, 4 << 20).known()
        assert "do not belong together" in caplog.records[-1].message


def test_the_order_of_use_survives(tmp_path: Path, without_pauses: None) -> None:
    memory = Memory(tmp_path / "cache", 4 << 20)
    for i in range(6):
        memory.remember([i] * 16, 16)
    memory.saver.flush()
    assert memory.prefix.match([0] * 17).num_tokens == 16  # the oldest is the most recent one now
    memory.saver.flush()
    least = 100_000
    while True:
        try:
            small = Memory(tmp_path / "cache", least)
        except ConfigError:
            least += 20_000
            continue
        if small.known():
            break
        least += 20_000
    assert (0,) * 16 in small.known()
    assert len(small.known()) < 6


def test_two_processes_with_one_file_do_not_spoil_it(tmp_path: Path, without_pauses: None) -> None:
    path = tmp_path / "cache"
    a, b = Memory(path, 4 << 20), Memory(path, 4 << 20)
    said = set()
    for i in range(12):
        one = (a, b)[i % 2]
        one.remember([i] * 12, 12)
        said.add((i,) * 12)
        for _ in range(4):
            one.saver.turn()
            one.saver.settle()
        found = newest(path, tmp_path)
        assert found
        assert found <= said
    a.saver.flush()
    assert newest(path, tmp_path) == a.known()  # who ends last has the word, as a whole
    b.saver.flush()
    assert newest(path, tmp_path) == b.known()


def test_a_slow_disk_stalls_nothing(
    tmp_path: Path, without_pauses: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One link is written, one is full, and the rest waits: for its turn, or to be evicted."""
    monkeypatch.setattr(saver, "LINK_BYTES", 30_000)
    gate, write = threading.Event(), disk.append

    def slow(*args: object) -> tuple[str, int]:
        assert gate.wait(30)
        return write(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(disk, "append", slow)
    memory = Memory(tmp_path / "cache", 16 << 20)
    for i in range(40):
        memory.remember([i] * 40, 40)
        for _ in range(20):
            memory.saver.turn()
    assert memory.saver._link.num_bytes < 60_000
    assert len(memory.saver._waiting) > 20
    memory.prefix.evict(SLIDING, memory.cache.pools[SLIDING].num_free + 60)
    gate.set()
    kept = memory.known()
    memory.saver.flush()
    assert kept <= newest(tmp_path / "cache", tmp_path)
    assert 10 < len(kept) < 40


def test_ctrl_c_in_the_middle_of_a_copy_leaves_a_file_that_is_right(
    tmp_path: Path, without_pauses: None
) -> None:
    memory = Memory(tmp_path / "cache", 4 << 20)
    for number, group in enumerate((FULL, SLIDING)):
        memory.remember([number] * 40, 40)
        stores = memory.saver._stores[group]
        kept, stores[1] = stores[1], (stores[1][0], Interrupting(stores[1][1]))  # type: ignore[assignment]
        with pytest.raises(KeyboardInterrupt):
            turn_often(memory)
        stores[1] = kept
        memory.saver._not_before = 0.0  # it would wait for a minute
    memory.remember([2] * 40, 40)
    memory.saver.flush()
    assert newest(tmp_path / "cache", tmp_path) == memory.known() == {(i,) * 40 for i in range(3)}


def turn_often(memory: Memory) -> None:
    for _ in range(20):
        memory.saver.turn()


class Interrupting:
    """A tensor in whose copying Ctrl-C is pressed."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __getitem__(self, index: object) -> torch.Tensor:
        if isinstance(index, slice):
            return self.tensor[index]
        raise KeyboardInterrupt


# With a network


def test_a_full_disk_fails_no_request_and_is_made_up_for(
    new_core: NewCore, golden: Golden, tmp_path: Path, without_pauses: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cache"
    core = new_core(prefix_cache_path=path)
    drive(core, request("a", golden[0], max_tokens=20))
    core.close()
    good, write = path.read_bytes(), disk.append

    def full(file: object, *args: object) -> tuple[str, int]:
        file.write(b"half a link")  # type: ignore[attr-defined]
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk, "append", full)
    for i in range(3):
        done = drive(core, request(f"b{i}", golden[0][i + 1 :], max_tokens=20))[f"b{i}"]
        assert done.last.finish_reason == "length"
    with pytest.raises(OSError, match="No space left"):
        core.close()
    assert path.read_bytes() == good
    assert [p.name for p in tmp_path.iterdir()] == ["cache"]
    monkeypatch.setattr(disk, "append", write)
    core.close()
    assert new_core(prefix_cache_path=path).stats().num_snapshots == core.stats().num_snapshots


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_a_cache_of_other_keys_and_values_is_refused_with_the_reason(
    new_core: NewCore, golden: Golden, tmp_path: Path, dtype: torch.dtype
) -> None:
    path = tmp_path / "cache"
    other = {torch.float32: torch.int8, torch.int8: torch.float32}[dtype]
    core = new_core(prefix_cache_path=path, kv_dtype=dtype)
    drive(core, request("a", golden[0], max_tokens=2))
    core.close()
    names = (str(t).removeprefix("torch.") for t in (dtype, other))
    with pytest.raises(ConfigError, match="computed with kv_dtype {}, not {} as here".format(*names)):
        new_core(prefix_cache_path=path, kv_dtype=other)
    with pytest.raises(ConfigError, match="computed with prediction modules 3, not 1 as here"):
        new_core(prefix_cache_path=path, kv_dtype=dtype, max_draft_depth=1)


LOAD = """
import sys
from pathlib import Path
import torch
from stepflash.engine import saver
from stepflash.engine.core import EngineConfig, EngineCore
from stepflash.weights.load import load_model
from tests.engine.conftest import MICRO, request

torch.set_num_threads(1)
saver.SAVE_SECONDS, saver.COPY_SHARE = 0.05, 0.5
config = EngineConfig(max_num_seqs=8, max_num_batched_tokens=64, max_model_len=512, kv_cache_bytes=32 << 20,
                      block_size=8, prefix_cache_path=Path(sys.argv[1]))
core = EngineCore(load_model(MICRO, dtype="float32", progress=False), config)
print("cached", core.stats().num_snapshots, flush=True)
chance = torch.Generator().manual_seed(int(sys.argv[2]))
number = 0
while True:
    while len(core.scheduler.running) + len(core.scheduler.waiting) < 4:
        prompt = torch.randint(3, 9, (40,), generator=chance).tolist()
        core.add(request(f"r{number}", prompt, max_tokens=12))
        number += 1
    for output in core.step():
        if output.finish_reason:
            print(output.request_id, core.stats().num_snapshots, flush=True)
"""


@pytest.fixture
def spawn(tmp_path: Path) -> Iterator[Callable[[int], subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []

    def start(seed: int) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", LOAD, str(tmp_path / "cache"), str(seed)]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_process_killed_under_load_left_most_of_what_it_had(
    new_core: NewCore, golden: Golden, tmp_path: Path, spawn: Callable[[int], subprocess.Popen[str]]
) -> None:
    """SIGKILL at random moments of a load without a pause, two processes one after the other."""
    chance = random.Random(8)
    had = 0
    for seed in range(2):
        process = spawn(seed)
        assert process.stdout is not None
        found = int(process.stdout.readline().split()[1])
        assert found >= 0.5 * had
        seen: list[tuple[float, int]] = []
        until = 25 + chance.randrange(10)
        for line in process.stdout:
            seen.append((time.monotonic(), int(line.split()[1])))
            if len(seen) == until:
                time.sleep(chance.random() * 0.05)
                process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        had = seen[-1][1]
    core = new_core(prefix_cache_path=tmp_path / "cache")
    assert core.stats().num_snapshots >= 0.5 * had > 20
    core.check_integrity()
    # What it has is what a fresh engine computes.
    assert core.prefix is not None
    nodes = core.prefix.snapshots()[:: max(1, had // 8)]
    fresh = new_core()
    for i, node in enumerate(nodes):
        prompt = [t for n in disk.window_nodes(node, 0) for t in n.token_ids] + [5]
        asked = request(f"x{i}", prompt, max_tokens=10)
        done, expected = drive(core, asked)[f"x{i}"], drive(fresh, asked)[f"x{i}"]
        assert done.stats.num_cached_tokens == len(prompt) - 1
        assert done.token_ids == expected.token_ids
