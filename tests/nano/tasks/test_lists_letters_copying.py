"""Lists, letters and copying, answered a second time from the question. Kind: brute force."""

from __future__ import annotations

import re
from collections import Counter

from tests.nano.tasks.drawing import answer, draw, question, thought


def numbers_in(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def test_sort() -> None:
    for example in draw("sort"):
        down = bool(re.search("descending|largest to|high to|biggest to", question(example)))
        assert numbers_in(answer(example)) == sorted(numbers_in(question(example)), reverse=down)
        for line in thought(example).split("\n")[1:]:
            best, *rest = numbers_in(line)
            assert best == (max if down else min)([best, *rest])


def test_extreme() -> None:
    for example in draw("extreme"):
        choose = max if re.search("largest|biggest|greatest|highest", question(example)) else min
        numbers = numbers_in(question(example))
        assert int(answer(example)) == choose(numbers)
        for position, line in enumerate(thought(example).split("\n")[2:], 1):
            assert numbers_in(line) == [numbers[position], choose(numbers[: position + 1])]


def test_count_items() -> None:
    for example in draw("count_items"):
        text = question(example)
        listed = re.split(", ", re.search(r": (.*?)\??$", text)[1])  # type: ignore[index]
        wanted = re.search(r"does (\w+) occur|Count (\w+) in|see (\w+) here", text)
        expected = Counter(listed)[next(filter(None, wanted.groups()))] if wanted else len(listed)
        assert int(answer(example)) == expected, text
        assert thought(example).endswith(f" {expected}")


def word_of(text: str) -> str:
    """The word that a question about letters is about."""
    patterns = r"in the word (\w+)\?|occur in (\w+)\?|in (\w+)[.?]$|letters does (\w+)|the word (\w+)"
    patterns += r"|letters of (\w+)|What is (\w+)"
    patterns += r"|spell (?!the )(\w+)|Spell (?!the )(\w+)|Write (?!the )(\w+)|Reverse (?!the )(\w+)"
    match = re.search(patterns, text)
    assert match, text
    return next(filter(None, match.groups()))


def test_count_letter() -> None:
    for example in draw("count_letter"):
        letter = re.search(r"letter (\w)\b|many (\w)'s|often is (\w)\b", question(example))
        assert letter
        count = word_of(question(example)).count(next(filter(None, letter.groups())))
        assert int(answer(example)) == count


def test_count_letters() -> None:
    for example in draw("count_letters"):
        assert int(answer(example)) == len(word_of(question(example)))
        assert thought(example).endswith(answer(example))


def test_spell() -> None:
    for example in draw("spell"):
        letters = re.search(r"\b(\w( \w)+)(?=\?|$| spell)", question(example))
        if letters:
            assert answer(example) == letters[1].replace(" ", "")
        else:
            assert answer(example).split(" ") == list(word_of(question(example)))


def test_reverse() -> None:
    for example in draw("reverse"):
        assert answer(example).replace(" ", "") == word_of(question(example))[::-1]


def test_repeat() -> None:
    for example in draw("repeat"):
        times = 2 if re.search("twice|two times", question(example)) else 1
        given = answer(example).split("\n")
        assert len(given) == times
        assert len(set(given)) == 1
        opening = question(example).removesuffix(given[0])
        assert re.fullmatch(r"[A-Z][a-z ]+:? ", opening), question(example)


def test_quote() -> None:
    for example in draw("quote"):
        assert question(example).split('"')[1] == answer(example)


def test_lookup() -> None:
    for example in draw("lookup"):
        lines = question(example).split("\n")
        asks = next(line for line in lines if re.match(r"What is|Look up|Give me", line))
        key = re.sub(r"What is the value of |What is |Look up |Give me |[?.]$", "", asks)
        table = "\n".join(line for line in lines if line != asks)
        found = re.findall(rf'(?:^|\n|, |\{{|")"?{key}"?(?:: | = | is )"?([^",\n]+)', table)
        assert found == [answer(example)], question(example)


def test_nth_item() -> None:
    ordinals = ["first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth"]
    for example in draw("nth_item"):
        text = question(example)
        listed = re.sub(r"^.*?: |\n.*$", "", text).split(", ")
        word = re.search("|".join([*ordinals, "last"]), text.replace(", ".join(listed), ""))
        assert word
        assert answer(example) == (listed[-1] if word[0] == "last" else listed[ordinals.index(word[0])])
