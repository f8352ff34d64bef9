"""The tokenizer inside a GGUF file, as a `tokenizers` object.

A GGUF file carries the vocabulary, the merges and the type of each token, but only the *name* of the
pre-tokenizer; its regular expressions are knowledge that every reader must bring. Ids are those of the file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

from stepflash.errors import ConfigError

_T = TypeVar("_T")
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # values of tokenizer.ggml.token_type
HUGGING_FACE_JSON = (
    "tokenizer.huggingface.json"  # a whole tokenizer.json; rare, but files of stepflash have it
)

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

    Tokens of type "unused" are padding rows of the embedding and get no entry. A tokenizer.json in the metadata
    says more than the rest and is taken instead.

    Raises:
        ConfigError: the metadata lacks a tokenizer, or has one of another kind.
    """
    whole = metadata.get(HUGGING_FACE_JSON)
    if isinstance(whole, str):
        return _backend_from_json(whole, source)
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
    tokens, merges = _list_of(str, tokens, "tokens", source), _list_of(str, merges, "merges", source)
    types = metadata.get("tokenizer.ggml.token_type")
    types = [NORMAL] * len(tokens) if types is None else _list_of(int, types, "token_type", source)
    if len(types) != len(tokens):
        raise ConfigError(f"{source}: {len(types)} token types for {len(tokens)} tokens; convert it again")

    vocabulary = {token: index for index, token in enumerate(tokens) if types[index] != UNUSED}
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    try:
        backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    except Exception as error:  # the library raises bare Exception: a merge of tokens that do not exist
        raise ConfigError(f"{source}: vocabulary and merges do not fit together ({error})") from error
    backend.pre_tokenizer = split_sequence(PRE_TOKENIZERS[name])
    backend.decoder = decoders.ByteLevel()
    for kind in (CONTROL, USER_DEFINED):
        backend.add_tokens(
            [
                AddedToken(token, special=kind == CONTROL, normalized=False)
                for token, token_type in zip(tokens, types, strict=True)
                if token_type == kind
            ]
        )
    return backend


def _list_of(kind: type[_T], values: object, key: str, source: str) -> list[_T]:
    if not isinstance(values, list) or not all(type(value) is kind for value in values):
        raise ConfigError(
            f"{source}: tokenizer.ggml.{key} is not a list of {kind.__name__}; convert it again"
        )
    return values


def split_sequence(patterns: Iterable[str]) -> pre_tokenizers.PreTokenizer:
    """The pre-tokenizer that cuts by these patterns, one after the other, and maps bytes to characters."""
    return pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _backend_from_json(text: str, source: str) -> tokenizers.Tokenizer:
    try:
        backend = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception for every malformed description
        raise ConfigError(f"{source}: {HUGGING_FACE_JSON} is damaged ({error}); convert it again") from error
    if '"ByteLevel"' not in json.dumps(json.loads(text).get("decoder")):
        raise ConfigError(
            f"{source}: {HUGGING_FACE_JSON} is not a byte-level tokenizer, the only kind supported"
        )
    return backend


def special_ids_from_gguf(metadata: Mapping[str, Any]) -> tuple[int | None, list[int]]:
    """The bos id, or None, and the ids that end a turn or a text; ConfigError if they are none."""
    bos = metadata.get("tokenizer.ggml.bos_token_id")
    ends = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    more = metadata.get("stepflash.eos_token_ids", [])
    found = [
        token_id
        for token_id in (*ends, *(more if isinstance(more, list) else [more]))
        if token_id is not None
    ]
    ids = _list_of(int, [*found, 0 if bos is None else bos], "*_token_id", "the GGUF")
    return (None if bos is None else ids[-1]), ids[:-1]
