"""Simple chat: greetings, questions about itself and the package, and a few facts."""

from __future__ import annotations

from random import Random

from stepflash.nano.tasks.chat_facts import FACTS, INTENTS
from stepflash.nano.tasks.example import Example, Tier, single_turn
from stepflash.nano.tasks.pools import person

_OPENINGS = (
    "Please tell me: ",
    "I have a question. ",
    "Quick question: ",
    "Hey, ",
    "nano, ",
    "Tell me, ",
    "OK. ",
)


def small_talk(rng: Random, tier: Tier) -> Example:
    """A question about itself, the package, or a courtesy (hard: behind an opening phrase)."""
    thought, answer, phrasings = rng.choice(INTENTS)
    question = _vary(rng, tier, rng.choice(phrasings))
    return single_turn("small_talk", tier, question, thought, answer)


def introduction(rng: Random, tier: Tier) -> Example:
    """The user gives a name; greet by it."""
    name = person(rng)
    pattern = rng.choice(
        (
            "My name is {}.",
            "I am {}.",
            "Hi, I am {}.",
            "Call me {}.",
            "Hello, my name is {}.",
            "This is {}.",
            "Hi, {} here.",
        )
    )
    question = pattern.format(name)
    if tier == "hard":
        question += f" I like {rng.choice(('tea', 'music', 'books', 'maths', 'trains'))}."
    return single_turn("introduction", tier, question, f"name {name}", f"Hello, {name}! How can I help you?")


def fact(rng: Random, tier: Tier) -> Example:
    """A capital, an opposite, a colour, an animal's sound or a number to know."""
    thought, pattern, table, phrasings = rng.choice(FACTS)
    key = rng.choice(list(table))
    question = _vary(rng, tier, rng.choice(phrasings).format(key))
    return single_turn(
        "fact", tier, question, f"{thought}: {key} {table[key]}", pattern.format(key, table[key])
    )


def _vary(rng: Random, tier: Tier, question: str) -> str:
    style = rng.random()
    if style < 0.15:
        question = question.lower()
    elif style < 0.3:
        question = question.rstrip("?.!")
    if tier == "hard":
        question = rng.choice(_OPENINGS) + question
    return question
