"""Reads what clients say about when their request is to run: its priority and its deadline; pure.

`priority` has the name and the sense that it has in vLLM's servers. A deadline ends an answer with what there is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from stepflash.engine.request import Request
from stepflash.errors import RequestError
from stepflash.server.body import Body
from stepflash.settings import ServerSettings

MAX_PRIORITY = 2**31 - 1


class SchedulingBody(Body):
    """The fields of every API, all of them extensions."""

    priority: int | None = None
    deadline_seconds: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheduling:
    """`deadline_seconds` from submission; a lower `priority` runs earlier."""

    priority: int = 0
    deadline_seconds: float | None = None

    def of(self, request: Request, settings: ServerSettings) -> Request:
        """The request with these values, within what the server allows.

        Raises:
            RequestError: a priority on a server that has none.
        """
        if self.priority and settings.scheduling_policy != "priority":
            raise RequestError(
                "priority: this server takes requests in the order in which they come; "
                "it was started without --scheduling-policy priority",
                param="priority",
                code="unsupported_parameter",
            )
        limits = [limit for limit in (self.deadline_seconds, settings.request_timeout) if limit is not None]
        if not self.priority and not limits:
            return request
        return replace(request, priority=self.priority, deadline_seconds=min(limits, default=None))


WHENEVER = Scheduling()


def read_scheduling(body: SchedulingBody) -> Scheduling:
    """
    Raises:
        RequestError: a value is out of range.
    """
    priority, deadline = body.priority or 0, body.deadline_seconds
    if abs(priority) > MAX_PRIORITY:
        raise RequestError(f"priority: must fit in 32 bits, got {priority}", param="priority")
    if deadline is not None and deadline <= 0:
        raise RequestError(f"deadline_seconds: must be above 0, got {deadline:g}", param="deadline_seconds")
    return Scheduling(priority=priority, deadline_seconds=deadline)
