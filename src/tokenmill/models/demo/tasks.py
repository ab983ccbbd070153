"""Seeded generator of the chat tasks that the demo model is trained and scored on.

A task is a chat conversation with one known answer. The same seed gives the same tasks on every machine and Python
version, so a score can be repeated. Training and evaluation use the same functions with different seeds.
"""

import json
import random
import re
import string
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]


def _split(words: str) -> tuple[str, ...]:
    return tuple(words.split())


WORDS = _split(
    """apple river stone cloud tiger paper lemon chair glass train horse bread ocean tower piano
    clock field storm maple eagle robin candle garden window bridge castle desert forest island jungle
    kettle ladder magnet needle orange pencil quartz rocket saddle temple violin walnut yellow zipper anchor basket
    camera dragon engine feather guitar hammer insect jacket kitten lantern mirror napkin oyster pepper rabbit salmon
    tunnel velvet wagon amber berry cedar daisy ember flute grape honey ivory jewel koala lilac mango night olive
    pearl queen raven sugar tulip urban vapor wheat yacht zebra alpha bravo delta gamma sigma omega north south
    east west summer winter spring autumn copper silver iron gold blue green red black white purple"""
)
_FIRST_NAMES = _split(
    """Maria James Aisha Chen Olga Pedro Yuki Fatima Lars Nina Omar Priya Tom Elena Ivan Grace Hugo Lucia Ahmed Sofia
    David Emma Jonas Mei Carlos Ingrid Samir Ruth Victor Zoe"""
)
_LAST_NAMES = _split(
    """Lopez Smith Khan Wei Petrov Silva Tanaka Hassan Berg Rossi Farah Patel Baker Novak Klein Murphy Costa Dubois
    Haddad Moreau Walker Stone Larsen Chang Garcia Olsen Nasser Fisher Mason Reed"""
)
_CITIES = _split(
    """Lisbon Paris Tokyo Cairo Oslo Lima Boston Madrid Berlin Rome Delhi Seoul Dublin Vienna Athens Prague Nairobi
    Toronto Sydney Chicago Geneva Havana Warsaw Quito Bogota"""
)
_JOBS = _split("baker teacher nurse pilot lawyer farmer painter driver chemist editor singer plumber")
_MONTHS = _split("January February March April May June July August September October November December")
_VERBS = _split("find cancel open close update delete create send start stop check print move copy list book")
_NOUNS = _split("order ticket file report invoice user meeting lamp door server job task room alarm song table")
_PARAMETERS = _split("id name city date count size color level title owner status limit target mode label page")
_INTEGER_PARAMETERS = frozenset({"id", "count", "size", "level", "limit", "page"})
_SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are the tokenmill demo model.",
    "Answer with the result only.",
    "Be brief and exact.",
)

_FIRST_CONTINUED_LINE = 3
# The kinds whose operands are reserved in part, as `is_reserved` says.
_RESERVING = frozenset({"add", "subtract"})
# A bound on the tokens one pair of a lookup list takes beside its key and value: separator, spaces and newline.
_PAIR_OVERHEAD = 3
LOOKUP_TOKENS = 512
"""The longest list of key-value pairs in a lookup task, in tokens of the demo model's tokenizer."""


@dataclass(frozen=True)
class Task:
    """One conversation that ends with a user turn, and the answer expected from the assistant.

    `messages` and `tools` have the shape of the fields of the same names of an OpenAI chat request; `answer` is the
    exact content of the assistant turn that answers them.
    """

    kind: str
    messages: tuple[Message, ...]
    tools: tuple[Message, ...]
    answer: str


