"""Verbatim copying: the skill that tool use rests on.

Repeat a text, look a key up, take the n-th item, quote what stands in quotation marks. Most material is made up, so
that nothing but the prompt can tell the answer.
"""

from __future__ import annotations

from random import Random

from stepflash.nano.tasks.example import Example, Tier, single_turn
from stepflash.nano.tasks.pools import file_name, mixed_token, phrase, pseudo_word, words

ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")
KEYS = words("name colour city code size price owner file key id type team status place food day number word")


def repeat(rng: Random, tier: Tier) -> Example:
    """Say it again; a list of several tokens, sometimes twice."""
    low, high = (2, 8) if tier == "easy" else (8, 24)
    text = " ".join(mixed_token(rng) for _ in range(rng.randint(low, high)))
    if rng.random() < 0.2:
        pattern = rng.choice(("Say this twice: {}", "Repeat two times: {}", "Write this twice: {}"))
        return single_turn("repeat", tier, pattern.format(text), "say it twice", f"{text}\n{text}")
    pattern = rng.choice(
        (
            "Repeat: {}",
            "Repeat after me: {}",
            "Say this: {}",
            "Copy this text: {}",
            "Echo: {}",
            "Write exactly: {}",
            "Say {}",
        )
    )
    return single_turn("repeat", tier, pattern.format(text), "say it", text)


def quote(rng: Random, tier: Tier) -> Example:
    """Quote the text in quotation marks, among other text."""
    text = phrase(rng) if tier == "easy" else " ".join(mixed_token(rng) for _ in range(rng.randint(5, 12)))
    pattern = rng.choice(
        (
            'What stands between the quotes in: {0} "{1}" {2}',
            'Quote the text in quotation marks: {0} "{1}" {2}',
            '{0} "{1}" {2}\nWhat is quoted?',
        )
    )
    before = " ".join(mixed_token(rng) for _ in range(rng.randint(1, 3)))
    after = " ".join(mixed_token(rng) for _ in range(rng.randint(1, 3)))
    return single_turn("quote", tier, pattern.format(before, text, after), "the quoted text", text)


def lookup(rng: Random, tier: Tier) -> Example:
    """The value of a key in a small table, written in one of several ways."""
    count = rng.randint(2, 5) if tier == "easy" else rng.randint(6, 12)
    keys = (
        rng.sample(KEYS, count)
        if rng.random() < 0.5
        else list({pseudo_word(rng): None for _ in range(count)})
    )
    values = [rng.choice((mixed_token, file_name))(rng) for _ in keys]
    pairs = list(zip(keys, values, strict=True))
    wanted, answer = rng.choice(pairs)
    layout = rng.randrange(4)
    if layout == 0:
        table = "\n".join(f"{key}: {value}" for key, value in pairs)
    elif layout == 1:
        table = "\n".join(f"{key} = {value}" for key, value in pairs)
    elif layout == 2:
        table = ", ".join(f"{key} is {value}" for key, value in pairs)
    else:
        table = "{" + ", ".join(f'"{key}": "{value}"' for key, value in pairs) + "}"
    question = rng.choice(("What is the value of {}?", "What is {}?", "Look up {}.", "Give me {}."))
    prompt = (
        f"{table}\n{question.format(wanted)}" if rng.random() < 0.7 else f"{question.format(wanted)}\n{table}"
    )
    return single_turn("lookup", tier, prompt, f"{wanted}: {answer}", answer)


def nth_item(rng: Random, tier: Tier) -> Example:
    """The second, last, ... item, by numbering up to it."""
    count = rng.randint(2, 5) if tier == "easy" else rng.randint(5, 8)
    items = [mixed_token(rng) for _ in range(count)]
    index = rng.randrange(count)
    word = "last" if index == count - 1 and rng.random() < 0.6 else ORDINALS[index]
    pattern = rng.choice(
        (
            "What is the {0} item of: {1}",
            "Give me the {0} word: {1}",
            "{1}\nWhich one is {0}?",
            "Pick the {0} of: {1}",
        )
    )
    reasoning = "\n".join(f"{position} {item}" for position, item in enumerate(items[: index + 1], 1))
    return single_turn("nth_item", tier, pattern.format(word, ", ".join(items)), reasoning, items[index])
