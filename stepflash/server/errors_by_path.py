"""Which API's error body a path answers with: Anthropic's below /v1/messages, OpenAI's everywhere else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

from stepflash.errors import StepflashError
from stepflash.server import anthropic_errors, openai_errors

_OPENAI_TYPES = {429: "rate_limit_error"}


def is_anthropic(path: str) -> bool:
    return path == "/v1/messages" or path.startswith("/v1/messages/")


def error_response(path: str, error: StepflashError) -> JSONResponse:
    """The answer to a request that ended with an error of ours."""
    describe = anthropic_errors.describe if is_anthropic(path) else openai_errors.describe
    status, body, headers = describe(error)
    return JSONResponse(body, status, headers=dict(headers))


def message_response(
    path: str, status: int, message: str, *, code: str | None = None, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """The answer with a status of HTTP's own; `code` is shown where the API has a place for it."""
    body: dict[str, Any]
    if is_anthropic(path):
        body = anthropic_errors.error_json(status, message)
    else:
        kind = "server_error" if status >= 500 else _OPENAI_TYPES.get(status, "invalid_request_error")
        body = openai_errors.error_json(message, type=kind, code=code)
    return JSONResponse(body, status, headers=dict(headers or {}))
