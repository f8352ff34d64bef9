"""`RemoteEngine`: the engine's interface over a vLLM or SGLang server, token ids in and out.

Everything above the engine runs unchanged on a cluster that one of those servers runs. One request of ours is usually
one streamed HTTP request. Constraints (grammars, thinking budgets) work without the server knowing them:

  * Tokens are drawn freely and checked as they arrive. The first one that the constraint does not allow is thrown
    away with what follows it, and one token is drawn again from the allowed ones; then the answer goes on freely.
    Drawing again from the allowed tokens what was refused gives the same distribution as a mask would: p(x) + (1 - P)
    p(x) / P = p(x) / P, with P the probability of all allowed tokens. With top_k, top_p or min_p the first draw is
    filtered before the constraint, the second after it.
  * Tokens that the constraint dictates are appended to the prompt, without asking anybody.

Each such cut is a new HTTP request, which the server's prefix cache makes cheap.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
import weakref
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
import torch
from prometheus_client.parser import text_string_to_metric_families

from stepflash.engine.constraints import Mask, allows
from stepflash.engine.request import Output, Request, RequestStats
from stepflash.engine.upstream import CONNECT_SECONDS, DIALECTS, Call, Delta, Upstream
from stepflash.errors import EngineError, PromptTooLong, QueueFull, RequestError, StepflashError

# Waits before another try, as long as no token has come.
RETRY_SECONDS = (0.25, 1.0)
RETRIED_STATUS = (429, 502, 503, 504)
GAUGES_SECONDS = 2.0
# The upstream's own gauges that /metrics repeats, by our names.
GAUGES = {
    "vllm:num_requests_running": "upstream_running",
    "vllm:num_requests_waiting": "upstream_waiting",
    "vllm:kv_cache_usage_perc": "upstream_kv_usage",
    "sglang:num_running_reqs": "upstream_running",
    "sglang:num_queue_reqs": "upstream_waiting",
    "sglang:token_usage": "upstream_kv_usage",
}

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteStats:
    """Counters since the start and gauges now; `upstream_*` are the server's own, -1 while they are not known."""

    num_running: int
    num_finished: int
    num_prompt_tokens: int
    num_cached_tokens: int
    num_generated_tokens: int
    num_drafted_tokens: int
    num_accepted_tokens: int
    num_calls: int
    num_retries: int
    num_failures: int
    is_reachable: int
    upstream_running: float
    upstream_waiting: float
    upstream_kv_usage: float


@dataclass(slots=True)
class _Running:
    """A request that runs: where its outputs go, and what they amount to."""

    request: Request
    loop: asyncio.AbstractEventLoop
    queue: asyncio.Queue[Output | BaseException] = field(default_factory=asyncio.Queue)
    stats: RequestStats = field(default_factory=RequestStats)
    token_ids: list[int] = field(default_factory=list)
    drafts_before: tuple[int, int] = (0, 0)  # drafted and accepted in the calls before this one
    started: float = field(default_factory=time.monotonic)

    def emit(self, **news: Any) -> None:
        self.queue.put_nowait(Output(request_id=self.request.request_id, stats=self.stats, **news))


