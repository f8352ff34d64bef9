"""Brute force: the `tokenizers` library itself. Property: any grouping of ids gives the same text."""

import json
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from stepflash.chat.tokenizer import LONG_TEXT_CHARS, PIECE_CHARS, Tokenizer
from stepflash.errors import ConfigError, PromptTooLong, WeightsError
from stepflash.gguf_file import read_gguf, write_gguf
from stepflash.weights.hub import resolve_model

MICRO = Path(__file__).parents[1] / "fixtures" / "micro"

TEXTS = [
    "",
    "Hello, world! 1234567 x",
    "  leading and trailing  \n\n\t\r\n ",
    "it's e=mc^2; foo_bar(baz)[0] <b>&amp;</b> #$%^",
    "日本語とEnglishを混ぜる。한국어 中文，标点",
    "é e\u0301 \U0001f468\u200d\U0001f469\u200d\U0001f467 \u0928\u092e\u0938\u094d\u0924\u0947 \u200b\ufeff",
    "<|im_start|>user\nhi<|im_end|>\n<think></think><tool_call>",
    "x" * 3000,
    "9" * 50 + " " * 50,
    "\x00\x01\x7f\x80",
]
FRAGMENTS = st.sampled_from([*"aA1 \n\r\t.,_'é日かﾀ", "</think>"])
ANY_TEXT = st.text(max_size=40) | st.lists(FRAGMENTS, max_size=30).map("".join)


@pytest.fixture(scope="module")
def step(step_folder: Path) -> Tokenizer:
    return Tokenizer.from_pretrained(step_folder)


