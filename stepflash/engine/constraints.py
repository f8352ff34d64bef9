"""The one interface of everything that restricts what a request may say.

Grammar, tool schema, thinking budget and loop guard are each a `Constraint`. The engine asks it for the allowed
tokens before every choice, walks it along drafts and back again, and tells it what was emitted. Because drafts
and verification use the same masks, speculation is safe under any of them.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from stepflash.errors import RequestError

# Allowed token ids: a collection of ids, a boolean array or tensor over the vocabulary, or None for all.
Mask = Collection[int] | Any | None


@runtime_checkable
class Constraint(Protocol):
    """State after the tokens accepted so far. One object serves one request.

    The token that ends a request is never accepted: a constraint that allows the answer to end lists the stop
    tokens in its mask. Exceptions end this request alone.
    """

    def mask(self) -> Mask:
        """The tokens that may come next."""
        ...

    def accept(self, token_id: int) -> None:
        """Advance by one token, which the mask allowed."""
        ...

    def rollback(self, num_tokens: int) -> None:
        """Undo the last `num_tokens` calls of `accept`."""
        ...

    def forced(self) -> Sequence[int]:
        """Tokens that must come next whatever the model thinks; empty when there is a choice."""
        ...


ALWAYS_FREE = 1 << 30


def num_free(constraint: Constraint) -> int:
    """So many tokens may be anything at all, whatever the ones before are: their masks need not be asked for.

    A constraint knows that if it has an attribute `num_free`; of any other it is not known, so it is 0.
    """
    number: int = getattr(constraint, "num_free", 0)
    return number


class AllOf:
    """Several constraints at once: a token is allowed when all of them allow it."""

    def __init__(self, constraints: Sequence[Constraint]) -> None:
        self.constraints = tuple(constraints)

    @property
    def num_free(self) -> int:
        return min(map(num_free, self.constraints))

    def mask(self) -> Mask:
        masks = [m for m in (constraint.mask() for constraint in self.constraints) if m is not None]
        if len(masks) <= 1:
            return masks[0] if masks else None
        listed = next((m for m in masks if isinstance(m, (set, frozenset, list, tuple, range))), None)
        if listed is not None:
            return {i for i in listed if all(allows(m, i) for m in masks)}
        tensors = [torch.as_tensor(m) for m in masks]
        shortest = min(len(m) for m in tensors)
        return torch.stack([m[:shortest].bool() for m in tensors]).all(dim=0)

    def accept(self, token_id: int) -> None:
        for index, constraint in enumerate(self.constraints):
            try:
                constraint.accept(token_id)
            except Exception:
                # All or nothing: those that did advance go back before the error leaves.
                for advanced in self.constraints[:index]:
                    advanced.rollback(1)
                raise

    def rollback(self, num_tokens: int) -> None:
        for constraint in self.constraints:
            constraint.rollback(num_tokens)

    def forced(self) -> Sequence[int]:
        """What one of them dictates; the masks of the others still apply to it."""
        for constraint in self.constraints:
            if tokens := constraint.forced():
                return tokens
        return ()


def allows(mask: Mask, token_id: int) -> bool:
    if mask is None:
        return True
    if isinstance(mask, (set, frozenset, list, tuple, range)):
        return token_id in mask
    allowed = torch.as_tensor(mask)
    return token_id < allowed.shape[0] and bool(allowed[token_id])


def as_tensor(mask: Mask, vocab_size: int) -> Tensor | None:
    """A mask as booleans over the first `vocab_size` tokens, on the host: it is asked about single tokens, too.

    Shorter arrays allow nothing beyond their end.

    Raises:
        RequestError: the mask allows no token at all.
    """
    if mask is None:
        return None
    allowed = torch.zeros(vocab_size, dtype=torch.bool)
    if isinstance(mask, (set, frozenset, list, tuple, range)):
        ids = [i for i in mask if 0 <= i < vocab_size]
        allowed[torch.tensor(ids, dtype=torch.long)] = True
    else:
        values = torch.as_tensor(mask)[:vocab_size].cpu()
        allowed[: values.shape[0]] = values.bool()
    if not bool(allowed.any()):
        raise RequestError("the constraint allows no token at this point", code="dead_constraint")
    return allowed
