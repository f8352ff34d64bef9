"""The errors that users see.

One tree: whatever a user or a client can cause is a `StepflashError` whose message says what is wrong,
where, and what to do. The command line prints the message alone; the server turns a `RequestError` into a
4xx answer and an `EngineError` into a 5xx one. Anything else that escapes is a bug in stepflash.
"""


class StepflashError(Exception):
    """Base of every error that a user can cause and fix."""


class ConfigError(StepflashError, ValueError):
    """A model configuration or a setting is wrong or not supported; names the key and the reason."""


class WeightsError(StepflashError, ValueError):
    """A checkpoint is missing, incomplete, corrupt or does not fit the configuration."""


class RequestError(StepflashError, ValueError):
    """A request is wrong (4xx). `param` names the field at fault when there is one."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class PromptTooLong(RequestError):
    """The prompt does not fit the context; carries both numbers."""

    def __init__(self, num_tokens: int, max_tokens: int) -> None:
        super().__init__(
            f"prompt is too long: {num_tokens} tokens > {max_tokens} maximum", code="context_length_exceeded"
        )
        self.num_tokens = num_tokens
        self.max_tokens = max_tokens


class BadSchema(RequestError):
    """A JSON schema, tool definition or grammar cannot be used."""


class QueueFull(RequestError):
    """Too many requests wait; `retry_after_seconds` estimates when to come back."""

    def __init__(self, message: str, retry_after_seconds: float) -> None:
        super().__init__(message, code="queue_full")
        self.retry_after_seconds = retry_after_seconds


class EngineError(StepflashError, RuntimeError):
    """The engine failed while running a request (5xx)."""


class ServerClosing(StepflashError):
    """The server goes down before an answer is complete (503)."""
