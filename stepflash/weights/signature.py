"""Ed25519 signatures of receipts.

A signature proves that whoever holds the key vouches for the receipt as it is, and with it for the digests of all
tensors, the configuration and the tokenizer. It does not prove that the numbers in the receipt are true, and it says
nothing about people: which keys to trust is a file of the user's.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepflash.errors import ConfigError, WeightsError
from stepflash.settings import trusted_signers_file

if TYPE_CHECKING:  # imported where there is a signature: most checkpoints have none
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

SIGNATURE, DIGEST = "signature", "receipt_sha256"
ALGORITHM = "ed25519"
CONTEXT = b"stepflash receipt\n"  # a signature of something else cannot pass for one of a receipt


def canonical_digest(values: Mapping[str, Any], without: tuple[str, ...]) -> str:
    """SHA-256 of a JSON object in canonical form, without some of its keys."""
    rest = {key: value for key, value in values.items() if key not in without}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def open_signing_key(path: Path) -> Ed25519PrivateKey:
    """The private key of a PEM file, which is made, readable by its owner only, if it is not there.

    Raises:
        ConfigError: the file is something else or cannot be made.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    try:
        if not path.exists():
            key = Ed25519PrivateKey.generate()
            text = key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(text)
            return key
        found = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"{path}: is no signing key: {error}") from error
    if not isinstance(found, Ed25519PrivateKey):
        raise ConfigError(f"{path}: is no Ed25519 key; give a new path and one is made")
    return found


def public_hex(key: Ed25519PrivateKey) -> str:
    """The public key as it stands in receipts and in the file of trusted signers."""
    return key.public_key().public_bytes_raw().hex()


def sign(values: Mapping[str, Any], key: Ed25519PrivateKey) -> dict[str, str]:
    """The `signature` object of a receipt."""
    return {
        "algorithm": ALGORITHM,
        "public_key": public_hex(key),
        "value": key.sign(_message(values)).hex(),
    }


def signer_of(values: Mapping[str, Any], origin: object) -> str | None:
    """The public key that signed a receipt, None if it is not signed.

    Raises:
        WeightsError: there is a signature and it does not fit.
    """
    signature = values.get(SIGNATURE)
    if signature is None:
        return None
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        if signature["algorithm"] != ALGORITHM:
            raise ValueError(f"algorithm {signature['algorithm']!r}")
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(signature["public_key"]))
        key.verify(bytes.fromhex(signature["value"]), _message(values))
    except InvalidSignature:
        raise WeightsError(f"{origin}: its signature is not of this receipt: it was changed") from None
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{origin}: its signature cannot be read: {error}") from error
    return key.public_bytes_raw().hex()


def _message(values: Mapping[str, Any]) -> bytes:
    return CONTEXT + canonical_digest(values, (SIGNATURE, DIGEST)).encode()


def trusted_signers() -> dict[str, str]:
    """Public key -> name, from the user's file: a key and a name on each line, # starts a comment."""
    path = trusted_signers_file()
    if not path.is_file():
        return {}
    rows = [
        line.partition("#")[0].split(maxsplit=1) for line in path.read_text(encoding="utf-8").splitlines()
    ]
    return {row[0].lower(): (row[1].strip() if len(row) > 1 else row[0][:16]) for row in rows if row}
