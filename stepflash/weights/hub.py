"""From what the user typed to a path: a folder, a .gguf file, the built-in nano, or a model on the Hugging Face hub.

Downloads resume, show progress and are cached by `huggingface_hub`, which also reads HF_HOME, HF_TOKEN and
HF_HUB_OFFLINE. Everything that can go wrong on the way becomes one line.
"""

import errno
import re
from pathlib import Path

from stepflash.errors import WeightsError

NANO = "nano"
NANO_FOLDER = Path(__file__).resolve().parents[1] / "nano" / "weights"
SMALL_FILES = ["*.json", "*.jinja"]
NEEDED_FILES = [*SMALL_FILES, "*.safetensors"]
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_GGUF = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)/(?P<file>.+\.gguf)")
_FIRST_PART = re.compile(r"(?P<prefix>.+)-00001-of-(?P<count>\d{5})\.gguf")


def resolve_model(name: str | Path, revision: str | None = None, *, needs_weights: bool = True) -> Path:
    """The folder or .gguf file that `name` stands for, downloaded if it is not on this machine yet.

    Args:
        needs_weights: False downloads of a hub id only what tells how to talk to the model.
        name: a folder, a .gguf file, "nano", a hub id `owner/name`, or `owner/name/FILE.gguf` on the hub.
        revision: branch, tag or commit of a hub id; the default branch otherwise.
    Raises:
        WeightsError: it is none of these, or the download failed.
    """
    path = Path(name).expanduser()
    text = str(name)
    if text == NANO and not path.exists():
        if not NANO_FOLDER.is_dir():
            raise WeightsError(f"{NANO_FOLDER}: the nano model is not part of this installation")
        return NANO_FOLDER
    if path.is_dir():
        return _model_in(path)
    if path.is_file() and path.suffix == ".gguf":
        return path
    if not path.exists() and not text.startswith((".", "/", "~", "\\")):
        if match := _HUB_GGUF.fullmatch(text):
            return _download(match["repo"], revision, match["file"])
        if _HUB_ID.fullmatch(text) and path.suffix != ".gguf":
            return _download(text, revision, None, needs_weights)
    raise WeightsError(
        f"{text!r} is neither a folder, nor a .gguf file, nor a hub id such as stepfun-ai/Step-3.5-Flash "
        "(nor the built-in 'nano')"
    )


def _model_in(folder: Path) -> Path:
    """The folder itself, or the only GGUF model in a folder that holds no safetensors."""
    if (folder / "config.json").exists() or any(folder.glob("*.safetensors")):
        return folder
    models = [
        path
        for path in sorted(folder.glob("*.gguf"))
        if "-of-" not in path.name or _FIRST_PART.fullmatch(path.name)
    ]
    if len(models) > 1:
        raise WeightsError(f"{folder}: holds {len(models)} GGUF models; name one, such as {models[0]}")
    return models[0] if models else folder


def _download(repo: str, revision: str | None, gguf_file: str | None, needs_weights: bool = True) -> Path:
    import huggingface_hub
    from httpx import HTTPError
    from huggingface_hub import errors

    patterns = NEEDED_FILES if needs_weights else SMALL_FILES
    if gguf_file is not None:
        split = _FIRST_PART.fullmatch(gguf_file)
        patterns = [f"{split['prefix']}-*-of-{split['count']}.gguf" if split else gguf_file]
    at = f"{repo} at revision {revision}" if revision else repo
    try:
        folder = Path(huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=patterns))
    except errors.GatedRepoError as error:
        raise WeightsError(
            f"{repo}: access is restricted; accept its terms at https://huggingface.co/{repo} and run `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise WeightsError(
            f"{repo!r} is neither a folder, nor a .gguf file, nor a hub id that exists (or it is private: run "
            "`hf auth login`)"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise WeightsError(f"{repo}: has no revision {revision!r}") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise WeightsError(
            f"{at}: not in the local cache, and the hub cannot be reached (no connection, or HF_HUB_OFFLINE is set)"
        ) from error
    except (OSError, ValueError, HTTPError, errors.XetDownloadError, errors.EntryNotFoundError) as error:
        if _is_disk_full(error):
            raise WeightsError(
                f"{at}: the disk is full; free some space or set HF_HOME to a larger disk, then run the same "
                "command again: it resumes"
            ) from error
        raise WeightsError(
            f"{at}: download failed: {_first_line(error)}; run the same command again: it resumes"
        ) from error
    if gguf_file is not None:
        if not (folder / gguf_file).is_file():
            raise WeightsError(f"{at}: has no file {gguf_file!r}")
        return folder / gguf_file
    if needs_weights and not any(folder.glob("*.safetensors")):
        raise WeightsError(f"{at}: has no safetensors; for a GGUF name its file: {repo}/FILE.gguf")
    return folder


def _is_disk_full(error: BaseException | None) -> bool:
    while error is not None:
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
