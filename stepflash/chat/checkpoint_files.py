"""The small JSON files beside a checkpoint's weights, read with errors that say what to do.

The tokenizer and the chat template both need them; neither should have its own idea of what a broken file
looks like.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from stepflash.errors import ConfigError, WeightsError


def is_gguf(path: Path) -> bool:
    """Whether `path` names one GGUF file rather than a folder."""
    return path.suffix.lower() == ".gguf"


def require_checkpoint(path: Path) -> None:
    """Raise WeightsError unless `path` is a folder or a GGUF file that exists."""
    if not path.exists():
        raise WeightsError(f"{path}: no such folder or file; give a checkpoint folder or a .gguf file")
    if path.is_file() and not is_gguf(path):
        raise WeightsError(f"{path}: not a checkpoint folder and not a .gguf file")


def read_text(path: Path) -> str:
    """The text of a UTF-8 file; ConfigError if it cannot be read as one."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path}: cannot be read as UTF-8 text ({error}); download the file again"
        ) from error


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`, empty when there is no such file; ConfigError when it is something else."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: not valid JSON ({error}); download the file again") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value