def lookup(rng: random.Random) -> Task:
    """Give the value of one key in a list of key-value pairs that takes at most `LOOKUP_TOKENS` tokens."""
    make_key, make_value = rng.choice(_KEY_MAKERS), rng.choice(_VALUE_MAKERS)
    budget = rng.randint(24, LOOKUP_TOKENS)
    pairs: dict[str, str] = {}
    while True:
        key, value = make_key(rng), make_value(rng)
        budget -= _most_tokens(key) + _most_tokens(value) + _PAIR_OVERHEAD
        if budget < 0 and pairs:
            break
        pairs.setdefault(key, value)
    key = rng.choice(list(pairs))
    line = rng.choice(("{}: {}", "{} = {}", "{} -> {}"))
    listing = "\n".join(line.format(k, v) for k, v in pairs.items())
    question = rng.choice(
        ("What is the value of {}?", "Look up {} in the list.", "Which value belongs to {}?", "Give the value of {}.")
    ).format(key)
    text = f"{listing}\n\n{question}" if rng.random() < 0.7 else f"{question}\n\n{listing}"
    return _task("lookup", rng, text, pairs[key])


def add(rng: random.Random) -> Task:
    """Add two numbers of two or three digits."""
    a, b = _operand(rng), _operand(rng)
    phrase = rng.choice(("What is {} + {}?", "{} + {} =", "Add {} and {}.", "Compute {}+{}.", "{} plus {}?"))
    return _task("add", rng, phrase.format(a, b), str(a + b))


def subtract(rng: random.Random) -> Task:
    """Subtract a number of two or three digits from one that is not smaller."""
    b, a = sorted((_operand(rng), _operand(rng)))
    if rng.random() < 0.2:
        return _task("subtract", rng, f"Subtract {b} from {a}.", str(a - b))
    phrase = rng.choice(("What is {} - {}?", "{} - {} =", "Compute {}-{}.", "{} minus {}?"))
    return _task("subtract", rng, phrase.format(a, b), str(a - b))


def copy(rng: random.Random) -> Task:
    """Repeat a sequence of words, letters or numbers."""
    sequence = " ".join(_items(rng, longest=32, makers=_COPY_MAKERS))
    phrase = rng.choice(("Copy this sequence: {}", "Repeat exactly: {}", "Copy: {}", "Say this again:\n{}"))
    return _task("copy", rng, phrase.format(sequence), sequence)


def reverse(rng: random.Random) -> Task:
    """Give the items of a sequence in the opposite order."""
    items = _items(rng, longest=16, makers=_REVERSE_MAKERS)
    phrase = rng.choice(
        ("Reverse this sequence: {}", "Write in reverse order: {}", "Reverse: {}", "Say this backwards:\n{}")
    )
    return _task("reverse", rng, phrase.format(" ".join(items)), " ".join(reversed(items)))


def extract_json(rng: random.Random) -> Task:
    """Put the asked fields of a sentence into a JSON object, in the order asked."""
    sentence, fields = rng.choice(_SENTENCES)(rng)
    asked = rng.sample(list(fields), rng.randint(min(2, len(fields)), len(fields)))
    names = ", ".join(asked)
    phrase = rng.choice(
        (
            "Extract {} as JSON: {}",
            "Return a JSON object with the fields {}.\n\n{}",
            "{1}\n\nExtract these fields as JSON: {0}.",
            "{1}\nGive {0} as JSON.",
        )
    )
    answer = json.dumps({name: fields[name] for name in asked})
    return _task("extract_json", rng, phrase.format(names, sentence), answer)


def tool_call(rng: random.Random) -> Task:
    """Answer a request with one call of the right tool among one to three tool definitions."""
    offered: dict[str, tuple[str, Message, dict[str, Any]]] = {}
    count = rng.choice((1, 1, 2, 3))
    while len(offered) < count:
        request, tool, arguments = rng.choice((_known_tool, _made_up_tool))(rng)
        offered[tool["function"]["name"]] = request, tool, arguments
    name, (request, _, arguments) = rng.choice(list(offered.items()))
    answer = f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"
    return _task("tool_call", rng, request, answer, tuple(tool for _, tool, _ in offered.values()))


def continue_code(rng: random.Random, source: str) -> Task:
    """Continue a passage of `source`, Python text; the answer is the next one to six lines.

    Raises `ValueError` when `can_continue(source)` is false.
    """
    if not can_continue(source):
        raise ValueError("source is too short to continue")
    lines = [line.rstrip() for line in source.splitlines()]
    starts = [i for i, line in enumerate(lines) if i >= _FIRST_CONTINUED_LINE and line]
    start = rng.choice(starts)
    before = "\n".join(lines[max(0, start - rng.randint(3, 40)) : start]).strip("\n")
    after = "\n".join(lines[start : start + rng.randint(1, 6)]).rstrip()
    return _task("continue_code", rng, f"Continue this Python code:\n\n{before}", after)


