"""A limit on the length of a thought, as a constraint: when it is reached, a short sentence closes the thought.

The open weights know no levels of effort; this is the only way to bound what they think. Up to the limit the model is
free, then the tokens of the closing are dictated one by one, and behind them it is free again. Only the number of
accepted tokens and the place where the thought ended are kept, so that going back over drafts is a subtraction.
"""

from __future__ import annotations

from collections.abc import Sequence

from stepflash.chat.tokenizer import Tokenizer
from stepflash.engine.constraints import Mask

CLOSING_TEXT = "\n\nThat is enough thinking; I answer now.\n"


class ThinkingBudget:
    """Allows `num_tokens` tokens of thought; `closing` is what then follows, its last token ends the thought."""

    def __init__(self, num_tokens: int, closing: Sequence[int]) -> None:
        self._num_tokens = num_tokens
        self._closing = tuple(closing)
        self._num_accepted = 0
        self._end: int | None = None  # number of accepted tokens with which the thought ended

    def mask(self) -> Mask:
        forced = self.forced()
        return {forced[0]} if forced else None

    def accept(self, token_id: int) -> None:
        self._num_accepted += 1
        if self._end is None and token_id == self._closing[-1]:
            self._end = self._num_accepted

    def rollback(self, num_tokens: int) -> None:
        self._num_accepted -= num_tokens
        if self._end is not None and self._end > self._num_accepted:
            self._end = None

    def forced(self) -> Sequence[int]:
        if self._end is not None or self._num_accepted < self._num_tokens:
            return ()
        return self._closing[self._num_accepted - self._num_tokens :]


def thinking_budget(num_tokens: int, tokenizer: Tokenizer) -> ThinkingBudget | None:
    """The constraint for a model whose prompt opens a thought; None if the end of a thought is no single token."""
    if tokenizer.think_end_id is None:
        return None
    return ThinkingBudget(num_tokens, [*tokenizer.encode(CLOSING_TEXT), tokenizer.think_end_id])
