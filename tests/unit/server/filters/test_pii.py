"""Personal data becomes its kind in brackets; what only looks like it stays."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenmill.server.config import FilterConfig
from tokenmill.server.filters.pii import FILTER

PII = FILTER(FilterConfig())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Mail bob.smith+x@mail.example.co.uk now", "Mail [EMAIL] now"),
        ("<a@b.de>, (c@d.org).", "<[EMAIL]>, ([EMAIL])."),
        ("müller@example.de", "[EMAIL]"),
        ("Call +1 (555) 123-4567 or +49 30 1234567.", "Call [PHONE] or [PHONE]."),
        ("555-123-4567, (555) 123-4567, 030 1234567", "[PHONE], [PHONE], [PHONE]"),
        ("4111 1111 1111 1111 and 4111111111111111", "[CARD] and [CARD]"),
        ("378282246310005, 3782 822463 10005", "[CARD], [CARD]"),
        ("DE89 3704 0044 0532 0130 00 AND MORE", "[IBAN] AND MORE"),
        ("GB29NWBK60161331926819.", "[IBAN]."),
        ("from 10.0.0.1, 192.168.17.3.", "from [IP], [IP]."),
        ("at fe80::1: and 2001:db8:0:0:0:0:2:1", "at [IP]: and [IP]"),
        ('{"mail": "a@b.de", "ip": "10.0.0.1"}', '{"mail": "[EMAIL]", "ip": "[IP]"}'),
    ],
)
async def test_what_is_redacted(text: str, expected: str) -> None:
    assert await PII.text(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "4111 1111 1111 1112",  # the check digit is wrong
        "DE88 3704 0044 0532 0130 00",  # and here the check sum
        "order 1234567890 of 2026-11-25 at 12:30:45",
        "version 3.11.2, address 1.2.3.400, std::vector, x :: y",
        "@decorator and user@host and a@b.",
        "0000 0000 0000 0000",
        "pi is 3.14159265358979",
    ],
)
async def test_what_stays(text: str) -> None:
    assert await PII.text(text) == text


SNIPPETS = st.sampled_from(
    [
        *("a@b.de", "x.y+z@mail.example.org", "@", ".", "+1 (555) 123-4567", "555-123-4567", "0", "12", " ", "-"),
        *("4111 1111 1111 1111", "4111 1111", "DE89 3704 0044 0532 0130 00", "DE89", " AND", "10.0.0.1", "10.0."),
        *("fe80::1", "::", ":", "hello", "The", "ä", "(", ")", "\n", "378282246310005"),
    ]
)


@settings(max_examples=200, deadline=None)
@given(st.lists(SNIPPETS, max_size=12).map("".join), st.lists(st.integers(1, 9), max_size=60))
async def test_an_answer_in_pieces_is_redacted_as_a_whole(text: str, sizes: list[int]) -> None:
    stream, out, at = PII.stream(), "", 0
    for size in sizes:
        out += await stream.push(text[at : at + size])
        at += size
    out += await stream.push(text[at:])
    assert out + await stream.finish() == await PII.text(text)


async def test_a_long_text_is_redacted_too() -> None:
    assert await PII.text("word " * 2000 + "a@b.de") == "word " * 2000 + "[EMAIL]"
