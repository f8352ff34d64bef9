"""A session over a model on this machine: everything from a name to something that answers."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from stepflash.assistant.session import Session
from stepflash.chat.template import ChatTemplate
from stepflash.chat.tokenizer import Tokenizer
from stepflash.engine.engine import Engine
from stepflash.engine.llm import LLM
from stepflash.engine.request import SamplingParams
from stepflash.errors import ConfigError, RequestError
from stepflash.kernels import build
from stepflash.model.config import ModelConfig
from stepflash.settings import EngineSettings
from stepflash.weights.hub import resolve_model

# Without native kernels plain bf16 is slow on many processors; models up to this size then run in float32.
FLOAT32_PARAMETERS = 500_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalModel:
    """A running model: how to talk to it, what to call it, and how its maker samples from it."""

    session: Session
    name: str
    sampling: SamplingParams


@contextlib.contextmanager
def open_session(model: str, settings: EngineSettings) -> Iterator[LocalModel]:
    """Load a model and run its engine until the block ends.

    Raises:
        WeightsError, ConfigError: the model or a setting cannot be used; before anything large is read if
            tokenizer, template or configuration are at fault.
    """
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    path = resolve_model(model)
    config = ModelConfig.from_pretrained(path)
    tokenizer = Tokenizer.from_pretrained(path)
    tokenizer.check_vocab(config.vocab_size)
    template = ChatTemplate.from_pretrained(path, tokenizer)
    sampling = default_sampling(path)
    dtype = settings.dtype
    if dtype is None:
        is_small = config.num_parameters(trunk=False) <= FLOAT32_PARAMETERS
        is_slow = settings.device == "cpu" and not build.load()
        dtype = "float32" if is_small and is_slow else "bfloat16"
    options: dict[str, Any] = {
        "max_num_seqs": settings.max_num_seqs,
        "kv_cache_bytes": settings.kv_cache_bytes,
        "kv_dtype": settings.kv_dtype,
        "max_model_len": settings.max_model_len,
        "prefix_cache_path": settings.prefix_cache,
    }
    llm = LLM(
        path,
        dtype=dtype,
        device=settings.device,
        quantization=settings.quantization,
        tokenizer=tokenizer,
        chat_template=template,
        **{name: value for name, value in options.items() if value is not None},
    )
    if settings.device != "cpu":
        with Console(stderr=True).status("compiling kernels"):
            llm.warm_up()
    with Engine(llm.core) as engine:
        session = Session(engine, tokenizer, template, max_context_tokens=llm.core.max_model_len)
        yield LocalModel(session=session, name=model_name(model, path), sampling=sampling)


def default_sampling(path: Path) -> SamplingParams:
    """How the model's generation_config.json says to sample; `do_sample` false means greedy.

    Raises:
        ConfigError: the file holds values that cannot be used.
    """
    file = path / "generation_config.json"
    if not file.is_file():
        return SamplingParams(max_tokens=None)
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file}: not valid JSON ({error})") from None
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    given = {name: values[name] for name in names if values.get(name) is not None}
    if values.get("do_sample") is False:
        given["temperature"] = 0.0
    try:
        return SamplingParams(max_tokens=None, **given)
    except (RequestError, TypeError) as error:
        raise ConfigError(f"{file}: {error}") from None


def model_name(model: str, path: Path) -> str:
    """What clients call it: what the user typed, or the name of the folder or file it is."""
    return path.resolve().name if Path(model).expanduser().exists() else model
