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


def error_response(path: str, error: StepflashError, request_id: str) -> JSONResponse:
    """The answer to a request that ended with an error of ours."""
    if is_anthropic(path):
        status, body, headers = anthropic_errors.describe(error, request_id)
    else:
        status, body, headers = openai_errors.describe(error)
    return JSONResponse(body, status, headers=dict(headers))


def message_response(
    path: str,
    status: int,
    message: str,
    request_id: str,
    *,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    """The answer with a status of HTTP's own; `code` is shown where the API has a place for it."""
    body: dict[str, Any]
    if is_anthropic(path):
        body = anthropic_errors.error_json(status, message, request_id)
    else:
        kind = "server_error" if status >= 500 else _OPENAI_TYPES.get(status, "invalid_request_error")
        body = openai_errors.error_json(message, type=kind, code=code)
    return JSONResponse(body, status, headers=dict(headers or {}))
