"""Listed patterns: prompts that hold one are refused, answers end before one."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenmill.errors import ConfigError, RequestError
from tokenmill.server.config import FilterConfig
from tokenmill.server.filter import Blocked, Filter
from tokenmill.server.filters.banned import FILTER


def banned(folder: Path, text: str) -> Filter:
    file = folder / "patterns.txt"
    file.write_text(text)
    return FILTER(FilterConfig(banned_patterns=str(file)))


async def read(chain: Filter, pieces: list[str]) -> tuple[str, bool]:
    """What goes out, and whether the filter ended it."""
    stream, out = chain.stream(), ""
    try:
        for piece in pieces:
            out += await stream.push(piece)
        return out + await stream.finish(), False
    except Blocked as end:
        return out + end.text, True


async def test_prompts_that_hold_a_pattern_are_refused_without_quoting(tmp_path: Path) -> None:
    chain = banned(tmp_path, "# names\n\n(?i)project (blue|red)bird\n")
    assert await chain.text("Project greenbird") == "Project greenbird"
    with pytest.raises(RequestError) as caught:
        await chain.text("about PROJECT bluebird")
    assert caught.value.code == "content_refused"
    assert "bluebird" not in caught.value.message.lower()


@settings(max_examples=100, deadline=None)
@given(cuts=st.lists(st.integers(0, 30), max_size=8))
async def test_an_answer_ends_before_the_pattern_however_it_is_split(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[int]
) -> None:
    chain = banned(tmp_path_factory.mktemp("banned"), "se+cret\nbird(?!s)\n")
    for text, expected in (
        ("birds sing. The seecret is", ("birds sing. The ", True)),
        ("birds sing of a secre", ("birds sing of a secre", False)),
        ("one bird", ("one ", True)),
    ):
        at = sorted(min(cut, len(text)) for cut in cuts)
        pieces = [text[begin:end] for begin, end in zip([0, *at], [*at, len(text)], strict=True)]
        assert await read(chain, pieces) == expected


async def test_a_pattern_that_takes_for_ever_counts_as_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenmill.server.filters.banned._TIMEOUT_S", 0.01)
    chain = banned(tmp_path, r"(?:a|aa|aaa)+\d$" + "\n")
    with pytest.raises(RequestError, match="banned"):
        await chain.text("a" * 60 + "!")
    assert (await read(chain, ["a" * 60, "!"]))[1]


@pytest.mark.parametrize(
    ("text", "code", "word"),
    [
        ("ok\n(open", "invalid_pattern", "line 2"),
        ("x*", "invalid_pattern", "empty text"),
        ("a(?!bc)|d", "invalid_pattern", "its own line"),
        (None, "file_unreadable", ""),
    ],
)
def test_a_wrong_file_is_told(tmp_path: Path, text: str | None, code: str, word: str) -> None:
    file = tmp_path / "patterns.txt"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        FILTER(FilterConfig(banned_patterns=str(file)))
    assert caught.value.code == code
    assert word in caught.value.message


def test_without_a_file_there_is_no_filter() -> None:
    with pytest.raises(ConfigError) as caught:
        FILTER(FilterConfig())
    assert (caught.value.code, caught.value.field) == ("missing_option", "banned_patterns")
