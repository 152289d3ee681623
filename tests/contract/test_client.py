"""Keys, model names, and what the SDK makes of our errors."""

from __future__ import annotations

import openai
import pytest
from openai import OpenAI

from tests.contract.base import BASE
from tests.contract.conftest import Served


def test_models(served: Served) -> None:
    assert BASE in [one.id for one in served.client.models.list()]
    found = served.client.models.retrieve(BASE)
    assert found.object == "model" and found.owned_by == "base" and found.created > 0
    with pytest.raises(openai.PermissionDeniedError):
        served.client.models.delete(BASE)


def test_a_hub_name_keeps_its_slash(served: Served) -> None:
    """The SDK sends org%2Fname; the route must see org/name."""
    directory = served.home / "models" / "hub" / "some-org--some-name@main"
    directory.mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    assert served.client.models.retrieve("some-org/some-name").id == "some-org/some-name"
    (directory / "config.json").unlink()
    with pytest.raises(openai.NotFoundError) as caught:
        served.client.models.retrieve("some-org/some-name")
    assert "some-org/some-name" in caught.value.message


@pytest.mark.parametrize("key", ["wrong", "gh-" + "a" * 43, "sk-abc"])
def test_a_wrong_key_is_a_401(served: Served, key: str) -> None:
    with OpenAI(base_url=f"{served.url}/v1", api_key=key) as client:
        with pytest.raises(openai.AuthenticationError) as caught:
            client.models.list()
    assert caught.value.code == "invalid_api_key" and key not in caught.value.message


def test_a_key_without_the_scope_is_a_403(served: Served) -> None:
    made = served.client.post("/keys", body={"name": "reader", "scopes": ["read"]}, cast_to=dict)
    with OpenAI(base_url=f"{served.url}/v1", api_key=made["key"]) as client:
        assert client.models.list().data
        with pytest.raises(openai.PermissionDeniedError) as caught:
            client.chat.completions.create(model=BASE, messages=[{"role": "user", "content": "x"}])
        assert caught.value.code == "insufficient_scope"
        served.client.delete(f"/keys/{made['id']}", cast_to=dict)
        with pytest.raises(openai.AuthenticationError):
            client.models.list()
    listed = served.client.get("/keys", cast_to=dict)["data"]
    assert all(not one["key"] for one in listed) and made["id"] in [one["id"] for one in listed]


def test_every_answer_has_a_request_id(served: Served) -> None:
    assert served.client.models.list()._request_id.startswith("req_")