def can_continue(source: str) -> bool:
    """Say whether a text is long enough for a continue_code task: something follows its third line."""
    return any(line.strip() for line in source.splitlines()[_FIRST_CONTINUED_LINE:])


TASKS: Mapping[str, Callable[[random.Random], Task]] = {
    "lookup": lookup,
    "add": add,
    "subtract": subtract,
    "copy": copy,
    "reverse": reverse,
    "extract_json": extract_json,
    "tool_call": tool_call,
}
"""The tasks that need no corpus, by kind. `continue_code` is the one that does."""


def is_reserved(task: Task) -> bool:
    """Say whether a task is kept from training: one pair of operands in twenty, for add and subtract.

    There are so few pairs that a long training sees most of them; the reserved ones tell a model that calculates from
    one that remembers. The other kinds have too many possible tasks for one to come back by chance.
    """
    if task.kind not in _RESERVING:
        return False
    operands = sorted(re.findall(r"\d+", task.messages[-1]["content"]))
    return zlib.crc32(" ".join(operands).encode()) % 20 == 0


def generate(kind: str, seed: int, n: int) -> list[Task]:
    """Make `n` tasks of one kind of `TASKS` for evaluation; sums and differences are all of reserved operands.

    A longer list with the same seed begins with the shorter one. Raises `KeyError` for a kind that is not in `TASKS`.
    """
    make, rng = TASKS[kind], random.Random(f"{kind}:{seed}")
    made: list[Task] = []
    while len(made) < n:
        task = make(rng)
        if kind not in _RESERVING or is_reserved(task):
            made.append(task)
    return made


def generate_code(sources: Iterable[str], seed: int, n: int) -> list[Task]:
    """Make `n` continue_code tasks from the given Python texts, taken in turn.

    Raises `ValueError` when no text is long enough, as `can_continue` says.
    """
    rng = random.Random(f"continue_code:{seed}")
    usable = [source for source in sources if can_continue(source)]
    if not usable:
        raise ValueError("no source is long enough to continue")
    rng.shuffle(usable)
    return [continue_code(rng, usable[i % len(usable)]) for i in range(n)]


def is_correct(task: Task, text: str) -> bool:
    """Say whether `text`, the content of an assistant turn, answers the task.

    JSON and tool calls are compared as values, code by its first line without indentation, everything else as text
    without surrounding whitespace.
    """
    if task.kind == "extract_json":
        return bool(_parse(text) == _parse(task.answer))
    if task.kind == "tool_call":
        return parse_tool_call(text) == parse_tool_call(task.answer)
    if task.kind == "continue_code":
        return _first_line(text) == _first_line(task.answer)
    return text.strip() == task.answer.strip()


def is_valid_json(task: Task, text: str) -> bool:
    """Say whether `text` is a JSON object with exactly the keys that an extract_json task asks for."""
    value = _parse(text)
    return isinstance(value, dict) and value.keys() == json.loads(task.answer).keys()


def parse_tool_call(text: str) -> dict[str, Any] | None:
    """Read one call in the Hermes form: a JSON object between `<tool_call>` and `</tool_call>` and nothing else.

    Returns the object, with its `name` and `arguments`, or None when the text is anything else.
    """
    body = text.strip()
    if not (body.startswith("<tool_call>") and body.endswith("</tool_call>")):
        return None
    value = _parse(body.removeprefix("<tool_call>").removesuffix("</tool_call>"))
    return value if isinstance(value, dict) and value.keys() == {"name", "arguments"} else None


def _task(kind: str, rng: random.Random, text: str, answer: str, tools: tuple[Message, ...] = ()) -> Task:
    user = {"role": "user", "content": text}
    if rng.random() < 0.7:
        return Task(kind, (user,), tools, answer)
    return Task(kind, ({"role": "system", "content": rng.choice(_SYSTEM_PROMPTS)}, user), tools, answer)


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _first_line(text: str) -> str:
    return next(iter(text.strip().splitlines()), "").rstrip()


