"""Load on any server with the OpenAI chat API: Poisson arrivals, time to first token, time per token, throughput.

Arrivals do not wait for answers, so a server that is too slow shows it in the tail. Times are the client's: the
first piece of text or reasoning ends the time to first token, and the rest is shared by the tokens that the
server counts in `usage`.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import httpx

from stepflash.errors import ConfigError, StepflashError

PERCENTILES = (50, 90, 99)
WORDS = (
    "river", "stone", "light", "paper", "seven", "green", "under", "morning", "window", "letter", "small", "number",
    "bridge", "winter", "open", "north",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """`rate` requests a second on average; each has `input_words` words and gets at most `max_tokens` tokens."""

    rate: float
    num_requests: int
    input_words: int
    max_tokens: int
    timeout_seconds: float = 300.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rate", "num_requests", "input_words", "max_tokens", "timeout_seconds"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be above 0, got {getattr(self, name):g}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One request as the client saw it. `error` says why it has no figures."""

    start_seconds: float
    end_seconds: float
    first_token_seconds: float | None = None
    num_prompt_tokens: int = 0
    num_tokens: int = 0
    error: str | None = None

    @property
    def time_per_token(self) -> float | None:
        """After the first; None for an answer of one token."""
        if self.first_token_seconds is None or self.num_tokens < 2:
            return None
        return (self.end_seconds - self.start_seconds - self.first_token_seconds) / (self.num_tokens - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeReport:
    """Percentiles in seconds by name (`p50`); rates in tokens a second over the whole run."""

    num_requests: int
    num_failed: int
    seconds: float
    request_rate: float
    output_rate: float
    prompt_rate: float
    time_to_first_token: dict[str, float]
    time_per_token: dict[str, float]
    latency: dict[str, float]
    errors: tuple[str, ...]

    def to_json(self) -> dict[str, object]:
        return asdict(self)


async def run_load(
    base_url: str,
    load: Load,
    model: str | None = None,
    api_key: str | None = None,
    transport: httpx.AsyncBaseTransport | None = None,
) -> ServeReport:
    """Send all requests and wait for all answers. `transport` replaces the network, for tests.

    Raises:
        StepflashError: the server cannot be reached at all.
    """
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    timeout = httpx.Timeout(load.timeout_seconds)
    async with httpx.AsyncClient(
        base_url=base_url.rstrip("/") + "/",
        headers=headers,
        limits=limits,
        timeout=timeout,
        transport=transport,
    ) as client:
        name = model or await _served_model(client, base_url)
        rng = random.Random(load.seed)
        at = 0.0
        start = time.perf_counter()
        tasks = []
        for _ in range(load.num_requests):
            body = _body(name, load, rng)
            tasks.append(asyncio.create_task(_one(client, body, start, at)))
            at += rng.expovariate(load.rate)
        return summarize(await asyncio.gather(*tasks))


def summarize(answers: Sequence[Answer]) -> ServeReport:
    """Percentiles and rates; failed requests count in `num_failed` alone."""
    good = [answer for answer in answers if answer.error is None]
    seconds = max((a.end_seconds for a in answers), default=0.0) - min(
        (a.start_seconds for a in answers), default=0.0
    )
    per_second = 1 / seconds if seconds > 0 else 0.0
    return ServeReport(
        num_requests=len(answers),
        num_failed=len(answers) - len(good),
        seconds=seconds,
        request_rate=len(good) * per_second,
        output_rate=sum(answer.num_tokens for answer in good) * per_second,
        prompt_rate=sum(answer.num_prompt_tokens for answer in good) * per_second,
        time_to_first_token=percentiles(
            [a.first_token_seconds for a in good if a.first_token_seconds is not None]
        ),
        time_per_token=percentiles([t for a in good if (t := a.time_per_token) is not None]),
        latency=percentiles([a.end_seconds - a.start_seconds for a in good]),
        errors=tuple(sorted({a.error for a in answers if a.error is not None})),
    )


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """`PERCENTILES` by linear interpolation between the two nearest values; empty without values."""
    if not values:
        return {}
    ordered = sorted(values)
    found = {}
    for percent in PERCENTILES:
        rank = percent / 100 * (len(ordered) - 1)
        low = int(rank)
        high = min(low + 1, len(ordered) - 1)
        found[f"p{percent}"] = ordered[low] + (rank - low) * (ordered[high] - ordered[low])
    return found


async def _served_model(client: httpx.AsyncClient, base_url: str) -> str:
    try:
        response = await client.get("models")
        response.raise_for_status()
        return str(response.json()["data"][0]["id"])
    except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError) as error:
        raise StepflashError(
            f"{base_url}: no list of models there ({type(error).__name__}: {error}); "
            "give the URL that ends in /v1, and --api-key if the server wants one"
        ) from error


def _body(model: str, load: Load, rng: random.Random) -> dict[str, object]:
    text = " ".join(rng.choice(WORDS) for _ in range(load.input_words))
    return {
        "model": model,
        "messages": [{"role": "user", "content": text}],
        "max_tokens": load.max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def _one(client: httpx.AsyncClient, body: dict[str, object], start: float, at: float) -> Answer:
    """One request at its time of arrival. Whatever goes wrong is the answer's error, not the run's."""
    await asyncio.sleep(max(0.0, start + at - time.perf_counter()))
    begin = time.perf_counter()
    first: float | None = None
    usage: dict[str, int] = {}
    num_pieces = 0
    error = None
    try:
        async with client.stream("POST", "chat/completions", json=body) as response:
            if response.status_code != 200:
                text = (await response.aread()).decode(errors="replace")
                error = f"HTTP {response.status_code}: {text[:200]}"
            else:
                async for line in response.aiter_lines():
                    if not line.startswith("data:") or line.endswith("[DONE]"):
                        continue
                    chunk = json.loads(line.removeprefix("data:"))
                    usage = chunk.get("usage") or usage
                    if any(_has_news(choice) for choice in chunk.get("choices", ())):
                        num_pieces += 1
                        first = time.perf_counter() - begin if first is None else first
    except (httpx.HTTPError, ValueError) as problem:
        error = f"{type(problem).__name__}: {problem}"
    end = time.perf_counter()
    if error is None and first is None:
        error = "the stream ended without a token"
    return Answer(
        start_seconds=begin - start,
        end_seconds=end - start,
        first_token_seconds=first,
        num_prompt_tokens=usage.get("prompt_tokens", 0),
        num_tokens=usage.get("completion_tokens", num_pieces),
        error=error,
    )


def _has_news(choice: dict[str, object]) -> bool:
    """Whether a piece of a stream carries output; the first one of most servers only names the role."""
    delta = choice.get("delta")
    if not isinstance(delta, dict):
        return False
    return any(delta.get(key) for key in ("content", "reasoning_content", "reasoning", "tool_calls"))
