"""Random answers under a grammar: the tokens are drawn by a test, the masks say which may be drawn."""

from __future__ import annotations

from functools import cache

import numpy as np

from stepflash.chat.grammar import AnswerGrammar, GrammarCompiler
from stepflash.chat.tokenizer import Tokenizer
from stepflash.weights.hub import resolve_model

# What brings an answer to its end, where it is allowed.
CLOSING_TEXTS = ('"', "}", "]", "\n", "</parameter>", "</function>", "</tool_call>")


@cache
def tokenizer() -> Tokenizer:
    """nano's: 2048 tokens, those of the tags among them."""
    return Tokenizer.from_pretrained(resolve_model("nano"))


@cache
def compiler() -> GrammarCompiler:
    return GrammarCompiler(tokenizer())


def walk(constraint: AnswerGrammar, seed: int, *, num_free: int = 30, limit: int = 1500) -> str | None:
    """A random answer, from the first token to one that may be the last; None if it did not end.

    The first `num_free` tokens are drawn from all allowed ones, later ones from those that close something if there
    are such.
    """
    draw = np.random.default_rng(seed)
    eos = sorted(tokenizer().eos_token_ids)
    closing = [tokenizer().encode(text)[0] for text in CLOSING_TEXTS]
    token_ids: list[int] = []
    for count in range(limit):
        mask = constraint.mask().copy()
        may_end = bool(mask[eos].any())
        mask[eos] = False
        going_on = np.flatnonzero(mask)
        assert may_end or len(going_on), tokenizer().decode(token_ids)
        if may_end and (not len(going_on) or count >= num_free or draw.random() < 0.3):
            return tokenizer().decode(token_ids)
        ways = [i for i in closing if mask[i]]
        token_id = int(draw.choice(ways if ways and count >= num_free * draw.random() else going_on))
        constraint.accept(token_id)
        token_ids.append(token_id)
    return None
