"""A session over a vLLM or SGLang server: tokenizer, template and configuration from here, tokens from there."""

from __future__ import annotations

from pathlib import Path

from stepflash.assistant.local import LocalModel, default_sampling, model_name
from stepflash.assistant.session import Session
from stepflash.chat.template import ChatTemplate
from stepflash.chat.tokenizer import Tokenizer
from stepflash.engine.remote import RemoteEngine
from stepflash.engine.upstream import Upstream, connect, tokenize
from stepflash.errors import ConfigError
from stepflash.model.config import ModelConfig
from stepflash.settings import EngineSettings
from stepflash.weights.hub import resolve_model

# Letters, digits, a word of another script and a symbol of four bytes: tokenizers that agree on this are the same.
PROBE = "The year 2026: naïve Übung, 北京 и Москва, 🙂\n\n<think>\n</think>"


def open_remote_session(
    model: str, url: str, settings: EngineSettings, *, api_key: str | None = None
) -> LocalModel:
    """Find the server and prepare to talk to it. Of `model` only the small files are read.

    Raises:
        ConfigError: nothing answers at the address, it serves another tokenizer than that of `model`, or a setting is
            one that only the server can have.
        WeightsError: `model` is not there.
    """
    for name in (
        "threads",
        "dtype",
        "quantization",
        "max_num_seqs",
        "kv_cache_gb",
        "kv_dtype",
        "prefix_cache",
    ):
        if getattr(settings, name) is not None:
            raise ConfigError(f"{name} belongs to the server behind --upstream; set it there")
    path = resolve_model(model, needs_weights=False)
    config = ModelConfig.from_pretrained(path)
    tokenizer = Tokenizer.from_pretrained(path)
    tokenizer.check_vocab(config.vocab_size)
    template = ChatTemplate.from_pretrained(path, tokenizer)
    upstream = connect(url, api_key)
    check_tokenizer(upstream, tokenizer, path)
    engine = RemoteEngine(upstream, eos_token_ids=tokenizer.eos_token_ids, vocab_size=tokenizer.vocab_size)
    limits = (config.max_position_embeddings, upstream.max_model_len, settings.max_model_len)
    max_context_tokens = min(limit for limit in limits if limit is not None)
    session = Session(engine, tokenizer, template, max_context_tokens=max_context_tokens)
    return LocalModel(session=session, name=model_name(model, path), sampling=default_sampling(path))


def check_tokenizer(upstream: Upstream, tokenizer: Tokenizer, path: Path) -> None:
    """
    Raises:
        ConfigError: the server's tokenizer is another one, so that its answers would be read wrongly.
    """
    theirs = tokenize(upstream, PROBE)
    if theirs is not None and theirs != tokenizer.encode(PROBE):
        raise ConfigError(
            f"--upstream {upstream.url}: serves {upstream.model!r}, whose tokenizer is not that of {path}; "
            "name the folder (or hub id) of the model that it serves as MODEL"
        )
