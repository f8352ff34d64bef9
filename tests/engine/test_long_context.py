"""262,144 tokens, the longest context of the architecture, on a network small enough to read them in a minute."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from stepflash.engine.core import EngineConfig, EngineCore
from stepflash.weights.load import load_model
from stepflash.weights.random_checkpoint import Size, write_random_checkpoint
from tests.engine.conftest import drive, request

# Every fourth layer is full, prediction modules counted: layer 0 and module 1. One head of 32 for keys and values.
SMALL = Size(
    hidden=64, layers=4, dense=1, experts=4, top_k=2, expert_inter=32, shared_inter=32, inter=96, heads=2,
    sliding_heads=3, kv_heads=1, head_dim=32, window=512, vocab=512, context=262144, rope_original=131072,
)  # fmt: skip
CONTEXT = 262144


def resident_bytes() -> int:
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("needs Linux's count of resident pages")
    return int(status.read_text().split("VmRSS:")[1].split()[0]) * 1024


@pytest.mark.slow
@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, torch.int8])
def test_the_whole_context_takes_the_memory_of_the_formula(tmp_path: Path, kv_dtype: torch.dtype) -> None:
    write_random_checkpoint(tmp_path, SMALL)
    model = load_model(tmp_path, progress=False)
    before = resident_bytes()
    core = EngineCore(
        model,
        EngineConfig(
            max_num_seqs=1,
            max_num_batched_tokens=2048,
            max_model_len=CONTEXT,
            kv_dtype=kv_dtype,
            prefix_caching=False,
        ),
    )
    stats = core.stats()
    per_head = 2 * (32 * 2 if kv_dtype == torch.bfloat16 else 32 + 4)
    assert stats.kv_bytes_per_token == 2 * per_head
    assert stats.kv_window_bytes == 5 * per_head * 512
    prompt = torch.randint(8, 500, (CONTEXT - 16,), generator=torch.Generator().manual_seed(0)).tolist()
    asked = request("long", prompt, max_tokens=16)
    core.add(asked)
    most_full = most_sliding = most_resident = 0
    tokens: list[int] = []
    while core.has_work:
        for output in core.step():
            tokens += output.token_ids
        stats = core.stats()
        most_full, most_sliding = (
            max(most_full, stats.kv_full_bytes),
            max(most_sliding, stats.kv_sliding_bytes),
        )
        most_resident = max(most_resident, resident_bytes() - before)
    assert len(tokens) == 16
    # One block more, for what drafts may touch beyond the end.
    assert most_full == (CONTEXT + 16) * 2 * per_head
    # Between two steps: the window, what a snapshot at the last block needs, and what drafts may touch.
    assert stats.kv_used_bytes == 0
    assert most_sliding <= 5 * per_head * (512 + 4 * 16 + 64)
    # Beside the cache: a step's activations for 2048 tokens, and the tokens themselves.
    assert most_resident < most_full + most_sliding + (120 << 20)
    print(f"{CONTEXT} tokens, {kv_dtype}: {most_full} + {most_sliding} bytes, {most_resident} resident")


@pytest.mark.slow
def test_chunks_do_not_change_a_long_context(tmp_path: Path) -> None:
    """20,000 tokens in chunks of 2048, of 333 and after a prefix hit: the same greedy answer, drafts or not."""
    write_random_checkpoint(tmp_path, SMALL)
    model = load_model(tmp_path, dtype="float32", progress=False)
    prompt = torch.randint(8, 500, (20_000,), generator=torch.Generator().manual_seed(1)).tolist()
    answers = []
    for chunk, depth in ((2048, 0), (333, 3)):
        config = EngineConfig(max_num_seqs=1, max_num_batched_tokens=chunk, max_model_len=CONTEXT)
        core = EngineCore(model, config)
        for name in ("cold", "warm"):
            done = drive(core, request(name, prompt, max_tokens=12, draft_depth=depth))[name]
            answers.append(done.token_ids)
        assert done.stats.num_prefill_tokens <= 32
    assert all(answer == answers[0] for answer in answers)
