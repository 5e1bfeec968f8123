"""Incremental text: pieces joined equal the one-shot decode, and none ends inside a character."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_runtime.tokenizer import Tokenizer
from tests.moe_runtime.text_helpers import (
    byte_fallback_json,
    byte_level_json,
    harmony_tokenizer,
    word_piece_json,
)

TOKENIZERS = {
    "byte-level": byte_level_json,
    "byte-fallback": byte_fallback_json,
    "word-piece": word_piece_json,
}
MADE = {name: Tokenizer.from_json(make()) for name, make in TOKENIZERS.items()}
names = st.sampled_from(sorted(MADE))
any_text = st.text(st.characters(exclude_categories=("Cs",)), max_size=60)


def streamed(tokenizer, ids, *, skip_special_tokens=True):
    detokenizer = tokenizer.detokenizer(skip_special_tokens=skip_special_tokens)
    return [detokenizer.push(i) for i in ids] + [detokenizer.finish()]


@settings(max_examples=300, deadline=None)
@given(names, any_text)
def test_pieces_of_a_text_join_to_the_decode(name, text):
    tokenizer = MADE[name]
    ids = tokenizer.encode(text)
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


@settings(max_examples=500, deadline=None)
@given(names, st.lists(st.integers(0, 450), max_size=120), st.booleans())
def test_pieces_of_random_ids_join_to_the_decode(name, ids, skip):
    """Random ids are mostly invalid UTF-8, and some are unknown to the tokenizer."""
    tokenizer = MADE[name]
    pieces = streamed(tokenizer, ids, skip_special_tokens=skip)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=skip)


@settings(max_examples=300, deadline=None)
@given(any_text)
def test_byte_level_gives_text_back_exactly_and_whole(text):
    """Valid text never shows a replacement character, wherever the tokens cut it."""
    tokenizer = MADE["byte-level"]
    pieces = streamed(tokenizer, [i for byte in text.encode() for i in byte_ids(tokenizer, byte)])
    assert "".join(pieces) == text
    position = 0
    for piece in pieces:
        assert text.startswith(piece, position)
        position += len(piece)


def byte_ids(tokenizer, byte):
    return [next(i for i in range(300) if tokenizer.token_bytes(i) == bytes([byte]))]


def test_a_character_comes_with_its_last_byte():
    tokenizer = harmony_tokenizer()
    ids = [byte_ids(tokenizer, byte)[0] for byte in "\U0001f680".encode()]
    assert streamed(tokenizer, ids) == ["", "", "", "\U0001f680", ""]
    assert streamed(tokenizer, ids[:3]) == ["", "", "", "\ufffd"]


def test_long_text_streams_without_waiting_for_the_end():
    """The window of the general way moves on, and gives text token by token."""
    tokenizer = MADE["byte-fallback"]
    ids = tokenizer.encode("the a " * 200)
    pieces = streamed(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    assert all(pieces[1:-1]) and pieces[-1] == ""


@pytest.mark.parametrize("skip", [True, False])
def test_control_tokens_are_skipped_as_in_the_decode(skip):
    tokenizer = harmony_tokenizer()
    ids = tokenizer.encode("hello<|end|> world<think>")
    expected = "hello world<think>" if skip else "hello<|end|> world<think>"
    assert "".join(streamed(tokenizer, ids, skip_special_tokens=skip)) == expected
