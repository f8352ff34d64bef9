"""What can be set about an engine, and what it tells of itself."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from stepflash import settings
from stepflash.engine.kv_cache import MAX_MODULES
from stepflash.errors import ConfigError

KV_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in settings.KV_DTYPES}
# Of whole numbers in `EngineConfig`, and those that may be None.
LIMITS = {
    "max_num_seqs": (1, math.inf), "max_model_len": (2, math.inf), "max_num_batched_tokens": (1, math.inf),
    "max_waiting": (1, math.inf), "kv_cache_bytes": (1, math.inf), "block_size": (1, math.inf),
    "max_draft_depth": (0, MAX_MODULES), "max_deferred_tokens": (1, math.inf), "snapshot_interval": (1, math.inf),
    "prefix_cache_disk_bytes": (1, math.inf), "vocab_limit": (1, math.inf), "seed": (-math.inf, math.inf),
}  # fmt: skip
OPTIONAL = ("max_model_len", "kv_cache_bytes", "vocab_limit", "seed")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How much the engine may do at once. Sizes in tokens unless named otherwise.

    `kv_cache_bytes` None sizes the cache for `max_num_seqs` full contexts, 4 GiB at most. `vocab_limit`: ids
    from there on have no token. `snapshot_interval`: a window snapshot is kept every so many tokens.
    `prefix_cache_path`: file from which the prefix cache is loaded, to which it is saved while the engine works,
    and by `close` whatever is left; it takes `prefix_cache_disk_bytes` at most, and while it is written anew twice
    that.
    """

    max_num_seqs: int = 16
    max_model_len: int | None = None
    max_num_batched_tokens: int = 512
    max_waiting: int = 1024
    kv_cache_bytes: int | None = None
    kv_dtype: torch.dtype | None = None
    block_size: int = 16
    max_draft_depth: int = MAX_MODULES
    max_deferred_tokens: int = 64
    prefix_caching: bool = True
    prefix_cache_path: str | Path | None = None
    prefix_cache_disk_bytes: int = 8 << 30
    snapshot_interval: int = 2048
    vocab_limit: int | None = None
    eos_token_ids: tuple[int, ...] | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, (least, most) in LIMITS.items():
            value = getattr(self, name)
            if value is None and name in OPTIONAL:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
                allowed = f"at least {least}" if most == math.inf else f"between {least} and {most}"
                raise ConfigError(f"{name} must be {allowed}, a whole number, got {value!r}")
        if self.kv_dtype not in (None, *KV_DTYPES.values()):
            known = ", ".join(map(str, KV_DTYPES.values()))
            raise ConfigError(f"kv_dtype must be one of {known}, got {self.kv_dtype}")
        if self.prefix_cache_path is not None and not Path(self.prefix_cache_path).name:
            raise ConfigError(f"prefix_cache_path must name a file, got {str(self.prefix_cache_path)!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """Gauges now and counters since the start.

    Bytes are those of the cache's tensors, to the byte. `kv_used_bytes` of `kv_total_bytes` are in blocks that
    somebody has; `kv_cached_bytes` of them only the prefix cache, which gives them back when they are needed. The
    same for full-attention and sliding layers apart. A context takes `kv_bytes_per_token` for each token, in
    whole blocks, and `kv_window_bytes` once; a running sequence holds up to three sliding blocks and
    `max_deferred_tokens` more than its window, and a step its own tokens.
    """

    num_running: int
    num_waiting: int
    num_steps: int
    num_finished: int
    num_preemptions: int
    num_prompt_tokens: int
    num_computed_prompt_tokens: int
    num_cached_tokens: int
    num_generated_tokens: int
    num_drafted_tokens: tuple[int, ...]
    num_accepted_tokens: tuple[int, ...]
    draft_depth: int
    kv_total_bytes: int
    kv_used_bytes: int
    kv_cached_bytes: int
    kv_full_bytes: int
    kv_full_total_bytes: int
    kv_sliding_bytes: int
    kv_sliding_total_bytes: int
    kv_bytes_per_token: int
    kv_window_bytes: int
    num_cached_blocks: int
    num_snapshots: int
