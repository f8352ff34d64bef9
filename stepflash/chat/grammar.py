"""Grammars as constraints on token ids: what may be said next, token by token.

`llguidance` does the parsing (an Earley parser over a lexer of regular expressions, with a mask over the whole
vocabulary for each state). This file ties it to our tokenizer and to thoughts: a grammar speaks about the answer,
which begins with the very first token behind the `</think>` that the model itself writes, never with one that the
prompt contains. Nothing here knows where a grammar comes from; see `answer_format` and `tool_grammar`.
"""

from __future__ import annotations

import copy
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper
from numpy.typing import NDArray

from stepflash.chat.thought_end import THINK_END, advance
from stepflash.chat.tokenizer import Tokenizer
from stepflash.errors import BadSchema, RequestError

Mask = NDArray[np.bool_]

_EXCERPT = re.compile(r"[0-9]+ \||[\^ ]+$")
MAX_GRAMMAR_CHARS = 1 << 20
CACHED_GRAMMARS = 64
# Masks kept behind the last position: those of the drafts of one step are asked for again and again.
CACHED_MASKS = 48
# A grammar that can read a text in ever more ways takes ever longer over a token, and everybody waits meanwhile: so
# many seconds may go into one answer, and no more where a mask takes longer than this on average.
PATIENCE_SECONDS = 10.0
SLOW_MASK_SECONDS = 0.02


class Vocabulary:
    """A tokenizer as llguidance sees it, and the masks that guard the end of a thought.

    Control tokens (end of turn, bos, thought tags, ...) are no text for a grammar; the tags of tool calls are, also
    where the vocabulary has them as single tokens.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.size = tokenizer.vocab_size
        self._tokens = [tokenizer.token_bytes(token_id) for token_id in range(self.size)]
        self._eos_token_ids = sorted(tokenizer.eos_token_ids)
        if not self._eos_token_ids:
            raise RequestError("the tokenizer names no token that ends an answer, so no grammar can end")
        wrapped = TokenizerWrapper(_LibraryTokenizer(tokenizer, self._tokens))
        self.tokenizer = LLTokenizer(wrapped, n_vocab=self.size, eos_token=self._eos_token_ids)
        self._overshooting = _overshooting(self._tokens)
        self._thought_masks: dict[tuple[int, bool], Mask] = {}

    def thought_mask(self, progress: int, *, may_end: bool) -> Mask:
        """What may come in a thought of which `progress` characters of `</think>` stand already.

        A token must not go on behind the closing tag, where the grammar begins; and unless `may_end`, the whole
        answer must not end here.
        """
        mask = self._thought_masks.get((progress, may_end))
        if mask is None:
            mask = np.ones(self.size, dtype=np.bool_)
            mask[self._overshooting[progress]] = False
            if not may_end:
                mask[self._eos_token_ids] = False
            self._thought_masks[progress, may_end] = mask
        return mask

    def advance_thought(self, progress: int, token_id: int) -> int:
        """How much of `</think>` stands after one more token; its whole length: the thought is over."""
        return advance(progress, self._tokens[token_id])


class _LibraryTokenizer:
    """What llguidance asks of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer, tokens: list[bytes]) -> None:
        added = tokenizer.backend.get_added_tokens_decoder()
        special = {
            *tokenizer.eos_token_ids,
            *tokenizer.missing_token_ids,
            *(token_id for token_id, token in added.items() if token.special),
            tokenizer.bos_token_id,
            tokenizer.think_start_id,
            tokenizer.think_end_id,
        }
        self._tokenizer = tokenizer
        self.tokens = tokens
        self.special_token_ids = sorted(token_id for token_id in special if token_id is not None)
        self.eos_token_id = min(tokenizer.eos_token_ids)
        self.bos_token_id = tokenizer.bos_token_id

    def __call__(self, text: bytes | str) -> list[int]:
        return self._tokenizer.encode(text.decode("utf-8", "replace") if isinstance(text, bytes) else text)


