"""`client.files`."""

from __future__ import annotations

import openai
import pytest

from tests.contract.conftest import Served


def test_a_file_is_uploaded_listed_read_and_deleted(served: Served) -> None:
    text = b'{"messages": []}\n{"messages": []}\n'
    made = served.client.files.create(file=("my rows.jsonl", text), purpose="fine-tune")
    assert made.object == "file" and made.bytes == len(text) and made.filename == "my rows.jsonl"
    assert made.purpose == "fine-tune" and made.status == "processed"
    assert served.client.files.retrieve(made.id) == made
    assert served.client.files.content(made.id).read() == text
    assert made.id in [one.id for one in served.client.files.list(purpose="fine-tune")]
    gone = served.client.files.delete(made.id)
    assert gone.deleted and gone.id == made.id
    with pytest.raises(openai.NotFoundError) as caught:
        served.client.files.retrieve(made.id)
    assert caught.value.code == "file_not_found" and caught.value.param == "file_id"


def test_pages_go_on_where_the_last_one_ended(served: Served) -> None:
    made = [served.client.files.create(file=(f"{n}.jsonl", b"{}"), purpose="steering").id for n in range(5)]
    pages = served.client.files.list(purpose="steering", limit=2)
    assert pages.has_next_page()
    assert [one.id for one in pages] == made[::-1]
    assert [one.id for one in served.client.files.list(purpose="steering", limit=2, order="asc")] == made
    for name in made:
        served.client.files.delete(name)


@pytest.mark.parametrize(
    ("data", "code"),
    [(b"", "empty_file"), (b"PK\x03\x04zip", "invalid_file_format"), (b"not json\n", "invalid_file_format")],
)
def test_what_is_not_json_lines_is_refused_at_upload(served: Served, data: bytes, code: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        served.client.files.create(file=("rows.jsonl", data), purpose="fine-tune")
    assert caught.value.code == code and caught.value.param == "file"


def test_an_unknown_purpose_is_named(served: Served) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        served.client.files.create(file=("rows.jsonl", b"{}"), purpose="assistants")
    assert caught.value.param == "purpose"
