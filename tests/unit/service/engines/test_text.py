"""Stop strings: what comes out is the text before the first one, however the text was cut into pieces."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from service.engines.text import TextStream


def run(pieces: list[str], stop: tuple[str, ...]) -> tuple[str, list[int], bool]:
    stream: TextStream[int] = TextStream(stop)
    text, notes = "", []
    for i, piece in enumerate(pieces):
        out, done = stream.push(piece, i)
        text += out
        notes += done
        if stream.stopped:
            return text, notes, True
    out, done = stream.flush()
    return text + out, notes + done, False


@given(st.lists(st.text("ab", max_size=3), max_size=8), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_equals_scanning_the_prefixes(pieces: list[str], stops: list[str]) -> None:
    whole, expected = "", None
    for piece in pieces:
        whole += piece
        found = [whole.find(s) for s in stops if s in whole]
        if found:
            expected = whole[: min(found)]
            break
    text, notes, stopped = run(pieces, tuple(stops))
    assert stopped == (expected is not None)
    assert text == (whole if expected is None else expected)
    assert notes == list(range(len(notes)))


def test_nothing_of_a_stop_string_leaks_and_what_is_not_one_comes_out() -> None:
    stream: TextStream[int] = TextStream(("END",))
    assert stream.push("a E", 0) == ("a ", [])
    assert stream.push("N", 1) == ("", [])
    assert stream.push("x", 2) == ("ENx", [0, 1, 2])
    assert stream.push("EN", 3) == ("", [])
    assert stream.push("D and more", 4) == ("", [])
    assert stream.stopped


def test_the_note_of_a_piece_that_is_cut_comes_out_only_with_text() -> None:
    assert run(["ab", "cSTOP", "d"], ("STOP",)) == ("abc", [0, 1], True)
    assert run(["ab", "STOP"], ("STOP",)) == ("ab", [0], True)