def _operand(rng: random.Random) -> int:
    return rng.randint(10, 99) if rng.random() < 0.3 else rng.randint(100, 999)


def _number(rng: random.Random) -> str:
    return str(rng.randint(0, 10 ** rng.randint(1, 4) - 1))


def _word(rng: random.Random) -> str:
    return rng.choice(WORDS)


def _letters(rng: random.Random) -> str:
    return "".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 6)))


def _letter(rng: random.Random) -> str:
    return rng.choice(string.ascii_letters)


def _code(rng: random.Random) -> str:
    return "".join(rng.choices(string.ascii_lowercase + string.digits, k=rng.randint(3, 6)))


def _compound(rng: random.Random) -> str:
    return f"{rng.choice(WORDS)}_{rng.choice((_word, _number))(rng)}"


def _mixed(rng: random.Random) -> str:
    return rng.choice((_word, _number, _letter, _code))(rng)


_KEY_MAKERS = (_word, _letters, _code, _compound, _number)
_VALUE_MAKERS = (_word, _number, _letters, _code, _compound)
_COPY_MAKERS = (_word, _number, _letter, _letters, _mixed)
_REVERSE_MAKERS = (_word, _number, _letter, _mixed)


def _most_tokens(text: str) -> int:
    """An upper bound on the tokens of a word: the listed words take at most three, other text one a character."""
    return sum(3 if part in WORDS else len(part) for part in text.split("_")) + text.count("_")


def _items(rng: random.Random, longest: int, makers: Sequence[Callable[[random.Random], str]]) -> list[str]:
    make = rng.choice(makers)
    return [make(rng) for _ in range(rng.randint(3, longest))]


def _name(rng: random.Random) -> str:
    return f"{rng.choice(_FIRST_NAMES)} {rng.choice(_LAST_NAMES)}"


def _date(rng: random.Random) -> str:
    return f"{rng.randint(1, 28)} {rng.choice(_MONTHS)} {rng.randint(1950, 2049)}"


def _time(rng: random.Random) -> str:
    return f"{rng.randint(0, 23):02d}:{rng.choice((0, 15, 30, 45)):02d}"


def _person(rng: random.Random) -> tuple[str, dict[str, Any]]:
    fields = {
        "name": _name(rng),
        "age": rng.randint(18, 90),
        "city": rng.choice(_CITIES),
        "job": rng.choice(_JOBS),
    }
    sentence = rng.choice(
        (
            "{name}, {age}, lives in {city} and works as a {job}.",
            "My name is {name}. I am a {job} of {age} years from {city}.",
            "In {city} we met the {job} {name}, who is {age} years old.",
        )
    )
    return sentence.format(**fields), fields


def _order(rng: random.Random) -> tuple[str, dict[str, Any]]:
    fields = {
        "order": rng.randint(1000, 99999),
        "customer": _name(rng),
        "quantity": rng.randint(1, 99),
        "item": _word(rng),
        "price": rng.randint(1, 999),
    }
    sentence = rng.choice(
        (
            "Order {order}: {customer} bought {quantity} pieces of {item} for {price} euros.",
            "{customer} paid {price} euros for {quantity} x {item} (order {order}).",
            "We shipped {quantity} units of {item} to {customer}; order {order}, price {price}.",
        )
    )
    return sentence.format(**fields), fields


def _event(rng: random.Random) -> tuple[str, dict[str, Any]]:
    fields = {
        "title": f"{_word(rng)} {_word(rng)}",
        "date": _date(rng),
        "time": _time(rng),
        "city": rng.choice(_CITIES),
    }
    sentence = rng.choice(
        (
            "The {title} meeting takes place on {date} at {time} in {city}.",
            "On {date} there is a meeting about {title} in {city}, starting at {time}.",
            "{city}, {date}, {time}: the {title} meeting.",
        )
    )
    return sentence.format(**fields), fields


