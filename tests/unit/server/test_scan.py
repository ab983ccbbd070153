"""Patterns in a text that comes in pieces: the same result however it is split."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenmill.server.scan import Pattern, Scanner, scan

PATTERNS = (
    Pattern(r"ab+c?", lambda text: (len(text), "<1>")),
    Pattern(r"(?<!x)cd(?!e)", lambda text: (len(text), "<2>")),
    Pattern(r"b{2,4}a\b", lambda text: None if text == "bba" else (len(text) - 1, "<3>")),
    Pattern(r"(?:e|ee)d", lambda text: (len(text), "")),
)


def pieces_of(draw: st.DrawFn, text: str) -> list[str]:
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=12)))
    return [text[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]


@st.composite
def split_texts(draw: st.DrawFn) -> tuple[str, list[str]]:
    text = draw(st.text(alphabet="abcdex ", max_size=40))
    return text, pieces_of(draw, text)


@given(split_texts())
def test_the_split_makes_no_difference(case: tuple[str, list[str]]) -> None:
    text, pieces = case
    scanner = Scanner(PATTERNS, 1.0)
    assert "".join(scanner.push(piece) for piece in pieces) + scanner.finish() == scan(text, PATTERNS, 1.0)


def test_only_what_may_become_a_match_is_held_back() -> None:
    scanner = Scanner((Pattern("secret word", lambda text: (len(text), "***")),), 1.0)
    assert scanner.push("no secrets here, ") == "no secrets here, "
    assert scanner.push("one sec") == "one "
    assert scanner.push("ond") == "second"
    assert scanner.push(" secret ") == " "
    assert scanner.push("word!") == "***!"
    assert scanner.finish() == ""


def test_a_pattern_may_look_back_at_what_went_out() -> None:
    scanner = Scanner((Pattern("(?<=id: )[0-9]+", lambda text: (len(text), "N")),), 1.0)
    assert scanner.push("id: ") == "id: "
    assert scanner.push("12") + scanner.push("3 4") + scanner.finish() == "N 4"


def test_the_beginning_is_only_at_the_beginning() -> None:
    scanner = Scanner((Pattern("^a", lambda text: (len(text), "A")),), 1.0)
    assert scanner.push("a") + scanner.push("a") + scanner.finish() == "Aa"


@pytest.mark.parametrize("pieces", [["one stop two"], list("one stop two"), ["one st", "op two"]])
def test_a_pattern_can_end_the_text(pieces: list[str]) -> None:
    scanner = Scanner((Pattern("stop", lambda text: (len(text), None)),), 1.0)
    assert "".join(scanner.push(piece) for piece in pieces) + scanner.finish() == "one "
    assert scanner.stopped
