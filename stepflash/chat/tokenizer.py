"""Text to token ids and back, for any byte-level BPE checkpoint.

Encoding is the `tokenizers` library. Decoding is ours, because it must be incremental: every token of a
byte-level vocabulary is a fixed string of bytes, so a stream of ids is a stream of bytes and one incremental
UTF-8 decoder turns it into text. Hence the invariant: the pieces that a `Detokenizer` returns join to exactly
`Tokenizer.decode` of all ids, however the ids were grouped, and no piece ends inside a character.

Special ids are never hard-coded: they are looked up by their text (`<|im_end|>`, `</think>`) or read from the
checkpoint's own files.
"""

from __future__ import annotations

import codecs
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from stepflash.chat.checkpoint_files import is_gguf, read_json_object, require_checkpoint
from stepflash.chat.gguf_tokenizer import backend_from_gguf, special_ids_from_gguf
from stepflash.errors import ConfigError, PromptTooLong, WeightsError
from stepflash.gguf_file import read_gguf

BOS_TEXT = "<\uff5cbegin\u2581of\u2581sentence\uff5c>"  # the released model's bos, id 0
TURN_END_TEXT = "<|im_end|>"

# The library needs hundreds of bytes for each token while it encodes, so long texts are counted in pieces. For a
# limit of tokens a text is long if it has more characters than so many for each.
PIECE_CHARS = 1 << 16
LONG_TEXT_CHARS = 1 << 20
CHARS_PER_TOKEN = 8

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # as long in UTF-8 as its replacement: 3 bytes


class Tokenizer:
    """A checkpoint's tokenizer with its special tokens.

    Attributes:
        vocab_size: one more than the largest id that has a token; ids from here on (padded embedding rows)
            must never be sampled. `missing_token_ids` are the holes below it, normally none.
        bos_token_id: None when the checkpoint names none.
        eos_token_ids: every id that ends a turn: those of generation_config.json, config.json and
            tokenizer_config.json, and that of `<|im_end|>`.
        think_start_id, think_end_id: ids of `<think>` and `</think>` where they are single tokens.
        special_tokens: texts by the names that chat templates use ("bos_token", "eos_token", ...).
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos_token_id: int | None = None,
        eos_token_ids: Iterable[int] = (),
        special_tokens: Mapping[str, str] | None = None,
    ) -> None:
        self.backend = backend
        self._ids: dict[str, int] = backend.get_vocab(with_added_tokens=True)
        added = {token_id: token.content for token_id, token in backend.get_added_tokens_decoder().items()}
        self._bytes = _token_bytes(self._ids, added)
        self.vocab_size = max(self._bytes, default=-1) + 1
        self.missing_token_ids = frozenset(range(self.vocab_size)) - self._bytes.keys()
        self.bos_token_id = bos_token_id if bos_token_id in self._bytes else None
        turn_end = self._ids.get(TURN_END_TEXT)
        candidates = {*eos_token_ids} if turn_end is None else {*eos_token_ids, turn_end}
        self.eos_token_ids = frozenset(candidates & self._bytes.keys())
        self.think_start_id = self._ids.get("<think>")
        self.think_end_id = self._ids.get("</think>")
        self.special_tokens = dict(special_tokens or {})
        if self.bos_token_id is not None:
            self.special_tokens.setdefault("bos_token", self.decode([self.bos_token_id]))

    @classmethod
    def from_pretrained(cls, path: str | Path) -> Tokenizer:
        """Load the tokenizer of a checkpoint folder or of a `.gguf` file.

        Raises:
            WeightsError: the path or its tokenizer.json does not exist.
            ConfigError: a file is damaged, or describes a tokenizer that is not byte-level BPE.
        """
        path = Path(path)
        require_checkpoint(path)
        return cls._from_gguf(path) if is_gguf(path) else cls._from_folder(path)

    @classmethod
    def _from_folder(cls, folder: Path) -> Tokenizer:
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise WeightsError(
                f"{folder}: tokenizer.json is missing; download it from the model's repository into this folder"
            )
        backend = _load_backend(file)
        special_tokens = {
            name: text
            for name, value in read_json_object(folder / "tokenizer_config.json").items()
            if name.endswith("_token") and (text := _token_text(value)) is not None
        }
        configs = [read_json_object(folder / name) for name in ("generation_config.json", "config.json")]
        by_text = {name: backend.token_to_id(text) for name, text in special_tokens.items()}
        bos_ids = [by_text.get("bos_token"), *(config.get("bos_token_id") for config in configs)]
        bos_ids.append(backend.token_to_id(BOS_TEXT))
        eos_ids = [by_text.get("eos_token")]
        for config in configs:
            value = config.get("eos_token_id")
            eos_ids.extend(value if isinstance(value, list) else [value])
        return cls(
            backend,
            bos_token_id=next((token_id for token_id in bos_ids if token_id is not None), None),
            eos_token_ids=[token_id for token_id in eos_ids if token_id is not None],
            special_tokens=special_tokens,
        )

    @classmethod
    def _from_gguf(cls, path: Path) -> Tokenizer:
        metadata = read_gguf(path).metadata
        bos_token_id, eos_token_ids = special_ids_from_gguf(metadata)
        return cls(
            backend_from_gguf(metadata, source=str(path)),
            bos_token_id=bos_token_id,
            eos_token_ids=eos_token_ids,
        )

    def token_id(self, text: str) -> int | None:
        """The id of the token whose text is exactly `text`, or None."""
        return self._ids.get(text)

    def encode(self, text: str, *, limit: int | None = None) -> list[int]:
        """Token ids of `text`. Special tokens written in the text become their ids; no bos is added.

        Lone surrogates, which JSON can carry and UTF-8 cannot, count as U+FFFD.

        Raises:
            PromptTooLong: the text is long and has far more than `limit` tokens, of which not all were counted.
        """
        if limit is not None and len(text) > CHARS_PER_TOKEN * limit:
            num_tokens = 0
            for piece in _pieces(text):
                num_tokens += len(self.encode(piece))
                # A cut may add some tokens to those of the whole.
                if num_tokens > limit + limit // 8 + 1024:
                    raise PromptTooLong(num_tokens, limit)
        text = _LONE_SURROGATE.sub("\ufffd", text)
        # A batch of one, because other threads run meanwhile; they wait for `backend.encode`.
        (encoding,) = self.backend.encode_batch_fast([text], add_special_tokens=False)
        ids: list[int] = encoding.ids
        return ids

    def count(self, text: str) -> int:
        """How many tokens `text` has. A long one is counted in pieces, perhaps some tokens too many for each."""
        if len(text) <= LONG_TEXT_CHARS:
            return len(self.encode(text))
        return sum(len(self.encode(piece)) for piece in _pieces(text))

    def encode_with_cuts(
        self, text: str, cut_points: Sequence[int], *, limit: int | None = None
    ) -> tuple[list[int], tuple[int, ...]]:
        """Encode `text` and translate its character offsets `cut_points` into token counts.

        A cut point that falls inside a token is dropped: no token prefix ends there. Raises what `encode` raises.
        """
        token_ids = self.encode(text, limit=limit)
        lengths = [0, *itertools.accumulate(len(self._bytes[token_id]) for token_id in token_ids)]
        num_tokens_at = {num_bytes: num_tokens for num_tokens, num_bytes in enumerate(lengths)}
        cuts = []
        num_chars = num_bytes = 0
        for cut in sorted(set(cut_points)):
            num_bytes += len(text[num_chars:cut].encode("utf-8", "surrogatepass"))
            num_chars = cut
            if num_bytes in num_tokens_at:
                cuts.append(num_tokens_at[num_bytes])
        return token_ids, tuple(cuts)

    def decode(self, token_ids: Iterable[int]) -> str:
        """Text of `token_ids`, special tokens included. Ids without a token give nothing."""
        return b"".join(self._bytes.get(token_id, b"") for token_id in token_ids).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for; empty for ids without a token."""
        return self._bytes.get(token_id, b"")

    def detokenizer(self, *, hide_eos: bool = False) -> Detokenizer:
        """A fresh incremental decoder; `hide_eos` leaves the end-of-turn tokens out of the text."""
        return Detokenizer(self, hidden=self.eos_token_ids if hide_eos else frozenset())

    def check_vocab(self, config_vocab_size: int) -> None:
        """Raise ConfigError unless every token has a row in an embedding of `config_vocab_size` rows."""
        if self.vocab_size > config_vocab_size:
            raise ConfigError(
                f"the tokenizer has {self.vocab_size} tokens but config.json says vocab_size={config_vocab_size}; "
                "tokenizer.json and config.json belong to different models"
            )


