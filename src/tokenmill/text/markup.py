"""Reading markup while it arrives: a cursor over text that comes in pieces, and parsers made of generators.

A dialect's syntax is written as one reads it, top down, in a generator that yields None where it needs more text. So
where the text is cut makes no difference, and each character is looked at a bounded number of times.

A call is held back until it is complete and known to be well formed. Sending its arguments as they come would be
quicker to see, but a call that then breaks could not come back as text: part of it would be out, as something else.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Sequence
from typing import TypeVar, cast

import msgspec

from tokenmill.text.delta import Content, Delta, Functions, ToolArguments, ToolCall

__all__ = [
    "Ends",
    "Found",
    "Malformed",
    "Read",
    "Reader",
    "StreamParser",
    "all_of",
    "call_of",
    "calls_in_content",
    "checked_call",
]

T = TypeVar("T")
Read = Generator[None, None, T]
"""Something being read; yields when the text so far is used up."""

_WHITESPACE = " \t\r\n"
_SPACES = re.compile(rf"[{_WHITESPACE}]+")
_JSON_PLAIN = re.compile(r"[ \t\r\n0-9aeflnrstuE+\-.,:]+")
_KEY = re.compile(r"\w+")
_JSON_STRINGS = {'"': re.compile(r'[^"\\\x00-\x1f]+')}
_PYTHON_PLAIN = re.compile(r"[\w \t\r\n+\-.,:=]+")
_PYTHON_STRINGS = {quote: re.compile(rf"[^{quote}\\]+") for quote in "\"'"}
_CLOSING = {"{": "}", "[": "]", "(": ")"}
_DEEPEST = 64


class Malformed(Exception):
    """The text is not what the syntax demands; the reader stands where that became certain."""


class Found(msgspec.Struct, frozen=True):
    """A well-formed call of a function that may be called."""

    name: str
    arguments: str


class Ends:
    """Texts to look for in a stream, each of at least two characters."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = tuple(texts)
        self._longest = max(map(len, texts), default=1)
        self._first = frozenset(text[0] for text in texts)
        self._pattern = re.compile("|".join(map(re.escape, texts)) or r"(?!)")

    def search(self, text: str, start: int = 0) -> re.Match[str] | None:
        """The first of the texts at or after `start`."""
        return self._pattern.search(text, start)

    def undecided(self, text: str, start: int = 0) -> int:
        """Length of the longest end of `text`, from `start` on, with which one of the texts begins."""
        for at in range(max(start, len(text) - self._longest + 1), len(text)):
            if text[at] in self._first and any(each.startswith(text[at:]) for each in self._texts):
                return len(text) - at
        return 0

    def remove(self, text: str) -> tuple[str, str]:
        """`text` without the texts, and its end that may still become one of them."""
        kept, start = [], 0
        for match in self._pattern.finditer(text):
            kept.append(text[start : match.start()])
            start = match.end()
        hold = len(text) - self.undecided(text, start)
        return "".join([*kept, text[start:hold]]), text[hold:]


