"""What vLLM and SGLang are told and what they answer: the two wire formats of `RemoteEngine`; pure but for `connect`.

Both take a prompt of token ids and stream token ids back. A `Call` is one HTTP request; a `Delta` is what one event
of its stream says. Every sampling parameter is sent, also those at their default, because both servers would
otherwise fill in defaults of their own (generation_config.json).

Protocols as of vLLM 0.32 (`/v1/completions` with `return_token_ids`) and SGLang 0.5.23 (`/generate`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import httpx

from stepflash.engine.request import FinishReason, SamplingParams, TokenLogprob
from stepflash.errors import ConfigError, EngineError, RequestError

CONNECT_SECONDS = 10.0
MAX_SEED = 2**63 - 1
BIAS = 100.0  # what both servers accept at most; e^-100 is nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class Upstream:
    """A server that was found. `max_model_len` None: it does not say. `is_incremental`: SGLang streams what is new
    alone. `priority_sign` is -1 where higher priorities run first, 0 where there are none."""

    url: str
    kind: str
    model: str
    max_model_len: int | None
    takes_seeds: bool = True
    is_incremental: bool = False
    priority_sign: int = 1
    api_key: str | None = None

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.api_key is None else {"authorization": f"Bearer {self.api_key}"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One request to the upstream. `allowed` restricts the tokens (one token is asked for then)."""

    call_id: str
    prompt_token_ids: Sequence[int]
    max_tokens: int
    sampling: SamplingParams
    stop_token_ids: Sequence[int]
    logit_bias: Mapping[int, float]
    allowed: Sequence[int] | None = None
    priority: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """News of a call. Counts that are None were not told. `stop_token_id` is one that ended it."""

    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    num_cached_tokens: int | None = None
    num_drafted_tokens: int | None = None
    num_accepted_tokens: int | None = None


class Dialect(Protocol):
    """One call in the words of one server; `read` is given the events of its stream in order."""

    path: str

    def body(self) -> dict[str, Any]: ...

    def read(self, event: Mapping[str, Any]) -> Delta: ...


class VLLM:
    """`POST /v1/completions`."""

    path = "/v1/completions"

    def __init__(self, upstream: Upstream, call: Call) -> None:
        self._model = upstream.model
        self._call = call

    def body(self) -> dict[str, Any]:
        call, sampling = self._call, self._call.sampling
        body = {
            "model": self._model,
            "request_id": call.call_id,
            "prompt": list(call.prompt_token_ids),
            "max_tokens": call.max_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
            "add_special_tokens": False,
            **_common(sampling),
            "top_k": sampling.top_k,
            "stop_token_ids": list(call.stop_token_ids),
            "ignore_eos": sampling.ignore_eos,
            "skip_special_tokens": False,
        }
        if call.logit_bias:
            body["logit_bias"] = {str(token_id): bias for token_id, bias in call.logit_bias.items()}
        if sampling.seed is not None:
            body["seed"] = sampling.seed & MAX_SEED
        if sampling.logprobs is not None:
            body |= {"logprobs": sampling.logprobs, "return_tokens_as_token_ids": True}
        if call.allowed is not None:
            body["allowed_token_ids"] = list(call.allowed)
        if call.priority:
            body["priority"] = call.priority
        return body

    def read(self, event: Mapping[str, Any]) -> Delta:
        usage = event.get("usage") or {}
        details = usage.get("prompt_tokens_details") or {}
        speculation = (event.get("metrics") or {}).get("speculative_decoding") or {}
        choice = next(iter(event.get("choices") or ()), None) or {}
        token_ids = choice.get("token_ids")
        if token_ids is None:
            if choice.get("text"):
                raise EngineError(
                    "the upstream sends no token ids; it needs `return_token_ids`, that is vLLM 0.11 or later"
                )
            token_ids = ()
        stop = choice.get("stop_reason")
        return Delta(
            token_ids=tuple(token_ids),
            logprobs=_vllm_logprobs(token_ids, choice.get("logprobs"), self._call.sampling.logprobs),
            finish_reason=_finish_reason(choice.get("finish_reason")),
            stop_token_id=stop if isinstance(stop, int) else None,
            num_cached_tokens=details.get("cached_tokens"),
            num_drafted_tokens=speculation.get("num_draft_tokens"),
            num_accepted_tokens=speculation.get("num_accepted_draft_tokens"),
        )


