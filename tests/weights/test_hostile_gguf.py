"""Metadata of wrong types and sizes: 1,000 mutated dictionaries give a result or a StepflashError, nothing else."""

import contextlib
import random
from pathlib import Path

from stepflash.chat.gguf_tokenizer import backend_from_gguf, special_ids_from_gguf
from stepflash.errors import StepflashError
from stepflash.gguf_file import read_gguf
from stepflash.model.config import ModelConfig
from stepflash.tools.conversion import convert

MICRO = Path(__file__).parents[1] / "fixtures" / "micro"
HOSTILE = (
    0, 1, -1, 11, 2**31, 2**63, 2.5, float("nan"), float("inf"), "", "x", True, False, [], [1], ["a"],
    [2**40] * 11, [0] * 11, [-1] * 11, [1.5] * 11, [True] * 11, ["a"] * 11,
)  # fmt: skip


def test_a_thousand_hostile_dictionaries_end_cleanly(tmp_path: Path) -> None:
    convert(MICRO, tmp_path / "m.gguf", "gguf", "bf16")
    good = read_gguf(tmp_path / "m.gguf").metadata
    rng = random.Random(1)
    refused = 0
    for _ in range(1000):
        metadata = dict(good)
        for key in rng.sample(sorted(good), rng.randint(1, 3)):
            metadata[key] = rng.choice(HOSTILE)
            if rng.random() < 0.2:
                del metadata[key]
        for read in (
            ModelConfig.from_gguf,
            lambda m: backend_from_gguf(m, source="m"),
            special_ids_from_gguf,
        ):
            refused += 1
            with contextlib.suppress(StepflashError):
                read(metadata)
                refused -= 1
    assert refused > 300
