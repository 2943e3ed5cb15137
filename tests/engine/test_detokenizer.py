"""Text as it grows: whole characters only, and nothing shown that a stop string takes back."""

from __future__ import annotations

import itertools
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from nanopd_lab.engine.detokenizer import Detokenizer


class Bytes:
    """A byte-level tokenizer: a token is a byte."""

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return bytes(ids).decode("utf-8", errors="replace")


@given(text=st.text(max_size=30), prompt=st.text(max_size=10))
def test_stream_is_a_growing_prefix_and_complete(text: str, prompt: str) -> None:
    reader = Detokenizer(Bytes(), list(prompt.encode()))
    for byte in text.encode():
        before = reader.text
        reader.push(byte)
        assert reader.text.startswith(before)
        assert text.startswith(reader.text)
    reader.end()
    assert reader.text == text


@given(
    text=st.text(alphabet="abc", max_size=40),
    stop=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
)
def test_stop_strings(text: str, stop: list[str]) -> None:
    reader = Detokenizer(Bytes(), [], stop)
    shown, stopped = "", None
    for byte in text.encode():
        stopped = reader.push(byte)
        assert reader.text.startswith(shown), "something shown was taken back"
        shown = reader.text
        if stopped:
            break
    stopped = stopped or reader.end()
    # The first prefix that contains a stop string ends the text; it is cut where that string begins.
    for end in range(len(text) + 1):
        hits = [(at, s) for s in stop if (at := text[:end].find(s)) >= 0]
        if hits:
            assert (reader.text, stopped) == (text[: min(hits)[0]], min(hits)[1])
            return
    assert stopped is None
    assert reader.text == text


def test_the_stop_string_can_be_kept() -> None:
    reader = Detokenizer(Bytes(), [], ["END"], include_stop=True)
    assert [reader.push(byte) for byte in b"x END"] == [None, None, None, None, "END"]
    assert reader.text == "x END"


def test_a_stop_string_before_min_tokens_is_text_like_any_other() -> None:
    """And one that begins before and is complete there ends the text."""
    reader = Detokenizer(Bytes(), [], ["ab"], min_tokens=4)
    assert [reader.push(byte) for byte in b"abca"] == [None] * 4
    assert reader.push(*b"b") == "ab"
    assert reader.text == "abc"
    late = Detokenizer(Bytes(), [], ["bc"], min_tokens=3)
    assert [late.push(byte) for byte in b"abc"] == [None, None, "bc"]


def test_an_unfinished_character_is_shown_at_the_end() -> None:
    reader = Detokenizer(Bytes(), [])
    for byte in "ab€".encode()[:-1]:
        reader.push(byte)
    assert reader.text == "ab"
    reader.end()
    assert reader.text == "ab\ufffd"


class Marked(Bytes):
    """With special tokens, which are no text; counts what it decodes."""

    all_special_ids = (256, 257)
    decoded = 0

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        self.decoded += len(ids)
        return super().decode([token for token in ids if token < 256])


@given(
    tokens=st.lists(st.one_of(st.integers(0, 257), st.just([257] * 20)), max_size=30),
    stop=st.sampled_from(["", "a", "ab"]),
)
def test_special_tokens_are_no_text_however_many(tokens: list[Any], stop: str) -> None:
    flat = [each for token in tokens for each in (token if isinstance(token, list) else [token])]
    reader, plain = Detokenizer(Marked(), [], stop and [stop]), Detokenizer(Bytes(), [], stop and [stop])
    for number, token in enumerate(flat, 1):
        assert reader.push(token) == (plain.push(token) if token < 256 else None)
        assert (reader.text, reader.num_pushed) == (plain.text, number)
    assert (reader.end(), reader.text) == (plain.end(), plain.text)


def test_tokens_without_text_are_not_decoded_again_for_ever() -> None:
    """`ignore_eos` goes on behind the end of an answer, mostly with one stop token after the other."""
    tokenizer = Marked()
    reader = Detokenizer(tokenizer, list(b"ab"))
    for token in [99, *[256] * 2000, 100]:
        reader.push(token)
    assert reader.text == "cd"
    assert tokenizer.decoded < 2000 * 64


@given(
    prompt=st.binary(max_size=8), output=st.binary(max_size=24), cuts=st.lists(st.integers(0, 24), max_size=3)
)
def test_several_tokens_at_once_are_the_same_text(prompt: bytes, output: bytes, cuts: list[int]) -> None:
    """Also where the bytes are no text."""
    one_by_one, at_once = Detokenizer(Bytes(), list(prompt)), Detokenizer(Bytes(), list(prompt))
    for byte in output:
        one_by_one.push(byte)
    for begin, end in itertools.pairwise([0, *sorted(cuts), len(output)]):
        at_once.push(*output[begin:end])
    one_by_one.end()
    at_once.end()
    assert at_once.text == one_by_one.text
