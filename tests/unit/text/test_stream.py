"""TextStream: the pieces add up to the text whatever the chunks, and stop strings cut exactly."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenmill.text.stream import Piece, TextStream
from tokenmill.text.tokenizer import Tokenizer

TEXTS = st.text(st.sampled_from("abSTOP é你😀🎉\n"), max_size=30)


def chunks(data: st.DataObject, ids: Sequence[int]) -> list[Sequence[int]]:
    """`ids` cut at drawn places."""
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=8)))
    return [ids[start:end] for start, end in zip([0, *cuts], [*cuts, len(ids)], strict=True)]


def run(stream: TextStream, parts: Sequence[Sequence[int]]) -> list[Piece]:
    """Pushes all parts, the last as final, and stops where the stream does."""
    pieces = []
    for index, part in enumerate(parts):
        pieces.append(stream.push(part, final=index == len(parts) - 1))
        if pieces[-1].stop is not None:
            break
    return pieces


@given(data=st.data(), skip=st.booleans())
def test_any_tokens_in_any_chunks_give_their_text(byte_level: Tokenizer, data: st.DataObject, skip: bool) -> None:
    ids = data.draw(st.lists(st.integers(0, byte_level.vocab_size + 2)))
    stream = TextStream(byte_level, [40], skip_special_tokens=skip)
    pieces = run(stream, chunks(data, ids))
    assert "".join(piece.text for piece in pieces) == byte_level.decode(ids, skip)
    assert sum(piece.tokens for piece in pieces) == len(ids)


@given(data=st.data(), text=TEXTS, with_prompt=st.booleans())
def test_sentencepiece_in_any_chunks(
    sentencepiece: Tokenizer, data: st.DataObject, text: str, with_prompt: bool
) -> None:
    prompt = sentencepiece.encode("prompt") if with_prompt else []
    ids = sentencepiece.encode(text)
    pieces = run(TextStream(sentencepiece, prompt), chunks(data, ids))
    whole = sentencepiece.decode(prompt + ids).removeprefix(sentencepiece.decode(prompt))
    assert "".join(piece.text for piece in pieces) == whole


@given(
    data=st.data(),
    text=TEXTS,
    stop=st.lists(st.text(st.sampled_from("abSTOP é你😀"), min_size=1, max_size=4), max_size=3),
    include=st.booleans(),
)
def test_stop_strings_in_any_chunks(
    byte_level: Tokenizer, data: st.DataObject, text: str, stop: list[str], include: bool
) -> None:
    ids = byte_level.encode(text)
    pieces = run(TextStream(byte_level, [40], stop, include), chunks(data, ids))
    got = "".join(piece.text for piece in pieces)

    # The plain statement: the shortest beginning of the output that holds a stop string ends there.
    for count in range(len(ids) + 1):
        so_far = byte_level.decode(ids[:count]).rstrip("\ufffd")
        found = [(so_far.index(word), word) for word in stop if word in so_far]
        if found:
            start, word = min(found, key=lambda match: match[0])
            assert pieces[-1].stop == word
            assert got == so_far[:start] + (word if include else "")
            assert sum(piece.tokens for piece in pieces) == count
            return
    assert got == text
    assert all(piece.stop is None for piece in pieces)


def test_characters_come_out_whole_and_at_once(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("x🎊y")
    stream = TextStream(byte_level, [])
    texts = [stream.push([i], final=False).text for i in ids]
    assert len(ids) >= 4
    assert [text for text in texts if text] == ["x", "🎊", "y"]


def test_text_that_may_begin_a_stop_string_waits_and_is_then_released(byte_level: Tokenizer) -> None:
    stream = TextStream(byte_level, [], stop=["STOP"])
    assert stream.push(byte_level.encode("a ST"), final=False).text == "a "
    assert stream.push(byte_level.encode("EP"), final=False).text == "STEP"
    assert stream.push(byte_level.encode("S"), final=False).text == ""
    assert stream.push([], final=True) == Piece("S", None, 0)


def test_after_the_stop_nothing_comes(byte_level: Tokenizer) -> None:
    stream = TextStream(byte_level, [], stop=["b"])
    ids = [byte_level.encode(char)[0] for char in "abc"]
    assert stream.push(ids, final=False) == Piece("a", "b", 2)
    assert stream.push(ids, final=True) == Piece("", None, 0)


def test_stop_strings_do_not_count_in_the_first_tokens(byte_level: Tokenizer) -> None:
    ids = [byte_level.encode(char)[0] for char in "bbab"]
    assert TextStream(byte_level, [], stop=["b"], min_tokens=2).push(ids, final=True) == Piece("bba", "b", 4)


def test_unfinished_character_is_shown_as_replacement_at_the_end(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("🎊")[:-1]
    stream = TextStream(byte_level, [])
    assert stream.push(ids, final=False).text == ""
    assert stream.push([], final=True).text == "\ufffd"


@pytest.mark.parametrize("split", [1, 2, 3])
def test_character_begun_in_the_prompt_is_finished(byte_level: Tokenizer, split: int) -> None:
    ids = byte_level.encode("🎊")
    stream = TextStream(byte_level, byte_level.encode("so ") + ids[:split])
    assert stream.push(ids[split:], final=True).text == ("🎊" if split < len(ids) else "")
