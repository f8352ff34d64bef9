"""The receipt of a quantised checkpoint, as the loader sees it: are these the bytes that were measured?

`stepflash quantize` writes `stepflash-receipt.json`: the SHA-256 of every tensor, how it was made and how well it
agrees with the model it was made from (`stepflash.tools.receipt`). A checkpoint is then

- good: the receipt is whole, every tensor read has its digest, and the measured quality passed;
- unknown: there is no receipt;
- bad: the quality was measured and did not pass (a loud warning), or bytes differ (an error: it is damaged).

The receipt has no secret: its own digest catches damage and careless edits, it is no proof of who made it.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from stepflash.errors import WeightsError
from stepflash.weights.checkpoint import Checkpoint, is_packed
from stepflash.weights.packed import hashed
from stepflash.weights.stored import StoredTensor

RECEIPT_NAME = "stepflash-receipt.json"
VERSION = 1
DIGEST = "receipt_sha256"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """A whole receipt. `digests`: released name -> SHA-256 of the tensor's bytes; `values`: the JSON object."""

    path: Path
    digests: Mapping[str, str]
    values: Mapping[str, Any]

    @property
    def is_good(self) -> bool | None:
        """Whether the measured quality passed; None if it was not measured."""
        quality = self.values.get("quality")
        return bool(quality["passed"]) if isinstance(quality, Mapping) and "passed" in quality else None

    def checked(self, stored: StoredTensor, pieces: Iterator[Tensor]) -> Iterator[Tensor]:
        """The bytes of a stored tensor, compared with its digest once the last piece is taken.

        Raises:
            WeightsError: they are not the bytes that the receipt was made for.
        """
        digest = hashlib.sha256()
        yield from hashed(pieces, digest)
        if digest.hexdigest() != self.digests.get(stored.name):
            raise WeightsError(
                f"{stored.origin}: not the bytes that {self.path} lists: the checkpoint is damaged or was "
                "changed; quantise or download it again (without the receipt it loads unchecked)"
            )

    def check(self, stored: StoredTensor) -> None:
        """Read a stored tensor and compare its bytes; raises as `checked`."""
        pieces = stored.packed.pieces() if stored.packed is not None else stored.values()
        for _ in self.checked(stored, pieces):
            pass


def read_receipt(folder: Path) -> Receipt | None:
    """The receipt of a folder, None if there is none.

    Raises:
        WeightsError: it is damaged, was edited, or is of another version.
    """
    path = folder / RECEIPT_NAME
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_bytes())
        digests = {name: entry["sha256"] for name, entry in values["tensors"].items()}
        version, own = values["version"], values[DIGEST]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{path}: not a receipt: {type(error).__name__}: {error}") from error
    if version != VERSION:
        raise WeightsError(f"{path}: version {version!r}, this stepflash reads {VERSION}")
    if receipt_digest(values) != own:
        raise WeightsError(f"{path}: was changed after it was made ({DIGEST} does not fit)")
    return Receipt(path=path, digests=digests, values=values)


def receipt_digest(values: Mapping[str, Any]) -> str:
    """SHA-256 of the receipt as canonical JSON, without its own digest."""
    rest = {key: value for key, value in values.items() if key != DIGEST}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def checked_receipt(checkpoint: Checkpoint) -> Receipt | None:
    """The receipt to load a packed checkpoint by; says so if there is none or if it tells of poor quality.

    Raises:
        WeightsError: the receipt is damaged, or made for other tensors.
    """
    if not is_packed(checkpoint):
        return None
    receipt = read_receipt(checkpoint.path)
    if receipt is None:
        log.warning("%s: has no %s: its quality is unknown", checkpoint.path, RECEIPT_NAME)
        return None
    if missing := set(checkpoint.tensors) - set(receipt.digests):
        raise WeightsError(f"{receipt.path}: does not list {sorted(missing)[0]}; it is of another checkpoint")
    if receipt.is_good is False:
        log.warning("%s: KNOWN BAD: %s", checkpoint.path, verdict(receipt))
    return receipt


def verdict(receipt: Receipt | None) -> str:
    """One line about the quality."""
    if receipt is None:
        return "unknown: no receipt"
    quality = receipt.values.get("quality")
    if receipt.is_good is None or not isinstance(quality, Mapping):
        return "unknown: its receipt has digests but no measurement"
    numbers = (
        f"KL {quality['mean_kl']:.4f} nats a token, top-1 agreement {quality['top1_agreement']:.1%} on "
        f"{quality['num_tokens']} tokens"
    )
    return f"{'good' if receipt.is_good else 'bad'}: {numbers}"