def _overshooting(tokens: Sequence[bytes]) -> list[list[int]]:
    """For each progress within `</think>`: the tokens that hold its end and more behind it."""
    rests = [THINK_END[progress:] for progress in range(len(THINK_END))]
    overshooting: list[list[int]] = [[] for _ in rests]
    for token_id, token in enumerate(tokens):
        if b">" not in token[:-1]:
            continue
        whole = token.find(THINK_END)
        for progress, rest in enumerate(rests):
            if (token.startswith(rest) and len(token) > len(rest)) or 0 <= whole < len(token) - len(
                THINK_END
            ):
                overshooting[progress].append(token_id)
    return overshooting


class AnswerGrammar:
    """A constraint of the engine (see `stepflash.engine.constraints`): one answer under one grammar.

    Going back over drafts and forth again is the common case, so tokens are handed to the matcher only when a mask
    is wanted that is not known yet, and masks of the last positions are kept.
    """

    def __init__(
        self, vocabulary: Vocabulary, matcher: LLMatcher, *, param: str, in_thought: bool, may_end: bool
    ) -> None:
        """`matcher` has seen nothing and belongs to many; `param` names where the grammar came from. `in_thought`:
        the grammar begins behind the model's `</think>`. `may_end`: it need not get there."""
        self._vocabulary = vocabulary
        self._unused, self._matcher = matcher, matcher.deep_copy()
        self._param = param
        self._may_end = may_end
        # Progress within `</think>` after each token of the thought; None: there is none, or it is over.
        self._thought: list[int] | None = [0] if in_thought else None
        self._answer: list[int] = []  # accepted tokens behind the thought
        self._fed: list[int] = []  # what the matcher has seen
        self._num_valid = 0  # of these, the first that are still the beginning of `_answer`
        self._masks: dict[int, Mask] = {}  # by number of answer tokens before it; exact up to `_num_valid`
        self._seconds, self._num_masks = 0.0, 0  # spent on how many

    def mask(self) -> Mask:
        if self._in_thought:
            assert self._thought is not None
            return self._vocabulary.thought_mask(self._thought[-1], may_end=self._may_end)
        position = len(self._answer)
        if position > self._num_valid or position not in self._masks:
            start = time.perf_counter()
            self._feed()
            bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
            self._check()
            self._be_patient(time.perf_counter() - start)
            mask = np.unpackbits(bits, bitorder="little")[: self._vocabulary.size].view(np.bool_)
            self._masks[position] = mask
            if len(self._masks) > CACHED_MASKS:
                del self._masks[min(self._masks)]
        return self._masks[position]

    def accept(self, token_id: int) -> None:
        if self._in_thought:
            assert self._thought is not None
            self._thought.append(self._vocabulary.advance_thought(self._thought[-1], token_id))
            return
        position = len(self._answer)
        if position == self._num_valid < len(self._fed) and self._fed[position] == token_id:
            self._num_valid += 1
        self._answer.append(token_id)

    def rollback(self, num_tokens: int) -> None:
        num_answer = min(num_tokens, len(self._answer))
        del self._answer[len(self._answer) - num_answer :]
        self._num_valid = min(self._num_valid, len(self._answer))
        if self._thought is not None and num_tokens > num_answer:
            del self._thought[len(self._thought) - (num_tokens - num_answer) :]

    def forced(self) -> Sequence[int]:
        if self._in_thought:
            return ()
        mask = self.mask()
        if np.count_nonzero(mask) != 1:
            return ()
        self._feed()
        tokens = self._matcher.compute_ff_tokens()
        return tokens if tokens and mask[tokens[0]] else ()

    def __deepcopy__(self, memo: dict[int, Any]) -> AnswerGrammar:
        self._feed()
        twin = copy.copy(self)
        twin._matcher = self._matcher.deep_copy()
        twin._thought = None if self._thought is None else list(self._thought)
        twin._answer, twin._fed, twin._masks = list(self._answer), list(self._fed), dict(self._masks)
        return twin

    @property
    def _in_thought(self) -> bool:
        return self._thought is not None and self._thought[-1] < len(THINK_END)

    def _feed(self) -> None:
        """Bring the matcher to where the answer is."""
        if len(self._fed) > self._num_valid:
            self._matcher.rollback(len(self._fed) - self._num_valid)
            del self._fed[self._num_valid :]
            self._masks = {at: mask for at, mask in self._masks.items() if at <= self._num_valid}
        new = self._answer[self._num_valid :]
        if new:
            self._matcher.consume_tokens(new)
            self._fed += new
            self._num_valid = len(self._fed)
        self._check()

    def _be_patient(self, seconds: float) -> None:
        self._seconds, self._num_masks = self._seconds + seconds, self._num_masks + 1
        average = self._seconds / self._num_masks
        if self._seconds > PATIENCE_SECONDS and average > SLOW_MASK_SECONDS:
            raise RequestError(
                f"{self._param}: the grammar is too ambiguous: after {len(self._answer)} tokens it takes "
                f"{average * 1000:.0f} ms a token, for which other requests wait; "
                "write it so that a text can be read in one way",
                param=self._param,
                code="grammar_failed",
            )

    def _check(self) -> None:
        if not self._matcher.is_error():
            return
        problem = _first_line(self._matcher.get_error().partition("<state>")[0])
        # A matcher has its error for good, but what it has seen may be a draft that is taken back.
        self._matcher, self._fed, self._num_valid, self._masks = self._unused.deep_copy(), [], 0, {}
        raise RequestError(
            f"{self._param}: the grammar cannot go on: {problem}", param=self._param, code="grammar_failed"
        )