class Reader:
    """A cursor over text that comes in pieces. `passed` collects what was read, so that it can be given back."""

    def __init__(self) -> None:
        self.passed: list[str] = []
        self._piece = ""
        self._at = 0
        self._closed = False

    def feed(self, text: str) -> None:
        """Adds text."""
        self._piece = self._piece[self._at :] + text
        self._at = 0

    def close(self) -> None:
        """No more text comes: nothing waits for it any longer."""
        self._closed = True

    def rest(self) -> str:
        """Takes the unread text, without passing it."""
        rest = self._piece[self._at :]
        self._piece, self._at = "", 0
        return rest

    def peek(self) -> Read[str]:
        """The next character; empty at the end of the text."""
        while self._at == len(self._piece):
            if self._closed:
                return ""
            yield
        return self._piece[self._at]

    def take(self, run: re.Pattern[str]) -> Read[str]:
        """The longest text that `run`, one character class repeated, matches; possibly empty."""
        start = len(self.passed)
        while (yield from self.peek()) and (match := run.match(self._piece, self._at)):
            self._at = match.end()
            self.passed.append(match[0])
        return "".join(self.passed[start:])

    def spaces(self) -> Read[str]:
        """Whitespace, possibly none."""
        return (yield from self.take(_SPACES))

    def literal(self, text: str) -> Read[bool]:
        """Reads `text` if it comes next, else nothing."""
        for index, char in enumerate(text):
            if (yield from self.peek()) != char:
                self._unread(text[:index])
                return False
            self._at += 1
        self.passed.append(text)
        return True

    def expect(self, text: str) -> Read[None]:
        """Reads `text`.

        Raises:
            Malformed: something else comes.
        """
        if not (yield from self.literal(text)):
            raise Malformed

    def until(self, ends: Ends) -> Read[tuple[str, str]]:
        """Text before the first of `ends`, as far as it is certain now, and that end.

        The end is empty when none has come yet: call again. At the end of the text both are empty.
        """
        while (yield from self.peek()):
            if match := ends.search(self._piece, self._at):
                text, end = self._piece[self._at : match.start()], match[0]
            else:
                hold = 0 if self._closed else ends.undecided(self._piece, self._at)
                text, end = self._piece[self._at : len(self._piece) - hold], ""
            self._at += len(text) + len(end)
            if text or end:
                self.passed += [text, end]
                return text, end
            yield
        return "", ""

    def json(self, first_keys: Sequence[str] = ()) -> Read[str]:
        """The text of a JSON object, if its inside is well formed too, which `checked_call` knows.

        Args:
            first_keys: what its first key may be; empty for anything.

        Raises:
            Malformed: at the first character that no JSON can have there.
        """
        start = len(self.passed)
        yield from self.expect("{")
        if first_keys:
            yield from self.spaces()
            yield from self.expect('"')
            if (yield from self.take(_KEY)) not in first_keys:
                raise Malformed
            yield from self.expect('"')
        yield from self._nested("{", _JSON_PLAIN, _JSON_STRINGS)
        return "".join(self.passed[start:])

    def python_call(self) -> Read[str]:
        """The text of a Python call's arguments with its parentheses, if its inside is well formed too.

        Raises:
            Malformed: at the first character that no arguments made of literals can have there.
        """
        start = len(self.passed)
        yield from self.expect("(")
        yield from self._nested("(", _PYTHON_PLAIN, _PYTHON_STRINGS)
        return "".join(self.passed[start:])

    def _nested(self, opening: str, plain: re.Pattern[str], strings: dict[str, re.Pattern[str]]) -> Read[None]:
        """Text up to the bracket that closes one just read."""
        open_brackets = [opening]
        while open_brackets:
            yield from self.take(plain)
            char = yield from self.peek()
            if char in strings:
                yield from self._string(char, strings[char])
            elif char in _CLOSING and len(open_brackets) < _DEEPEST:
                yield from self.expect(char)
                open_brackets.append(char)
            else:
                yield from self.expect(_CLOSING[open_brackets.pop()])

    def _string(self, quote: str, inside: re.Pattern[str]) -> Read[None]:
        yield from self.expect(quote)
        yield from self.take(inside)
        while not (yield from self.literal(quote)):
            yield from self.expect("\\")
            self.passed.append((yield from self.peek()))
            self._at += len(self.passed[-1])
            yield from self.take(inside)

    def _unread(self, text: str) -> None:
        if self._at >= len(text):
            self._at -= len(text)
        else:  # it came in several pieces
            self._piece = text + self._piece[self._at :]
            self._at = 0


class _Calls:
    """Numbers the calls of one answer."""

    def __init__(self, new_id: Callable[[], str]) -> None:
        self._new_id = new_id
        self.count = 0

    def deltas(self, found: Found) -> list[Delta]:
        index = self.count
        self.count += 1
        return [ToolCall(index, self._new_id(), found.name), ToolArguments(index, found.arguments)]


