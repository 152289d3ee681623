"""A pull that takes a minute says so before it is silent."""

from __future__ import annotations

from service.cli.models import _size


def test_a_pull_says_how_big_it_is_where_that_is_known() -> None:
    assert "93 MB" in _size("smollm2-135m-instruct") and "about a minute" in _size("smollm2-135m-instruct")
    assert _size("tiny-llama") == _size("org/name") == ""
