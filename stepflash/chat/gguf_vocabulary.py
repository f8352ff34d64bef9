"""A checkpoint's tokenizer and chat template as GGUF metadata, and back as the files of a checkpoint folder.

`tokenizer.ggml.*` is what llama.cpp reads: tokens, their types, merges, and the name of a pre-tokenizer that it
knows. The name is found by trying: it is the one that cuts every probe text as the checkpoint's own does. Beside it
goes the whole tokenizer.json under `tokenizer.huggingface.json` (a standard key), from which stepflash rebuilds the
tokenizer exactly, also where no name fits.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from stepflash.chat.gguf_tokenizer import (
    CONTROL,
    HUGGING_FACE_JSON,
    NORMAL,
    PRE_TOKENIZERS,
    UNUSED,
    USER_DEFINED,
    split_sequence,
)
from stepflash.chat.template import ChatTemplate
from stepflash.chat.tokenizer import TURN_END_TEXT
from stepflash.chat.tokenizer import Tokenizer as CheckpointTokenizer
from stepflash.errors import ConfigError
from stepflash.gguf_file import TypedValue, read_gguf

FALLBACK_PRE_TOKENIZER = "deepseek-v3"  # that of the released model
_PROBES = (
    "It's 12345 o'clock, we'll pay $1,234.50 (or 99%)!  Don't\n\n\tdo   that...\r\n  ",
    "def f(x_1: int) -> str:\n    return f\"{x_1!r}\" + 'ABC'  # why?\n\n\n    pass\n",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002\u30ab\u30bf\u30ab\u30ca 123\u5e74 \uac00\ub098\ub2e4",
    "caf\u00e9 na\u00efve e\u0301 \u0391\u0392\u0393 \u0663\u0664 a\u00a0b \u2014 \u00abq\u00bb",
    "<b>a&amp;b</b> [1](http://x.y/z?q=1&r=2) \U0001f600\U0001f680 IT'S i'M 'll\n \n",
)  # fmt: skip


def pre_tokenizer_name(backend: Tokenizer) -> str | None:
    """llama.cpp's name of the pre-tokenizer that cuts text as this one does, or None."""
    own = backend.pre_tokenizer
    if own is None:
        return None
    for name, patterns in PRE_TOKENIZERS.items():
        candidate = split_sequence(patterns)
        if all(own.pre_tokenize_str(text) == candidate.pre_tokenize_str(text) for text in _PROBES):
            return name
    return None


def vocabulary_metadata(path: Path, vocab_size: int) -> dict[str, Any]:
    """`tokenizer.*` keys for `write_gguf`, of a checkpoint folder or another GGUF.

    Args:
        vocab_size: rows of the embedding; ids without a token become unused ones.
    Raises:
        WeightsError: there is no tokenizer.
        ConfigError: it is not a byte-level BPE, or has more tokens than the embedding has rows.
    """
    tokenizer = CheckpointTokenizer.from_pretrained(path)
    tokenizer.check_vocab(vocab_size)
    description = json.loads(tokenizer.backend.to_str())
    model = description["model"]
    if model.get("type") != "BPE" or description.get("normalizer"):
        raise ConfigError(f"{path}: only a byte-level BPE without normalizer can be written to a GGUF")
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [UNUSED] * vocab_size
    for token, index in model["vocab"].items():
        tokens[index], types[index] = token, NORMAL
    for added in description["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre_tokenizer_name(tokenizer.backend) or FALLBACK_PRE_TOKENIZER,
        "tokenizer.ggml.tokens": TypedValue("str", tokens),
        "tokenizer.ggml.token_type": TypedValue("i32", types),
        "tokenizer.ggml.merges": TypedValue("str", merges),
        "tokenizer.ggml.add_bos_token": False,  # the template writes it
        HUGGING_FACE_JSON: tokenizer.backend.to_str(),
    }
    metadata |= _special_ids(tokenizer)
    template = ChatTemplate.from_pretrained(path, tokenizer)
    for name, text in template.sources.items():
        metadata["tokenizer.chat_template" + ("" if name == "default" else f".{name}")] = text
    return metadata


def _special_ids(tokenizer: CheckpointTokenizer) -> dict[str, Any]:
    """bos, the three ends that llama.cpp has keys for, and all of them under a key of ours."""
    ids: dict[str, Any] = {}
    if tokenizer.bos_token_id is not None:
        ids["tokenizer.ggml.bos_token_id"] = tokenizer.bos_token_id
    ends = sorted(tokenizer.eos_token_ids)
    turn_end = tokenizer.token_id(TURN_END_TEXT)
    if turn_end in ends:
        ends.remove(turn_end)
        ends.insert(0, turn_end)
    for name, token_id in zip(("eos", "eot", "eom"), ends, strict=False):
        ids[f"tokenizer.ggml.{name}_token_id"] = token_id
    if ends:
        ids["stepflash.eos_token_ids"] = sorted(ends)
    return ids


def vocabulary_files(gguf: Path) -> dict[str, str]:
    """File name -> text: the tokenizer, its special tokens and the template of a GGUF, as a folder has them."""
    metadata = read_gguf(gguf).metadata
    tokenizer = CheckpointTokenizer.from_pretrained(gguf)
    template = ChatTemplate.from_pretrained(gguf, tokenizer)
    own = metadata.get(HUGGING_FACE_JSON)
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    if tokenizer.bos_token_id is not None:
        config["bos_token"] = tokenizer.decode([tokenizer.bos_token_id])
    eos = metadata.get("tokenizer.ggml.eos_token_id")
    if eos is not None:
        config["eos_token"] = tokenizer.decode([int(eos)])
    config |= {"add_bos_token": False, "clean_up_tokenization_spaces": False}
    others = [{"name": name, "template": text} for name, text in template.sources.items()]
    if len(others) > 1:
        config["chat_template"] = others
    generation = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": sorted(tokenizer.eos_token_ids)}
    files = {
        "tokenizer.json": own if isinstance(own, str) else tokenizer.backend.to_str(pretty=True),
        "tokenizer_config.json": json.dumps(config, indent=1, ensure_ascii=False) + "\n",
        "generation_config.json": json.dumps(generation, indent=1) + "\n",
    }
    if len(others) == 1:
        files["chat_template.jinja"] = others[0]["template"]
    return files
