"""Whether the model answers: a token is generated, and nothing less counts.

One check serves all who ask at the same time, and its result is kept for a moment, so that asking often costs
nothing. A busy engine is not a dead one: where the check has to wait, progress that others make is proof enough.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Any

from stepflash.assistant.session import Session
from stepflash.assistant.stream import fold
from stepflash.engine.request import SamplingParams
from stepflash.errors import QueueFull, StepflashError

KEPT_SECONDS, POLL_SECONDS, LIMIT_SECONDS = 2.0, 0.25, 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """`seconds` until the proof was there."""

    is_ok: bool
    status: str
    seconds: float


class HealthCheck:
    """`check` may be called by any number of tasks of one event loop."""

    def __init__(self, session: Session, *, limit_seconds: float = LIMIT_SECONDS) -> None:
        self._session = session
        self._limit_seconds = limit_seconds
        self._running: asyncio.Task[Health] | None = None
        self.proven_at = float("-inf")  # on the monotonic clock; whoever sees a token sets it

    async def check(self) -> Health:
        if time.monotonic() - self.proven_at < KEPT_SECONDS:
            return Health(is_ok=True, status="ok", seconds=0.0)
        if self._running is None:
            self._running = asyncio.create_task(self._run())
            self._running.add_done_callback(self._forget)
        # One who leaves must not end it for the others.
        return await asyncio.shield(self._running)

    def _forget(self, task: asyncio.Task[Health]) -> None:
        self._running = None

    async def _run(self) -> Health:
        started = time.monotonic()
        before = _progress(self._session.engine.stats())
        answer = asyncio.create_task(self._generate())
        try:
            while True:
                await asyncio.wait({answer}, timeout=POLL_SECONDS)
                seconds = round(time.monotonic() - started, 4)
                if answer.done() and answer.result() is None:
                    return self._keep(Health(is_ok=True, status="ok", seconds=seconds))
                is_moving = _progress(self._session.engine.stats()) > before
                is_waiting = not answer.done() or isinstance(answer.result(), QueueFull)
                if is_waiting and is_moving:
                    return self._keep(Health(is_ok=True, status="busy", seconds=seconds))
                if answer.done() and not is_waiting:
                    return Health(is_ok=False, status=str(answer.result()), seconds=seconds)
                if seconds >= self._limit_seconds:
                    status = f"no token within {self._limit_seconds:g} seconds"
                    return Health(is_ok=False, status=status, seconds=seconds)
        finally:
            answer.cancel()

    def _keep(self, health: Health) -> Health:
        self.proven_at = time.monotonic()
        return health

    async def _generate(self) -> StepflashError | None:
        """One token, or why there is none."""
        session = self._session
        sampling = SamplingParams(max_tokens=1, temperature=0.0, draft_depth=0, ignore_eos=True)
        try:
            prompt = session.prepare_text([session.tokenizer.bos_token_id or 0], sampling)
            await fold(session.answer(prompt))
        except StepflashError as error:
            return error
        return None


def _progress(stats: Any) -> int:
    """Tokens that the engine has computed for anybody; what an engine does not report counts as none."""
    names = ("num_generated_tokens", "num_computed_prompt_tokens")
    return sum(int(getattr(stats, name, 0)) for name in names)
