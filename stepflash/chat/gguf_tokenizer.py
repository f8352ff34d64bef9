"""The tokenizer inside a GGUF file, as a `tokenizers` object.

A GGUF file carries the vocabulary, the merges and the type of each token, but only the *name* of the
pre-tokenizer; its regular expressions are knowledge that every reader must bring. Ids are those of the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

from stepflash.errors import ConfigError

_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5  # values of tokenizer.ggml.token_type

_WHITESPACE = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"

# Regular expressions applied one after the other, each splitting what the earlier ones left. Step-3.5-Flash is
# deepseek-v3; the others are for models converted with other tokenizers. Source: the published tokenizer.json
# files of DeepSeek-V3, Llama 3 and Qwen2.
PRE_TOKENIZERS: dict[str, tuple[str, ...]] = {
    "deepseek-v3": (
        r"\p{N}{1,3}",
        "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
        r"| ?[\p{P}\p{S}]+[\r\n]*|" + _WHITESPACE,
    ),
    "llama-bpe": (
        _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _WHITESPACE,
    ),
    "qwen2": (_CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _WHITESPACE,),
    "gpt-2": (r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",),
}


def backend_from_gguf(metadata: Mapping[str, Any], *, source: str) -> tokenizers.Tokenizer:
    """Build the byte-level BPE that `tokenizer.ggml.*` describes; `source` names the file in errors.

    Tokens of type "unused" are padding rows of the embedding and get no entry.

    Raises:
        ConfigError: the metadata lacks a tokenizer, or has one of another kind.
    """
    model = metadata.get("tokenizer.ggml.model")
    if model != "gpt2":
        raise ConfigError(
            f"{source}: tokenizer.ggml.model is {model!r}; only 'gpt2' (byte-level BPE) is supported"
        )
    name = str(metadata.get("tokenizer.ggml.pre", "gpt-2"))
    if name not in PRE_TOKENIZERS:
        raise ConfigError(
            f"{source}: unknown pre-tokenizer tokenizer.ggml.pre={name!r}; known: {', '.join(PRE_TOKENIZERS)}"
        )
    tokens = metadata.get("tokenizer.ggml.tokens")
    merges = metadata.get("tokenizer.ggml.merges")
    if tokens is None or merges is None:
        raise ConfigError(
            f"{source}: tokenizer.ggml.tokens or tokenizer.ggml.merges is missing; convert it again"
        )
    types = metadata.get("tokenizer.ggml.token_type")
    types = [1] * len(tokens) if types is None else [int(value) for value in types]
    if len(types) != len(tokens):
        raise ConfigError(f"{source}: {len(types)} token types for {len(tokens)} tokens; convert it again")

    vocabulary = {token: index for index, token in enumerate(tokens) if types[index] != _UNUSED}
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    try:
        backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    except Exception as error:  # the library raises bare Exception: a merge of tokens that do not exist
        raise ConfigError(f"{source}: vocabulary and merges do not fit together ({error})") from error
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PRE_TOKENIZERS[name]),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    for kind in (_CONTROL, _USER_DEFINED):
        backend.add_tokens(
            [
                AddedToken(token, special=kind == _CONTROL, normalized=False)
                for token, token_type in zip(tokens, types, strict=True)
                if token_type == kind
            ]
        )
    return backend


def special_ids_from_gguf(metadata: Mapping[str, Any]) -> tuple[int | None, list[int]]:
    """The bos id, or None, and the ids that end a turn or a text."""
    bos = metadata.get("tokenizer.ggml.bos_token_id")
    eos = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    return (None if bos is None else int(bos)), [int(token_id) for token_id in eos if token_id is not None]
