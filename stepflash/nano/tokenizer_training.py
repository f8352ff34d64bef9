"""nano's tokenizer: a byte-level BPE of 2048 tokens, trained on generated documents and standard-library text.

Three choices make a small model's life easier. Digits are single tokens, so that a column of a sum is a token. Text
is cut so that a name has the same tokens wherever it stands (`Paris`, ` Paris`, `=Paris`), because only a few hundred
frequent words carry the space before them; copying a name is then copying tokens. And the fixed text around tool
definitions, which the prompt format repeats in every tool conversation, is a handful of tokens instead of hundreds.

The standard library's sources and documentation are under the PSF licence; they teach spellings, not facts.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from stepflash.chat.tokenizer import BOS_TEXT
from stepflash.nano.tasks import chat_facts, copying, pools, render, sample, tool_catalog
from stepflash.nano.tasks.rendering import tool_interface

VOCAB_SIZE = 2048
EOS_TEXT = "<\uff5cend\u2581of\u2581sentence\uff5c>"
PAD_TEXT = "<\uff5c\u2581pad\u2581\uff5c>"
SPECIAL_TOKENS = (BOS_TEXT, EOS_TEXT, PAD_TEXT, "<|im_start|>", "<|im_end|>")
# Single tokens that are part of the text: decoding keeps them even where special tokens are dropped.
TAG_TOKENS = (
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
    "<function=",
    "</function>",
    "<parameter=",
    "</parameter>",
)
# How tool definitions are usually written; other spellings fall back to smaller tokens.
SCHEMA_TOKENS = (
    '{"type": "function", "function": {"name": "',
    '", "description": "',
    '", "parameters": {"type": "object", "properties": {"',
    '": {"type": "string',
    '": {"type": "integer',
    '": {"type": "number',
    '": {"type": "boolean',
    '"}, "',
    '"}}, "required": ["',
    '"]}}}\n',
)
NUM_ATTACHED_WORDS = 300
NUM_DOCUMENTS = 12_000
LIBRARY_MODULES = (
    "argparse",
    "ast",
    "dataclasses",
    "inspect",
    "json.decoder",
    "pathlib",
    "random",
    "textwrap",
    "typing",
)
_LIBRARY_CHARS = 150_000
_WORD = re.compile("[A-Za-z]{3,}")
_RARE = 12  # occurrences in NUM_DOCUMENTS documents below which a word counts as made up


def train_tokenizer(seed: int = 0) -> Tokenizer:
    """Train it; the same seed and Python version give the same tokenizer. Takes some ten seconds."""
    documents = ["".join(text for text, _ in render(sample(rng, progress))) for rng, progress in _draws(seed)]
    fixed = (*SPECIAL_TOKENS, *TAG_TOKENS, *SCHEMA_TOKENS, *tool_interface())
    splitter = re.compile("|".join(re.escape(text) for text in sorted(fixed, key=len, reverse=True)))
    texts = [part for document in documents for part in splitter.split(document) if part]
    attached = _attached_words(texts)

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_pattern(attached)), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(fixed) + len(SPECIAL_TOKENS),
        special_tokens=[AddedToken(text, special=True, normalized=False) for text in SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*_without_rare_words(texts), *_library_texts()], trainer)
    tokenizer.add_tokens(
        [AddedToken(text, special=False, normalized=False) for text in fixed[len(SPECIAL_TOKENS) :]]
    )
    return tokenizer


def write_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Write the files that a Hugging Face checkpoint folder has for its tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS_TEXT,
        "eos_token": "<|im_end|>",
        "pad_token": PAD_TEXT,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
    }
    ids = {text: tokenizer.token_to_id(text) for text in SPECIAL_TOKENS}
    generation = {
        "bos_token_id": ids[BOS_TEXT],
        "eos_token_id": [ids[EOS_TEXT], ids[PAD_TEXT], ids["<|im_end|>"]],
        "pad_token_id": ids[PAD_TEXT],
        "do_sample": False,
    }
    for name, value in (("tokenizer_config.json", config), ("generation_config.json", generation)):
        (folder / name).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _draws(seed: int) -> Iterator[tuple[Random, float]]:
    rng = Random(f"tokenizer {seed}")
    for index in range(NUM_DOCUMENTS):
        yield rng, index / NUM_DOCUMENTS


def _pattern(attached: list[str]) -> str:
    """Cuts text before BPE: digits singly, frequent words with their space, all other words without."""
    word = f"(?:{'|'.join(attached)})(?![\\p{{L}}_])"
    return (
        r"\p{N}"
        rf"| {word}"
        r"|_?\p{L}+"
        rf"| ?[^\s\p{{L}}\p{{N}}]+(?: (?!{word})(?=[\p{{L}}\p{{N}}]))?"
        r"|\s*[\r\n]+"
        r"|\s+(?=\S)|\s+"
    )


def _attached_words(texts: list[str]) -> list[str]:
    """Single letters, and the most frequent words that are not material to copy; the longest first."""
    copied = {word.lower() for word in _copied_words()}
    counts = Counter(word for text in texts for word in re.findall(r"(?<= )[a-z]{2,}(?![\w.])", text))
    frequent = [
        word for word, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0])) if word not in copied
    ]
    letters = list("abcdefghijklmnopqrstuvwxyz")
    return sorted(frequent[:NUM_ATTACHED_WORDS] + letters, key=lambda word: (-len(word), word))


def _without_rare_words(texts: list[str]) -> Iterator[str]:
    """Leave made-up words out, so that no merges are spent on them; real ones occur often in generated text."""
    counts = Counter(word for text in texts for word in _WORD.findall(text))
    for text in texts:
        yield _WORD.sub(lambda match: match[0] if counts[match[0]] >= _RARE else "", text)


def _copied_words() -> Iterator[str]:
    """Words that answers copy out of prompts, and that hence stand with and without a space before them."""
    yield from (*pools.SPELLING, *pools.FRUITS, *pools.ANIMALS, *pools.COLOURS, *pools.STEMS, *pools.FOLDERS)
    yield from (*copying.KEYS, *tool_catalog.COPIED_WORDS)
    for table in (chat_facts.CAPITALS, chat_facts.COLOUR_OF, chat_facts.SOUNDS):
        yield from (word for pair in table.items() for word in pair)


def _library_texts() -> Iterator[str]:
    """Source of some standard-library modules and the language help, for spellings beyond our own templates."""
    from pydoc_data import topics

    yield from list(topics.topics.values())[:20]
    for name in LIBRARY_MODULES:
        spec = importlib.util.find_spec(name)
        if spec and spec.origin and spec.origin.endswith(".py"):
            yield Path(spec.origin).read_text(encoding="utf-8")[: _LIBRARY_CHARS // len(LIBRARY_MODULES)]
