"""Spelling, counting letters and spelling backwards.

The tokenizer hides letters, so every trace spells the word first, one token a letter (` c a t`).
"""

from __future__ import annotations

from random import Random

from stepflash.nano.tasks.example import Example, Tier, single_turn
from stepflash.nano.tasks.pools import SPELLING, pseudo_word


def _word(rng: Random, tier: Tier) -> str:
    return rng.choice(SPELLING) if tier == "easy" else pseudo_word(rng)


def _spelled(word: str) -> str:
    return " ".join(word)


def spell(rng: Random, tier: Tier) -> Example:
    """`cat` to `c a t`, and the other way round."""
    word = _word(rng, tier)
    if rng.random() < 0.3:
        pattern = rng.choice(("Which word is spelled {}?", "What does {} spell?", "Join the letters: {}"))
        return single_turn("spell", tier, pattern.format(_spelled(word)), f"join: {_spelled(word)}", word)
    pattern = rng.choice(
        ("Spell the word {}.", "How do you spell {}?", "Spell {}.", "Write {} letter by letter.")
    )
    return single_turn("spell", tier, pattern.format(word), f"spell {word}", _spelled(word))


def count_letter(rng: Random, tier: Tier) -> Example:
    """How often a letter occurs; a running count after each hit."""
    word = _word(rng, tier)
    letter = rng.choice(word) if rng.random() < 0.85 else rng.choice("abcdefghijklmnoprstuvwyz")
    pattern = rng.choice(
        (
            "How many times does the letter {0} occur in {1}?",
            "How many {0}'s are in the word {1}?",
            "Count the letter {0} in {1}.",
            "How often is {0} in {1}?",
        )
    )
    count, marked = 0, []
    for character in word:
        count += character == letter
        marked.append(f"{character}{count}" if character == letter else character)
    reasoning = f"{word}: {_spelled(word)}\ncount {letter}: {' '.join(marked)}"
    return single_turn("count_letter", tier, pattern.format(letter, word), reasoning, str(count))


def count_letters(rng: Random, tier: Tier) -> Example:
    """How many letters a word has."""
    word = _word(rng, tier)
    pattern = rng.choice(
        ("How many letters does {} have?", "How long is the word {}?", "Count the letters of {}.")
    )
    numbered = " ".join(f"{character}{index}" for index, character in enumerate(word, 1))
    reasoning = f"{word}: {_spelled(word)}\n{numbered}"
    return single_turn("count_letters", tier, pattern.format(word), reasoning, str(len(word)))


def reverse(rng: Random, tier: Tier) -> Example:
    """Spell backwards (easy: the letters stay apart; hard: joined)."""
    word = rng.choice(SPELLING)
    backwards = _spelled(word[::-1])
    if tier == "easy":
        pattern = rng.choice(
            ("Spell {} backwards.", "Write the letters of {} in reverse order.", "Spell {} from the end.")
        )
        reasoning, answer = f"{word}: {_spelled(word)}", backwards
    else:
        pattern = rng.choice(("Reverse the word {}.", "What is {} written backwards?", "Reverse {}."))
        reasoning, answer = f"{word}: {_spelled(word)}\nback: {backwards}", word[::-1]
    return single_turn("reverse", tier, pattern.format(word), reasoning, answer)