class SGLang:
    """`POST /generate`. Events hold everything so far, or with --incremental-streaming-output only what is new."""

    path = "/generate"

    def __init__(self, upstream: Upstream, call: Call) -> None:
        self._call = call
        self._is_incremental = upstream.is_incremental
        self._priority_sign = upstream.priority_sign
        self._num_seen = 0

    def body(self) -> dict[str, Any]:
        call, sampling = self._call, self._call.sampling
        params = {
            "max_new_tokens": call.max_tokens,
            **_common(sampling),
            "top_k": sampling.top_k or -1,
            "stop_token_ids": list(call.stop_token_ids),
            "ignore_eos": sampling.ignore_eos,
            "skip_special_tokens": False,
            "no_stop_trim": True,
        }
        bias = dict(call.logit_bias)
        for token_id in call.allowed or ():
            bias[token_id] = bias.get(token_id, 0.0) + BIAS
        if bias:
            params["logit_bias"] = {str(token_id): value for token_id, value in bias.items()}
        if sampling.seed is not None:
            params["sampling_seed"] = sampling.seed & MAX_SEED
        body: dict[str, Any] = {
            "rid": call.call_id,
            "input_ids": list(call.prompt_token_ids),
            "sampling_params": params,
            "stream": True,
        }
        if sampling.logprobs is not None:
            body |= {"return_logprob": True, "top_logprobs_num": sampling.logprobs}
        if self._priority_sign:
            # Also 0: SGLang puts requests that name none behind all that do.
            body["priority"] = self._priority_sign * call.priority
        return body

    def read(self, event: Mapping[str, Any]) -> Delta:
        meta = event.get("meta_info") or {}
        token_ids = tuple(event.get("output_ids") or ())
        if not self._is_incremental:
            token_ids, self._num_seen = token_ids[self._num_seen :], len(token_ids)
        finish = meta.get("finish_reason") or {}
        matched = finish.get("matched")
        if finish.get("type") == "abort":
            message = str(finish.get("message") or "the upstream aborted the request")
            if finish.get("status_code") == 400:
                raise RequestError(message)
            raise EngineError(f"upstream: {message}")
        return Delta(
            token_ids=token_ids,
            logprobs=_sglang_logprobs(meta, token_ids, self._call.sampling.logprobs),
            finish_reason=_finish_reason(finish.get("type")),
            stop_token_id=matched if isinstance(matched, int) else None,
            num_cached_tokens=meta.get("cached_tokens"),
            num_drafted_tokens=meta.get("spec_num_proposed_drafts"),
            num_accepted_tokens=meta.get("spec_num_correct_drafts"),
        )


DIALECTS: Mapping[str, type[VLLM] | type[SGLang]] = {"vllm": VLLM, "sglang": SGLang}


def connect(url: str, api_key: str | None = None) -> Upstream:
    """Ask a server what it is and what it serves.

    Raises:
        ConfigError: nothing answers there, or it is neither vLLM nor SGLang.
    """
    url = url.rstrip("/").removesuffix("/v1")
    headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
    try:
        with httpx.Client(base_url=url, headers=headers, timeout=CONNECT_SECONDS, trust_env=False) as client:
            answer = client.get("/v1/models")
            if answer.status_code in (401, 403):
                raise ConfigError(
                    f"--upstream {url}: refuses the API key; see --upstream-api-key (status {answer.status_code})"
                )
            models = _json(answer).get("data")
            first = next(iter(models), None) if isinstance(models, list) else None
            if not isinstance(first, Mapping) or not isinstance(first.get("id"), str):
                raise ConfigError(f"--upstream {url}: lists no model at /v1/models")
            kind = _kind(client, first)
            info = _json(client.get("/server_info")) if kind == "sglang" else {}
    except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:
        raise ConfigError(f"--upstream {url}: no answer ({error or type(error).__name__})") from None
    if kind is None:
        raise ConfigError(f"--upstream {url}: answers neither as vLLM nor as SGLang")
    max_model_len = first.get("max_model_len")
    return Upstream(
        url=url,
        kind=kind,
        model=first["id"],
        max_model_len=max_model_len if isinstance(max_model_len, int) else None,
        takes_seeds=kind == "vllm" or bool(info.get("enable_deterministic_inference")),
        is_incremental=bool(info.get("incremental_streaming_output") or info.get("stream_output")),
        priority_sign=1 if kind == "vllm" else _sglang_priority_sign(info),
        api_key=api_key,
    )


