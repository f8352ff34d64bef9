"""A thought inside a field that clients take for a signature or a cipher and send back as it is; pure.

Some clients ask not to be shown the thought, or keep only its sealed form. Nothing is secret about it: it is the
client's own, in base64, behind a mark by which we know it again.
"""

from __future__ import annotations

import base64
import binascii
from typing import Any

MARK = "stepflash-thought:"


def seal(text: str) -> str:
    """The sealed form; `unseal` reads it back."""
    return MARK + base64.b64encode(text.encode("utf-8", "replace")).decode("ascii")


def unseal(value: Any) -> str:
    """The thought; empty if this is not ours."""
    if not isinstance(value, str) or not value.startswith(MARK):
        return ""
    try:
        return base64.b64decode(value.removeprefix(MARK), validate=True).decode()
    except (binascii.Error, UnicodeDecodeError, ValueError):
        return ""