@pytest.fixture(scope="module")
def library(step_folder: Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(step_folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def gguf(step_gguf: Path) -> Tokenizer:
    return Tokenizer.from_pretrained(step_gguf)


@pytest.fixture(scope="module")
def nano() -> Tokenizer:
    return Tokenizer.from_pretrained(resolve_model("nano"))


def test_special_tokens_are_found_by_text(step: Tokenizer, library: tokenizers.Tokenizer) -> None:
    assert step.bos_token_id == 0
    assert step.eos_token_ids == {1, 2, library.token_to_id("<|im_end|>")}
    assert step.think_end_id == library.token_to_id("</think>")
    assert step.think_start_id == library.token_to_id("<think>")
    assert step.token_id("<|im_start|>") == 3
    assert step.token_id("no such token") is None
    assert step.vocab_size == library.get_vocab_size()
    assert not step.missing_token_ids
    assert step.special_tokens["bos_token"] == "<\uff5cbegin\u2581of\u2581sentence\uff5c>"


def test_ids_without_a_token_are_no_stop_tokens(step_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(step_folder, tmp_path / "m")
    (tmp_path / "m" / "generation_config.json").write_text('{"eos_token_id": 128007, "bos_token_id": 128000}')
    (tmp_path / "m" / "tokenizer_config.json").unlink()
    (tmp_path / "m" / "config.json").write_text('{"eos_token_id": [1]}')
    tokenizer = Tokenizer.from_pretrained(tmp_path / "m")
    assert tokenizer.eos_token_ids == {1, 4}
    assert tokenizer.bos_token_id is None


@pytest.mark.parametrize("text", TEXTS)
def test_encode_and_decode_equal_the_library(
    step: Tokenizer, library: tokenizers.Tokenizer, text: str
) -> None:
    ids = library.encode(text, add_special_tokens=False).ids
    assert step.encode(text) == ids
    assert step.decode(ids) == text == library.decode(ids, skip_special_tokens=False)


def test_micro_checkpoint_tokenizer() -> None:
    tokenizer = Tokenizer.from_pretrained(MICRO)
    library = tokenizers.Tokenizer.from_file(str(MICRO / "tokenizer.json"))
    assert (tokenizer.vocab_size, tokenizer.bos_token_id, tokenizer.eos_token_ids) == (512, 0, {1, 2})
    assert tokenizer.think_end_id is None
    for text in TEXTS:
        assert tokenizer.encode(text) == library.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(tokenizer.encode(text)) == text


@given(st.lists(st.integers(0, 700), max_size=40), st.data())
def test_any_grouping_of_any_ids_gives_the_decoded_text(
    step_folder: Path, ids: list[int], data: st.DataObject
) -> None:
    """Random ids are full of broken UTF-8, which the library replaces in the same way."""
    step = _cached(step_folder)
    library = step.backend
    known = [token_id for token_id in ids if token_id < step.vocab_size]
    assert step.decode(ids) == library.decode(known, skip_special_tokens=False)
    detokenizer, pieces, rest = step.detokenizer(), [], ids
    while rest:
        size = data.draw(st.integers(1, len(rest)))
        pieces.append(detokenizer.push(rest[:size]))
        rest = rest[size:]
    pieces.append(detokenizer.flush())
    assert "".join(pieces) == step.decode(ids)


_TOKENIZERS: dict[Path, Tokenizer] = {}


def _cached(folder: Path) -> Tokenizer:
    return _TOKENIZERS.setdefault(folder, Tokenizer.from_pretrained(folder))


def test_detokenizer_never_shows_half_a_character(step: Tokenizer) -> None:
    text = "a\U0001d11e\u20ac\u0645"  # U+1D11E was not in the corpus: four tokens of a byte each
    ids = step.encode(text)
    assert len(ids) >= 5
    detokenizer = step.detokenizer()
    pieces = [detokenizer.push([token_id]) for token_id in ids]
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces)
    assert pieces[1:4] == ["", "", ""]
    assert pieces[4] == "\U0001d11e"

    cut_off = step.detokenizer()
    assert cut_off.push(ids[:3]) == "a"
    assert cut_off.flush() == "\ufffd"


def test_special_tokens_are_text_and_eos_can_be_hidden(step: Tokenizer) -> None:
    ids = step.encode("hm\n</think>\nyes<tool_call><|im_end|>")
    assert step.detokenizer().push(ids) == "hm\n</think>\nyes<tool_call><|im_end|>"
    assert step.detokenizer(hide_eos=True).push(ids) == "hm\n</think>\nyes<tool_call>"


def test_lone_surrogates_do_not_crash(step: Tokenizer) -> None:
    assert step.decode(step.encode("a\ud800b\udfff")) == "a\ufffdb\ufffd"
    assert step.encode_with_cuts("\ud800<|im_end|>x", [1, 11])[1][1] == len(step.encode("\ud800<|im_end|>"))


def test_cut_points_become_token_counts(step: Tokenizer) -> None:
    turns = ["<|im_start|>user\ngrüße 日本<|im_end|>\n", "<|im_start|>assistant\nThe quick<|im_end|>\n"]
    text = "".join(turns)
    ids, cuts = step.encode_with_cuts(text, [len(turns[0]), len(text), len(text) - 14])
    assert ids == step.encode(text)
    # The third offset is inside "quick", which the corpus made one token, so no prefix of the ids ends there.
    assert cuts == (len(step.encode(turns[0])), len(ids))


@given(ANY_TEXT)
def test_gguf_tokenizer_equals_the_folder_tokenizer(step_folder: Path, gguf: Tokenizer, text: str) -> None:
    step = _cached(step_folder)
    assert gguf.encode(text) == step.encode(text)
    assert gguf.decode(gguf.encode(text)) == text


def test_gguf_special_tokens(step: Tokenizer, gguf: Tokenizer) -> None:
    assert gguf.vocab_size == step.vocab_size  # the [PAD...] rows are no tokens
    assert (gguf.bos_token_id, gguf.eos_token_ids, gguf.think_end_id) == (0, {4}, step.think_end_id)
    assert gguf.special_tokens["bos_token"] == step.special_tokens["bos_token"]
    assert gguf.backend.token_to_id("[PAD639]") is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.ggml.pre": "martian"}, "martian.*known: deepseek-v3"),
        ({"tokenizer.ggml.model": "llama"}, "only 'gpt2'"),
        ({"tokenizer.ggml.tokens": None}, "is missing"),
        ({"tokenizer.ggml.token_type": [1]}, "1 token types for 640 tokens"),
        ({"tokenizer.ggml.merges": ["nope nope"]}, "do not fit together"),
    ],
)
def test_bad_gguf_tokenizers_are_refused(
    step_gguf: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    metadata = {**read_gguf(step_gguf).metadata, **change}
    path = tmp_path / "m.gguf"
    write_gguf(path, {key: value for key, value in metadata.items() if value is not None}, {})
    with pytest.raises(ConfigError, match=message) as caught:
        Tokenizer.from_pretrained(path)
    assert "m.gguf" in str(caught.value)


def test_wrong_vocabulary_size_is_refused(step: Tokenizer) -> None:
    step.check_vocab(step.vocab_size)
    step.check_vocab(640)
    with pytest.raises(ConfigError, match=f"{step.vocab_size} tokens but config.json says vocab_size=100"):
        step.check_vocab(100)


def test_missing_and_damaged_files_are_named(step_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no such folder"):
        Tokenizer.from_pretrained(tmp_path / "nothing")
    with pytest.raises(WeightsError, match=r"tokenizer\.json is missing"):
        Tokenizer.from_pretrained(tmp_path)
    with pytest.raises(WeightsError, match="not a checkpoint folder"):
        Tokenizer.from_pretrained(step_folder / "config.json")
    shutil.copytree(step_folder, tmp_path / "m")
    file = tmp_path / "m" / "tokenizer.json"
    whole = file.read_text(encoding="utf-8")
    for text, message in [
        (whole[:500], "not valid JSON"),
        ("[]", "expected a JSON object"),
        (json.dumps({"decoder": {"type": "WordPiece"}}), "not a byte-level tokenizer"),
        (json.dumps({"decoder": {"type": "ByteLevel"}}), "the tokenizers library refuses it"),
    ]:
        file.write_text(text, encoding="utf-8")
        with pytest.raises(ConfigError, match=message) as caught:
            Tokenizer.from_pretrained(tmp_path / "m")
        assert "tokenizer.json" in str(caught.value)


# Texts that are far too long


def test_a_hopeless_text_is_given_up_before_it_is_encoded(nano: Tokenizer) -> None:
    limit = 1000
    hopeless = "word " * 400_000
    with pytest.raises(PromptTooLong) as error:
        nano.encode(hopeless, limit=limit)
    assert limit < error.value.num_tokens < 50_000
    # What might fit is encoded in full, whatever the limit: only the engine's own count refuses it.
    blanks = " " * 400_000
    assert nano.encode(blanks, limit=40 * limit) == nano.encode(blanks)
    short = "word " * limit
    assert nano.encode(short, limit=limit) == nano.encode(short)


def test_long_texts_are_counted_in_pieces(nano: Tokenizer) -> None:
    text = "A line of a long text, 17 words or so.\n" * 30_000
    assert len(text) > LONG_TEXT_CHARS
    exact, pieces = len(nano.encode(text)), -(-len(text) // PIECE_CHARS)
    assert exact <= nano.count(text) <= exact + 3 * pieces
    assert nano.count(text[:1000]) == len(nano.encode(text[:1000]))


def test_other_threads_run_while_a_text_is_encoded(nano: Tokenizer) -> None:
    """Whoever holds the interpreter's lock for seconds holds up every stream of a server."""
    ticks = 0
    thread = threading.Thread(target=nano.encode, args=("some words " * 60_000,))
    thread.start()
    while thread.is_alive():
        ticks += 1
        time.sleep(0.001)
    assert ticks > 10
