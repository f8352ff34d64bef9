"""A request while the engine works on it: tokens, how many are computed, blocks, and its MTP state.

There are no phases. A sequence has `token_ids` and drafts; `num_computed` of the tokens have keys and values.
Prefill, decode and verification all mean: compute some of the rest.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from stepflash.engine.constraints import Constraint, num_free
from stepflash.engine.kv_cache import SequenceBlocks
from stepflash.engine.request import Request, RequestStats, SamplingParams, TokenLogprob
from stepflash.engine.sampler import SamplerState

# Modules that begin in the middle of a text read so many tokens before the engine lets them draft: on nano 58 of 100
# drafts were right in the first 32 tokens, 99 after them.
GATHERED_TOKENS = 32


@dataclass(slots=True, eq=False)
class MtpState:
    """How far each MTP module got; entry k - 1 is module k's.

    `num_computed[k - 1]`: slots below it are in module k's cache. `pending[k - 1]`: what module k has yet to
    read, hidden states of module k - 1 (the trunk for k = 1) from slot num_computed[k - 1] - 1 on, or None.
    `at_last_boundary[k - 1]`: the last block boundary that module k passed, and the row it read there.
    """

    num_computed: list[int] = field(default_factory=list)
    pending: list[Tensor | None] = field(default_factory=list)
    at_last_boundary: list[tuple[int, Tensor] | None] = field(default_factory=list)

    @classmethod
    def at_start(cls, num_modules: int, first: int = 0) -> MtpState:
        """Nothing computed; the first slot of module k is `first` + k, where the trunk goes on at slot `first`."""
        start = first + 1
        return cls(list(range(start, start + num_modules)), [None] * num_modules, [None] * num_modules)

    @classmethod
    def at_boundary(cls, num_tokens: int, carries: tuple[Tensor, ...]) -> MtpState:
        """After `num_tokens` tokens that all modules have read; carries[k - 1] [1, hidden_size] is of the last."""
        return cls([num_tokens] * len(carries), list(carries), [None] * len(carries))

    def copy(self) -> MtpState:
        return MtpState(list(self.num_computed), list(self.pending), list(self.at_last_boundary))


@dataclass(slots=True, eq=False)
class Sequence:
    """State of one request. `max_tokens` is what fits, `stop_ids` end it, `num_modules` MTP modules serve it now."""

    request: Request
    sampler: SamplerState
    constraint: Constraint | None
    stop_ids: frozenset[int]
    max_tokens: int
    arrival: int
    submitted_at: float
    token_ids: list[int]
    stats: RequestStats
    num_modules: int = 0
    num_computed: int = 0
    drafts: list[int] = field(default_factory=list)
    # True where drafts came from the constraint and not from the modules.
    drafts_are_forced: bool = False
    blocks: SequenceBlocks | None = None
    mtp: MtpState = field(default_factory=MtpState)
    # Hidden states before each module at the last block boundary, for a snapshot when the sequence ends.
    boundary: tuple[int, tuple[Tensor, ...]] | None = None
    # Chance that draft k is right given that the ones before it are; a moving average.
    acceptance: list[float] = field(default_factory=list)
    # Of the prompt's tokens from the second on, as far as they were asked for and are known.
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    # See `reading`. The step of the engine when sleeping modules wake, and when those that are awake did; the slot
    # where sleeping ones have stopped; and how many tokens must be known before the engine's depth counts.
    wakes_at: int | None = None
    awake_since: int = 0
    asleep_from: int = 0
    drafts_from: int = 0
    started_at: float | None = None
    first_token_at: float | None = None

    @property
    def sampling(self) -> SamplingParams:
        return self.request.sampling

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_pending(self) -> int:
        """Known tokens without keys and values; at least one while the sequence runs."""
        return len(self.token_ids) - self.num_computed

    @property
    def reusable(self) -> list[int]:
        """The tokens that may be looked for in the prefix cache: not those behind which log-probabilities are to be
        computed, because the cache has no hidden states."""
        num_known = len(self.prompt_logprobs)
        if self.sampling.prompt_logprobs is None or num_known >= self.num_prompt_tokens - 1:
            return self.token_ids
        return self.token_ids[: num_known + 1]

    def begin_modules(self, carries: tuple[Tensor, ...] = ()) -> None:
        """Let the modules go on where the sequence stands, with what they left at the last token if that is known."""
        self.drafts_from, self.asleep_from = 0, self.num_computed
        if carries and self.num_modules:
            self.mtp = MtpState.at_boundary(self.num_computed, carries)
            return
        self.mtp = MtpState.at_start(self.num_modules, self.num_computed)
        if self.num_computed:
            self.drafts_from = self.num_computed + GATHERED_TOKENS

    def note_time(self, now: float) -> None:
        """`now` is when a step's tokens leave the engine, which is after the modules have read and drafted."""
        if self.first_token_at is None and self.num_generated:
            self.first_token_at = now
            self.stats.prefill_seconds = now - (self.started_at or now)
        if self.first_token_at is not None:
            self.stats.decode_seconds = now - self.first_token_at

    def restriction(self, num_tokens: int) -> Constraint | None:
        """What must be asked about the next `num_tokens` tokens; None if they may be anything."""
        is_free = self.constraint is None or num_free(self.constraint) >= num_tokens
        return None if is_free else self.constraint

    @property
    def order(self) -> tuple[int, int]:
        """Smaller runs earlier and is preempted later."""
        return self.request.priority, self.arrival
