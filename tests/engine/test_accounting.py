"""Bytes: what `stats()` and `/metrics` say, against the released model's published numbers and the tensors' sizes.

The released configuration runs on the meta device: everything but the arithmetic of the network is real.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from stepflash.engine.core import EngineConfig, EngineCore
from stepflash.engine.sequence import MtpState
from stepflash.model.config import ModelConfig
from stepflash.model.transformer import Step3p5ForCausalLM
from stepflash.server.metrics import Metrics
from tests.engine.conftest import request

RELEASED = ModelConfig.from_pretrained(Path(__file__).parents[1] / "fixtures" / "step-3.5-flash-config.json")
KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


@pytest.fixture(scope="module")
def released() -> Step3p5ForCausalLM:
    with torch.device("meta"):
        return Step3p5ForCausalLM(RELEASED).to(torch.bfloat16)


def new_core(model: Step3p5ForCausalLM, **options: object) -> EngineCore:
    values: dict[str, object] = {
        "max_num_seqs": 2,
        "max_model_len": 262144,
        "max_num_batched_tokens": 512,
        "max_deferred_tokens": 1,
        "kv_cache_bytes": 26 * GIB,
    }
    return EngineCore(model, EngineConfig(**(values | options)))  # type: ignore[arg-type]


def read_prompt(core: EngineCore) -> None:
    """Everything that a step does with a prompt of one request but run the network."""
    (seq,) = [*core.scheduler.running, *core.scheduler.waiting]
    while seq.num_pending > 1:
        (planned,) = core.scheduler.schedule(0.0)
        taken = min(planned.num_tokens, seq.num_pending - 1)
        seq.num_computed += taken
        seq.mtp = MtpState([seq.num_computed] * 3, [None] * 3, [None] * 3)
        assert seq.blocks is not None
        core.cache.trim(seq.blocks, seq.num_computed)


def test_the_released_model_takes_the_bytes_of_its_specification(released: Step3p5ForCausalLM) -> None:
    core = new_core(released)
    stats = core.stats()
    assert stats.kv_bytes_per_token == 48 * KIB
    assert stats.kv_window_bytes == (66 + 6) * MIB
    assert stats.kv_used_bytes == 0
    assert stats.kv_total_bytes <= 26 * GIB
    tensors = [t for layer in core.cache.layers.values() for t in (layer.keys, layer.values)]
    assert stats.kv_total_bytes == sum(t.nbytes for t in tensors)

    core.add(request("long", [5] * (262144 - 16), max_tokens=8))
    read_prompt(core)
    stats = core.stats()
    # 256K tokens in whole blocks of 16; the window, and what drafts may touch: two blocks of 16 x 144 KiB.
    assert stats.kv_full_bytes == 12 * GIB
    assert 72 * MIB <= stats.kv_sliding_bytes <= 72 * MIB + 3 * 16 * 144 * KIB
    assert stats.kv_used_bytes == stats.kv_full_bytes + stats.kv_sliding_bytes
    assert stats.kv_cached_bytes == 0
    core.abort("long")
    assert core.stats().kv_used_bytes == 0


def test_a_snapshot_of_the_released_model_is_its_window(released: Step3p5ForCausalLM) -> None:
    """72 MiB with the prediction modules; 12 GiB and 72 MiB for a context that is kept and not in use."""
    core = new_core(released)
    core.add(request("long", [5] * (262144 - 16), max_tokens=8))
    read_prompt(core)
    (seq,) = core.scheduler.running
    assert seq.blocks is not None
    boundary = seq.num_computed // 16 * 16
    core._snapshot(seq, boundary, (torch.empty(1, 4096),) * 3)
    core.abort("long")
    stats = core.stats()
    assert stats.num_snapshots == 1
    assert stats.kv_sliding_bytes == 72 * MIB
    assert stats.kv_full_bytes == boundary * 48 * KIB
    assert stats.kv_cached_bytes == stats.kv_used_bytes == boundary * 48 * KIB + 72 * MIB
    core.check_integrity()


def test_int8_takes_a_byte_a_value_and_a_scale_a_head(released: Step3p5ForCausalLM) -> None:
    core = new_core(released, kv_dtype=torch.int8)
    stats = core.stats()
    # 12 full layers, key and value, 8 heads of 128 values and a float32 scale.
    assert stats.kv_bytes_per_token == 12 * 2 * 8 * (128 + 4)
    assert stats.kv_window_bytes == 36 * 2 * 8 * (128 + 4) * 512
    stores = [
        (layer.keys, layer.values, layer.k_scale, layer.v_scale) for layer in core.cache.layers.values()
    ]
    assert stats.kv_total_bytes == sum(t.nbytes for store in stores for t in store if t is not None)


def test_without_modules_their_windows_cost_nothing(released: Step3p5ForCausalLM) -> None:
    assert new_core(released, max_draft_depth=0).stats().kv_window_bytes == 66 * MIB


def test_metrics_show_the_same_bytes(released: Step3p5ForCausalLM) -> None:
    core = new_core(released)
    core.add(request("long", [5] * 1000, max_tokens=8))
    read_prompt(core)
    stats = core.stats()
    lines = dict(
        line.rsplit(" ", 1) for line in Metrics(core.stats).render().splitlines() if not line.startswith("#")
    )
    shown = {
        field.name: float(lines[f"stepflash_engine_{field.name}"])
        for field in dataclasses.fields(stats)
        if field.name.startswith("kv_")
    }
    assert len(shown) == 9
    assert all(value == getattr(stats, name) for name, value in shown.items())
    assert shown["kv_full_bytes"] == -(-(1000 + 7) // 16) * 16 * 48 * KIB
