"""The receipt of a quantised checkpoint, as the loader sees it: are these the bytes that were measured, and says who?

`stepflash quantize` writes `stepflash-receipt.json`: the SHA-256 of every tensor and of the files beside them, how
they were made and how well they agree with the model they were made from (`stepflash.tools.receipt`); with `--sign`
also a signature. A checkpoint is then

- good: the receipt is whole and signed by a trusted key, and every tensor read has its digest;
- unknown: there is no receipt, or nobody trusted has signed it (a warning);
- known bad: bytes, files, receipt or signature do not fit, or it was made in a way that is known to fail. It is
  refused unless known bad ones are allowed.

Poor measured quality is a loud warning. Digests are checked while the bytes are read to be used, so that nothing is
read twice; no model comes out of a load that fails.
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
from stepflash.settings import allows_known_bad
from stepflash.weights.checkpoint import Checkpoint, is_packed
from stepflash.weights.known_bad import known_bad
from stepflash.weights.packed import hashed
from stepflash.weights.safetensors import is_file_name
from stepflash.weights.signature import DIGEST, canonical_digest, signer_of, trusted_signers
from stepflash.weights.stored import StoredTensor

RECEIPT_NAME = "stepflash-receipt.json"
VERSION = 1
OVERRIDE = "--allow-known-bad or STEPFLASH_ALLOW_KNOWN_BAD=1 loads it all the same"
GOOD, UNKNOWN, BAD = "good", "unknown", "known bad"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """A whole receipt.

    Attributes:
        digests: released name -> SHA-256 of the tensor's bytes.
        values: the JSON object.
        signer: the public key whose signature it bears.
    """

    path: Path
    digests: Mapping[str, str]
    values: Mapping[str, Any]
    signer: str | None = None

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
            refuse(
                f"{stored.origin}: not the bytes that {self.path} lists: the checkpoint is damaged or was "
                "changed; quantise or download it again"
            )

    def check(self, stored: StoredTensor) -> None:
        """Read a stored tensor and compare its bytes; raises as `checked`."""
        pieces = stored.packed.pieces() if stored.packed is not None else stored.values()
        for _ in self.checked(stored, pieces):
            pass


def read_receipt(folder: Path) -> Receipt | None:
    """The receipt of a folder, None if there is none.

    Raises:
        WeightsError: it is damaged, was edited, is of another version, or its signature does not fit.
    """
    path = folder / RECEIPT_NAME
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_bytes())
        digests = {name: entry["sha256"] for name, entry in values["tensors"].items()}
        version, own = values["version"], values[DIGEST]
        values["recipe"].get("rounding")
        if not all(map(is_file_name, values.get("files", {}).keys())):
            raise ValueError("files has a name that no file can have")
        if values.get("quality") is not None:
            describe_quality(values["quality"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{path}: not a receipt: {type(error).__name__}: {error}") from error
    if version != VERSION:
        raise WeightsError(f"{path}: version {version!r}, this stepflash reads {VERSION}")
    if receipt_digest(values) != own:
        raise WeightsError(f"{path}: was changed after it was made ({DIGEST} does not fit)")
    return Receipt(path=path, digests=digests, values=values, signer=signer_of(values, path))


def receipt_digest(values: Mapping[str, Any]) -> str:
    """SHA-256 of the receipt as canonical JSON, without its own digest."""
    return canonical_digest(values, (DIGEST,))


def refuse(reason: str) -> None:
    """Raise, or only warn if known bad checkpoints are allowed."""
    if not allows_known_bad():
        raise WeightsError(f"{reason} ({OVERRIDE})")
    log.warning("KNOWN BAD, loaded because it is allowed: %s", reason)


def standing(checkpoint: Checkpoint, receipt: Receipt | None) -> tuple[str, str]:
    """GOOD, UNKNOWN or BAD, and why; from headers and small files, without reading a weight."""
    is_calibrated = receipt is not None and receipt.values["recipe"].get("rounding", "nearest") != "nearest"
    if (entry := known_bad(checkpoint.config, checkpoint.tensors, is_calibrated)) is not None:
        return BAD, f"{entry.name}: reported to give broken output ({entry.reference})"
    if receipt is None:
        return UNKNOWN, f"it has no {RECEIPT_NAME}"
    if missing := set(checkpoint.tensors) - set(receipt.digests):
        return BAD, f"its receipt does not list {sorted(missing)[0]}; it is of another checkpoint"
    for name, digest in receipt.values.get("files", {}).items():
        path = checkpoint.path / name
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            return BAD, f"{name} is not the file that its receipt lists"
    if receipt.signer is None:
        return UNKNOWN, "its receipt is not signed"
    name = trusted_signers().get(receipt.signer)
    if name is None:
        return UNKNOWN, f"its receipt is signed by {receipt.signer}, whom you have not said to trust"
    return GOOD, f"signed by {name}"


def checked_receipt(checkpoint: Checkpoint) -> Receipt | None:
    """The receipt to load a packed checkpoint by; says once if it is unknown or tells of poor quality.

    Raises:
        WeightsError: the checkpoint is known to be bad, and that is not allowed.
    """
    if not is_packed(checkpoint):
        return None
    try:
        receipt = read_receipt(checkpoint.path)
    except WeightsError as error:
        refuse(str(error))
        return None
    level, reason = standing(checkpoint, receipt)
    if level == BAD:
        refuse(f"{checkpoint.path}: {reason}")
    elif level == UNKNOWN:
        log.warning("%s: unknown: %s", checkpoint.path, reason)
    if receipt is not None and receipt.is_good is False:
        log.warning("%s: POOR QUALITY: %s", checkpoint.path, verdict(receipt))
    return receipt


def verdict(receipt: Receipt | None) -> str:
    """One line about the quality."""
    if receipt is None:
        return "unknown: no receipt"
    if receipt.is_good is None:
        return "unknown: its receipt has digests but no measurement"
    return f"{'good' if receipt.is_good else 'bad'}: {describe_quality(receipt.values['quality'])}"


def describe_quality(quality: Mapping[str, Any]) -> str:
    """The measured numbers.

    Raises:
        KeyError, TypeError, ValueError: they are not there, or are no numbers.
    """
    return (
        f"KL {quality['mean_kl']:.4f} nats a token, top-1 agreement {quality['top1_agreement']:.1%} on "
        f"{quality['num_tokens']} tokens"
    )
