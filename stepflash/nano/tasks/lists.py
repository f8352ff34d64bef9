"""Sorting, extremes and counting in short lists."""

from __future__ import annotations

from random import Random

from stepflash.nano.tasks.example import Example, Tier, single_turn
from stepflash.nano.tasks.pools import ANIMALS, COLOURS, FRUITS


def sort_numbers(rng: Random, tier: Tier) -> Example:
    """3 to 5 numbers below 100 (easy), 5 to 8 below 1000 (hard), up or down, by repeated selection."""
    length, limit = (rng.randint(3, 5), 99) if tier == "easy" else (rng.randint(5, 8), 999)
    numbers = [rng.randint(1, limit) for _ in range(length)]
    down = rng.random() < 0.4
    listed = ", ".join(map(str, numbers))
    if down:
        pattern = rng.choice(
            (
                "Sort in descending order: {}",
                "Sort these numbers from largest to smallest: {}",
                "Order {} from high to low.",
                "Arrange {} from biggest to smallest.",
            )
        )
    else:
        pattern = rng.choice(
            (
                "Sort these numbers: {}",
                "Sort in ascending order: {}",
                "Sort {} from smallest to largest.",
                "Order these numbers from low to high: {}",
                "Put {} in increasing order.",
            )
        )
    rest, lines = list(numbers), ["down" if down else "up"]
    while len(rest) > 1:
        best = max(rest) if down else min(rest)
        rest.remove(best)
        lines.append(f"{best} | {' '.join(map(str, rest))}")
    answer = ", ".join(map(str, sorted(numbers, reverse=down)))
    return single_turn("sort", tier, pattern.format(listed), "\n".join(lines), answer)


def extreme(rng: Random, tier: Tier) -> Example:
    """Largest or smallest of 2 to 5 numbers below 100 (easy), 5 to 9 below 1000 (hard), by a running best."""
    length, limit = (rng.randint(2, 5), 99) if tier == "easy" else (rng.randint(5, 9), 999)
    numbers = [rng.randint(1, limit) for _ in range(length)]
    largest = rng.random() < 0.5
    word = rng.choice(
        ("largest", "biggest", "greatest", "highest") if largest else ("smallest", "lowest", "least")
    )
    pattern = rng.choice(
        ("What is the {} of {}?", "Which number is the {}: {}?", "Find the {} number: {}", "The {} of {}?")
    )
    choose = max if largest else min
    best, lines = numbers[0], ["max" if largest else "min", str(numbers[0])]
    for number in numbers[1:]:
        best = choose(best, number)
        lines.append(f"{number} >{best}")
    question = pattern.format(word, ", ".join(map(str, numbers)))
    return single_turn("extreme", tier, question, "\n".join(lines), str(best))


def count_items(rng: Random, tier: Tier) -> Example:
    """How many items a list has, or how often one occurs, by numbering them."""
    pool = rng.choice((FRUITS, ANIMALS, COLOURS))
    length = rng.randint(2, 6) if tier == "easy" else rng.randint(6, 12)
    if rng.random() < 0.5:
        items = [rng.choice(pool) for _ in range(length)]
        pattern = rng.choice(
            (
                "How many items are in this list: {}?",
                "Count the items: {}",
                "How many words are there in: {}?",
            )
        )
        lines = [f"{item} {index}" for index, item in enumerate(items, 1)]
        return single_turn(
            "count_items", tier, pattern.format(", ".join(items)), "\n".join(lines), str(length)
        )
    kinds = rng.sample(pool, 3 if tier == "easy" else 4)
    items = [rng.choice(kinds) for _ in range(length)]
    wanted = rng.choice(kinds)
    pattern = rng.choice(
        (
            "How many times does {0} occur in: {1}?",
            "Count {0} in this list: {1}",
            "How often do you see {0} here: {1}?",
        )
    )
    count, lines = 0, [f"count {wanted}"]
    for item in items:
        count += item == wanted
        lines.append(f"{item} {count}")
    return single_turn(
        "count_items", tier, pattern.format(wanted, ", ".join(items)), "\n".join(lines), str(count)
    )
