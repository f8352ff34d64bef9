"""The tools that appear in training: natural ones, and ones whose names and parameters are made up.

A `Kind` is a tool definition and a way to ask for it: `request` draws a user text and the arguments that it implies,
`result` draws what the tool would return and the answer that follows from it. Arguments stand word for word in the
request wherever a person would write them so; choosing and filling is then copying.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

from stepflash.chat.messages import Tool
from stepflash.nano.tasks.example import Tier
from stepflash.nano.tasks.pools import (
    city,
    file_name,
    identifier,
    mixed_token,
    person,
    phrase,
    pseudo_word,
    words,
)

Arguments = dict[str, Any]

_VERBS = words(
    "get set check update create find start stop open close move count mark track tag sync lock "
    "scan print order"
)
_NOUNS = words(
    "order ticket user task room device account invoice package event sensor table report lamp door record"
)
_PARAMETERS = words("id name code level number label target owner mode key size status title place")
_ROOMS = words("kitchen bedroom bathroom hall office garage")
_UNITS = (
    ("km", "miles"),
    ("miles", "km"),
    ("kg", "pounds"),
    ("pounds", "kg"),
    ("celsius", "fahrenheit"),
    ("cm", "inches"),
)
_CLASSES = ("economy", "business", "first")
# Other names that people give to the same tools and parameters, so that names are read and not remembered.
_TOOL_ALIASES = {
    "calculator": words("calculate calc evaluate math"),
    "read_file": words("file_read open_file cat read view_file"),
    "write_file": words("file_write save_file write create_file"),
    "get_weather": words("weather get_current_weather current_weather fetch_weather"),
    "get_time": words("time current_time get_current_time clock"),
    "list_files": words("ls list_dir list_directory dir"),
    "search": words("web_search search_web google find"),
    "send_message": words("send message send_text notify"),
    "set_timer": words("timer start_timer create_timer"),
    "run_python": words("python execute_python run_code exec"),
    "convert_units": words("convert unit_converter"),
    "translate": words("translate_text translator"),
    "get_stock_price": words("stock_price stock quote"),
    "switch_light": words("set_light light toggle_light"),
    "play_music": words("play play_song"),
    "book_flight": words("flight_booking reserve_flight"),
    "delete_file": words("remove_file rm delete"),
}
_PARAMETER_ALIASES = {
    "expression": words("formula expr input"),
    "path": words("file file_path filename name"),
    "content": words("text data contents"),
    "city": words("location place town"),
    "query": words("q text keywords"),
    "recipient": words("to person receiver"),
    "text": words("message body content"),
    "minutes": words("duration time"),
    "code": words("source script program"),
    "language": words("target to target_language"),
    "symbol": words("ticker share"),
    "room": words("place location"),
    "song": words("title name track"),
}
COPIED_WORDS = (
    *(word for aliases in _PARAMETER_ALIASES.items() for word in (aliases[0], *aliases[1])),
    *_VERBS,
    *_NOUNS,
    *_PARAMETERS,
    *_ROOMS,
    *_CLASSES,
    *(unit for pair in _UNITS for unit in pair),
)


@dataclass(frozen=True, slots=True)
class Kind:
    """A tool, how users ask for it, and what comes back."""

    tool: Tool
    request: Callable[[Random], tuple[str, Arguments]]
    result: Callable[[Random, Arguments], tuple[str, str]]  # tool output, final answer


def define(
    name: str, description: str, parameters: Mapping[str, Any], required: list[str] | None = None
) -> Tool:
    """A tool in the OpenAI form. `parameters` maps a name to a type, a (type, description) or a whole schema."""
    properties: dict[str, Any] = {}
    for key, value in parameters.items():
        if isinstance(value, str):
            properties[key] = {"type": value}
        elif isinstance(value, tuple):
            properties[key] = {"type": value[0], "description": value[1]}
        else:
            properties[key] = dict(value)
    schema = {"type": "object", "properties": properties, "required": required or list(parameters)}
    function = {"name": name, "description": description, "parameters": schema}
    return Tool(definition={"type": "function", "function": function})


def _fill(rng: Random, patterns: tuple[str, ...], **arguments: Any) -> tuple[str, Arguments]:
    return rng.choice(patterns).format(**arguments), arguments


def _weather(rng: Random) -> tuple[str, Arguments]:
    patterns = (
        "What is the weather in {city}?",
        "How is the weather in {city} today?",
        "Weather in {city}?",
        "Is it raining in {city}?",
        "Tell me the weather for {city}.",
        "Do I need an umbrella in {city}?",
    )
    return _fill(rng, patterns, city=city(rng))


def _weather_result(rng: Random, arguments: Arguments) -> tuple[str, str]:
    degrees, sky = rng.randint(-9, 35), rng.choice(("sunny", "cloudy", "rain", "snow", "windy", "fog"))
    return f"{degrees} degrees, {sky}", f"The weather in {arguments['city']}: {degrees} degrees, {sky}."


def _time(rng: Random) -> tuple[str, Arguments]:
    patterns = (
        "What time is it in {city}?",
        "Tell me the time in {city}.",
        "Current time in {city}?",
        "How late is it in {city}?",
    )
    return _fill(rng, patterns, city=city(rng))


def _time_result(rng: Random, arguments: Arguments) -> tuple[str, str]:
    clock = f"{rng.randint(0, 23)}:{rng.randint(10, 59)}"
    return clock, f"It is {clock} in {arguments['city']}."


def calculation(rng: Random, low: int = 11, high: int = 9999) -> str:
    """An expression for the calculator, for example `348*27`."""
    return f"{rng.randint(low, high)}{rng.choice('+-*')}{rng.randint(low, high)}"


def _calculate(rng: Random) -> tuple[str, Arguments]:
    patterns = (
        "What is {expression}?",
        "Compute {expression}.",
        "Calculate {expression}",
        "How much is {expression}?",
    )
    return _fill(rng, patterns, expression=calculation(rng))


def _calculate_result(rng: Random, arguments: Arguments) -> tuple[str, str]:
    value = calculate(arguments["expression"])
    return value, f"{arguments['expression']} = {value}"


def calculate(expression: str) -> str:
    """The value of `a+b`, `a-b` or `a*b`."""
    for operator in "+-*":
        left, found, right = expression.partition(operator)
        if found:
            first, second = int(left), int(right)
            value = (
                first + second if operator == "+" else first - second if operator == "-" else first * second
            )
            return str(value)
    raise ValueError(f"not a sum, difference or product: {expression!r}")


def _convert(rng: Random) -> tuple[str, Arguments]:
    source, target = rng.choice(_UNITS)
    patterns = (
        "Convert {value} {from_unit} to {to_unit}.",
        "How many {to_unit} are {value} {from_unit}?",
        "What is {value} {from_unit} in {to_unit}?",
    )
    return _fill(rng, patterns, value=rng.randint(1, 500), from_unit=source, to_unit=target)


def _convert_result(rng: Random, arguments: Arguments) -> tuple[str, str]:
    value = f"{rng.randint(1, 900)}.{rng.randint(1, 9)}"
    return value, f"{arguments['value']} {arguments['from_unit']} are {value} {arguments['to_unit']}."


def _search(rng: Random) -> tuple[str, Arguments]:
    patterns = (
        'Search for "{query}".',
        "Search the web for {query}",
        'Look up "{query}" online.',
        'Find "{query}" on the web.',
    )
    return _fill(rng, patterns, query=phrase(rng))


def _found(rng: Random, arguments: Arguments) -> tuple[str, str]:
    text = phrase(rng)
    return text, f"I found: {text}"


def _read(rng: Random) -> tuple[str, Arguments]:
    patterns = (
        "Read the file {path}.",
        "What is in {path}?",
        "Show me {path}",
        "Open {path}.",
        "Print the contents of {path}.",
    )
    return _fill(rng, patterns, path=file_name(rng))


def _read_result(rng: Random, arguments: Arguments) -> tuple[str, str]:
    text = phrase(rng)
    return text, f"{arguments['path']} says: {text}"


def _write(rng: Random) -> tuple[str, Arguments]:
    patterns = (
        'Write "{content}" to {path}.',
        'Save "{content}" in the file {path}.',
        'Create {path} with the text "{content}".',
        'Put "{content}" into {path}',
    )
    text, arguments = _fill(rng, patterns, path=file_name(rng), content=phrase(rng))
    return text, arguments


def _write_result(rng: Random, arguments: Arguments) -> tuple[str, str]:
    return "ok", f"I wrote {arguments['path']}."


def _list(rng: Random) -> tuple[str, Arguments]:
    patterns = (
        "List the files in {path}.",
        "What files are in {path}?",
        "Show the folder {path}.",
        "ls {path}",
    )
    return _fill(rng, patterns, path=rng.choice(("docs", "src", "data", "home", "tests", pseudo_word(rng))))


def _list_result(rng: Random, arguments: Arguments) -> tuple[str, str]:
    names = " ".join(file_name(rng).rpartition("/")[2] for _ in range(rng.randint(1, 3)))
    return names, f"{arguments['path']} has: {names}"


def _python(rng: Random) -> tuple[str, Arguments]:
    code = rng.choice(
        (
            f"print({rng.randint(2, 99)}**{rng.randint(2, 9)})",
            f"print(len('{mixed_token(rng)}'))",
            f"print(sum(range({rng.randint(2, 999)})))",
            f"print({rng.randint(2, 999)} % {rng.randint(2, 99)})",
        )
    )
    return _fill(
        rng,
        ("Run this Python: {code}", "Execute {code}", "Run the code {code}", "Use Python: {code}"),
        code=code,
    )


def _python_result(rng: Random, arguments: Arguments) -> tuple[str, str]:
    value = str(rng.randint(0, 99999))
    return value, f"It prints {value}."


def _send(rng: Random) -> tuple[str, Arguments]:
    patterns = (
        'Send "{text}" to {recipient}.',
        'Tell {recipient} "{text}".',
        'Message {recipient}: "{text}"',
        'Write to {recipient}: "{text}"',
    )
    return _fill(rng, patterns, recipient=person(rng), text=phrase(rng))


def _send_result(rng: Random, arguments: Arguments) -> tuple[str, str]:
    return "sent", f"I sent it to {arguments['recipient']}."


def _translate(rng: Random) -> tuple[str, Arguments]:
    language = rng.choice(words("French German Spanish Italian Polish Greek Dutch Swedish"))
    patterns = (
        'Translate "{text}" into {language}.',
        'What is "{text}" in {language}?',
        'Say "{text}" in {language}.',
    )
    return _fill(rng, patterns, text=phrase(rng), language=language)


def _translate_result(rng: Random, arguments: Arguments) -> tuple[str, str]:
    text = " ".join(pseudo_word(rng) for _ in range(rng.randint(1, 3)))
    return text, f"In {arguments['language']}: {text}"


def _timer(rng: Random) -> tuple[str, Arguments]:
    patterns = (
        "Set a timer for {minutes} minutes.",
        "Wake me in {minutes} minutes.",
        "Start a {minutes} minute timer.",
    )
    return _fill(rng, patterns, minutes=rng.randint(2, 90))


def _timer_result(rng: Random, arguments: Arguments) -> tuple[str, str]:
    return "started", f"The timer is set for {arguments['minutes']} minutes."


def _stock(rng: Random) -> tuple[str, Arguments]:
    symbol = "".join(rng.choice("ABCDEFGHKLMNPRSTVX") for _ in range(rng.randint(3, 4)))
    patterns = (
        "What is the stock price of {symbol}?",
        "How is {symbol} trading?",
        "Price of {symbol} shares?",
    )
    return _fill(rng, patterns, symbol=symbol)


def _stock_result(rng: Random, arguments: Arguments) -> tuple[str, str]:
    price = f"{rng.randint(2, 900)}.{rng.randint(10, 99)}"
    return price, f"{arguments['symbol']} stands at {price}."


def _light(rng: Random) -> tuple[str, Arguments]:
    room, on = rng.choice(_ROOMS), rng.random() < 0.5
    word = "on" if on else "off"
    patterns = (
        "Turn {word} the light in the {room}.",
        "Switch the {room} light {word}.",
        "Light {word} in the {room}.",
    )
    return rng.choice(patterns).format(word=word, room=room), {"room": room, "on": on}


def _light_result(rng: Random, arguments: Arguments) -> tuple[str, str]:
    return "ok", f"The light in the {arguments['room']} is {'on' if arguments['on'] else 'off'}."


def _music(rng: Random) -> tuple[str, Arguments]:
    song = phrase(rng)
    return _fill(rng, ('Play "{song}".', 'Put on the song "{song}".', 'I want to hear "{song}".'), song=song)


def _music_result(rng: Random, arguments: Arguments) -> tuple[str, str]:
    return "playing", f"Now playing: {arguments['song']}"


def _book(rng: Random) -> tuple[str, Arguments]:
    patterns = (
        "Book a {travel_class} flight from {origin} to {destination}.",
        "I need a {travel_class} flight from {origin} to {destination}.",
        "Fly me {travel_class} from {origin} to {destination}.",
    )
    travel_class = rng.choice(_CLASSES)
    return _fill(rng, patterns, origin=city(rng), destination=city(rng), travel_class=travel_class)


def _book_result(rng: Random, arguments: Arguments) -> tuple[str, str]:
    code = identifier(rng)
    return f"booked {code}", f"Your flight to {arguments['destination']} is booked: {code}"


def _delete(rng: Random) -> tuple[str, Arguments]:
    return _fill(rng, ("Delete the file {path}.", "Remove {path}.", "Delete {path}"), path=file_name(rng))


def _delete_result(rng: Random, arguments: Arguments) -> tuple[str, str]:
    return "deleted", f"I deleted {arguments['path']}."


def _string(description: str) -> tuple[str, str]:
    return ("string", description)


CALCULATOR = Kind(
    define("calculator", "Evaluate an arithmetic expression.", {"expression": "string"}),
    _calculate,
    _calculate_result,
)
READ_FILE = Kind(define("read_file", "Read a text file.", {"path": "string"}), _read, _read_result)
WRITE_FILE = Kind(
    define("write_file", "Write text to a file.", {"path": "string", "content": "string"}),
    _write,
    _write_result,
)
WEATHER = Kind(
    define("get_weather", "Get the current weather of a city.", {"city": _string("name of the city")}),
    _weather,
    _weather_result,
)
TIME = Kind(define("get_time", "Get the current time in a city.", {"city": "string"}), _time, _time_result)
LIST_FILES = Kind(
    define("list_files", "List the files in a folder.", {"path": "string"}), _list, _list_result
)
SEARCH = Kind(define("search", "Search the web.", {"query": "string"}), _search, _found)
SEND = Kind(
    define("send_message", "Send a message to a person.", {"recipient": "string", "text": "string"}),
    _send,
    _send_result,
)
TIMER = Kind(
    define("set_timer", "Start a timer.", {"minutes": ("integer", "minutes to wait")}), _timer, _timer_result
)
RUN_PYTHON = Kind(define("run_python", "Run Python code.", {"code": "string"}), _python, _python_result)
NATURAL = (CALCULATOR, READ_FILE, WRITE_FILE, WEATHER, TIME, LIST_FILES, SEARCH, SEND, TIMER, RUN_PYTHON)
FURTHER = (
    Kind(
        define(
            "convert_units",
            "Convert a value to another unit.",
            {"value": "number", "from_unit": "string", "to_unit": "string"},
        ),
        _convert,
        _convert_result,
    ),
    Kind(
        define("translate", "Translate a text.", {"text": "string", "language": "string"}),
        _translate,
        _translate_result,
    ),
    Kind(
        define("get_stock_price", "Get the price of a share.", {"symbol": _string("stock symbol")}),
        _stock,
        _stock_result,
    ),
    Kind(
        define("switch_light", "Turn a light on or off.", {"room": "string", "on": "boolean"}),
        _light,
        _light_result,
    ),
    Kind(define("play_music", "Play a song.", {"song": "string"}), _music, _music_result),
    Kind(
        define(
            "book_flight",
            "Book a flight.",
            {
                "origin": "string",
                "destination": "string",
                "travel_class": {"type": "string", "enum": list(_CLASSES)},
            },
        ),
        _book,
        _book_result,
    ),
    Kind(define("delete_file", "Delete a file.", {"path": "string"}), _delete, _delete_result),
)


def renamed(rng: Random, kind: Kind) -> Kind:
    """The same tool under other names, of itself and of its parameters."""
    definition = kind.tool.definition["function"]
    properties = definition["parameters"]["properties"]
    names = {key: rng.choice((key, *_PARAMETER_ALIASES.get(key, ()))) for key in properties}
    if len(set(names.values())) < len(names):
        return kind
    original = {new: key for key, new in names.items()}
    tool = define(
        rng.choice((definition["name"], *_TOOL_ALIASES[definition["name"]])),
        definition["description"],
        {names[key]: schema for key, schema in properties.items()},
    )

    def request(rng: Random) -> tuple[str, Arguments]:
        text, arguments = kind.request(rng)
        return text, {names[key]: value for key, value in arguments.items()}

    def result(rng: Random, arguments: Arguments) -> tuple[str, str]:
        return kind.result(rng, {original[key]: value for key, value in arguments.items()})

    return Kind(tool, request, result)


def made_up(rng: Random, tier: Tier) -> Kind:
    """A tool that exists nowhere: a verb, a noun (often made up) and one or two (hard: three) random parameters."""
    verb = rng.choice(_VERBS) if rng.random() < 0.7 else pseudo_word(rng)
    noun = rng.choice(_NOUNS) if rng.random() < 0.5 else pseudo_word(rng)
    count = rng.choice((1, 1, 2)) if tier == "easy" else rng.choice((2, 3))
    keys = (
        rng.sample(_PARAMETERS, count)
        if rng.random() < 0.7
        else list({pseudo_word(rng): None for _ in range(count)})
    )
    types = {key: rng.choice(("string", "string", "integer")) for key in keys}
    name = rng.choice(("{}_{}", "{}_{}", "{}_{}", "{}-{}")).format(verb, noun)
    description = f"{verb.capitalize()} the {noun}."
    parameters: dict[str, Any] = {
        key: (kind, f"{key} of the {noun}") if rng.random() < 0.3 else kind for key, kind in types.items()
    }

    def request(rng: Random) -> tuple[str, Arguments]:
        arguments: Arguments = {
            key: rng.randint(0, 9999) if kind == "integer" else _value(rng) for key, kind in types.items()
        }
        said = " and ".join(f"{key} {value}" for key, value in arguments.items())
        opening = rng.choice(
            (
                "{verb} the {noun} with {said}.",
                "Please {verb} the {noun} with {said}",
                "{verb} {noun}: {said}",
            )
        )
        text = opening.format(verb=verb, noun=noun, said=said)
        if rng.random() < 0.2:
            text = f"Use {name} with {said}."
        return text[0].upper() + text[1:] if rng.random() < 0.3 else text, arguments

    def result(rng: Random, arguments: Arguments) -> tuple[str, str]:
        value = mixed_token(rng)
        return value, f"The result is {value}."

    return Kind(define(name, description, parameters), request, result)


def _value(rng: Random) -> str:
    """A string argument that cannot be taken for a number."""
    while True:
        value = rng.choice((mixed_token, file_name, person, city))(rng)
        if not value.isdigit():
            return value
