"""stepflash: the whole system around Step-3.5-Flash.

The public names are imported when they are first used, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stepflash.engine.llm import LLM, RequestOutput
    from stepflash.engine.request import SamplingParams
    from stepflash.model.config import ModelConfig
    from stepflash.weights.load import load_model

# GNU OpenMP's threads spin for some 5 ms after an operation that torch runs on several of them, and take the cores
# from the kernels' own; with this for half a millisecond, enough for operations that follow one another. Read when
# torch is loaded; who has set either is heard.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "30000")

__version__ = "0.1.0"
__all__ = ["LLM", "ModelConfig", "RequestOutput", "SamplingParams", "__version__", "load_model"]

_HOMES = {
    "LLM": "stepflash.engine.llm",
    "ModelConfig": "stepflash.model.config",
    "RequestOutput": "stepflash.engine.llm",
    "SamplingParams": "stepflash.engine.request",
    "load_model": "stepflash.weights.load",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'stepflash' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
