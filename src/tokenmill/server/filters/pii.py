"""Takes personal data out of prompts and answers: e-mail and IP addresses, phone, card and account numbers.

Each is replaced by its kind in brackets, as ``[EMAIL]``. Card numbers must have the right check digit (Luhn), account
numbers (IBAN) the right check sum, so that other long numbers stay.

Source: https://www.iso.org/standard/70484.html (card numbers), https://www.iso.org/standard/81090.html (IBAN)
"""

from __future__ import annotations

import ipaddress
import re

from tokenmill.server.aside import aside
from tokenmill.server.config import FilterConfig
from tokenmill.server.filter import Filter, TextFilter
from tokenmill.server.scan import Pattern, Scanner, scan

__all__ = ["FILTER"]

_TIMEOUT_S = 10.0

_EMAIL = r"(?<![\w.+-])\w[\w.%+-]{0,63}@(?:[^\W_][\w-]{0,62}\.)+[^\W\d_]{2,24}(?![\w-])"
_IBAN = r"(?<!\w)[A-Z]{2}\d{2}(?: ?[A-Z0-9]){11,30}(?![a-z])"
_CARD = (
    r"(?<![\w.+])(?:\d{13,19}|\d{4}([ -])\d{4}\1\d{4}\1\d{4}(?:\1\d{1,3})?|3[47]\d{2}([ -])\d{6}\2\d{5}"
    r"|3\d{3}([ -])\d{6}\3\d{4})(?!\w)"
)
_IPV4 = r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w]|\.\d)"
_IPV6 = r"(?<![\w:.])[0-9A-Fa-f:]{3,39}(?:(?<=:)(?:\d{1,3}\.){3}\d{1,3})?(?![\w:])"
_PHONE = (
    r"(?<![\w+.-])(?:\+\d(?:[ .)-]{0,2}\(?\d){6,14}|\(\d{3}\) ?\d{3}[ .-]\d{4}|\d{3}([ .-])\d{3}\1\d{4}"
    r"|0\d{2,4}[ /-]\d{5,8})(?!\w)"
)


def _email(text: str) -> tuple[int, str]:
    return len(text), "[EMAIL]"


def _iban(text: str) -> tuple[int, str] | None:
    """The longest beginning that is an account number: words in capitals may follow one."""
    for end in range(len(text), 14, -1):
        compact = text[:end].replace(" ", "")
        if len(compact) >= 15 and not text[end : end + 1].isalnum() and text[end - 1] != " " and _checks(compact):
            return end, "[IBAN]"
    return None


def _checks(iban: str) -> bool:
    return int("".join(str(int(letter, 36)) for letter in iban[4:] + iban[:4])) % 97 == 1


def _card(text: str) -> tuple[int, str] | None:
    digits = [int(digit) for digit in text if digit.isdecimal()]
    doubled = [sum(divmod(2 * digit, 10)) for digit in digits[-2::-2]]
    return (len(text), "[CARD]") if (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0 and any(digits) else None


def _ip(text: str) -> tuple[int, str] | None:
    known = text.rstrip(":")  # of a sentence, as in "from fe80::1:"
    if known.endswith(":") or not re.search(r"[\dA-Fa-f]", known):
        return None
    try:
        ipaddress.ip_address(known)
    except ValueError:
        return None
    return len(known), "[IP]"


def _phone(text: str) -> tuple[int, str]:
    return len(text), "[PHONE]"


_PATTERNS = (
    Pattern(_EMAIL, _email),
    Pattern(_IBAN, _iban),
    Pattern(_CARD, _card),
    Pattern(_IPV4, _ip),
    Pattern(_IPV6, _ip),
    Pattern(_PHONE, _phone),
)


class _Redaction:
    """One answer."""

    def __init__(self) -> None:
        self._scanner = Scanner(_PATTERNS, _TIMEOUT_S)

    async def push(self, text: str) -> str:
        return self._scanner.push(text)

    async def finish(self) -> str:
        return self._scanner.finish()


class _Pii(Filter):
    async def text(self, text: str) -> str:
        return await aside(len(text), lambda: scan(text, _PATTERNS, _TIMEOUT_S))

    def stream(self) -> TextFilter:
        return _Redaction()


def FILTER(_: FilterConfig) -> Filter:
    """Takes no options."""
    return _Pii()
