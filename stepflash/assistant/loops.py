"""Finds out that a thought goes round in circles, on token ids, as they come.

Two signs, both only after many repetitions, because honest thoughts repeat themselves too (tables, code, drafts
of one sentence):
  * a period: the last tokens are one phrase over and over, at least `MIN_REPEATS` times and
    `MIN_REPEATED_TOKENS` long;
  * a refrain: the same `REFRAIN_TOKENS` tokens came `MIN_REFRAINS` times within the last `REFRAIN_WINDOW` tokens,
    whatever stood between.
A token costs one comparison with the tokens before it (numpy, some microseconds) and one dictionary entry.
"""

from __future__ import annotations

import numpy as np

MAX_PERIOD = 512
MIN_REPEATS = 4
MIN_REPEATED_TOKENS = 256
REFRAIN_TOKENS = 32
MIN_REFRAIN_KINDS = 8  # different tokens in it: rows of zeros and rules of dashes are no refrain
MIN_REFRAINS = 8
REFRAIN_WINDOW = 4096

_PERIODS = np.arange(1, MAX_PERIOD + 1)
# Tokens that must have equalled the one a period before them: all repetitions but the first.
_NEEDED = np.maximum(MIN_REPEATS * _PERIODS, MIN_REPEATED_TOKENS) - _PERIODS
_KEPT_RUNS = 64  # undone without recomputing: more than drafts ever are


class LoopDetector:
    """Reads a thought token by token, and back."""

    def __init__(self) -> None:
        self._tokens = np.empty(1024, dtype=np.int64)
        self._num_tokens = 0
        # runs[p - 1]: so many tokens in a row equal the one p places before them. The last few states of it.
        self._runs = [np.zeros(MAX_PERIOD, dtype=np.int32)]
        # Where each phrase began, latest last, at most MIN_REFRAINS places, no two overlapping.
        self._places: dict[int, tuple[int, ...]] = {}
        self._looped_at: int | None = None

    @property
    def is_looping(self) -> bool:
        return self._looped_at is not None

    def accept(self, token_id: int) -> None:
        if self._num_tokens == len(self._tokens):
            self._tokens = np.concatenate([self._tokens, np.empty_like(self._tokens)])
        self._tokens[self._num_tokens] = token_id
        self._num_tokens += 1
        self._extend_runs()
        if self._looped_at is None and (self._has_period() or self._has_refrain()):
            self._looped_at = self._num_tokens

    def rollback(self, num_tokens: int) -> None:
        for _ in range(num_tokens):
            self._forget_phrase()
            self._num_tokens -= 1
        if self._looped_at is not None and self._looped_at > self._num_tokens:
            self._looped_at = None
        del self._runs[max(0, len(self._runs) - num_tokens) :]
        if not self._runs:
            self._recompute_runs()

    def _extend_runs(self) -> None:
        last = self._num_tokens - 1
        runs = np.zeros(MAX_PERIOD, dtype=np.int32)
        before = self._tokens[max(0, last - MAX_PERIOD) : last][::-1]
        runs[: len(before)] = (self._runs[-1][: len(before)] + 1) * (before == self._tokens[last])
        self._runs.append(runs)
        if len(self._runs) > _KEPT_RUNS:
            del self._runs[0]

    def _recompute_runs(self) -> None:
        runs = np.zeros(MAX_PERIOD, dtype=np.int32)
        tokens = self._tokens[: self._num_tokens]
        for period in range(1, min(MAX_PERIOD, len(tokens) - 1) + 1):
            differs = np.flatnonzero(tokens[period:] != tokens[:-period])
            runs[period - 1] = len(tokens) - period - (differs[-1] + 1 if len(differs) else 0)
        self._runs = [runs]

    def _has_period(self) -> bool:
        return bool((self._runs[-1] >= _NEEDED).any())

    def _has_refrain(self) -> bool:
        """Notes the phrase that ends here, and looks whether it has come too often."""
        begin = self._num_tokens - REFRAIN_TOKENS
        if begin < 0:
            return False
        if len(self._places) > 2 * REFRAIN_WINDOW:
            self._drop_old_phrases(begin)
        phrase = self._phrase()
        places = self._places.get(phrase, ())
        if places and begin < places[-1] + REFRAIN_TOKENS:
            return False
        places = (*places, begin)[-MIN_REFRAINS:]
        self._places[phrase] = places
        return (
            len(places) == MIN_REFRAINS
            and begin - places[0] <= REFRAIN_WINDOW
            and len(set(self._tokens[begin : self._num_tokens].tolist())) >= MIN_REFRAIN_KINDS
        )

    def _forget_phrase(self) -> None:
        """Takes back what the last token noted. A place that had been pushed out is not missed: it was too old, or
        the thought had been cut by then."""
        begin = self._num_tokens - REFRAIN_TOKENS
        if begin < 0:
            return
        phrase = self._phrase()
        places = self._places.get(phrase, ())
        if places and places[-1] == begin:
            if len(places) == 1:
                del self._places[phrase]
            else:
                self._places[phrase] = places[:-1]

    def _phrase(self) -> int:
        return hash(self._tokens[self._num_tokens - REFRAIN_TOKENS : self._num_tokens].tobytes())

    def _drop_old_phrases(self, begin: int) -> None:
        """A phrase counts only within the window; the margin covers what may still be taken back."""
        oldest = begin - REFRAIN_WINDOW - _KEPT_RUNS
        self._places = {phrase: places for phrase, places in self._places.items() if places[-1] >= oldest}
