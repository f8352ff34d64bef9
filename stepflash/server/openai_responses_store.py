"""Responses that were asked to be stored: in memory, the most recently used ones, up to a limit."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stepflash.errors import RequestError

MAX_RESPONSES = 1024
MAX_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredResponse:
    """A finished response with the items that led to it, for the owner alone. `num_bytes` counts the earlier turns
    too, because their items are kept as long as this is."""

    response: Mapping[str, Any]
    items: tuple[Any, ...]
    num_bytes: int
    owner: str

    @property
    def next_items(self) -> tuple[Any, ...]:
        """What the input of the next turn is appended to."""
        return (*self.items, *self.response["output"])


class ResponseStore:
    """Least recently used out first."""

    def __init__(self, max_responses: int = MAX_RESPONSES, max_bytes: int = MAX_BYTES) -> None:
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._stored: OrderedDict[str, StoredResponse] = OrderedDict()
        self._num_bytes = 0

    def put(self, stored: StoredResponse) -> None:
        self._stored[stored.response["id"]] = stored
        self._num_bytes += stored.num_bytes
        while len(self._stored) > self._max_responses or self._num_bytes > self._max_bytes:
            _, oldest = self._stored.popitem(last=False)
            self._num_bytes -= oldest.num_bytes

    def get(self, response_id: str, owner: str) -> StoredResponse | None:
        stored = self._stored.get(response_id)
        if stored is None or stored.owner != owner:
            return None
        self._stored.move_to_end(response_id)
        return stored

    def delete(self, response_id: str, owner: str) -> None:
        """
        Raises:
            RequestError: the owner has no such response.
        """
        stored = self.get(response_id, owner)
        if stored is None:
            raise not_found(response_id)
        del self._stored[response_id]
        self._num_bytes -= stored.num_bytes


def not_found(response_id: str) -> RequestError:
    return RequestError(f"there is no stored response {response_id!r}", param="response_id", code="not_found")
