"""What the routes of all APIs share: the session with its limits, and running answers under it.

A route that answers a conversation begins with `open`: body, model, values, prompt. Others read the body with
`read` and prepare prompts with `prepared`. From `answers` comes one stream of items for each prompt; what the route
encodes goes out through `event_stream`, or is collected under `unless_gone`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any, TypeVar

from fastapi import Request
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from stepflash.assistant.budget import Thinking
from stepflash.assistant.reader import Prompt
from stepflash.assistant.session import Session
from stepflash.assistant.stream import Progress, StreamItem
from stepflash.chat.canonical import canonical
from stepflash.chat.messages import Conversation, Finish
from stepflash.engine.request import SamplingParams
from stepflash.errors import EngineError, RequestError, StepflashError
from stepflash.server.answer_request import AnswerBody, AnswerRequest
from stepflash.server.body import BodyType, read_body
from stepflash.server.cache_ledger import CacheLedger, CacheReport
from stepflash.server.closing import Closing
from stepflash.server.health import HealthCheck
from stepflash.server.limits import OpenAnswers
from stepflash.server.metrics import Metrics
from stepflash.server.request_records import CLIENT_GONE, AnswerRecord, RequestRecord, current_record, log
from stepflash.server.scheduling_fields import Scheduling
from stepflash.server.sse import COMMENTS, ClientGone, EventStream, KeepAlive, unless_disconnected
from stepflash.settings import ServerSettings

LARGE_BODY_BYTES = 32_768  # from here on, templates and tokenising leave the event loop

T = TypeVar("T")
AnswerBodyType = TypeVar("AnswerBodyType", bound=AnswerBody)
AskedType = TypeVar("AskedType", bound=AnswerRequest)


class Service:
    """One session under one model name. `defaults` are the sampling parameters of a request that names none."""

    def __init__(
        self,
        session: Session,
        model_name: str,
        settings: ServerSettings,
        defaults: SamplingParams,
        closing: Closing,
    ) -> None:
        self.session = session
        self.model_name = model_name
        self.settings = settings
        self.defaults = defaults
        self.closing = closing
        self.metrics = Metrics(session.engine.stats, lambda: getattr(session.engine, "num_restarts", 0))
        self.health = HealthCheck(session)
        self.cache_ledger = CacheLedger()
        self.open_answers = OpenAnswers(settings.max_open_answers)
        self.created = int(time.time())

    async def open(
        self,
        request: Request,
        body_type: type[AnswerBodyType],
        decode: Callable[[AnswerBodyType, SamplingParams], AskedType],
    ) -> tuple[AskedType, Prompt]:
        """The beginning of every answer to a conversation: read and check the body, decode it, prepare the prompt.

        Raises:
            RequestError: something is wrong with the body, or the prompt does not fit.
            And what `read` raises.
        """
        body = await self.read(request, body_type)
        self.check_model(body.model)
        asked = await self.prepared(lambda: decode(body, self.defaults))

        def prepare() -> Prompt:
            return self.session.prepare(
                self.canonical(asked.conversation),
                asked.sampling,
                prefill=asked.prefill,
                max_tool_calls=asked.max_tool_calls,
                template_variables=asked.template_variables,
                extra_tools=asked.deferred_tools,
                thinking=self.thinking(asked.thinking),
                answer_format=asked.answer_format,
                calls=asked.calls,
            )

        return asked, await self.prepared(prepare, has_grammar=asked.has_grammar)

    async def read(self, request: Request, body_type: type[BodyType]) -> BodyType:
        """The checked body.

        Raises:
            RequestError: it is none of this type.
            HTTPException: 413, it is longer than the settings allow; 408, it does not come; 415, it is compressed.
            ClientGone: the client left in the middle of it.
        """
        encoding = request.headers.get("content-encoding", "identity")
        if encoding != "identity":
            raise HTTPException(415, f"content-encoding {encoding[:40]}: send the body as it is")
        limit = self.settings.max_body_bytes
        raw = bytearray()
        too_large = HTTPException(413, f"the body is larger than {limit} bytes")
        announced = request.headers.get("content-length", "")
        if announced.isdecimal() and int(announced) > limit:
            raise too_large
        try:
            async with asyncio.timeout(self.settings.body_seconds):
                async for piece in request.stream():
                    raw += piece
                    if len(raw) > limit:
                        raise too_large
        except TimeoutError:
            seconds = self.settings.body_seconds
            raise HTTPException(408, f"the body did not come within {seconds:g} seconds") from None
        except ClientDisconnect:
            raise ClientGone from None
        record = current_record()
        record.num_body_bytes = len(raw)
        body, record.unknown_fields = read_body(bytes(raw), body_type)
        return body

    def check_model(self, name: str | None) -> None:
        if name is not None and name != self.model_name:
            raise RequestError(
                f"the model {name!r} does not exist; this server has {self.model_name!r}",
                param="model",
                code="model_not_found",
            )

    def canonical(self, conversation: Conversation) -> Conversation:
        """The conversation as it is rendered, without known noise if the settings say so."""
        return canonical(conversation) if self.settings.is_canonical else conversation

    def thinking(self, thinking: Thinking) -> Thinking:
        """What a request asks for, else what the settings say."""
        return thinking.or_else(
            Thinking(
                max_tokens=self.settings.max_thinking_tokens,
                task_tokens=self.settings.max_task_thinking_tokens,
                stops_loops=self.settings.stops_thinking_loops,
            )
        )

    async def prepared(self, prepare: Callable[[], T], *, has_grammar: bool = False) -> T:
        """Render and encode: for short bodies here, for long ones and grammars in a thread, so that others go on."""
        is_quick = current_record().num_body_bytes < LARGE_BODY_BYTES and not has_grammar
        return prepare() if is_quick else await asyncio.to_thread(prepare)

    def answers(
        self, prompts: Sequence[Prompt], scheduling: Scheduling
    ) -> list[AsyncGenerator[list[StreamItem]]]:
        """Submit prompts; the streams give the items that came together in one list.

        Raises:
            QueueFull: too many answers are running and waiting.
            RequestError: the engine refuses one.
            ServerClosing: the server's time is over.
        """
        if self.closing.is_over:
            raise self.closing.error()
        prompts = [self._limited(prompt, scheduling) for prompt in prompts]
        record = current_record()
        self.open_answers.take(record, len(prompts))
        if self.settings.log_prompts:
            decode = self.session.tokenizer.decode
            record.prompts += [decode(prompt.request.prompt_token_ids) for prompt in prompts]
        streams = [self.session.batches(prompt) for prompt in prompts]
        answers = [AnswerRecord() for _ in streams]
        record.answers += answers
        reports = self._cache_reports(record, prompts)
        # Choices of one prompt are one prompt to whoever asks what was reused.
        of_prompt = {
            id(prompt.request.prompt_token_ids): report
            for prompt, report in zip(prompts, reports, strict=True)
        }
        record.cache_reports += of_prompt.values()
        return [self._measured(*each) for each in zip(streams, answers, reports, strict=True)]

    def _cache_reports(self, record: RequestRecord, prompts: Sequence[Prompt]) -> list[CacheReport]:
        return [
            self.cache_ledger.open(
                record.request_id, record.client, prompt.request.prompt_token_ids, self.session.lookup(prompt)
            )
            for prompt in prompts
        ]

    def close_reports(self, record: RequestRecord) -> None:
        """For a request that has ended, even if its answers were never begun."""
        for report in record.cache_reports:
            self.cache_ledger.close(report)

    def _limited(self, prompt: Prompt, scheduling: Scheduling) -> Prompt:
        request = scheduling.of(prompt.request, self.settings)
        limit, sampling = self.settings.max_output_tokens, request.sampling
        if limit is not None and (sampling.max_tokens is None or sampling.max_tokens > limit):
            request = replace(request, sampling=replace(sampling, max_tokens=limit))
        return prompt if request is prompt.request else replace(prompt, request=request)

    async def _measured(
        self, stream: AsyncGenerator[list[StreamItem]], answer: AnswerRecord, report: CacheReport
    ) -> AsyncGenerator[list[StreamItem]]:
        """The stream, with its times and tokens noted however it ends."""
        started = last_at = time.monotonic()
        self.metrics.running_answers.inc()
        try:
            async with aclosing(stream):
                async for batch in stream:
                    for item in batch:
                        if isinstance(item, Progress):
                            now, before = time.monotonic(), answer.usage.completion_tokens
                            answer.usage = item.usage
                            report.num_cached_tokens = item.usage.cached_tokens
                            report.answer_ids += item.token_ids
                            num_tokens = item.usage.completion_tokens - before
                            if answer.first_token_seconds is None:
                                answer.first_token_seconds = now - started
                                answer.queue_seconds = item.usage.queue_seconds
                            elif num_tokens:
                                self.metrics.token_seconds.observe((now - last_at) / num_tokens)
                            last_at = self.health.proven_at = now
                        elif isinstance(item, Finish):
                            late = answer.usage.deadline_reached
                            answer.finish_reason = "deadline" if late else item.reason
                    yield batch
        except StepflashError:
            answer.finish_reason = "error"
            raise
        finally:
            self.metrics.running_answers.dec()
            self.cache_ledger.close(report)
            if self.closing.is_over and answer.finish_reason == "disconnect":
                answer.finish_reason = "abort"
            answer.seconds = time.monotonic() - started

    async def unless_gone(self, request: Request, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`.

        Raises:
            ClientGone: the client went first; the work was cancelled.
            ServerClosing: so was the work because the server's time is over.
        """
        return await unless_disconnected(request.receive, work, self.closing)

    def event_stream(
        self,
        request: Request,
        frames: AsyncGenerator[bytes],
        error_frame: Callable[[StepflashError], bytes],
        *,
        last_frame: bytes = b"",
        keep_alive: KeepAlive = COMMENTS,
    ) -> EventStream:
        """A streamed reply. The head is sent first, so whatever fails later is told in the stream."""
        record = current_record()

        async def all_frames() -> AsyncGenerator[bytes]:
            record.outcome = CLIENT_GONE
            try:
                async with aclosing(frames):
                    async for data in frames:
                        yield data
                record.outcome = None
            except StepflashError as error:
                record.outcome = 400 if isinstance(error, RequestError) else 500
                if record.outcome == 500:
                    log.error("%s %s: %s", record.method, record.path, error)
                yield error_frame(error)
            except Exception:  # a bug of ours, which must not end anything but this stream
                log.exception("%s %s failed in its stream", record.method, record.path)
                record.outcome = 500
                yield error_frame(EngineError("internal error"))

        def last_words() -> bytes:
            error = self.closing.error()
            record.outcome = 503
            return error_frame(error) + last_frame

        return EventStream(
            all_frames(),
            self.closing,
            last_words,
            last_frame=last_frame,
            keep_alive=keep_alive,
            send_seconds=self.settings.send_seconds,
            send_body=record.send,
        )
