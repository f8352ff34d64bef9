"""Resolving names: local paths, and a hub that is played by a function raising the library's own errors."""

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import huggingface_hub
import pytest
from huggingface_hub import errors

from stepflash.errors import WeightsError
from stepflash.weights import hub
from stepflash.weights.hub import resolve_model

HUB_ID = "stepfun-ai/Step-3.5-Flash"
Hub = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def fake_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hub:
    """Install a hub whose snapshot holds `files`, or that raises `error`; returns the list of its calls."""

    def install(*files: str, error: Exception | None = None) -> list[dict[str, Any]]:
        calls: list[dict[str, Any]] = []
        folder = tmp_path / "snapshot"

        def snapshot_download(repo_id: str, **options: Any) -> str:
            calls.append({"repo_id": repo_id, **options})
            if error is not None:
                raise error
            for name in files:
                path = folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
            return str(folder)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        return calls

    return install


def response(status: int) -> httpx.Response:
    return httpx.Response(status, request=httpx.Request("GET", "https://hub.invalid/api"))


def test_local_folder_and_file(tmp_path: Path, fake_hub: Hub) -> None:
    calls = fake_hub()
    (tmp_path / "config.json").touch()
    gguf = tmp_path / "model.gguf"
    gguf.touch()
    assert resolve_model(tmp_path) == tmp_path
    assert resolve_model(str(gguf)) == gguf
    assert calls == []


def test_folder_with_one_gguf_model_means_that_model(tmp_path: Path) -> None:
    parts = [tmp_path / f"step-0000{i}-of-00002.gguf" for i in (1, 2)]
    for part in parts:
        part.touch()
    assert resolve_model(tmp_path) == parts[0]
    (tmp_path / "other.gguf").touch()
    with pytest.raises(WeightsError, match="holds 2 GGUF models; name one"):
        resolve_model(tmp_path)


def test_nano_is_the_folder_in_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import stepflash

    assert Path(stepflash.__file__).resolve().parent / "nano" / "weights" == hub.NANO_FOLDER
    monkeypatch.setattr(hub, "NANO_FOLDER", tmp_path)
    assert resolve_model("nano") == tmp_path
    monkeypatch.setattr(hub, "NANO_FOLDER", tmp_path / "absent")
    with pytest.raises(WeightsError, match="not part of this installation"):
        resolve_model("nano")


def test_hub_id_downloads_what_is_needed_at_the_revision(fake_hub: Hub) -> None:
    calls = fake_hub("config.json", "model-00001.safetensors")
    folder = resolve_model(HUB_ID, revision="v2")
    assert (folder / "config.json").exists()
    assert calls == [
        {"repo_id": HUB_ID, "revision": "v2", "allow_patterns": ["*.json", "*.jinja", "*.safetensors"]}
    ]


@pytest.mark.parametrize(
    ("file", "pattern"),
    [
        ("step3.5_flash_Q4_K_S.gguf", "step3.5_flash_Q4_K_S.gguf"),
        ("Q4_K_S/step-00001-of-00012.gguf", "Q4_K_S/step-*-of-00012.gguf"),
    ],
)
def test_gguf_file_on_the_hub(fake_hub: Hub, file: str, pattern: str) -> None:
    calls = fake_hub(file)
    assert resolve_model(f"{HUB_ID}-GGUF/{file}").as_posix().endswith(file)
    assert calls[0]["repo_id"] == f"{HUB_ID}-GGUF"
    assert calls[0]["allow_patterns"] == [pattern]


def test_repository_without_usable_weights(fake_hub: Hub) -> None:
    fake_hub("config.json")
    with pytest.raises(WeightsError, match=r"has no safetensors; for a GGUF name its file"):
        resolve_model(HUB_ID)
    with pytest.raises(WeightsError, match=r"has no file 'x.gguf'"):
        resolve_model(HUB_ID + "/x.gguf")


@pytest.mark.parametrize(
    "name", ["nanoo", "./absent", "/absent/folder", "a/b/c", "absent.gguf", "", "a/b.gguf"]
)
def test_a_name_that_is_nothing_tells_the_possibilities(fake_hub: Hub, name: str, monkeypatch: Any) -> None:
    calls = fake_hub()
    if name == "":
        name = " "
    with pytest.raises(WeightsError) as caught:
        resolve_model(name)
    for word in ("folder", ".gguf file", "hub id", "'nano'", repr(name)):
        assert word in str(caught.value)
    assert calls == []


def full_disk_behind_another_error() -> Exception:
    error = RuntimeError("xet stream failed")
    error.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    wrapped = errors.XetDownloadError("could not write")
    wrapped.__cause__ = error
    return wrapped


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device"),
            "the disk is full; free some space or set HF_HOME",
        ),
        (full_disk_behind_another_error(), "the disk is full; free some space or set HF_HOME"),
        (errors.RepositoryNotFoundError("404", response=response(404)), "nor a hub id that exists"),
        (errors.GatedRepoError("403", response=response(403)), "access is restricted; accept its terms at"),
        (errors.RevisionNotFoundError("404", response=response(404)), "has no revision 'v9'"),
        (
            errors.LocalEntryNotFoundError("no snapshot"),
            "not in the local cache, and the hub cannot be reached",
        ),
        (errors.OfflineModeIsEnabled("offline"), "not in the local cache, and the hub cannot be reached"),
        (httpx.ConnectError("connection refused\nmore"), "download failed: connection refused; run the same"),
        (
            errors.HfHubHTTPError("502 bad gateway", response=response(502)),
            "download failed: 502 bad gateway",
        ),
        (PermissionError(errno.EACCES, "Permission denied"), "Permission denied"),
    ],
)
def test_each_failure_of_a_download_is_one_line(fake_hub: Hub, error: Exception, message: str) -> None:
    fake_hub(error=error)
    with pytest.raises(WeightsError) as caught:
        resolve_model(HUB_ID, revision="v9")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert HUB_ID in str(caught.value)


def test_offline_mode_of_the_library_itself(tmp_path: Path) -> None:
    """No fake: a fresh process with HF_HUB_OFFLINE and an empty cache."""
    import os
    import subprocess
    import sys

    code = f"from stepflash.weights.hub import resolve_model; resolve_model({HUB_ID!r})"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60
    )
    assert "WeightsError: stepfun-ai/Step-3.5-Flash: not in the local cache" in result.stderr
