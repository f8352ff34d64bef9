"""Run by test_fuzz.py in a process of little memory: damaged checkpoints through everything that loading does.

    python -m tests.weights.fuzz gguf|safetensors|config|index|receipt SOURCE COUNT SEED

A GGUF's header, a shard's header, config.json, the index of the shards or the receipt of a quantised checkpoint (with
its digest made good again) is damaged COUNT times; each must end in a model or a
StepflashError of one line. Prints one JSON object; whatever else happens ends the process.
"""

import json
import random
import resource
import shutil
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from stepflash.chat.tokenizer import Tokenizer
from stepflash.errors import StepflashError
from stepflash.gguf_file import read_gguf
from stepflash.weights.checkpoint import compare, open_checkpoint, select_mtp
from stepflash.weights.load import load_model
from stepflash.weights.receipt import RECEIPT_NAME, receipt_digest
from stepflash.weights.safetensors import INDEX_NAME
from stepflash.weights.signature import DIGEST

EXTRA_BYTES = 384 << 20  # of address space, beyond what Python and torch have taken
SIZES = (0, 1, 7, 2**15, 2**31 - 1, 2**31, 2**32, 2**40, 2**62, 2**63, 2**64 - 1)
JSON_VALUES = (
    0,
    -1,
    1,
    3,
    2**31,
    2**63,
    10**30,
    0.5,
    1e308,
    "",
    "x",
    None,
    True,
    [],
    [0],
    [2**40] * 11,
    {},
    {"a": [1]},
)
TEXTS = (b"9" * 40, b"[" * 2000, b'"', b"\\u0000", b"-", b"\0", b"\xff\xfe", b"{}", b",")


def damaged_bytes(good: bytes, rng: random.Random) -> bytes:
    """Flipped bytes, a huge integer, a cut, or an insertion."""
    data = bytearray(good)
    match rng.randrange(4):
        case 0:
            for _ in range(rng.randint(1, 8)):
                data[rng.randrange(len(data))] = rng.randrange(256)
        case 1:
            position = rng.randrange(len(data) - 8)
            data[position : position + 8] = struct.pack("<Q", rng.choice(SIZES))
        case 2:
            del data[rng.randrange(len(data)) :]
        case _:
            position = rng.randrange(len(data))
            data[position:position] = rng.choice((*TEXTS, rng.randbytes(8)))
    return bytes(data)


def damaged_json(good: bytes, rng: random.Random) -> bytes:
    """One to three values replaced, a key removed, or a damaged text."""
    if rng.random() < 0.2:
        return damaged_bytes(good, rng)
    config = json.loads(good)
    for key in rng.sample(sorted(config), rng.randint(1, 3)):
        if isinstance(config[key], list) and config[key] and rng.random() < 0.4:
            config[key][rng.randrange(len(config[key]))] = rng.choice(JSON_VALUES)
        else:
            config[key] = rng.choice(JSON_VALUES)
        if rng.random() < 0.15:
            del config[key]
    return json.dumps(config).encode()


def damaged_receipt(good: bytes, rng: random.Random) -> bytes:
    """Damage that its digest does not show: whoever edits an unsigned receipt can put that right."""
    changed = damaged_json(good, rng)
    try:
        values = json.loads(changed)
        part = rng.choice(sorted(values))
        if isinstance(values[part], dict) and rng.random() < 0.7:
            values[part] = json.loads(damaged_json(json.dumps(values[part]).encode(), rng))
        values[DIGEST] = receipt_digest(values)
    except (ValueError, LookupError, AttributeError, TypeError):
        return changed
    return json.dumps(values).encode()


def attempt(path: Path, whole: bool) -> None:
    """What `load_model` does before it reads weights, and then that, too."""
    checkpoint = open_checkpoint(path)
    config = select_mtp(checkpoint, None)
    if compare(checkpoint, config).fits:
        Tokenizer.from_pretrained(path)
        if whole:
            load_model(path, dtype="float32")


def target(
    kind: str, source: Path, folder: Path
) -> tuple[Path, Path, int, Callable[[bytes, random.Random], bytes]]:
    """(what is opened, the file to damage, bytes of its header, how)."""
    if kind == "gguf":
        file = folder / "m.gguf"
        shutil.copyfile(source, file)
        return file, file, min(t.offset for t in read_gguf(file).tensors.values()), damaged_bytes
    shutil.copytree(source, folder / "m")
    small = {
        "config": ("config.json", damaged_json),
        "index": (INDEX_NAME, damaged_bytes),
        "receipt": (RECEIPT_NAME, damaged_receipt),
    }
    if kind in small:
        name, damage = small[kind]
        file = folder / "m" / name
        return folder / "m", file, file.stat().st_size, damage
    file = next((folder / "m").glob("*.safetensors"))
    return folder / "m", file, 8 + struct.unpack("<Q", file.read_bytes()[:8])[0], damaged_bytes


def main() -> None:
    kind, source, count, seed = sys.argv[1:]
    rng = random.Random(int(seed))
    refused: list[str] = []
    slowest = 0.0
    with tempfile.TemporaryDirectory() as folder:
        opened, file, header_bytes, damage = target(kind, Path(source), Path(folder))
        attempt(opened, whole=True)  # undamaged; imports and the kernels are in memory now
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + EXTRA_BYTES, taken + EXTRA_BYTES))
        good = file.read_bytes()
        for index in range(int(count)):
            changed = damage(good[:header_bytes], rng)
            file.write_bytes(changed)
            if rng.random() < 0.9:  # else the tensors are cut off, too
                with file.open("r+b") as output:
                    output.truncate(len(changed) + len(good) - header_bytes)
            started = time.process_time()
            try:
                attempt(opened, whole=index % 20 == 0 or kind == "receipt")
            except StepflashError as error:
                refused.append(str(error))
            except BaseException:
                print(f"{kind}: damage {index} of seed {seed}", file=sys.stderr)
                raise
            slowest = max(slowest, time.process_time() - started)
    assert not any("\n" in message for message in refused)
    print(
        json.dumps({"refused": len(refused), "different": len(set(refused)), "slowest_cpu_seconds": slowest})
    )


if __name__ == "__main__":
    main()