def _device(rng: random.Random) -> tuple[str, dict[str, Any]]:
    fields = {
        "host": _code(rng),
        "port": rng.randint(1, 65535),
        "owner": rng.choice(_FIRST_NAMES),
        "active": rng.random() < 0.5,
    }
    state = "active" if fields["active"] else "not active"
    sentence = rng.choice(
        (
            "The server {host} listens on port {port}, belongs to {owner} and is {state}.",
            "{owner} runs {host} on port {port}. It is {state}.",
        )
    )
    return sentence.format(state=state, **fields), fields


_SENTENCES = (_person, _order, _event, _device)


def _tool(name: str, description: str, properties: dict[str, Any]) -> Message:
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def _known_tool(rng: random.Random) -> tuple[str, Message, dict[str, Any]]:
    """A request in natural words, the tool it is for, and the arguments of the call."""
    name, description, parameters, requests = rng.choice(_KNOWN_TOOLS)
    arguments = {parameter: make(rng) for parameter, make in parameters.items()}
    properties = {
        parameter: {"type": "integer" if isinstance(value, int) else "string"} for parameter, value in arguments.items()
    }
    return rng.choice(requests).format(**arguments), _tool(name, description, properties), arguments


def _made_up_tool(rng: random.Random) -> tuple[str, Message, dict[str, Any]]:
    """As `_known_tool`, for a tool of a random name and parameters, so that names are read and not remembered."""
    verb, noun = rng.choice(_VERBS), rng.choice((rng.choice(_NOUNS), _word(rng)))
    arguments: dict[str, Any] = {}
    for parameter in rng.sample(_PARAMETERS, rng.randint(1, 3)):
        arguments[parameter] = rng.randint(0, 999) if parameter in _INTEGER_PARAMETERS else _mixed_text(rng)
    properties = {
        parameter: {"type": "integer" if isinstance(value, int) else "string"} for parameter, value in arguments.items()
    }
    given = " and ".join(f"{parameter} {value}" for parameter, value in arguments.items())
    request = rng.choice(("Please {} the {} with {}.", "{} the {} with {}", "I want to {} a {} with {}."))
    tool = _tool(f"{verb}_{noun}", f"{verb.capitalize()} a {noun}.", properties)
    return request.format(verb, noun, given), tool, arguments


def _mixed_text(rng: random.Random) -> str:
    return rng.choice((_word, _letters, _code))(rng)


_KNOWN_TOOLS: tuple[tuple[str, str, Mapping[str, Callable[[random.Random], str | int]], tuple[str, ...]], ...] = (
    (
        "get_weather",
        "Get the weather in a city.",
        {"city": lambda rng: rng.choice(_CITIES)},
        ("What is the weather in {city}?", "How is the weather in {city} today?", "Weather in {city}, please."),
    ),
    (
        "get_time",
        "Get the current time in a city.",
        {"city": lambda rng: rng.choice(_CITIES)},
        ("What time is it in {city}?", "Tell me the time in {city}."),
    ),
    (
        "send_message",
        "Send a message to a person.",
        {"recipient": lambda rng: rng.choice(_FIRST_NAMES), "text": lambda rng: f"{_word(rng)} {_word(rng)}"},
        ("Send the message '{text}' to {recipient}.", "Tell {recipient}: {text}"),
    ),
    (
        "set_alarm",
        "Set an alarm.",
        {"time": _time},
        ("Wake me up at {time}.", "Set an alarm for {time}."),
    ),
    (
        "search",
        "Search the library.",
        {"query": lambda rng: f"{_word(rng)} {_word(rng)}", "limit": lambda rng: rng.randint(1, 50)},
        ("Search for {query} and show {limit} results.", "Find up to {limit} entries about {query}."),
    ),
    (
        "book_flight",
        "Book a flight between two cities.",
        {
            "origin": lambda rng: rng.choice(_CITIES),
            "destination": lambda rng: rng.choice(_CITIES),
            "passengers": lambda rng: rng.randint(1, 9),
        },
        (
            "Book a flight from {origin} to {destination} for {passengers}.",
            "I need {passengers} seats from {origin} to {destination}.",
        ),
    ),
    (
        "multiply",
        "Multiply two integers.",
        {"a": lambda rng: rng.randint(2, 999), "b": lambda rng: rng.randint(2, 999)},
        ("What is {a} times {b}?", "Multiply {a} by {b}."),
    ),
)
