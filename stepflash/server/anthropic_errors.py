"""Errors as the Anthropic API shows them: a status and `{"type": "error", "error": {...}, "request_id": ...}`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from stepflash.errors import QueueFull, RequestError, ServerClosing, StepflashError

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",  # what clients try again, also when it comes in a stream
    529: "overloaded_error",
}
OVERLOADED = 529


def error_json(status: int, message: str, request_id: str) -> dict[str, Any]:
    kind = TYPES.get(status, "api_error" if status >= 500 else "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": message}, "request_id": request_id}


def describe(error: StepflashError, request_id: str) -> tuple[int, dict[str, Any], Mapping[str, str]]:
    """Status, body and extra headers of an error of ours.

    A prompt that does not fit keeps its own words, `prompt is too long: A tokens > B maximum`: clients read both
    numbers and shorten the conversation.
    """
    headers: Mapping[str, str] = {}
    match error:
        case QueueFull():
            status = OVERLOADED
            headers = {"retry-after": str(max(1, math.ceil(error.retry_after_seconds)))}
        case RequestError():
            status = 404 if error.code == "model_not_found" else 400
        case ServerClosing():
            status = 503
        case _:
            status = 500
    return status, error_json(status, str(error), request_id), headers
