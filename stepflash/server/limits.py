"""How much one client may ask for: requests a minute, tokens a minute, requests at once.

A client is an API key or, on a server without keys, an address. Rates are buckets that refill all the time and
hold one minute's worth. Tokens are charged when a request has ended, prompt and answer together: what has been
overdrawn must flow back before the next request. What all clients share, the queue, is `OpenAnswers`.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict

from starlette.types import ASGIApp, Receive, Scope, Send

from stepflash.errors import QueueFull, RequestError
from stepflash.server.errors_by_path import message_response
from stepflash.server.request_records import RequestRecord, current_record
from stepflash.settings import ServerSettings

MAX_CLIENTS = 10_000  # remembered; whoever was not seen for longest is forgotten first
MAX_RETRY_SECONDS = 60.0


class Bucket:
    """`per_minute` units at most, refilled evenly. `now` is on the monotonic clock, in seconds."""

    def __init__(self, per_minute: float, now: float) -> None:
        self._per_minute = per_minute
        self._level = per_minute
        self._at = now

    def wait_seconds(self, needed: float, now: float) -> float:
        """How long until so much is there; 0 if it is."""
        self._level = min(self._per_minute, self._level + (now - self._at) * self._per_minute / 60)
        self._at = now
        return max(0.0, (needed - self._level) * 60 / self._per_minute)

    def take(self, amount: float) -> None:
        """May go below zero."""
        self._level -= amount


class _Client:
    def __init__(self, settings: ServerSettings, now: float) -> None:
        self.num_running = 0
        self.requests = Bucket(settings.requests_per_minute or math.inf, now)
        self.tokens = Bucket(settings.tokens_per_minute or math.inf, now)


class ClientLimits:
    """ASGI middleware that answers 429 to a client that asks for too much; it looks at POST only, and not at
    those that end a response: whoever has all that it may have must be able to give it up."""

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self.app = app
        self._settings = settings
        self._clients: OrderedDict[str, _Client] = OrderedDict()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        settings = self._settings
        limits = (settings.requests_per_minute, settings.tokens_per_minute, settings.max_requests_per_client)
        asks = scope["type"] == "http" and scope["method"] == "POST" and not scope["path"].endswith("/cancel")
        if not asks or not any(limits):
            await self.app(scope, receive, send)
            return
        record = current_record()
        client = self._client(record.client)
        refusal = self._refusal(client)
        if refusal is not None:
            reason, wait_seconds = refusal
            headers = {"retry-after": str(max(1, math.ceil(wait_seconds)))}
            response = message_response(
                scope["path"],
                429,
                reason,
                record.request_id,
                code="rate_limit_exceeded",
                headers=headers,
            )
            await response(scope, receive, send)
            return
        if settings.requests_per_minute:
            client.requests.take(1)
        client.num_running += 1
        try:
            await self.app(scope, receive, send)
        finally:
            client.num_running -= 1
            if settings.tokens_per_minute:
                usage = record.usage
                client.tokens.take(usage.prompt_tokens + usage.completion_tokens)

    def _client(self, name: str) -> _Client:
        client = self._clients.pop(name, None) or _Client(self._settings, time.monotonic())
        self._clients[name] = client
        if len(self._clients) > MAX_CLIENTS:
            idle = next((name for name, other in self._clients.items() if not other.num_running), name)
            del self._clients[idle]
        return client

    def _refusal(self, client: _Client) -> tuple[str, float] | None:
        """Why a request is refused and in how many seconds it would not be; None if it is not."""
        settings, now = self._settings, time.monotonic()
        at_once = settings.max_requests_per_client
        if at_once is not None and client.num_running >= at_once:
            return f"{at_once} requests of this key are running; it may have no more at once", 1.0
        if settings.requests_per_minute and (wait := client.requests.wait_seconds(1, now)):
            return f"rate limit: {settings.requests_per_minute} requests a minute", wait
        if settings.tokens_per_minute and (wait := client.tokens.wait_seconds(1, now)):
            return f"rate limit: {settings.tokens_per_minute} tokens a minute", wait
        return None


class OpenAnswers:
    """The places for answers that run and wait, of all clients together."""

    def __init__(self, max_answers: int) -> None:
        self._max_answers = max_answers
        self._num_open = 0
        self._mean_seconds = 1.0

    def take(self, record: RequestRecord, count: int) -> None:
        """Places for the answers of a request, until its record is closed.

        Raises:
            QueueFull: there are not so many.
            RequestError: there never will be.
        """
        if count > self._max_answers:
            raise RequestError(
                f"n: {count} answers at once, this server takes {self._max_answers}", param="n"
            )
        if self._num_open + count > self._max_answers:
            raise QueueFull(
                f"{self._num_open} answers are running and waiting, {self._max_answers} may; try again later",
                retry_after_seconds=min(self._mean_seconds, MAX_RETRY_SECONDS),
            )
        self._num_open += count
        record.num_open_answers += count

    def give_back(self, record: RequestRecord) -> None:
        self._num_open -= record.num_open_answers
        for answer in record.answers:
            self._mean_seconds += 0.1 * (answer.seconds - self._mean_seconds)
