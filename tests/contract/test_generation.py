"""`client.chat.completions`, `client.completions`: whole, streamed, with log-probabilities, and what is refused."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from tests.contract.base import BASE
from tests.contract.conftest import Served

HELLO: Any = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Where is my box?"}]


def chat(served: Served, **more: Any) -> Any:
    return served.client.chat.completions.create(**{"model": BASE, "messages": HELLO, "max_tokens": 6, **more})


def test_a_chat_has_openais_shape(served: Served) -> None:
    answer = chat(served)
    assert answer.object == "chat.completion" and answer.id.startswith("chatcmpl-") and answer.model == BASE
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert 1 <= answer.usage.completion_tokens <= 6


def test_the_stream_says_what_the_answer_says(served: Served) -> None:
    whole = chat(served, temperature=0)
    chunks = list(chat(served, temperature=0, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(one.choices[0].delta.content or "" for one in chunks if one.choices)
    assert text == whole.choices[0].message.content
    ends = [one.choices[0].finish_reason for one in chunks if one.choices and one.choices[0].finish_reason]
    assert ends == [whole.choices[0].finish_reason]
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert all(one.usage is None for one in chunks[:-1])


def test_n_choices_are_told_apart(served: Served) -> None:
    answer = chat(served, n=3, seed=5, temperature=1.0)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    one = chat(served, seed=5, temperature=1.0)
    assert answer.usage.prompt_tokens == one.usage.prompt_tokens > 0, "the prompt is read, and counted, once"
    again = chat(served, n=3, seed=5, temperature=1.0)
    assert [c.message.content for c in answer.choices] == [c.message.content for c in again.choices]
    assert len({c.message.content for c in answer.choices}) > 1, "each choice draws with a seed of its own"
    streamed: dict[int, str] = {}
    for chunk in chat(served, n=3, seed=5, temperature=1.0, stream=True, stream_options={"include_usage": True}):
        if not chunk.choices:
            assert chunk.usage == answer.usage
        for choice in chunk.choices:
            streamed[choice.index] = streamed.get(choice.index, "") + (choice.delta.content or "")
    assert [streamed[n] for n in range(3)] == [c.message.content for c in answer.choices]


def test_log_probabilities(served: Served) -> None:
    answer = chat(served, logprobs=True, top_logprobs=2, temperature=0)
    tokens = answer.choices[0].logprobs.content
    assert len(tokens) == answer.usage.completion_tokens
    assert all(token.logprob <= 0 and len(token.top_logprobs) == 2 for token in tokens)
    assert (
        bytes(b for token in tokens for b in token.bytes)
        .decode(errors="replace")
        .startswith(answer.choices[0].message.content.rstrip("\ufffd"))
    )
    streamed = [
        token
        for chunk in chat(served, logprobs=True, top_logprobs=2, temperature=0, stream=True)
        if chunk.choices and chunk.choices[0].logprobs
        for token in chunk.choices[0].logprobs.content
    ]
    assert [one.token for one in streamed] == [one.token for one in tokens]
    assert chat(served).choices[0].logprobs is None


def test_stop_strings_are_left_out(served: Served) -> None:
    text = chat(served, temperature=0, max_tokens=12).choices[0].message.content
    stop = text[len(text) // 2 : len(text) // 2 + 2]
    cut = chat(served, temperature=0, max_tokens=12, stop=stop).choices[0]
    assert cut.message.content == text[: text.index(stop)] and cut.finish_reason == "stop"
    assert chat(served, temperature=0, max_tokens=12, stop=["never!!", stop]).choices[0].message == cut.message


def test_max_completion_tokens_is_the_same_limit(served: Served) -> None:
    answer = chat(served, max_tokens=openai.NOT_GIVEN, max_completion_tokens=2, temperature=0)
    assert answer.usage.completion_tokens <= 2


def test_parameters_that_may_be_ignored(served: Served) -> None:
    chat(served, user="u", store=True, metadata={"a": "b"}, service_tier="auto", presence_penalty=0.5, top_p=0.9)


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"logit_bias": {"1": 1}}, "logit_bias"),
        ({"parallel_tool_calls": False}, "parallel_tool_calls"),
        ({"reasoning_effort": "low"}, "reasoning_effort"),
        ({"extra_body": {"made_up": 1}}, "made_up"),
        ({"temperature": 3}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 100}, "n"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, "messages.0"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "u"}}]}]}, "messages.0"),
    ],
)
def test_what_would_have_no_effect_is_refused_by_name(served: Served, more: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        chat(served, **more)
    assert caught.value.param is not None and caught.value.param.startswith(param), caught.value
    assert caught.value.type == "invalid_request_error"


def test_a_prompt_that_is_too_long_gives_both_numbers(served: Served) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        chat(served, messages=[{"role": "user", "content": "word " * 3000}])
    assert caught.value.code == "context_length_exceeded"
    numbers = [int(word) for word in caught.value.message.replace(",", " ").split() if word.isdigit()]
    assert len(numbers) >= 2
    if max(numbers) < 3000:  # Refused by its beginning: the message says how many tokens it has more than.
        context = int(caught.value.message.split("context length is ")[1].split()[0])
        assert f"more than {max(numbers)} tokens" in caught.value.message and max(numbers) > context
    with pytest.raises(openai.BadRequestError) as streamed:
        list(chat(served, messages=[{"role": "user", "content": "word " * 3000}], stream=True))
    assert streamed.value.code == "context_length_exceeded"


def test_an_unknown_model(served: Served) -> None:
    for name in ("gpt-4o", "org/nothing", "ft:tiny-llama:local::none", "/etc", "../x", "https://a/b"):
        with pytest.raises(openai.NotFoundError) as caught:
            chat(served, model=name)
        assert caught.value.code == "model_not_found" and caught.value.param == "model"


def test_text_completions(served: Served) -> None:
    answer = served.client.completions.create(model=BASE, prompt="Once upon", max_tokens=5, temperature=0, logprobs=1)
    choice = answer.choices[0]
    assert answer.object == "text_completion" and answer.usage.completion_tokens <= 5
    assert len(choice.logprobs.tokens) == len(choice.logprobs.token_logprobs) == answer.usage.completion_tokens
    assert choice.logprobs.text_offset[0] == 0
    stream = served.client.completions.create(model=BASE, prompt="Once upon", max_tokens=5, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == choice.text
    listed = served.client.completions.create(model=BASE, prompt=["Once upon"], max_tokens=5, temperature=0)
    assert listed.choices[0].text == choice.text
    with pytest.raises(openai.BadRequestError):
        served.client.completions.create(model=BASE, prompt=["a", "b"])
