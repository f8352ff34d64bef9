"""Names, words and made-up strings that the generators draw from.

Real words carry natural requests; `pseudo_word` and `identifier` give strings that cannot be memorised, so that the
only way to answer is to copy.
"""

from __future__ import annotations

from random import Random


def words(text: str) -> tuple[str, ...]:
    """The words of `text`."""
    return tuple(text.split())


PEOPLE = words(
    "Anna Ben Carla David Emma Felix Grace Hugo Ida Jack Kim Leo Mia Noah Olga Paul Rosa Sam Tina "
    "Umar Vera Will Yara Zoe Alice Bob Clara Dan Eva Frank Gina Henry Iris John Kate Liam Maria "
    "Nina Oscar Pia Ravi Sara Tom Wei"
)
CITIES = words(
    "Paris London Berlin Rome Madrid Vienna Oslo Tokyo Delhi Cairo Lima Quito Boston Chicago Denver "
    "Miami Seattle Toronto Sydney Perth Dublin Lisbon Prague Warsaw Athens Zurich Geneva Milan "
    "Naples Munich Hamburg Kyoto Osaka Seoul Beijing Shanghai Mumbai Dubai Nairobi Lagos Accra "
    "Bogota Havana Helsinki Stockholm Copenhagen Brussels"
)
THINGS = words(
    "apples pears books pens coins cards stamps shells stones eggs cookies cakes balls toys marbles "
    "stickers plums lemons oranges cups plates flowers roses trees chairs boxes bottles tickets "
    "buttons candles"
)
COLOURS = words("red blue green black white yellow pink brown grey orange purple")
FRUITS = words("apple pear plum fig lemon lime mango kiwi peach melon cherry grape banana orange")
ANIMALS = words(
    "cat dog cow pig hen fox owl bee ant bat rat frog goat duck bear lion wolf deer horse sheep mouse"
)
# Words to spell, count letters in and turn round: few enough that each is met many times.
SPELLING = words(
    "cat dog sun map pen cup hat bed red box key ice egg arm leg sea sky tea zoo bag bus car day "
    "fun gas hot job kid lip man net oil pot run sad top use van wet yes apple bread chair dance "
    "eagle fruit grape house juice knife lemon money night ocean paper queen river stone table "
    "uncle voice water young zebra ball book tree moon foot door fish bird cake game hill jump king "
    "lamp milk nose park rain ship time wind year banana cheese dinner farmer garden hammer island "
    "jacket kitten letter market needle orange pepper rabbit summer tomato winter yellow bottle "
    "coffee dragon engine flower guitar mirror pencil school ticket window butter carrot silver "
    "spring street hello happy green black white small sweet sleep tooth wheel"
)
PHRASES = (
    "see you at noon",
    "the meeting is at three",
    "call me back",
    "happy birthday",
    "lunch is ready",
    "the train is late",
    "good luck",
    "thank you for the help",
    "I will be there soon",
    "please bring the keys",
    "the report is done",
    "buy milk and eggs",
    "we won the game",
    "the shop is closed",
    "do not forget the tickets",
    "the door is open",
    "dinner at eight",
    "all tests pass",
    "the server is down",
    "see the new plan",
)
STEMS = words(
    "notes report data plan list budget todo readme config log summary letter draft recipe table main test"
)
SUFFIXES = words("txt md csv json py log")
FOLDERS = words("docs src data work tmp home logs tests")
_ONSETS = words("b d f g k l m n p r s t v z br dr st tr pl")
_VOWELS = words("a e i o u")
_CODAS = ["", "", "n", "r", "l", "k", "s", "m"]


def pseudo_word(rng: Random) -> str:
    """A made-up word of two or three syllables, for example `dravok`."""
    syllables = rng.choice((2, 2, 3))
    return "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS) for _ in range(syllables))


def identifier(rng: Random) -> str:
    """A made-up id, for example `KX-4072`."""
    letters = "".join(rng.choice("ABCDEFGHKLMNPRSTVXZ") for _ in range(2))
    return f"{letters}-{rng.randint(10, 9999)}"


def mixed_token(rng: Random) -> str:
    """A word, number, made-up word or id: material to copy."""
    kind = rng.random()
    if kind < 0.35:
        return rng.choice(rng.choice((SPELLING, FRUITS, ANIMALS, COLOURS, PEOPLE, CITIES)))
    if kind < 0.6:
        return pseudo_word(rng)
    if kind < 0.8:
        return str(rng.randint(0, 9999))
    return identifier(rng)


def person(rng: Random) -> str:
    """A first name, made up one time in five."""
    return rng.choice(PEOPLE) if rng.random() < 0.8 else pseudo_word(rng).capitalize()


def city(rng: Random) -> str:
    """A city, made up one time in five."""
    return rng.choice(CITIES) if rng.random() < 0.8 else pseudo_word(rng).capitalize()


def file_name(rng: Random) -> str:
    """A file name, sometimes with a folder, a number or a made-up stem."""
    stem = rng.choice(STEMS) if rng.random() < 0.7 else pseudo_word(rng)
    if rng.random() < 0.3:
        stem += f"_{rng.randint(1, 99)}"
    name = f"{stem}.{rng.choice(SUFFIXES)}"
    return f"{rng.choice(FOLDERS)}/{name}" if rng.random() < 0.25 else name


def phrase(rng: Random) -> str:
    """A short text: a stock phrase or a few random words."""
    if rng.random() < 0.5:
        return rng.choice(PHRASES)
    return " ".join(mixed_token(rng) for _ in range(rng.randint(2, 5)))
