"""An engine without a model: it "generates" texts that somebody wrote down.

Below the session nothing is real, above it everything is: the tokenizer is a byte-level one with the model's
special tokens, so that any text can be scripted and any burst of tokens can be cut anywhere. Tests use it, and so
do checks of client programs, where what matters is that everything between the model and the client is right.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from stepflash.assistant.scripted_agent import END
from stepflash.assistant.session import Session
from stepflash.chat.template import ChatTemplate
from stepflash.chat.tokenizer import BOS_TEXT, Tokenizer
from stepflash.engine.constraints import Constraint, allows
from stepflash.engine.request import Output, Request, RequestStats, TokenLogprob
from stepflash.errors import RequestError

SPECIAL_TOKENS = (BOS_TEXT, END, "<|im_start|>", "<think>", "</think>")

Script = Sequence[str] | Callable[[str], str]


def byte_tokenizer() -> Tokenizer:
    """256 byte tokens and the special ones; no merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(
        models.BPE(vocab={character: index for index, character in enumerate(alphabet)}, merges=[])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([tokenizers.AddedToken(text, normalized=False) for text in SPECIAL_TOKENS])
    return Tokenizer(backend, bos_token_id=backend.token_to_id(BOS_TEXT))


class ScriptedEngine:
    """Answers request number i with `script[i % len(script)]`, or with `script(prompt text)`.

    The answer comes in bursts of the given sizes, cycled. A text that does not end with `END` runs out of tokens:
    its finish reason is "length". `error` is reported after `error_after` bursts, and the deadline of a request, if
    it has one, is reached after `deadline_after`. `pause` seconds pass before each burst. It keeps to the constraint
    of a request: what that dictates replaces the script up to the end of the thought, and a script that it forbids is
    an error.
    """

    def __init__(
        self,
        script: Script,
        *,
        bursts: Sequence[int] = (1,),
        error: str | None = None,
        error_after: int = 0,
        deadline_after: int | None = None,
        pause: float = 0.0,
    ) -> None:
        self.tokenizer = byte_tokenizer()
        self.script = script
        self.bursts = bursts
        self.error = error
        self.error_after = error_after
        self.deadline_after = deadline_after
        self.pause = pause
        self.requests: list[Request] = []
        self.aborted: list[str] = []

    async def submit(self, request: Request) -> AsyncIterator[Output]:
        text = self._text(request)
        self.requests.append(request)
        is_complete = text.endswith(END)
        try:
            token_ids = self._obeying(request.constraint, self.tokenizer.encode(text))
        except RequestError as forbidden:
            yield Output(request_id=request.request_id, finish_reason="error", error=str(forbidden))
            return
        limit = request.sampling.max_tokens
        if limit is not None and limit < len(token_ids):
            token_ids, is_complete = token_ids[:limit], False
        stats = RequestStats(num_prompt_tokens=len(request.prompt_token_ids), num_cached_tokens=1)
        pieces = list(_split(token_ids, self.bursts)) or [()]
        of_prompt = tuple(_logprobs(request.prompt_token_ids[1:], request.sampling.prompt_logprobs))
        for index, piece in enumerate(pieces):
            await asyncio.sleep(self.pause)
            if request.request_id in self.aborted:
                yield Output(request_id=request.request_id, finish_reason="abort", stats=stats)
                return
            if request.deadline_seconds is not None and index == self.deadline_after:
                yield Output(
                    request_id=request.request_id, finish_reason="abort", stop_reason="deadline", stats=stats
                )
                return
            if self.error is not None and index == self.error_after:
                yield Output(request_id=request.request_id, finish_reason="error", error=self.error)
                return
            stats.num_steps += 1
            stats.num_generated_tokens += len(piece)
            stats.num_drafted_tokens[0] += 3
            stats.num_accepted_tokens[0] += max(0, len(piece) - 1)
            reason = None
            if index == len(pieces) - 1:
                reason = "stop" if is_complete else "length"
            yield Output(
                request_id=request.request_id,
                token_ids=tuple(piece),
                logprobs=tuple(_logprobs(piece, request.sampling.logprobs)),
                prompt_logprobs=() if index else of_prompt,
                finish_reason=reason,  # type: ignore[arg-type]
                stats=stats,
            )

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)

    def stats(self) -> dict[str, float]:
        return {"num_free_blocks": 7}

    def _obeying(self, constraint: Constraint | None, script: list[int]) -> list[int]:
        if constraint is None:
            return script
        decode, end = self.tokenizer.decode, self.tokenizer.think_end_id
        written: list[int] = []
        while script:
            forced = list(constraint.forced())
            if forced and forced[0] != script[0]:
                if forced[-1] != end:
                    raise RequestError(f"the constraint dictates {decode(forced)!r}")
                script = [*forced, *(script[script.index(end) + 1 :] if end in script else ())]
            token_id, *script = script
            if not allows(constraint.mask(), token_id):
                raise RequestError(
                    f"the constraint forbids {decode([token_id])!r} behind {decode(written)!r}"
                )
            written.append(token_id)
            if token_id not in self.tokenizer.eos_token_ids:
                constraint.accept(token_id)
        return written

    def _text(self, request: Request) -> str:
        if callable(self.script):
            return self.script(self.tokenizer.decode(request.prompt_token_ids))
        return self.script[len(self.requests) % len(self.script)]


def scripted_session(
    *texts: str,
    answer: Callable[[str], str] | None = None,
    max_context_tokens: int = 4096,
    **options: object,
) -> Session:
    """A session over a scripted engine, with the built-in template; it says `texts`, or `answer(prompt text)`."""
    engine = ScriptedEngine(answer or texts, **options)  # type: ignore[arg-type]
    template = ChatTemplate.builtin(engine.tokenizer.special_tokens)
    return Session(engine, engine.tokenizer, template, max_context_tokens=max_context_tokens)


def engine_of(session: Session) -> ScriptedEngine:
    assert isinstance(session.engine, ScriptedEngine)
    return session.engine


def _split(token_ids: Sequence[int], sizes: Iterable[int]) -> Iterator[Sequence[int]]:
    sizes = list(sizes)
    begin = index = 0
    while begin < len(token_ids):
        size = sizes[index % len(sizes)]
        yield token_ids[begin : begin + size]
        begin, index = begin + size, index + 1


def _logprobs(token_ids: Sequence[int], num_top: int | None) -> Iterator[TokenLogprob]:
    """Log-probability -0.25 for every token, and as many alternatives as were asked for."""
    if num_top is not None:
        for token_id in token_ids:
            top = tuple((token_id + offset, -0.25 - offset) for offset in range(num_top))
            yield TokenLogprob(token_id=token_id, logprob=-0.25, top=top)