def _pieces(text: str) -> Iterator[str]:
    return (text[begin : begin + PIECE_CHARS] for begin in range(0, len(text), PIECE_CHARS))


class Detokenizer:
    """Turns a growing list of token ids into text that can be shown at once."""

    def __init__(self, tokenizer: Tokenizer, hidden: frozenset[int] = frozenset()) -> None:
        self._tokenizer = tokenizer
        self._hidden = hidden
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_ids: Iterable[int]) -> str:
        """The text that these ids complete; the bytes of an unfinished character wait for the next call."""
        token_bytes, hidden = self._tokenizer.token_bytes, self._hidden
        return self._decoder.decode(b"".join([token_bytes(i) for i in token_ids if i not in hidden]))

    def flush(self) -> str:
        """What is left at the end: U+FFFD if the ids stopped inside a character, else nothing."""
        return self._decoder.decode(b"", final=True)


def _load_backend(file: Path) -> tokenizers.Tokenizer:
    description = read_json_object(file)
    decoder = json.dumps(description.get("decoder"))
    if '"ByteLevel"' not in decoder:
        raise ConfigError(
            f"{file}: not a byte-level tokenizer (decoder: {decoder}); stepflash supports only those"
        )
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(description))
    except Exception as error:  # the library raises bare Exception for every malformed description
        raise ConfigError(
            f"{file}: the tokenizers library refuses it ({error}); download the file again"
        ) from error


def _token_text(value: Any) -> str | None:
    """Text of a special token as tokenizer_config.json writes it: a string or an AddedToken object."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def _byte_of_character() -> dict[str, int]:
    """The byte behind each character of a byte-level vocabulary.

    GPT-2's table: printable Latin-1 characters stand for themselves, the other bytes, in order, for the
    characters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    table.update({chr(0x100 + index): byte for index, byte in enumerate(others)})
    return table


def _token_bytes(vocabulary: Mapping[str, int], added: Mapping[int, str]) -> dict[int, bytes]:
    table = _byte_of_character()
    token_bytes = {}
    for text, token_id in vocabulary.items():
        if token_id in added or any(character not in table for character in text):
            token_bytes[token_id] = text.encode("utf-8")
        else:
            token_bytes[token_id] = bytes(table[character] for character in text)
    return token_bytes
