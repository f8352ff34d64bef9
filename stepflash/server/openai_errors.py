"""Errors as the OpenAI API shows them: a status and `{"error": {...}}`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from stepflash.errors import (
    EngineError,
    PromptTooLong,
    QueueFull,
    RequestError,
    ServerClosing,
    StepflashError,
)

Headers = Mapping[str, str]


def error_json(
    message: str, *, type: str = "invalid_request_error", param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    return {"error": {"message": message, "type": type, "param": param, "code": code}}


def describe(error: StepflashError) -> tuple[int, dict[str, Any], Headers]:
    """Status, body and extra headers of an error of ours."""
    message = str(error)
    match error:
        case QueueFull():
            retry = str(max(1, math.ceil(error.retry_after_seconds)))
            return (
                429,
                error_json(message, type="rate_limit_error", code=error.code),
                {"retry-after": retry},
            )
        case PromptTooLong():
            # The words by which clients recognise it and start to shorten the conversation.
            message = (
                f"This model's maximum context length is {error.max_tokens} tokens, "
                f"but the {message[0].lower()}{message[1:]}"
            )
            return 400, error_json(message, param="messages", code=error.code), {}
        case RequestError():
            status = 404 if error.code in ("model_not_found", "not_found") else 400
            return status, error_json(message, param=error.param, code=error.code), {}
        case ServerClosing():
            return 503, error_json(message, type="server_error", code="server_closing"), {}
        case EngineError():
            return 500, error_json(message, type="server_error", code="engine_error"), {}
    return 500, error_json(message, type="server_error"), {}
