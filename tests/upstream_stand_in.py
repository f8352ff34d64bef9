"""A server that speaks the protocols of vLLM (`/v1/completions` with token ids) and SGLang (`/generate`).

It stands in for them in the ordinary tests: our own engine computes the tokens, so that what comes through can be
compared with what the engine says itself. It knows only the fields that those servers have and refuses any other, so
that a field which one of them would ignore silently fails a test. What goes wrong in real life can be switched on.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse

from stepflash.assistant.session import EngineClient
from stepflash.chat.tokenizer import Tokenizer
from stepflash.engine.request import Output, SamplingParams
from stepflash.engine.request import Request as EngineRequest

VLLM_FIELDS = {
    "model", "request_id", "prompt", "max_tokens", "stream", "stream_options", "return_token_ids",
    "add_special_tokens", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty",
    "repetition_penalty", "stop_token_ids", "ignore_eos", "skip_special_tokens", "logit_bias", "seed", "logprobs",
    "return_tokens_as_token_ids", "allowed_token_ids", "priority",
}  # fmt: skip
SGLANG_FIELDS = {
    "rid",
    "input_ids",
    "sampling_params",
    "stream",
    "return_logprob",
    "top_logprobs_num",
    "priority",
}
SGLANG_PARAMS = {
    "max_new_tokens", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty",
    "repetition_penalty", "stop_token_ids", "ignore_eos", "skip_special_tokens", "no_stop_trim", "logit_bias",
    "sampling_seed",
}  # fmt: skip


class OnlyThese:
    """A constraint that allows the same tokens at every place: `allowed_token_ids`."""

    def __init__(self, token_ids: list[int]) -> None:
        self._mask = set(token_ids)

    def mask(self) -> set[int]:
        return self._mask

    def accept(self, token_id: int) -> None: ...

    def rollback(self, num_tokens: int) -> None: ...

    def forced(self) -> tuple[int, ...]:
        return ()


@dataclass
class StandIn:
    """`statuses` are answered to the next requests instead of tokens; `cut_after` breaks the connection after so many
    events; `pause` seconds pass before each event. `bodies` and `ended` say what came and how it ended."""

    engine: EngineClient
    tokenizer: Tokenizer
    kind: str
    api_key: str | None = None
    max_model_len: int = 512
    is_incremental: bool = False
    takes_seeds: bool = True
    has_priorities: bool = False
    runs_low_priorities_first: bool = False
    statuses: list[int] = field(default_factory=list)
    cut_after: int | None = None
    cut_times: int = 1
    pause: float = 0.0
    error_event: str | None = None
    bodies: list[dict[str, Any]] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)
    url: str = ""

    def app(self) -> FastAPI:
        app = FastAPI()
        app.add_api_route("/v1/models", self.models, methods=["GET"])
        app.add_api_route("/tokenize", self.tokenize, methods=["POST"], response_model=None)
        app.add_api_route("/metrics", self.metrics, methods=["GET"], response_class=PlainTextResponse)
        if self.kind == "vllm":
            app.add_api_route("/v1/completions", self.completions, methods=["POST"], response_model=None)
        else:
            app.add_api_route("/generate", self.generate, methods=["POST"], response_model=None)
            app.add_api_route("/server_info", self.server_info, methods=["GET"])
        return app

    async def models(self, request: Request) -> Response:
        if self.api_key and request.headers.get("authorization") != f"Bearer {self.api_key}":
            return JSONResponse({"error": "Unauthorized"}, 401)
        model = {"id": "upstream-model", "owned_by": self.kind, "max_model_len": self.max_model_len}
        return JSONResponse({"object": "list", "data": [model]})

    async def server_info(self) -> dict[str, Any]:
        return {
            "enable_deterministic_inference": self.takes_seeds,
            "incremental_streaming_output": self.is_incremental,
            "enable_priority_scheduling": self.has_priorities,
            "schedule_low_priority_values_first": self.runs_low_priorities_first,
        }

    async def tokenize(self, request: Request) -> Response:
        token_ids = self.tokenizer.encode((await request.json())["prompt"])
        return JSONResponse({"tokens": token_ids, "count": len(token_ids)})

    async def metrics(self) -> str:
        names = {
            "vllm": ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"),
            "sglang": ("sglang:num_running_reqs", "sglang:num_queue_reqs", "sglang:token_usage"),
        }[self.kind]
        lines = [
            f'{name}{{engine="{i}"}} {value}'
            for i in range(2)
            for name, value in zip(names, (3, 1, 0.5), strict=True)
        ]
        return "\n".join(lines) + "\n"

    async def completions(self, request: Request) -> Response:
        body = await request.json()
        if (refusal := self._refusal(request, body, set(body) - VLLM_FIELDS)) is not None:
            return refusal
        assert body["stream"]
        assert body["return_token_ids"]
        if body.get("priority") and not self.has_priorities:
            message = "Got priority but Priority scheduling is not enabled."
            return JSONResponse({"error": {"message": message}}, 400)
        assert body["model"] == "upstream-model"
        assert body.get("logprobs") is None or body["return_tokens_as_token_ids"]
        sampling = _sampling(body, body["max_tokens"], body.get("seed"), body.get("logprobs"))
        allowed = body.get("allowed_token_ids")
        engine_request = EngineRequest(
            request_id=body["request_id"],
            prompt_token_ids=tuple(body["prompt"]),
            sampling=sampling,
            constraint=None if allowed is None else OnlyThese(allowed),
        )
        return StreamingResponse(
            self._events(engine_request, self._vllm_events), media_type="text/event-stream"
        )

    async def generate(self, request: Request) -> Response:
        body = await request.json()
        params = body["sampling_params"]
        unknown = (set(body) - SGLANG_FIELDS) | (set(params) - SGLANG_PARAMS)
        if (refusal := self._refusal(request, body, unknown)) is not None:
            return refusal
        assert body["stream"]
        params["top_k"] = max(params["top_k"], 0)
        num_top = body["top_logprobs_num"] if body.get("return_logprob") else None
        sampling = _sampling(params, params["max_new_tokens"], params.get("sampling_seed"), num_top)
        engine_request = EngineRequest(
            request_id=body["rid"], prompt_token_ids=tuple(body["input_ids"]), sampling=sampling
        )
        return StreamingResponse(
            self._events(engine_request, self._sglang_events), media_type="text/event-stream"
        )

    def _refusal(self, request: Request, body: dict[str, Any], unknown: set[str]) -> Response | None:
        self.bodies.append(body)
        if self.api_key and request.headers.get("authorization") != f"Bearer {self.api_key}":
            return JSONResponse({"error": "Unauthorized"}, 401)
        if unknown:
            return JSONResponse({"error": {"message": f"unknown fields {sorted(unknown)}"}}, 400)
        if self.statuses:
            status = self.statuses.pop(0)
            return JSONResponse({"error": {"message": "told to"}}, status, headers={"retry-after": "7"})
        return None

    async def _events(self, request: EngineRequest, encode: Any) -> AsyncIterator[bytes]:
        outcome, num_events = "left", 0
        outputs = self.engine.submit(request)
        try:
            # Both are closed here: who left must not be worked for until the garbage collector finds out.
            async with contextlib.aclosing(outputs), contextlib.aclosing(encode(request, outputs)) as events:  # type: ignore[type-var]
                async for event in events:
                    await asyncio.sleep(self.pause)
                    if self.error_event is not None:
                        error = {"message": self.error_event, "code": 500, "type": "InternalServerError"}
                        yield f"data: {json.dumps({'error': error})}\n\n".encode()
                        outcome = "failed"
                        break
                    if self.cut_after is not None and num_events == self.cut_after and self.cut_times:
                        self.cut_times -= 1
                        outcome = "cut"
                        raise ConnectionError("told to break")
                    yield f"data: {json.dumps(event)}\n\n".encode()
                    num_events += 1
                else:
                    outcome = "done"
            yield b"data: [DONE]\n\n"
        finally:
            self.ended.append(outcome)

    async def _vllm_events(
        self, request: EngineRequest, outputs: AsyncIterator[Output]
    ) -> AsyncIterator[Any]:
        last = None
        async for last in outputs:
            choice: dict[str, Any] = {
                "index": 0,
                "text": "",
                "logprobs": None,
                "finish_reason": last.finish_reason,
                "token_ids": list(last.token_ids),
            }
            if last.finish_reason is not None:
                choice["stop_reason"] = last.stop_reason
            if last.logprobs:
                choice["logprobs"] = {
                    "tokens": [f"token_id:{entry.token_id}" for entry in last.logprobs],
                    "token_logprobs": [entry.logprob for entry in last.logprobs],
                    # The chosen token first, and one more than was asked for if it is not among the best.
                    "top_logprobs": [
                        {f"token_id:{i}": value for i, value in ((entry.token_id, entry.logprob), *entry.top)}
                        for entry in last.logprobs
                    ],
                    "text_offset": [0] * len(last.logprobs),
                }
            yield {"id": "cmpl-1", "object": "text_completion", "choices": [choice]}
        assert last is not None
        assert last.stats is not None
        yield {
            "id": "cmpl-1",
            "choices": [],
            "usage": {
                "prompt_tokens": last.stats.num_prompt_tokens,
                "completion_tokens": last.stats.num_generated_tokens,
                "prompt_tokens_details": {"cached_tokens": last.stats.num_cached_tokens},
            },
            "metrics": {
                "speculative_decoding": {
                    "num_draft_tokens": sum(last.stats.num_drafted_tokens),
                    "num_accepted_draft_tokens": sum(last.stats.num_accepted_tokens),
                }
            },
        }

    async def _sglang_events(
        self, request: EngineRequest, outputs: AsyncIterator[Output]
    ) -> AsyncIterator[Any]:
        token_ids: list[int] = []
        num_tokens = 0
        chosen: list[Any] = []
        tops: list[Any] = []
        async for output in outputs:
            if self.is_incremental:
                token_ids, chosen, tops = [], [], []
            token_ids = [*token_ids, *output.token_ids]
            num_tokens += len(output.token_ids)
            chosen += [(entry.logprob, entry.token_id, None) for entry in output.logprobs]
            tops += [[(value, i, None) for i, value in entry.top] or None for entry in output.logprobs]
            stats = output.stats
            assert stats is not None
            finish: dict[str, Any] | None = None
            if output.finish_reason == "stop":
                finish = {"type": "stop", "matched": token_ids[-1]}
            elif output.finish_reason is not None:
                finish = {"type": output.finish_reason, "length": len(token_ids)}
            meta = {
                "id": request.request_id,
                "finish_reason": finish,
                "prompt_tokens": stats.num_prompt_tokens,
                "completion_tokens": num_tokens,
                "cached_tokens": stats.num_cached_tokens,
            }
            if sum(stats.num_drafted_tokens):
                meta["spec_num_proposed_drafts"] = sum(stats.num_drafted_tokens)
                meta["spec_num_correct_drafts"] = sum(stats.num_accepted_tokens)
            if request.sampling.logprobs is not None:
                meta |= {"output_token_logprobs": list(chosen), "output_top_logprobs": list(tops)}
            yield {"text": "", "output_ids": list(token_ids), "meta_info": meta}


def _sampling(
    fields: dict[str, Any], max_tokens: int, seed: int | None, num_top: int | None
) -> SamplingParams:
    names = {item.name for item in dataclasses.fields(SamplingParams)} - {
        "logprobs",
        "seed",
        "max_tokens",
        "stop",
    }
    given = {name: value for name, value in fields.items() if name in names and name != "logit_bias"}
    bias = {int(token_id): value for token_id, value in (fields.get("logit_bias") or {}).items()}
    # The tokens that end an answer are all in stop_token_ids; the engine's own list must not add to them.
    given |= {"stop_token_ids": tuple(given["stop_token_ids"]), "ignore_eos": True}
    given["draft_depth"] = 3  # Both speculate at a depth that is set when they start.
    return SamplingParams(max_tokens=max_tokens, seed=seed, logprobs=num_top, logit_bias=bias, **given)


@contextlib.contextmanager
def running(stand_in: StandIn) -> Iterator[StandIn]:
    """Serve it on a port of its own, from a thread, until the block ends."""
    listener = socket.create_server(("127.0.0.1", 0))
    stand_in.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    config = uvicorn.Config(stand_in.app(), log_level="critical", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])), daemon=True)
    thread.start()
    try:
        yield stand_in
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()
