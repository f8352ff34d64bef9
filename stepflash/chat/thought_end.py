"""Where a thought ends, told token by token: at `</think>`, be it one token or spelled out in several."""

from __future__ import annotations

THINK_END = b"</think>"


def advance(progress: int, token: bytes) -> int:
    """How much of `</think>` stands at the end after one more token, `progress` bytes of it before; its whole length:
    the thought is over, be it that the token goes on behind it."""
    if not progress and b"<" not in token:
        return 0
    text = THINK_END[:progress] + token
    if THINK_END in text:
        return len(THINK_END)
    longest = min(len(text), len(THINK_END) - 1)
    return next(n for n in range(longest, -1, -1) if text.endswith(THINK_END[:n]))
