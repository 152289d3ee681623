"""No text that a database or an answer cannot hold gets in, wherever in a body it stands: a 400, nothing is stored."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.routing import iter_route_contexts

from tests.api.test_files import upload

BAD = ("\ud800", "x\udfff", "\udc00\ud800", "a\x00b")
MESSAGE = {"role": "user", "content": "hello"}
STEERING = {"vectors": [{"id": "vec_x", "layers": [0], "positions": "all"}], "return": ["steered"]}
SHARED = {"model": "M", "stop": ["a"], "user": "u", "metadata": {"a": "b"}, "service_tier": "auto"}
# Bodies that are taken, or fail for what they name only, in every form that a field has.
BODIES: dict[str, list[dict[str, Any]]] = {
    "/v1/fine_tuning/jobs": [
        {
            "model": "M",
            "training_file": "F",
            "validation_file": "F",
            "method": {"type": "lora", "lora": {"hyperparameters": {"rank": 4, "targets": ["q_proj"]}}},
            "suffix": "s",
            "metadata": {"a": "b"},
        },
        {"model": "M", "training_file": "F", "hyperparameters": {"targets": "all-linear", "schedule": "cosine"}},
    ],
    "/v1/steering/vectors": [
        {"model": "M", "training_file": "F", "method": "mean_difference", "name": "n", "metadata": {"a": "b"}}
    ],
    "/v1/chat/completions": [
        {**SHARED, "messages": [MESSAGE]},
        {**SHARED, "messages": [{"role": "user", "content": [{"type": "text", "text": "t"}]}], "stop": "a"},
        {**SHARED, "messages": [MESSAGE], "steering": STEERING},
    ],
    "/v1/completions": [{**SHARED, "prompt": "p", "steering": STEERING}, {**SHARED, "prompt": ["p"]}],
    "/v1/models/pull": [{"model": "org/name"}],
    "/v1/keys": [{"name": "n", "scopes": ["read"]}],
}


def spoiled(value: Any, bad: str) -> Iterator[Any]:
    """The value with one text in it, or the name of one field, replaced; each in turn."""
    if isinstance(value, str):
        yield bad
    elif isinstance(value, list):
        for index, item in enumerate(value):
            for new in spoiled(item, bad):
                yield [*value[:index], new, *value[index + 1 :]]
    elif isinstance(value, dict):
        for key, item in value.items():
            yield {**{k: v for k, v in value.items() if k != key}, bad: item}
            for new in spoiled(item, bad):
                yield {**value, key: new}


def bodies_of(app: FastAPI) -> dict[str, type[Any]]:
    """Path of each route that takes a JSON body, and the body's model."""
    found = {}
    for context in iter_route_contexts(app.routes):
        field = getattr(context.original_route, "body_field", None)
        if field is not None:
            found[context.path or ""] = field.field_info.annotation
    return found


async def test_every_route_with_a_body_is_in_the_table(app: FastAPI) -> None:
    found = bodies_of(app)
    assert set(found) == set(BODIES)
    for path, model in found.items():
        given = {name for body in BODIES[path] for name in body}
        for name, field in model.model_fields.items():
            texts = "str" in str(field.annotation) and "Literal" not in str(field.annotation)
            assert (field.alias or name) in given or not texts, f"{path} takes the text {name}, which is never spoiled"


@pytest.mark.parametrize("path", BODIES)
async def test_half_a_surrogate_pair_or_nul_anywhere_is_a_400_and_stores_nothing(
    app: FastAPI, client: httpx.AsyncClient, base: str, path: str
) -> None:
    data = (await upload(client)).json()["id"]

    async def stored() -> list[Any]:
        lists = ("files", "fine_tuning/jobs?kind=all", "steering/vectors", "keys", "models")
        answers = [await client.get(f"/v1/{name}") for name in lists]
        assert all(answer.status_code == 200 for answer in answers)
        return [[one["id"] for one in answer.json()["data"]] for answer in answers]

    before, tried = await stored(), 0
    for body in BODIES[path]:
        whole = json.loads(json.dumps(body).replace('"M"', json.dumps(base)).replace('"F"', json.dumps(data)))
        cases = [new for bad in BAD for new in spoiled(whole, bad)]
        # In place of every field that there is, whatever kind it has, and within an array and an object.
        for name, field in bodies_of(app)[path].model_fields.items():
            for bad in BAD[::3]:
                cases += [{**whole, field.alias or name: new} for new in (bad, [bad], {bad: "x"}, {"x": bad}, [[bad]])]
        for case in cases:
            answer = await client.post(
                path, content=json.dumps(case).encode(), headers={"Content-Type": "application/json"}
            )
            assert answer.status_code == 400, (case, answer.text)
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
            tried += 1
    assert tried >= 18
    assert await stored() == before


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("value", ["[" * 400 + "]" * 400, "1" + "0" * 400, "NaN", "1e999", "[" * 100_000, "1" * 5000])
async def test_what_is_too_deep_or_too_large_anywhere_is_a_400(
    app: FastAPI, client: httpx.AsyncClient, base: str, path: str, value: str
) -> None:
    data = (await upload(client)).json()["id"]
    text = json.dumps(BODIES[path][-1]).replace('"M"', json.dumps(base)).replace('"F"', json.dumps(data))
    places = [*bodies_of(app)[path].model_fields, "other"]
    bodies = [text.removesuffix("}") + f', "{name}": {value}}}' for name in places]
    if path == "/v1/fine_tuning/jobs":
        hyper = f'{{"model": "{base}", "training_file": "{data}", "hyperparameters": {{"rank": {value}}}}}'
        bodies += [hyper, hyper.replace('"rank"', '"targets"'), hyper.replace('"rank"', '"max_steps"')]
    for body in bodies:
        answer = await client.post(path, content=body.encode(), headers={"Content-Type": "application/json"})
        assert answer.status_code == 400, (body[:200], answer.text)
