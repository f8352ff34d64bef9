"""Who vouches for a checkpoint: signed, unsigned, forged, edited, and made in a way that is known to fail."""

from __future__ import annotations

import json
import logging
import shutil
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from stepflash.cli import main
from stepflash.errors import ConfigError, WeightsError
from stepflash.kernels.formats import Format
from stepflash.model.config import ModelConfig
from stepflash.weights.checkpoint import open_checkpoint
from stepflash.weights.known_bad import known_bad
from stepflash.weights.load import load_model
from stepflash.weights.receipt import BAD, GOOD, UNKNOWN, read_receipt, receipt_digest, standing
from stepflash.weights.signature import open_signing_key, sign
from stepflash.weights.stored import PackedStorage, StoredTensor

MICRO = Path(__file__).parents[1] / "fixtures" / "micro"
RELEASED = Path(__file__).parents[1] / "fixtures" / "step-3.5-flash-config.json"
RECEIPT = "stepflash-receipt.json"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("signed")
    arguments = ["--format", "int8", "--no-measure", "--sign", str(folder / "key.pem"), "--json"]
    assert main(["quantize", str(MICRO), str(folder / "out"), *arguments]) == 0
    return folder


@pytest.fixture
def copy(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STEPFLASH_TRUSTED_SIGNERS", str(tmp_path / "trusted"))
    monkeypatch.delenv("STEPFLASH_ALLOW_KNOWN_BAD", raising=False)
    return Path(shutil.copytree(made / "out", tmp_path / "copy"))


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the receipt and make its own digest right again, as a forger would."""
    values = json.loads((folder / RECEIPT).read_text())
    change(values)
    values["receipt_sha256"] = receipt_digest(values)
    (folder / RECEIPT).write_text(json.dumps(values))


def level_of(folder: Path) -> tuple[str, str]:
    return standing(open_checkpoint(folder), read_receipt(folder))


def public_key(folder: Path) -> str:
    return str(json.loads((folder / RECEIPT).read_text())["signature"]["public_key"])


def test_the_key_is_an_ordinary_pem_for_its_owner_only(made: Path) -> None:
    path = made / "key.pem"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    key = load_pem_private_key(path.read_bytes(), None)
    assert key.public_key().public_bytes_raw().hex() == public_key(made / "out")  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match="is no signing key"):
        open_signing_key(MICRO / "config.json")


def test_good_and_unknown(copy: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "stepflash")
    assert level_of(copy) == (
        UNKNOWN,
        f"its receipt is signed by {public_key(copy)}, whom you have not said to trust",
    )
    load_model(copy, progress=False)
    assert caplog.text.count("unknown: its receipt is signed by") == 1
    caplog.clear()
    (tmp_path / "trusted").write_text(f"# mine\n{public_key(copy)} the makers\n")
    assert level_of(copy) == (GOOD, "signed by the makers")
    load_model(copy, progress=False)
    assert not caplog.text
    edit(copy, lambda values: values.pop("signature"))
    assert level_of(copy) == (UNKNOWN, "its receipt is not signed")


@pytest.mark.parametrize(
    "change",
    [
        lambda values: values["recipe"].update(format="bf16"),
        lambda values: values["signature"].update(value="00" * 64),
        lambda values: values["signature"].update(value="no"),
        lambda values: values["signature"].update(public_key="ff" * 32),
        lambda values: values["signature"].update(algorithm="none"),
        lambda values: values["tensors"].popitem(),
    ],
)
def test_forgeries_are_refused(copy: Path, change: Callable[[dict[str, Any]], object]) -> None:
    edit(copy, change)
    with pytest.raises(WeightsError, match=r"signature.*--allow-known-bad"):
        load_model(copy, progress=False)
    assert main(["inspect", str(copy)]) == 1


def test_a_signature_of_another_receipt_does_not_pass(copy: Path, made: Path) -> None:
    key = open_signing_key(made / "key.pem")
    edit(copy, lambda values: values.update(signature=sign({**values, "version": 2}, key)))
    with pytest.raises(WeightsError, match="not of this receipt"):
        load_model(copy, progress=False)


def test_an_edited_configuration_is_known_bad(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-4}))
    assert level_of(copy) == (BAD, "config.json is not the file that its receipt lists")
    with pytest.raises(WeightsError, match=r"config.json is not the file .*--allow-known-bad"):
        load_model(copy, progress=False)
    monkeypatch.setenv("STEPFLASH_ALLOW_KNOWN_BAD", "1")
    load_model(copy, progress=False)


def test_the_override_also_lets_changed_bytes_pass(
    copy: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = next(copy.glob("*.safetensors"))
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)
    command = ["generate", str(copy), "--prompt", "a", "--max-tokens", "1", "--raw"]
    assert main(command) == 2
    monkeypatch.setenv("STEPFLASH_ALLOW_KNOWN_BAD", "0")  # so that the flag's own setting is undone
    assert main([*command, "--allow-known-bad"]) == 0
    assert "KNOWN BAD, loaded because it is allowed" in caplog.text


def test_recipes_that_are_known_to_fail() -> None:
    config = ModelConfig.from_pretrained(RELEASED)

    def stored(layer: int, fmt: Format) -> dict[str, StoredTensor]:
        name = f"model.layers.{layer}.self_attn.q_proj.weight"
        return {
            name: StoredTensor(
                name=name, shape=(1, 1), dtype_name=fmt.name, num_bytes=1, origin="", values=lambda: iter(()),
                packed=PackedStorage(fmt, lambda: iter(())),
            )
        }  # fmt: skip

    for layer in (0, 4, 43, 44):
        assert known_bad(config, stored(layer, Format.INT4_G32), False) is not None
    assert known_bad(config, stored(5, Format.INT4_G32), False) is None
    assert known_bad(config, stored(0, Format.INT8_G128), False) is None
    assert known_bad(config, stored(0, Format.INT4_G32), True) is None
    assert known_bad(replace(config, hidden_size=64), stored(0, Format.INT4_G32), False) is None


def test_foreign_files_of_a_known_bad_method_say_why(tmp_path: Path) -> None:
    shutil.copytree(MICRO, tmp_path / "foreign")
    path = tmp_path / "foreign" / "config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": "auto-round"}})
    )
    with pytest.raises(WeightsError, match=r"known bad: .*auto-round#1624"):
        open_checkpoint(tmp_path / "foreign")
