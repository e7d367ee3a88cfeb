"""Stop strings against a search in the whole text."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.harmony.stop import StopStrings

STOPS = st.lists(st.text(alphabet="ab\n", min_size=1, max_size=6), max_size=5)
PIECES = st.lists(st.text(alphabet="abc\n", max_size=5), max_size=15)


def first_stop(text: str, stops: list[str]) -> tuple[int, str] | None:
    """Return the start of the first complete stop string, and the string: the one that ends first,
    of those the longest."""
    found = [(text.find(stop) + len(stop), text.find(stop), stop) for stop in stops if stop in text]
    return (min(found)[1], min(found)[2]) if found else None


@settings(max_examples=500, deadline=None)
@given(stops=STOPS, pieces=PIECES)
def test_any_split_gives_what_a_search_in_the_whole_text_gives(stops: list[str], pieces: list[str]) -> None:
    finder = StopStrings(stops)
    shown, matched, seen = "", None, ""
    for piece in pieces:
        seen += piece
        result = finder.push(piece)
        shown += result.text
        matched = result.matched
        expected = first_stop(seen, stops)
        if expected is not None:
            assert (shown, matched) == (seen[: expected[0]], expected[1])
            break
        assert matched is None
        held = max((k for stop in stops for k in range(len(stop)) if seen.endswith(stop[:k])), default=0)
        assert shown == seen[: len(seen) - held], "holds back exactly what could still become a stop string"
    if matched is None:
        assert shown + finder.flush() == seen
    assert finder.flush() == ""


def test_nothing_comes_after_a_match() -> None:
    finder = StopStrings(["END"])
    result = finder.push("text END more END")
    assert (result.text, result.matched) == ("text ", "END")
    after = finder.push("more")
    assert (after.text, after.matched) == ("", "END")
    assert finder.flush() == ""


def test_of_two_that_end_together_the_longest_wins() -> None:
    assert StopStrings(["b", "ab"]).push("xab").matched == "ab"
    assert StopStrings(["ab", "b"]).push("xab").matched == "ab"


def test_without_stop_strings_nothing_is_held() -> None:
    assert StopStrings([]).push("text").text == "text"


def test_many_long_stop_strings() -> None:
    stops = ["a" * 999 + chr(0x4E00 + index) for index in range(64)]
    finder = StopStrings(stops)
    text = ("a" * 998 + "b") * 20 + "a" * 1500
    shown = "".join(finder.push(text[at : at + 7]).text for at in range(0, len(text), 7))
    assert shown == text[:-999]
    result = finder.push("\u4e05")
    assert (result.text, result.matched) == ("", stops[5])


def test_empty_stop_string_is_our_bug() -> None:
    with pytest.raises(ValueError, match="empty"):
        StopStrings(["x", ""])
