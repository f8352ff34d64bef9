"""What the server writes to standard error: one line per request, and what went wrong.

As JSON, one object a line, or as text for people. A line says who asked for what, how it ended and what it cost;
prompts stand there only where the settings ask for them, and keys never.
"""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
from typing import Any

from stepflash.server.request_records import RequestRecord
from stepflash.settings import ServerSettings

access_log = logging.getLogger("stepflash.access")


def configure(settings: ServerSettings) -> None:
    """Send all logs of this process to standard error, in the format of the settings."""
    log_format = settings.log_format
    if log_format == "auto":
        log_format = "text" if sys.stderr.isatty() else "json"
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    # What asyncio says when several frames in a row are written to a client that just left; the record of the
    # request tells that it did.
    logging.getLogger("asyncio").addFilter(lambda line: "socket.send() raised" not in line.getMessage())
    access_log.setLevel(logging.WARNING if log_format == "off" else logging.INFO)


def log_request(record: RequestRecord) -> None:
    """One line for a closed request; the health check and the metrics are asked too often to be told."""
    if record.route in ("/health", "/metrics") and record.status == 200:
        return
    if not access_log.isEnabledFor(logging.INFO):
        return
    access_log.info("request", extra={"fields": fields(record)})


def fields(record: RequestRecord) -> dict[str, Any]:
    """What is told about a request; what it does not have is left out. Times in seconds."""
    told: dict[str, Any] = {
        "request_id": record.request_id,
        "client": record.client,
        "method": record.method,
        # Of an unknown path only that it is one: anybody may put anything there.
        "route": record.route,
        "status": record.status,
        "seconds": round(record.seconds, 4),
    }
    if record.answers:
        usage, first = record.usage, record.answers[0]
        told |= {
            "finish_reason": ",".join(answer.finish_reason for answer in record.answers),
            "prompt_tokens": usage.prompt_tokens,
            "cached_tokens": usage.cached_tokens,
            "completion_tokens": usage.completion_tokens,
            "reasoning_tokens": usage.reasoning_tokens,
            "accepted_draft_tokens": usage.accepted_draft_tokens,
        }
        if first.queue_seconds is not None:
            told["queue_seconds"] = round(first.queue_seconds, 4)
        if first.first_token_seconds is not None:
            told["first_token_seconds"] = round(first.first_token_seconds, 4)
    if record.prompts:
        told["prompts"] = record.prompts
    return told


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (UTC), level, logger, message, and the fields of a request."""

    def format(self, record: logging.LogRecord) -> str:
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        data: dict[str, Any] = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            data["traceback"] = "".join(traceback.format_exception(*record.exc_info))
        return json.dumps(data, ensure_ascii=False)


class TextFormatter(logging.Formatter):
    """The same for people."""

    def format(self, record: logging.LogRecord) -> str:
        told = dict(getattr(record, "fields", {}))
        at = time.strftime("%H:%M:%S", time.localtime(record.created))
        if not told:
            text = f"{at} {record.levelname.lower()}: {record.getMessage()}"
            if record.exc_info:
                text += "\n" + "".join(traceback.format_exception(*record.exc_info)).rstrip()
            return text
        head = " ".join(str(told.pop(name)) for name in ("method", "route", "status"))
        return f"{at} {head} " + " ".join(f"{name}={value}" for name, value in told.items())