class RemoteEngine:
    """Serves requests from any number of event loops by way of a server.

    `eos_token_ids` end an answer; `vocab_size` bounds what a constraint may allow. After `silence_seconds` without a
    byte a request fails.
    """

    def __init__(
        self,
        upstream: Upstream,
        *,
        eos_token_ids: frozenset[int],
        vocab_size: int,
        silence_seconds: float = 600.0,
    ) -> None:
        self.upstream = upstream
        self._eos_token_ids = eos_token_ids
        self._vocab_size = vocab_size
        self._timeout = httpx.Timeout(silence_seconds, connect=CONNECT_SECONDS, pool=None)
        # A client belongs to the event loop that made its connections.
        self._clients: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, httpx.AsyncClient] = (
            weakref.WeakKeyDictionary()
        )
        self._running: dict[str, _Running] = {}
        self._counts: Counter[str] = Counter()
        self._is_reachable = True
        self._gauges: dict[str, float] = {}
        self._gauges_at = float("-inf")
        self._gauges_task: asyncio.Task[None] | None = None

    def submit(self, request: Request) -> AsyncIterator[Output]:
        """Check a request at once; it runs when the returned iterator is first awaited.

        Closing or cancelling the iterator before its last output closes the HTTP request, which ends the work there.

        Raises:
            RequestError: the upstream cannot do what the request asks for; the iterator may raise it too.
        """
        sampling = request.sampling
        limit = self.upstream.max_model_len
        if not request.prompt_token_ids:
            raise RequestError("the prompt is empty", param="prompt")
        if limit is not None and len(request.prompt_token_ids) >= limit:
            raise PromptTooLong(len(request.prompt_token_ids), limit)
        if sampling.max_tokens is None and limit is None:
            raise RequestError(
                "max_tokens is needed: the upstream does not tell its context", param="max_tokens"
            )
        if sampling.prompt_logprobs is not None:
            # vLLM tells them only in answers that are not streamed, SGLang under rules of its own.
            raise RequestError(
                "the engine behind this server does not tell log-probabilities of prompts "
                "(prompt_logprobs, echo with logprobs or without tokens)",
                param="echo",
                code="unsupported_parameter",
            )
        if sampling.seed is not None and not self.upstream.takes_seeds:
            raise RequestError(
                "seed: the SGLang server behind this one follows seeds only with --enable-deterministic-inference",
                param="seed",
                code="unsupported_parameter",
            )
        if request.priority and not self.upstream.priority_sign:
            raise RequestError(
                "priority: the SGLang server behind this one has priorities only with "
                "--enable-priority-scheduling",
                param="priority",
                code="unsupported_parameter",
            )
        if request.request_id in self._running:
            raise EngineError(f"request id {request.request_id!r} is already running")
        return self._stream(request)

    def abort(self, request_id: str) -> None:
        """End a request now, with finish reason "abort"; nothing happens if it is not running."""
        running = self._running.get(request_id)
        if running is not None:
            running.loop.call_soon_threadsafe(lambda: running.emit(finish_reason="abort"))

    def stats(self) -> RemoteStats:
        """Our counters now; the upstream's gauges as of the last time that this was asked."""
        self._refresh_gauges()
        names = (
            "finished", "prompt_tokens", "cached_tokens", "generated_tokens", "drafted_tokens", "accepted_tokens",
            "calls", "retries", "failures",
        )  # fmt: skip
        counts = {f"num_{name}": self._counts[name] for name in names}
        return RemoteStats(
            num_running=len(self._running),
            is_reachable=int(self._is_reachable),
            upstream_running=self._gauges.get("upstream_running", -1.0),
            upstream_waiting=self._gauges.get("upstream_waiting", -1.0),
            upstream_kv_usage=self._gauges.get("upstream_kv_usage", -1.0),
            **counts,
        )

    async def aclose(self) -> None:
        """Close the connections of this event loop."""
        loop = asyncio.get_running_loop()
        if (task := self._gauges_task) is not None and task.get_loop() is loop:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        client = self._clients.pop(loop, None)
        if client is not None:
            await client.aclose()

    async def _stream(self, request: Request) -> AsyncIterator[Output]:
        running = _Running(request, asyncio.get_running_loop())
        running.stats.num_prompt_tokens = len(request.prompt_token_ids)
        self._running[request.request_id] = running
        task = asyncio.create_task(self._guarded(running))
        try:
            while True:
                item = await running.queue.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
                if item.finish_reason is not None:
                    return
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            del self._running[request.request_id]
            self._count(running.stats)

    def _count(self, stats: RequestStats) -> None:
        self._counts.update(
            finished=1,
            prompt_tokens=stats.num_prompt_tokens,
            cached_tokens=stats.num_cached_tokens,
            drafted_tokens=stats.num_drafted_tokens[0],
            accepted_tokens=stats.num_accepted_tokens[0],
        )

    async def _guarded(self, running: _Running) -> None:
        """Run a request; whatever ends it goes to whoever reads it."""
        try:
            async with asyncio.timeout(running.request.deadline_seconds):
                await self._generate(running)
        except TimeoutError:
            running.emit(finish_reason="abort", stop_reason="deadline")
        except StepflashError as error:
            self._counts["failures"] += not isinstance(error, RequestError)
            running.queue.put_nowait(error)
        except Exception as error:  # of a constraint, or a bug: it ends this request alone
            logger.exception("request %s failed", running.request.request_id)
            self._counts["failures"] += 1
            running.queue.put_nowait(EngineError(f"{type(error).__name__}: {error}"))

    async def _generate(self, running: _Running) -> None:
        request, constraint = running.request, running.request.constraint
        stop_ids = frozenset(request.sampling.stop_token_ids)
        if not request.sampling.ignore_eos:
            stop_ids |= self._eos_token_ids
        room = self._room(request)
        allowed: list[int] | None = None
        num_calls = 0
        while True:
            while constraint is not None and (forced := constraint.forced()):
                if self._take_forced(running, int(forced[0]), stop_ids, room):
                    return
            call = self._call(running, num_calls, room, stop_ids, allowed)
            was_allowed, allowed = allowed, None
            num_calls += 1
            stats = running.stats
            running.drafts_before = stats.num_drafted_tokens[0], stats.num_accepted_tokens[0]
            async with aclosing(self._deltas(call, running)) as deltas:
                async for delta in deltas:
                    kept = len(delta.token_ids)
                    if constraint is not None:
                        kept = _follow(constraint, delta, stop_ids)
                    self._take(running, delta, kept)
                    if kept < len(delta.token_ids):
                        if was_allowed is not None:
                            raise EngineError("the upstream does not keep to the tokens that it was allowed")
                        assert constraint is not None
                        allowed = None if constraint.forced() else self._allowed(constraint.mask())
                        break
                    goes_on = was_allowed is not None and len(running.token_ids) < room
                    if delta.finish_reason is None or (delta.finish_reason == "length" and goes_on):
                        continue
                    stop = _stop_reason(delta, self._eos_token_ids)
                    running.emit(finish_reason=delta.finish_reason, stop_reason=stop)
                    return

    def _room(self, request: Request) -> int:
        limit, wanted = self.upstream.max_model_len, request.sampling.max_tokens
        free = None if limit is None else limit - len(request.prompt_token_ids)
        return min(number for number in (free, wanted) if number is not None)

    def _take_forced(self, running: _Running, token_id: int, stop_ids: frozenset[int], room: int) -> bool:
        """Append one token that the constraint dictates; True if it was the last one of the answer."""
        constraint, sampling = running.request.constraint, running.request.sampling
        assert constraint is not None
        if sampling.logprobs is not None:
            # Nobody computed the probability of a token that nobody drew.
            raise RequestError(
                "logprobs: a token had to be dictated, and the upstream cannot tell its log-probability",
                param="logprobs",
                code="unsupported_parameter",
            )
        is_stop = token_id in stop_ids
        if not is_stop:
            constraint.accept(token_id)
        running.token_ids.append(token_id)
        running.stats.num_forced_tokens += 1
        self._take(running, Delta(token_ids=(token_id,)), 1, is_forced=True)
        if is_stop or len(running.token_ids) >= room:
            running.emit(finish_reason="stop" if is_stop else "length")
            return True
        return False

    def _take(self, running: _Running, delta: Delta, kept: int, *, is_forced: bool = False) -> None:
        """Pass on what is kept of a delta, with its counts."""
        stats = running.stats
        if kept and stats.num_generated_tokens == 0:
            stats.prefill_seconds = time.monotonic() - running.started
        stats.decode_seconds = max(time.monotonic() - running.started - stats.prefill_seconds, 0.0)
        stats.num_generated_tokens += kept
        stats.num_steps += bool(kept) and not is_forced
        self._counts["generated_tokens"] += kept
        if delta.num_cached_tokens is not None and not stats.num_cached_tokens:
            stats.num_cached_tokens = min(delta.num_cached_tokens, stats.num_prompt_tokens)
        if delta.num_drafted_tokens is not None and delta.num_accepted_tokens is not None:
            drafted, accepted = running.drafts_before
            stats.num_drafted_tokens[0] = drafted + delta.num_drafted_tokens
            stats.num_accepted_tokens[0] = accepted + delta.num_accepted_tokens
        if not is_forced:
            running.token_ids += delta.token_ids[:kept]
        if kept:
            running.emit(token_ids=delta.token_ids[:kept], logprobs=delta.logprobs[:kept])

    def _call(
        self,
        running: _Running,
        index: int,
        room: int,
        stop_ids: frozenset[int],
        allowed: list[int] | None,
    ) -> Call:
        request = running.request
        sampling, bias = request.sampling, dict(request.sampling.logit_bias)
        if index and sampling.seed is not None:
            # The same seed again would draw the same numbers again.
            sampling = replace(sampling, seed=sampling.seed + 1_000_003 * index)
        if index and (sampling.presence_penalty or sampling.frequency_penalty):
            # What was said is prompt now, which these penalties do not count: it becomes a bias.
            for token_id, count in Counter(running.token_ids).items():
                penalty = sampling.presence_penalty + count * sampling.frequency_penalty
                bias[token_id] = bias.get(token_id, 0.0) - penalty
        return Call(
            call_id=request.request_id if index == 0 else f"{request.request_id}-{index}",
            prompt_token_ids=(*request.prompt_token_ids, *running.token_ids),
            max_tokens=1 if allowed is not None else room - len(running.token_ids),
            sampling=sampling,
            stop_token_ids=sorted(stop_ids),
            logit_bias=bias,
            allowed=allowed,
            priority=request.priority,
        )

    def _allowed(self, mask: Mask) -> list[int]:
        if isinstance(mask, set | frozenset | list | tuple | range):
            found = sorted(int(i) for i in mask if 0 <= int(i) < self._vocab_size)
        else:
            found = [int(i) for i in torch.as_tensor(mask)[: self._vocab_size].nonzero().flatten().tolist()]
        if not found:
            raise RequestError("the constraint allows no token at this point", code="dead_constraint")
        return found

    async def _deltas(self, call: Call, running: _Running) -> AsyncGenerator[Delta]:
        """The news of one call, tried again while no token has come; the last one has a finish reason."""
        for attempt, wait in enumerate((*RETRY_SECONDS, None)):
            has_tokens = False
            self._counts["calls"] += 1
            try:
                # The server may still be busy ending an attempt that failed, so each has its own id.
                named = replace(call, call_id=f"{call.call_id}.{attempt}")
                async with aclosing(self._attempt(named)) as deltas:
                    async for delta in deltas:
                        has_tokens = has_tokens or bool(delta.token_ids)
                        yield delta
                self._is_reachable = True
                return
            except (_Retryable, httpx.TransportError) as error:
                if isinstance(error, httpx.TransportError):
                    self._is_reachable = False
                if wait is None or has_tokens or isinstance(error, httpx.ReadTimeout):
                    raise _final_error(error, self.upstream, len(running.token_ids)) from None
                logger.warning("upstream, attempt %d: %s", attempt + 1, error or type(error).__name__)
                self._counts["retries"] += 1
                await asyncio.sleep(wait)

    async def _attempt(self, call: Call) -> AsyncGenerator[Delta]:
        dialect = DIALECTS[self.upstream.kind](self.upstream, call)
        last = Delta()
        async with self._client().stream("POST", dialect.path, json=dialect.body()) as response:
            if response.status_code != 200:
                await response.aread()
                raise _status_error(response)
            async for line in response.aiter_lines():
                if not line.startswith("data:"):
                    continue
                data = line.removeprefix("data:").strip()
                if data == "[DONE]":
                    break
                delta = dialect.read(_event(data))
                if delta.finish_reason is None and last.finish_reason is None:
                    yield delta
                else:
                    # Counts come behind the finish reason, or with it.
                    last = _merged(last, delta)
        if last.finish_reason is None:
            raise httpx.RemoteProtocolError("the stream ended before the answer did")
        yield last

    def _client(self) -> httpx.AsyncClient:
        loop = asyncio.get_running_loop()
        client = self._clients.get(loop)
        if client is None:
            client = self._clients[loop] = httpx.AsyncClient(
                base_url=self.upstream.url,
                headers=self.upstream.headers,
                timeout=self._timeout,
                limits=httpx.Limits(max_connections=None, max_keepalive_connections=64),
                trust_env=False,
            )
        return client

    def _refresh_gauges(self) -> None:
        """Read the upstream's /metrics in the background, at most every few seconds."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            return
        is_due = time.monotonic() - self._gauges_at > GAUGES_SECONDS
        if is_due and (self._gauges_task is None or self._gauges_task.done()):
            self._gauges_at = time.monotonic()
            self._gauges_task = loop.create_task(self._read_gauges())

    async def _read_gauges(self) -> None:
        try:
            response = await self._client().get("/metrics", timeout=CONNECT_SECONDS)
        except httpx.HTTPError:
            self._gauges, self._is_reachable = {}, False
            return
        self._is_reachable = True
        try:
            self._gauges = _gauges(response.text) if response.status_code == 200 else {}
        except ValueError:
            self._gauges = {}


class _Retryable(Exception):
    """An answer that another try may better; `retry_after` in seconds, if it says so."""

    def __init__(self, message: str, status: int, retry_after: float | None) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after


def _follow(constraint: Any, delta: Delta, stop_ids: frozenset[int]) -> int:
    """Walk the constraint along the tokens that came; the number that it allows."""
    for index, token_id in enumerate(delta.token_ids):
        if not allows(constraint.mask(), token_id):
            return index
        if token_id not in stop_ids:
            constraint.accept(token_id)
    return len(delta.token_ids)


def _stop_reason(delta: Delta, eos_token_ids: frozenset[int]) -> int | None:
    """The stop token that was asked for; an ordinary end of the answer has none, as in our own engine."""
    stop = delta.stop_token_id
    return None if stop in eos_token_ids else stop


def _merged(last: Delta, delta: Delta) -> Delta:
    return Delta(
        token_ids=last.token_ids + delta.token_ids,
        logprobs=last.logprobs + delta.logprobs,
        finish_reason=last.finish_reason or delta.finish_reason,
        stop_token_id=delta.stop_token_id if last.stop_token_id is None else last.stop_token_id,
        num_cached_tokens=_known(delta.num_cached_tokens, last.num_cached_tokens),
        num_drafted_tokens=_known(delta.num_drafted_tokens, last.num_drafted_tokens),
        num_accepted_tokens=_known(delta.num_accepted_tokens, last.num_accepted_tokens),
    )


def _known(new: int | None, old: int | None) -> int | None:
    return old if new is None else new


def _event(data: str) -> dict[str, Any]:
    try:
        event = json.loads(data)
    except ValueError:
        raise EngineError("the upstream sends something that is not JSON") from None
    if not isinstance(event, dict):
        raise EngineError("the upstream sends something that is not an object")
    if event.get("error"):
        error = event["error"]
        message = error.get("message") if isinstance(error, dict) else error
        code = error.get("code") if isinstance(error, dict) else None
        if code == 400:
            raise RequestError(f"upstream: {message}")
        raise EngineError(f"upstream: {message}")
    return event


def _status_error(response: httpx.Response) -> Exception:
    message = _message(response)
    status = response.status_code
    if status in RETRIED_STATUS:
        try:
            retry_after: float | None = float(response.headers["retry-after"])
        except (KeyError, ValueError):
            retry_after = None
        return _Retryable(message, status, retry_after)
    if status in (401, 403):
        return EngineError(f"the upstream refuses its API key; see --upstream-api-key (status {status})")
    if status in (400, 413, 422):
        return RequestError(f"upstream: {message}")
    return EngineError(f"upstream: {message} (status {status})")


def _message(response: httpx.Response) -> str:
    try:
        data = response.json()
    except ValueError:
        return response.text[:300] or response.reason_phrase
    error = data.get("error", data) if isinstance(data, dict) else data
    message = error.get("message", error) if isinstance(error, dict) else error
    return str(message)[:1000]


def _final_error(error: Exception, upstream: Upstream, num_tokens: int) -> StepflashError:
    if isinstance(error, _Retryable):
        if error.status in (429, 503):
            return QueueFull(f"upstream: {error}", error.retry_after or 5.0)
        return EngineError(f"upstream: {error} (status {error.status})")
    reason = str(error) or type(error).__name__
    if isinstance(error, httpx.ReadTimeout):
        return EngineError("the upstream was silent for too long")
    if num_tokens:
        return EngineError(f"the connection to the upstream broke after {num_tokens} tokens: {reason}")
    return EngineError(f"the upstream at {upstream.url} cannot be reached: {reason}")


def _gauges(text: str) -> dict[str, float]:
    """The upstream's gauges; several engines behind one address are added up, their cache usage averaged."""
    found: dict[str, list[float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name in GAUGES:
                found.setdefault(GAUGES[sample.name], []).append(sample.value)
    return {
        name: sum(values) / (len(values) if name == "upstream_kv_usage" else 1)
        for name, values in found.items()
    }
