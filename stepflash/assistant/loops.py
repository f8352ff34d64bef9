"""Finds out that a thought goes round in circles, on token ids, as they come.

Two signs, both only after many repetitions, because honest thoughts repeat themselves too (tables, code, drafts
of one sentence):
  * a period: the last tokens are one phrase over and over, at least `MIN_REPEATS` times and
    `MIN_REPEATED_TOKENS` long;
  * a refrain: the same `REFRAIN_TOKENS` tokens came `MIN_REFRAINS` times within the last `REFRAIN_WINDOW` tokens,
    whatever stood between.
A token is noted and no more. What was read is looked at only where a loop could be complete at the earliest: after
each look it is known how much every phrase lacks.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

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
_QUICK = 4  # of a period that does not fit the last so many tokens it need not be known how many it does fit
_LONGEST = MIN_REPEATS * MAX_PERIOD
# A phrase is known by a polynomial of its tokens modulo 2**64.
_POWERS = np.array([pow(0x9E3779B97F4A7C15, j, 1 << 64) for j in range(REFRAIN_TOKENS)], dtype=np.uint64)
_FREQUENT = 4  # phrases that came so often are the ones whose next times are counted down


class LoopDetector:
    """Reads a thought token by token, and back."""

    def __init__(self) -> None:
        self._tokens = array("q")
        self._num_looked_at = 0
        self._look_at = (
            MIN_REPEATED_TOKENS  # number of tokens at which a loop can be complete at the earliest
        )
        # Where each phrase began, latest last, at most MIN_REFRAINS places, no two overlapping.
        self._places: dict[int, tuple[int, ...]] = {}
        self._frequent: set[int] = set()
        self._looped_at: int | None = None

    @property
    def is_looping(self) -> bool:
        return self._looped_at is not None

    @property
    def num_free(self) -> int:
        """So many tokens more, whatever they are, complete no loop."""
        return 0 if self.is_looping else self._look_at - len(self._tokens) - 1

    def accept(self, token_id: int) -> None:
        self._tokens.append(token_id)
        if len(self._tokens) >= self._look_at and self._looped_at is None:
            self._look()

    def rollback(self, num_tokens: int) -> None:
        num_left = len(self._tokens) - num_tokens
        if num_left < self._num_looked_at:
            self._forget_phrases(num_left)
            self._num_looked_at, self._look_at = num_left, num_left + 1
        del self._tokens[num_left:]
        if self._looped_at is not None and self._looped_at > num_left:
            self._looped_at = None

    def _look(self) -> None:
        count = len(self._tokens)
        self._note_phrases()
        missing = min(self._missing_of_period(), self._missing_of_refrain())
        self._num_looked_at = count
        if missing == 0:
            self._looped_at = count
        self._look_at = count + max(1, missing)

    def _missing_of_period(self) -> int:
        """How many tokens a period lacks, at least; 0 if there is one."""
        count = len(self._tokens)
        if count < MIN_REPEATED_TOKENS:
            return MIN_REPEATED_TOKENS - count
        tokens = _copy(self._tokens, max(0, count - _LONGEST))
        periods = _PERIODS[: max(0, len(tokens) - _QUICK)]
        for back in range(1, _QUICK + 1):
            periods = periods[tokens[-back] == tokens[-back - periods]]
        runs = [_run(tokens, period) for period in periods.tolist()]
        missing = [int(_NEEDED[p - 1]) - run for p, run in zip(periods.tolist(), runs, strict=True)]
        return max(0, min([int(_NEEDED.min()) - _QUICK + 1, *missing]))

    def _missing_of_refrain(self) -> int:
        """How many tokens the phrase that came most often lacks, at least; 0 if the last tokens are a refrain."""
        count = len(self._tokens)
        oldest = count + 1 - REFRAIN_TOKENS - REFRAIN_WINDOW
        most = _FREQUENT - 1
        for phrase in list(self._frequent):
            places = self._places.get(phrase, ())
            if len(places) < _FREQUENT or places[-1] < oldest:
                self._frequent.discard(phrase)
                continue
            begin = places[-1]
            if (
                begin == count - REFRAIN_TOKENS
                and len(places) == MIN_REFRAINS
                and begin - places[0] <= REFRAIN_WINDOW
            ):
                return 0
            most = max(most, sum(place >= oldest for place in places))
        # The next time may end with the next token, those after it cannot overlap it.
        return 1 + REFRAIN_TOKENS * max(0, MIN_REFRAINS - 1 - most)

    def _note_phrases(self) -> None:
        """Note the phrases that end in the tokens since the last look."""
        begin = max(0, self._num_looked_at - REFRAIN_TOKENS + 1)
        for place, phrase in enumerate(self._phrases(begin, len(self._tokens)), start=begin):
            places = self._places.get(phrase, ())
            if places and place < places[-1] + REFRAIN_TOKENS:
                continue
            self._places[phrase] = places = (*places, place)[-MIN_REFRAINS:]
            if len(places) >= _FREQUENT and phrase not in self._frequent:
                kinds = set(self._tokens[place : place + REFRAIN_TOKENS])
                if len(kinds) >= MIN_REFRAIN_KINDS:
                    self._frequent.add(phrase)
        if len(self._places) > 2 * REFRAIN_WINDOW:
            self._drop_old_phrases()

    def _phrases(self, begin: int, end: int) -> Sequence[int]:
        """What stands at each place from `begin` on that ends at `end` or before."""
        if end - begin < REFRAIN_TOKENS:
            return ()
        tokens = _copy(self._tokens, begin)[: end - begin].astype(np.uint64)
        windows = np.lib.stride_tricks.sliding_window_view(tokens, REFRAIN_TOKENS)
        phrases: list[int] = (windows @ _POWERS).tolist()
        return phrases

    def _forget_phrases(self, num_left: int) -> None:
        """Take back what was noted of phrases that end behind the first `num_left` tokens. A place that had been
        pushed out is not missed: it was too old, or the thought had been cut by then."""
        begin = max(0, num_left - REFRAIN_TOKENS + 1)
        phrases = self._phrases(begin, self._num_looked_at)
        for place in range(begin + len(phrases) - 1, begin - 1, -1):
            phrase = phrases[place - begin]
            places = self._places.get(phrase, ())
            if places and places[-1] == place:
                if len(places) == 1:
                    del self._places[phrase]
                else:
                    self._places[phrase] = places[:-1]

    def _drop_old_phrases(self) -> None:
        """A phrase counts only within the window; the margin covers what may still be taken back."""
        oldest = len(self._tokens) - REFRAIN_TOKENS - REFRAIN_WINDOW - 64
        self._places = {phrase: places for phrase, places in self._places.items() if places[-1] >= oldest}


def _copy(tokens: array[int], begin: int) -> NDArray[np.int64]:
    """A copy, because an array that is looked into cannot grow."""
    return np.frombuffer(tokens, dtype=np.int64)[begin:].copy()


def _run(tokens: NDArray[np.int64], period: int) -> int:
    """So many tokens at the end equal the one a period before them."""
    differs = (tokens[period:] != tokens[:-period])[::-1]
    first = int(differs.argmax())
    return first if differs[first] else len(differs)
