"""What chat sends, and what it shows of a stream."""

from __future__ import annotations

import json

import pytest

from service.cli.chat import parse_layers, parse_vector
from service.cli.errors import UsageProblem
from tests.unit.service.cli.conftest import Reply, Run, Script

ROUTE = "POST /v1/chat/completions"


def stream(*chunks: dict[str, object]) -> Reply:
    text = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
    return Reply(text.encode(), headers={"Content-Type": "text/event-stream"})


def delta(text: str, **more: object) -> dict[str, object]:
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None, **more}]}


def test_words_of_a_vector() -> None:
    assert parse_vector("vec_a:4") == {"id": "vec_a", "strength": 4.0}
    assert parse_vector("vec_a:-0.5:12,3-5") == {"id": "vec_a", "strength": -0.5, "layers": [3, 4, 5, 12]}
    assert parse_layers("7") == [7]


@pytest.mark.parametrize("text", ["vec_a", "vec_a:", "vec_a:x", ":1", "vec_a:1:", "vec_a:1:a", "vec_a:1:5-", "a:1:2:3"])
def test_a_vector_that_is_none_is_wrong_usage(text: str, run: Run) -> None:
    with pytest.raises(UsageProblem):
        parse_vector(text)
    assert run("chat", "--model", "m", "--vector", text, "hello").code == 2


def test_the_hint_of_a_vector_is_one_that_steers_and_does_not_babble(run: Run) -> None:
    assert "vec_abc:1.5:16" in run("chat", "--model", "m", "--vector", "vec_a", "hello").err


def test_an_empty_range_of_layers_names_none() -> None:
    with pytest.raises(ValueError, match="name none"):
        parse_layers("5-4")


def test_the_request_and_the_answer(run: Run, script: Script) -> None:
    receipt = {"layers": [3], "tokens": 9, "mean_relative_shift": 0.25}
    script.on(ROUTE, stream(delta("Hel"), delta("lo"), delta("", finish_reason="length", steering=receipt)))
    result = run(
        "chat", "--model", "ft:x", "--system", "Be brief.", "--vector", "vec_a:2:3", "--preserve-norm",
        "--max-tokens", 5, "--temperature", 0, "--seed", 1, "--url", script.url, "Hi",
    )  # fmt: skip
    assert (result.code, result.out) == (0, "Hello\n")
    assert "--max-tokens" in result.err
    assert "0.25" in result.err
    assert json.loads(script.asked[0].body) == {
        "model": "ft:x",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
        "max_completion_tokens": 5,
        "temperature": 0.0,
        "seed": 1,
        "steering": {"vectors": [{"id": "vec_a", "strength": 2.0, "layers": [3]}], "preserve_norm": True},
        "stream": True,
    }


def test_an_error_in_the_middle_of_a_stream_is_an_error(run: Run, script: Script) -> None:
    script.on(ROUTE, stream(delta("Hel"), {"error": {"message": "The engine died.", "code": "engine_died"}}))
    result = run("chat", "--model", "m", "--url", script.url, "Hi")
    assert (result.code, result.out) == (1, "Hel\n")
    assert "The engine died." in result.err


def test_json_is_the_whole_answer(run: Run, script: Script) -> None:
    script.on(ROUTE, Reply({"id": "chatcmpl-1", "choices": []}))
    assert run("chat", "--model", "m", "--json", "--url", script.url, "Hi").json["id"] == "chatcmpl-1"
    assert "stream" not in json.loads(script.asked[0].body)


def test_preserving_a_norm_without_a_vector_is_wrong_usage(run: Run) -> None:
    assert run("chat", "--model", "m", "--preserve-norm", "Hi").code == 2


def test_a_strength_that_is_no_number_is_named(run: Run) -> None:
    said = run("chat", "--model", "m", "--vector", "vec_a:abc", "hello").err
    assert "the strength 'abc' is no number" in said and "float" not in said


def test_a_vector_that_would_steer_every_layer_is_told_of(run: Run, script: Script) -> None:
    script.on("GET /v1/steering/vectors/vec_a", Reply({"layers": list(range(30))}))
    script.on(ROUTE, stream(delta("x")))
    chat = ("chat", "--model", "m", "--url", script.url, "hello", "--vector")
    assert "try vec_a:1.5:16)" in run(*chat, "vec_a:1.5").err
    assert "try" not in run(*chat, "vec_a:1.5:16").err
    script.on("GET /v1/steering/vectors/vec_a", Reply({"layers": [16]}))
    assert "try" not in run(*chat, "vec_a:1.5").err