class GrammarCompiler:
    """Compiles grammars for one tokenizer; any thread may use it. What was compiled lately is kept."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        self._vocabulary: Vocabulary | None = None
        self._matchers: OrderedDict[str, LLMatcher] = OrderedDict()

    def compile(
        self, grammar: str, *, param: str, in_thought: bool = False, may_end_in_thought: bool = False
    ) -> AnswerGrammar:
        """A fresh constraint for `grammar`, which is Lark text or the JSON that joins several grammars.

        Takes some milliseconds, and for the first grammar of a process the time to index the vocabulary (a third of
        a second for 128K tokens), so not for an event loop.

        Raises:
            BadSchema: it cannot be compiled; names `param`.
        """
        check_size(grammar, param)
        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = Vocabulary(self._tokenizer)
            matcher = self._matchers.get(grammar)
            if matcher is None:
                matcher = LLMatcher(self._vocabulary.tokenizer, grammar, log_level=0)
                if matcher.is_error():
                    raise _bad_grammar(matcher.get_error(), param)
                self._matchers[grammar] = matcher
            self._matchers.move_to_end(grammar)
            while len(self._matchers) > CACHED_GRAMMARS:
                self._matchers.popitem(last=False)
            return AnswerGrammar(
                self._vocabulary, matcher, param=param, in_thought=in_thought, may_end=may_end_in_thought
            )


def check_grammar(grammar: str, param: str) -> None:
    """Raise BadSchema, naming `param`, unless the grammar is well-formed; needs no tokenizer."""
    check_size(grammar, param)
    problem = LLMatcher.validate_grammar(grammar)
    if problem and not problem.startswith("WARNING"):
        raise _bad_grammar(problem, param)


def check_size(grammar: str, param: str) -> None:
    if len(grammar) > MAX_GRAMMAR_CHARS:
        raise BadSchema(f"{param}: longer than {MAX_GRAMMAR_CHARS} characters", param=param)


def _bad_grammar(problem: str, param: str) -> BadSchema:
    return BadSchema(f"{param}: {_first_line(problem)}", param=param, code="invalid_grammar")


def _first_line(problem: str) -> str:
    """The library's message without the excerpts that point into our own grammar."""
    lines = [line.strip() for line in problem.splitlines()]
    return " ".join(line for line in lines if line and not _EXCERPT.match(line))[:400]
