"""Limits of a thought, as a constraint: when it is long enough, or goes round in circles, a short sentence closes it.

The open weights know no levels of effort; this is the only way to bound what they think. Up to the limit the model is
free, then the tokens of the closing are dictated one by one, and behind them it is free again.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from stepflash.assistant.loops import LoopDetector
from stepflash.chat.thought_end import THINK_END, advance
from stepflash.chat.tokenizer import Tokenizer
from stepflash.engine.constraints import ALWAYS_FREE, AllOf, Constraint, Mask

CLOSING_TEXT = "\n\nThat is enough thinking; I answer now.\n"
LOOP_CLOSING_TEXT = "\n\nI am going round in circles; I answer now with what I have.\n"

# Why a thought was closed: the limit of this answer, what is left of the task's, or a loop.
Cut = Literal["budget", "task_budget", "loop"]

# Tokens of thought that a level of effort allows; None: as many as it takes.
EFFORT_TOKENS: Mapping[str, int | None] = {
    "none": 0,
    "minimal": 0,
    "low": 1024,
    "medium": 8192,
    "high": 32768,
    "xhigh": 65536,
    "max": None,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Thinking:
    """How much may be thought, in tokens; None: no limit.

    `max_tokens` is for one answer. `task_tokens` is for all answers since the last message of the user, so that
    a model cannot begin to ponder anew after each result of a tool. `stops_loops` closes a thought that repeats
    itself.
    """

    max_tokens: int | None = None
    task_tokens: int | None = None
    stops_loops: bool = True

    @property
    def is_wanted(self) -> bool:
        return self.max_tokens != 0 and self.task_tokens != 0

    def or_else(self, defaults: Thinking) -> Thinking:
        """With the defaults of a server where this says nothing."""
        return Thinking(
            max_tokens=defaults.max_tokens if self.max_tokens is None else self.max_tokens,
            task_tokens=defaults.task_tokens if self.task_tokens is None else self.task_tokens,
            stops_loops=self.stops_loops and defaults.stops_loops,
        )


NO_THOUGHT = Thinking(max_tokens=0)


class ThoughtLimit:
    """Allows `num_tokens` tokens of thought (None: any number), and no loop if it has a detector.

    `closing` is what then follows, its last token ends the thought; `loop_closing` the same after a loop, with
    the same last token. `reason` is what a used up budget is called. With `token_bytes` a closing tag that the
    model spells out in several tokens is noticed too.
    """

    def __init__(
        self,
        num_tokens: int | None,
        closing: Sequence[int],
        *,
        loop_closing: Sequence[int] = (),
        reason: Cut = "budget",
        token_bytes: Callable[[int], bytes] | None = None,
    ) -> None:
        self._num_tokens = num_tokens
        self._closing = tuple(closing)
        self._loop_closing = tuple(loop_closing)
        self._reason: Cut = reason
        self._loops = LoopDetector() if loop_closing else None
        end = self._closing[-1]
        self._token_bytes = token_bytes or (lambda token_id: THINK_END if token_id == end else b"")
        self._progress = [0]  # of the closing tag, after each accepted token of the thought
        self._num_accepted = 0
        self._cut_at: tuple[int, Cut] | None = (
            None  # number of accepted tokens at which the closing began, and why
        )
        self._end: int | None = None  # number of accepted tokens with which the thought ended
        self._cut()

    def __deepcopy__(self, memo: dict[int, Any]) -> ThoughtLimit:
        twin = copy.copy(self)  # what is never changed may be shared, a whole tokenizer among it
        twin._progress = list(self._progress)
        twin._loops = copy.deepcopy(self._loops, memo)
        return twin

    @property
    def budget(self) -> int | None:
        return self._num_tokens

    @property
    def cut(self) -> Cut | None:
        """Why the thought was closed. Other threads may ask when the thought is over, because then it stays."""
        return None if self._cut_at is None else self._cut_at[1]

    @property
    def num_free(self) -> int:
        """So many tokens may be chosen before the mask has to be asked again."""
        if self._cut_at is not None and self._end is None:
            return 0
        if self._end is not None:
            return ALWAYS_FREE
        left = ALWAYS_FREE if self._num_tokens is None else self._num_tokens - self._num_accepted
        return left if self._loops is None else min(left, self._loops.num_free + 1)

    def mask(self) -> Mask:
        forced = self.forced()
        return {forced[0]} if forced else None

    def accept(self, token_id: int) -> None:
        self._num_accepted += 1
        if self._end is not None:
            return
        self._progress.append(advance(self._progress[-1], self._token_bytes(token_id)))
        if self._progress[-1] == len(THINK_END):
            self._end = self._num_accepted
        elif self._cut_at is None:
            if self._loops is not None:
                self._loops.accept(token_id)
            self._cut()

    def rollback(self, num_tokens: int) -> None:
        seen = self._num_seen
        self._num_accepted -= num_tokens
        del self._progress[self._num_accepted + 1 :]
        if self._end is not None and self._end > self._num_accepted:
            self._end = None
        if self._cut_at is not None and self._cut_at[0] > self._num_accepted:
            self._cut_at = None
        if self._loops is not None:
            self._loops.rollback(seen - self._num_seen)

    def forced(self) -> Sequence[int]:
        if self._end is not None or self._cut_at is None:
            return ()
        begin, reason = self._cut_at
        return (self._loop_closing if reason == "loop" else self._closing)[self._num_accepted - begin :]

    def _cut(self) -> None:
        if self._num_tokens is not None and self._num_accepted >= self._num_tokens:
            self._cut_at = self._num_accepted, self._reason
        elif self._loops is not None and self._loops.is_looping:
            self._cut_at = self._num_accepted, "loop"

    @property
    def _num_seen(self) -> int:
        """How many tokens the detector has read: those of the thought before its closing."""
        if self._cut_at is not None:
            return self._cut_at[0]
        return self._num_accepted if self._end is None else self._end - 1


def thought_limit(
    thinking: Thinking, tokenizer: Tokenizer, num_thought_in_task: int = 0
) -> ThoughtLimit | None:
    """The constraint for a model whose prompt opens a thought, `num_thought_in_task` tokens after the task began.

    None if nothing is limited, or if the end of a thought is no single token.
    """
    if tokenizer.think_end_id is None:
        return None
    num_tokens, reason = thinking.max_tokens, "budget"
    if thinking.task_tokens is not None:
        left = max(0, thinking.task_tokens - num_thought_in_task)
        if num_tokens is None or left < num_tokens:
            num_tokens, reason = left, "task_budget"
    if num_tokens is None and not thinking.stops_loops:
        return None
    closing, loop_closing = _closings(tokenizer)
    return ThoughtLimit(
        num_tokens,
        closing,
        loop_closing=loop_closing if thinking.stops_loops else (),
        reason=reason,  # type: ignore[arg-type]
        token_bytes=tokenizer.token_bytes,
    )


@functools.lru_cache(maxsize=4)
def _closings(tokenizer: Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The tokens that close a thought, and those that close a loop."""
    end = tokenizer.think_end_id
    assert end is not None
    return (*tokenizer.encode(CLOSING_TEXT), end), (*tokenizer.encode(LOOP_CLOSING_TEXT), end)


def limit_of(constraint: Constraint | None) -> ThoughtLimit | None:
    """The limit of the thought among the constraints of a request."""
    parts = constraint.constraints if isinstance(constraint, AllOf) else (constraint,)
    return next((part for part in parts if isinstance(part, ThoughtLimit)), None)
