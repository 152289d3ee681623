"""The stream format, with its corners."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from service.cli.sse import Event, parse


def test_ids_names_comments_and_long_data() -> None:
    text = ": hello\nid: 7\nevent: metrics\ndata: {\ndata: }\n\ndata:x\n\nid: 8\n\nretry: 5\ndata: cut off"
    assert list(parse(text.split("\n"))) == [Event("7", "metrics", "{\n}"), Event("7", "message", "x")]


def test_data_that_is_no_object_is_none() -> None:
    assert [event.json() for event in parse(["data: [DONE]", "", "data: 3", "", 'data: {"a": 1}', ""])] == [
        None,
        None,
        {"a": 1},
    ]


@given(st.lists(st.text(st.characters(exclude_categories=["Cc", "Zl", "Zp"])), min_size=1, max_size=5))
def test_what_is_sent_arrives(texts: list[str]) -> None:
    lines = [line for number, text in enumerate(texts) for line in (f"id: {number}", f"data: {text}", "")]
    assert list(parse(lines)) == [Event(str(number), "message", text) for number, text in enumerate(texts)]