class StreamParser:
    """A parser that is one generator over the whole text: it yields deltas and calls, and None to get more text.

    What is left when it returns is content.
    """

    def __init__(
        self,
        read: Callable[[Reader], Generator[Delta | Found | None, None, None]],
        new_id: Callable[[], str],
    ) -> None:
        self._reader = Reader()
        self._read = read(self._reader)
        self._calls = _Calls(new_id)

    def push(self, text: str) -> list[Delta]:
        """What is certain now that `text` has come."""
        self._reader.feed(text)
        deltas: list[Delta] = []
        for each in self._read:
            if each is None:
                return deltas
            self._reader.passed.clear()
            deltas += self._calls.deltas(each) if isinstance(each, Found) else [each]
        rest = self._reader.rest()
        return [*deltas, Content(rest)] if rest else deltas

    def finish(self) -> list[Delta]:
        """What was held back."""
        self._reader.close()
        return self.push("")


def calls_in_content(
    opening: str, read: Callable[[Reader], Generator[Found | None, None, None]], bare: str = ""
) -> Callable[[Reader], Generator[Delta | Found | None, None, None]]:
    """Content with calls in it, for `StreamParser`.

    Whitespace around calls is markup, not content: what stands before the first of them when nothing else does, and
    what stands after each.

    Args:
        opening: the text with which calls begin, anywhere; empty when there is none.
        read: reads calls from there on. It yields each as soon as it is certain, and None to get more text. When it
            raises Malformed, what it has passed since the last call is content.
        bare: the character with which calls may also begin, where nothing but whitespace stands before.
    """
    ends = Ends([opening] if opening else [])

    def read_all(reader: Reader) -> Generator[Delta | Found | None, None, None]:
        pending = yield from reader.spaces()  # content, unless a call is next to it
        reader.passed.clear()
        begins = bool(bare) and (yield from reader.peek()) == bare
        called = False
        while begins or (yield from reader.peek()):
            if not begins:
                text, end = yield from reader.until(ends)
                if text:
                    yield Content(pending + text)
                    pending = ""
                if not end:
                    continue
                reader.passed[:] = [end]
            begins = False
            try:
                for found in read(reader):
                    if found is not None:
                        pending, called = "", True
                    yield found
                space = yield from reader.spaces()
                pending = space if called else pending + space
                reader.passed.clear()
            except Malformed:
                if text := pending + "".join(reader.passed):
                    yield Content(text)
                pending = ""
        if pending and not called:
            yield Content(pending)

    return read_all


def all_of(reading: Read[T]) -> T:
    """The result of reading from a closed reader, which never waits."""
    try:
        next(reading)
    except StopIteration as end:
        return cast(T, end.value)
    raise RuntimeError("the reader is not closed")


class _Written(msgspec.Struct):
    """A call as most models write it; Llama says parameters."""

    name: str
    arguments: msgspec.Raw = msgspec.Raw(b"")
    parameters: msgspec.Raw = msgspec.Raw(b"")


def call_of(text: str, functions: Functions) -> Found:
    """The call that a JSON object with ``name`` and ``arguments`` (or ``parameters``) describes.

    Raises:
        Malformed: it is no such object, or the function is not among `functions`.
    """
    try:
        written = _CALL.decode(text)
    except (ValueError, RecursionError):
        raise Malformed from None
    arguments = bytes(written.arguments) or bytes(written.parameters)
    return checked_call(written.name, "{}" if arguments in (b"", b"null") else arguments.decode(), functions)


def checked_call(name: str, arguments: str, functions: Functions) -> Found:
    """A call of `name` with the JSON text `arguments`.

    Raises:
        Malformed: they are no JSON object, or the function is not among `functions`.
    """
    try:
        _OBJECT.decode(arguments)
    except (ValueError, RecursionError):
        raise Malformed from None
    if name not in functions:
        raise Malformed
    return Found(name, arguments)


_CALL = msgspec.json.Decoder(_Written)
_OBJECT = msgspec.json.Decoder(dict[str, msgspec.Raw])
