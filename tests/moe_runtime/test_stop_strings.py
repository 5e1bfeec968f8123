"""Stop strings: the text before the first one, however it is cut into pieces."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_runtime.stop_strings import StopStrings, check_stops

short = st.text("ab\u4f60", max_size=30)
stop_lists = st.lists(st.text("ab\u4f60", min_size=1, max_size=4), max_size=4)


def expected_cut(text, stops):
    """Grow the text by one character at a time; the longest stop string at its end ends it."""
    for end in range(len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end - len(stop)], stop
    return text, None


def run(stops, pieces):
    stream = StopStrings(stops)
    out = [stream.push(piece) for piece in pieces]
    return out + ["" if stream.matched else stream.finish()], stream.matched


@settings(max_examples=500)
@given(st.lists(short, max_size=8), stop_lists)
def test_equals_the_search_in_the_whole_text(pieces, stops):
    out, matched = run(stops, pieces)
    assert ("".join(out), matched) == expected_cut("".join(pieces), stops)


@settings(max_examples=300)
@given(short, stop_lists)
def test_no_more_is_held_back_than_needed(text, stops):
    """After each character, what is held is the longest end that may begin a stop string."""
    stream = StopStrings(stops)
    given_out = ""
    for i, character in enumerate(text):
        given_out += stream.push(character)
        if stream.matched:
            return
        seen = text[: i + 1]
        ends = [seen[k:] for k in range(len(seen) + 1)]
        held = next(e for e in ends if not e or any(s.startswith(e) for s in stops))
        assert given_out == seen.removesuffix(held)


def test_a_stop_string_that_spans_three_pieces():
    assert run(["</end>"], ["Hi <", "/en", "d> more"]) == (["Hi ", "", "", ""], "</end>")


def test_a_false_beginning_is_given_out():
    assert run(["</end>"], ["a </", "b> c"]) == (["a ", "</b> c", ""], None)


@pytest.mark.parametrize(
    ("stop", "expected"), [(None, ()), ("x", ("x",)), (["x", "yz"], ("x", "yz"))]
)
def test_check_stops(stop, expected):
    assert check_stops(stop) == expected


@pytest.mark.parametrize("stop", ["", [""], [3], ["a", None]])
def test_check_stops_refuses(stop):
    with pytest.raises(ValueError, match="stop: expected"):
        check_stops(stop)