def tokenize(upstream: Upstream, text: str) -> list[int] | None:
    """The upstream's token ids of a text; None if it does not tell."""
    body = {"model": upstream.model, "prompt": text, "add_special_tokens": False}
    try:
        answer = httpx.post(
            f"{upstream.url}/tokenize",
            json=body,
            headers=upstream.headers,
            timeout=CONNECT_SECONDS,
            trust_env=False,
        )
    except httpx.HTTPError:
        return None
    tokens = _json(answer).get("tokens") if answer.status_code == 200 else None
    return tokens if isinstance(tokens, list) and all(isinstance(token, int) for token in tokens) else None


def _kind(client: httpx.Client, model: Mapping[str, Any]) -> str | None:
    """By who owns the model; behind a proxy that rewrites the list, by a route that only one of them has."""
    if model.get("owned_by") in DIALECTS:
        return str(model["owned_by"])
    for kind, path, key in (("sglang", "/model_info", "model_path"), ("vllm", "/version", "version")):
        if key in _json(client.get(path)):
            return kind
    return None


def _sglang_priority_sign(info: Mapping[str, Any]) -> int:
    if not info.get("enable_priority_scheduling"):
        return 0
    return 1 if info.get("schedule_low_priority_values_first") else -1


def _json(answer: httpx.Response) -> Mapping[str, Any]:
    try:
        data = answer.json()
    except ValueError:
        return {}
    return data if isinstance(data, Mapping) else {}


def _common(sampling: SamplingParams) -> dict[str, Any]:
    names = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
    return {name: getattr(sampling, name) for name in names}


def _finish_reason(reason: object) -> FinishReason | None:
    match reason:
        case None | "stop" | "length" | "abort":
            return reason
        case "repetition":  # vLLM's own detection of loops
            return "length"
    raise EngineError(f"upstream: the request ended with {reason!r}")


def _vllm_logprobs(
    token_ids: Sequence[int], logprobs: Mapping[str, Any] | None, num_top: int | None
) -> tuple[TokenLogprob, ...]:
    if num_top is None or not token_ids:
        return ()
    if not logprobs or len(logprobs.get("token_logprobs") or ()) != len(token_ids):
        raise EngineError("the upstream sends no log-probabilities although they were asked for")
    tops = logprobs.get("top_logprobs") or [None] * len(token_ids)
    return tuple(
        TokenLogprob(
            token_id=token_id,
            logprob=logprob,
            top=_best(
                [(int(name.removeprefix("token_id:")), value) for name, value in (top or {}).items()], num_top
            ),
        )
        for token_id, logprob, top in zip(token_ids, logprobs["token_logprobs"], tops, strict=True)
    )


def _sglang_logprobs(
    meta: Mapping[str, Any], token_ids: Sequence[int], num_top: int | None
) -> tuple[TokenLogprob, ...]:
    if num_top is None or not token_ids:
        return ()
    chosen = (meta.get("output_token_logprobs") or [])[-len(token_ids) :]
    tops = (meta.get("output_top_logprobs") or [])[-len(token_ids) :] or [None] * len(token_ids)
    if len(chosen) != len(token_ids) or len(tops) != len(token_ids):
        raise EngineError("the upstream sends no log-probabilities although they were asked for")
    return tuple(
        TokenLogprob(
            token_id=token_id,
            logprob=entry[0],
            top=_best([(item[1], item[0]) for item in top or ()], num_top),
        )
        for token_id, entry, top in zip(token_ids, chosen, tops, strict=True)
    )


def _best(entries: list[tuple[int, float]], num_top: int) -> tuple[tuple[int, float], ...]:
    """The `num_top` best; servers add the chosen token when it is not among them."""
    return tuple(sorted(entries, key=lambda entry: -entry[1])[:num_top])
