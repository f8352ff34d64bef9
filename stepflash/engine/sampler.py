"""From logits to a token: the same function for plain decoding, for drafts and for their verification.

A token is argmax(logits / temperature + Gumbel noise), which samples the softmax exactly (Gumbel 1954; Maddison
et al. 2014). The noise is a pure function of (seed, position, token id), so a seeded request gives the same
tokens whatever else is in the batch, wherever chunks end, after a preemption and with any speculation depth: a
draft is right if and only if it is the token that plain decoding takes. That is lossless speculation by
coupling (Daliri, Musco, Suresh 2024, arXiv 2408.07978): drafts choose with the same noise from the draft
distribution and are accepted with probability at least (1 - d) / (1 + d), d their total variation distance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from stepflash.engine.request import SamplingParams, TokenLogprob

NUCLEUS_GUESS = 1024
KEPT_POSITIONS = 8
# Dividing by less could overflow, and would choose the same token.
GREEDY_BELOW = 1e-5

_MASK64 = (1 << 64) - 1
_GOLDEN, _MIX_1, _MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


@dataclass(slots=True, eq=False)
class SamplerState:
    """What sampling remembers of one request: its noise seed and, for penalties, which tokens occurred.

    `counts` [vocab_size] float32 counts generated tokens; `in_prompt` [vocab_size] bool. Both are None without
    penalties. `bias` is (token ids, values) or None.
    """

    params: SamplingParams
    seed: int
    counts: Tensor | None = None
    in_prompt: Tensor | None = None
    bias: tuple[Tensor, Tensor] | None = None
    # Noise of the last few positions: a draft and its verification need the same.
    noise: dict[int, Tensor] = field(default_factory=dict)

    @property
    def is_greedy(self) -> bool:
        """True when the largest logit as the model gives it decides."""
        return self.params.temperature < GREEDY_BELOW and not self.changes_logits

    @property
    def changes_logits(self) -> bool:
        """Whether penalties or a bias apply."""
        return self.bias is not None or self.counts is not None

    def accept(self, token_ids: Sequence[int]) -> None:
        """Count tokens that were emitted."""
        if self.counts is not None:
            for token_id in token_ids:
                self.counts[token_id] += 1


@dataclass(frozen=True, slots=True)
class Row:
    """One row of logits to choose from.

    `position` is where the chosen token will stand; `drafted` are unconfirmed tokens between what `state` has
    counted and this row; `allowed` [vocab_size] bool on the host, or None. `logprobs` as in SamplingParams.
    """

    state: SamplerState
    position: int
    drafted: Sequence[int] = ()
    allowed: Tensor | None = None
    logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """Chosen token ids, one per row, and their log-probabilities where asked for.

    `is_finite[i]` is False where row i holds NaN or nothing that may be chosen; its token means nothing.
    """

    token_ids: list[int]
    is_finite: list[bool]
    logprobs: list[TokenLogprob | None] = field(default_factory=list)


class Sampler:
    """Chooses tokens below `vocab_limit`; rows of the logits beyond it have no token and are never chosen."""

    def __init__(self, vocab_limit: int, device: torch.device | str = "cpu") -> None:
        self.vocab_limit = vocab_limit
        self.device = torch.device(device)
        self._stream = torch.arange(1, vocab_limit + 1, device=self.device) * _signed(_GOLDEN)

    def state(self, params: SamplingParams, prompt_token_ids: Sequence[int], seed: int) -> SamplerState:
        state = SamplerState(params, seed)
        if params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0:
            state.counts = torch.zeros(self.vocab_limit, device=self.device)
            state.in_prompt = torch.zeros(self.vocab_limit, dtype=torch.bool, device=self.device)
            known = [i for i in prompt_token_ids if i < self.vocab_limit]
            state.in_prompt[torch.tensor(known, dtype=torch.long, device=self.device)] = True
        bias = {i: value for i, value in params.logit_bias.items() if 0 <= i < self.vocab_limit}
        if bias:
            ids = torch.tensor(list(bias), dtype=torch.long, device=self.device)
            state.bias = ids, torch.tensor(list(bias.values()), device=self.device)
        return state

    def choose(
        self,
        logits: Tensor,
        rows: Sequence[Row],
        greedy: Callable[[], tuple[list[int], list[float]] | None] = lambda: None,
    ) -> Choice:
        """Choose one token per row.

        Args:
            logits: [num_rows, vocab_size] float32, unprocessed; not changed.
            rows: what applies to each row.
            greedy: the best token of each row below the limit and its logit, if known already; asked only where
                that decides.
        """
        raw = logits
        logits = logits[:, : self.vocab_limit]
        changed = [i for i, row in enumerate(rows) if row.allowed is not None or row.state.changes_logits]
        if changed:
            logits = logits.clone()
            for i in changed:
                _apply(logits[i], rows[i])
        sampled = [i for i, row in enumerate(rows) if row.state.params.temperature >= GREEDY_BELOW]
        if not sampled and not changed and (known := greedy()) is not None:
            return _choice(raw, rows, *known)
        if not sampled:
            best, chosen = logits.max(dim=-1)
            return _choice(raw, rows, *_on_host(chosen, best, None)[:2])
        # The largest logit of a row tells whether the row is usable; noise must not hide that.
        best = logits.amax(dim=-1)
        for guess in (NUCLEUS_GUESS, self.vocab_limit):
            chosen, is_enough = self._sample(logits, rows, sampled, guess)
            token_ids, values, is_found = _on_host(chosen, best, is_enough)
            if is_found:
                break
        return _choice(raw, rows, token_ids, values)

    def _sample(
        self, logits: Tensor, rows: Sequence[Row], sampled: list[int], guess: int
    ) -> tuple[Tensor, Tensor | None]:
        """What the rows choose, those `sampled` with noise; and whether `guess` was enough (see `_filtered`)."""
        if len(sampled) < len(rows):
            index = to_device(torch.tensor(sampled), logits.device)
            some = [rows[i] for i in sampled]
            tokens, is_enough = self._sample(logits[index], some, list(range(len(some))), guess)
            return logits.argmax(dim=-1).index_copy(0, index, tokens), is_enough
        params = [row.state.params for row in rows]
        temperatures = to_device(torch.tensor([p.temperature for p in params]), logits.device)
        scaled, is_enough = _filtered(logits / temperatures[:, None], params, guess)
        return (scaled + self._noise(rows)).argmax(dim=-1), is_enough

    def _noise(self, rows: Sequence[Row]) -> Tensor:
        """`gumbel`, computed once per request and position."""
        found = [row.state.noise.get(row.position) for row in rows]
        missing = [i for i, noise in enumerate(found) if noise is None]
        if missing:
            fresh = self.gumbel([rows[i] for i in missing])
            for i, noise in zip(missing, fresh, strict=True):
                found[i] = noise
                kept = rows[i].state.noise
                # A view would keep the noise of the whole batch alive.
                kept[rows[i].position] = noise.clone()
                if len(kept) > KEPT_POSITIONS:
                    del kept[next(iter(kept))]
            if len(missing) == len(rows):
                return fresh
        return torch.stack([noise for noise in found if noise is not None])

    def gumbel(self, rows: Sequence[Row]) -> Tensor:
        """Gumbel noise of each row: [num_rows, vocab_limit] float32.

        Token i of a row takes output i + 1 of the splitmix64 stream (Steele et al. 2014) that starts at a mix
        of seed and position; its upper 32 bits are the uniform number.
        """
        keys = [_signed(_mix(row.state.seed + _mix(row.position))) for row in rows]
        x = self._stream + to_device(torch.tensor(keys), self.device)[:, None]
        x ^= (x >> 30) & 0x3FFFFFFFF  # int64 shifts are arithmetic: the mask makes them logical
        x *= _signed(_MIX_1)
        x ^= (x >> 27) & 0x1FFFFFFFFF
        x *= _signed(_MIX_2)
        x ^= (x >> 31) & 0x1FFFFFFFF
        uniform = (((x >> 32) & 0xFFFFFFFF).float() + 0.5) * 2.0**-32
        # -log1p(-u) keeps small exponentials, the winners, exact; below 1 or the rounding to 1 makes inf.
        exponential = -torch.log1p(-uniform.clamp_(max=1.0 - 2.0**-24))
        return -exponential.log()


def _on_host(chosen: Tensor, best: Tensor, is_enough: Tensor | None) -> tuple[list[int], list[float], bool]:
    """Each transfer waits for the device: one for all."""
    if not chosen.is_cuda:
        return chosen.tolist(), best.tolist(), is_enough is None or bool(is_enough)
    flag = torch.ones_like(best) if is_enough is None else is_enough.expand_as(best)
    ids, values, flags = torch.stack((chosen.double(), best.double(), flag.double())).tolist()
    return [int(i) for i in ids], values, bool(flags[0])


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """What the host has, on the device; the host does not wait for it."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def filter_logits(scaled: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Top-k, then top-p of what is left, then min-p: [num_rows, vocab], removed tokens become -inf.

    Ties at a threshold stay. The most likely token always stays.
    """
    filtered, is_enough = _filtered(scaled, params, NUCLEUS_GUESS)
    return (
        filtered if is_enough is None or bool(is_enough) else _filtered(scaled, params, scaled.shape[-1])[0]
    )


def _filtered(scaled: Tensor, params: Sequence[SamplingParams], guess: int) -> tuple[Tensor, Tensor | None]:
    """`filter_logits`, should every nucleus be among the first `guess` tokens; and a bool whether they are, if it is
    in question. Sorting a whole vocabulary costs more than a layer, and nothing waits for the device here."""
    is_enough = None
    vocab = scaled.shape[-1]
    device = scaled.device
    top_k = [min(p.top_k, vocab) if p.top_k else vocab for p in params]
    if (most := max((k for k in top_k if k < vocab), default=0)) > 0:
        values = scaled.topk(most, dim=-1).values
        index = to_device(torch.tensor([min(k, most) - 1 for k in top_k]), device)[:, None]
        threshold = values.gather(-1, index)
        off = to_device(torch.tensor([k == vocab for k in top_k]), device)[:, None]
        scaled = scaled.masked_fill((scaled < threshold) & ~off, float("-inf"))
    if any(p.top_p < 1.0 for p in params):
        top_p = to_device(torch.tensor([p.top_p for p in params]), device)[:, None]
        threshold, is_enough = _nucleus_threshold(scaled, top_p, min(guess, vocab))
        scaled = scaled.masked_fill((scaled < threshold) & (top_p < 1.0), float("-inf"))
    if any(p.min_p > 0.0 for p in params):
        min_p = to_device(torch.tensor([p.min_p for p in params]), device)[:, None]
        scaled = scaled.masked_fill(scaled < scaled.amax(-1, keepdim=True) + min_p.log(), float("-inf"))
    return scaled, is_enough


def _nucleus_threshold(scaled: Tensor, top_p: Tensor, count: int) -> tuple[Tensor, Tensor | None]:
    """The least likely logit of the smallest set with mass top_p, [num_rows, 1], if it is among the first `count`."""
    values = scaled.topk(count, dim=-1).values
    probabilities = (values - scaled.logsumexp(-1, keepdim=True)).exp()
    mass = probabilities.cumsum(-1)
    before = mass - probabilities  # mass of everything more likely
    size = (before < top_p).sum(-1, keepdim=True).clamp(min=1)
    is_enough = None if count == scaled.shape[-1] else ((mass[:, -1:] >= top_p) | (top_p >= 1.0)).all()
    return values.gather(-1, size - 1), is_enough


def _choice(raw: Tensor, rows: Sequence[Row], token_ids: list[int], best: list[float]) -> Choice:
    return Choice(
        token_ids,
        [math.isfinite(value) for value in best],
        [
            None
            if row.logprobs is None
            else token_logprobs(raw[i : i + 1], token_ids[i : i + 1], row.logprobs)[0]
            for i, row in enumerate(rows)
        ],
    )


def _apply(logits: Tensor, row: Row) -> None:
    """Penalties as in the OpenAI and CTRL definitions, bias, then the mask; in place on [vocab_limit]."""
    state, params = row.state, row.state.params
    if state.counts is not None and state.in_prompt is not None:
        counts = state.counts
        if row.drafted:
            counts = counts.clone()
            for token_id in row.drafted:
                counts[token_id] += 1
        generated = counts > 0
        if params.repetition_penalty != 1.0:
            factor = torch.where(logits > 0, 1.0 / params.repetition_penalty, params.repetition_penalty)
            logits.copy_(torch.where(generated | state.in_prompt, logits * factor, logits))
        logits -= params.frequency_penalty * counts + params.presence_penalty * generated
    if state.bias is not None:
        logits[state.bias[0]] += state.bias[1]
    if row.allowed is not None:
        logits.masked_fill_(to_device(~row.allowed, logits.device), float("-inf"))


def token_logprobs(logits: Tensor, token_ids: Sequence[int], num_top: int) -> list[TokenLogprob]:
    """Of one token for each row, as the model gives them: [num_rows, vocab_size]."""
    logprobs = logits.log_softmax(-1)
    index = to_device(torch.tensor(token_ids), logits.device)[:, None]
    values = logprobs.gather(-1, index)[:, 0].tolist()
    tops: list[tuple[tuple[int, float], ...]] = [()] * len(token_ids)
    if num_top:
        best, ids = logprobs.topk(min(num_top, logprobs.shape[-1]))
        tops = [tuple(zip(*row, strict=True)) for row in zip(ids.tolist(), best.tolist(), strict=True)]
    return [
        TokenLogprob(token_id=token_id, logprob=value, top=top)
        for token_id, value, top in zip(token_ids, values, tops, strict=True)
    ]


def _mix(x: int) -> int:
    """The output function of splitmix64."""
    x = (x + _GOLDEN) & _MASK64
    x = ((x ^ (x >> 30)) * _MIX_1) & _MASK64
    x = ((x ^ (x >> 27)) * _MIX_2) & _MASK64
    return x ^ (x >> 31)


def _signed(x: int) -> int:
    """An unsigned 64-bit number as the int64 of the same bits."""
    x &= _MASK64
    return x - (1 << 64) if x >> 63 else x
