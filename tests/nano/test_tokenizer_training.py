"""The trained tokenizer: round trips, single digits, the same tokens for a name everywhere. Kind: property."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepflash.chat.tokenizer import Tokenizer
from stepflash.nano.tasks import render, sample
from stepflash.nano.tokenizer_training import (
    SPECIAL_TOKENS,
    TAG_TOKENS,
    VOCAB_SIZE,
    train_tokenizer,
    write_tokenizer,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, train_tokenizer(seed=0))
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_pretrained(folder)


def test_size_and_special_tokens(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == VOCAB_SIZE
    assert not tokenizer.missing_token_ids
    for text in (*SPECIAL_TOKENS, *TAG_TOKENS):
        assert len(tokenizer.encode(text)) == 1, text
    assert [tokenizer.token_id(text) for text in SPECIAL_TOKENS[:3]] == [0, 1, 2]
    assert tokenizer.bos_token_id == 0
    assert tokenizer.eos_token_ids == {1, 2, tokenizer.token_id("<|im_end|>")}
    assert tokenizer.think_end_id == tokenizer.token_id("</think>")


@given(text=st.text())
def test_any_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(text=st.text(alphabet="0123456789 +-*/=.,ab\n"))
def test_digits_stand_alone(tokenizer: Tokenizer, text: str) -> None:
    for token_id in tokenizer.encode(text):
        token = tokenizer.decode([token_id])
        if any(character.isdigit() for character in token):
            assert len(token) == 1


@given(name=st.from_regex(r"[A-Z][a-z]{3,10}", fullmatch=True))
def test_a_name_has_the_same_tokens_everywhere(tokenizer: Tokenizer, name: str) -> None:
    alone = tokenizer.encode(name)
    for before, after in ((" ", " "), ("=", "\n"), ('"', '"'), ("\n", "\n"), (": ", "?"), (", ", ", ")):
        whole = tokenizer.encode(f"in{before}{name}{after}")
        assert any(whole[start : start + len(alone)] == alone for start in range(len(whole))), (before, after)


def test_pieces_encode_like_the_whole_document(tokenizer: Tokenizer) -> None:
    rng = Random(9)
    for _ in range(200):
        pieces = [text for text, _ in render(sample(rng, rng.random()))]
        assert [token for text in pieces for token in tokenizer.encode(text)] == tokenizer.encode(
            "".join(pieces)
        )


def test_documents_are_short(tokenizer: Tokenizer) -> None:
    rng = Random(10)
    sizes = [len(tokenizer.encode("".join(text for text, _ in render(sample(rng, 0.7))))) for _ in range(500)]
    assert sum(sizes) / len(sizes) < 120
    assert max(sizes) < 600


def test_the_same_seed_gives_the_same_tokenizer(folder: Path) -> None:
    assert train_tokenizer(seed=0).to_str(pretty=True) == (folder / "tokenizer.json").read_text(
        encoding="utf-8"
    )
