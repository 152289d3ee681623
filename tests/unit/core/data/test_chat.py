"""The tokens trained on are the tokens served."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from core.data.chat import encode, end_of_turn_id, prompt_ids, text_prompt_ids
from core.data.rules import Message, Row
from core.models.load import Loaded, load_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def talk(*contents: str, system: str | None = None, role: str = "system", weights: dict[int, int] | None = None) -> Row:
    """A row of user and assistant messages in turn, behind a system message."""
    messages = [Message(role, system)] if system is not None else []
    for index, content in enumerate(contents):
        speaker = "user" if index % 2 == 0 else "assistant"
        messages.append(Message(speaker, content, weight=(weights or {}).get(index)))
    return Row(1, messages=tuple(messages))


def trained_runs(row: Row, tokenizer: Any, **settings: Any) -> list[list[int]]:
    """The trained tokens of a row, one list per uninterrupted run."""
    example = encode(row, tokenizer, **{"max_length": 10_000, **settings})
    runs: list[list[int]] = []
    for before, label in zip([-100, *example.labels], example.labels, strict=False):
        if label != -100:
            if before == -100:
                runs.append([])
            runs[-1].append(label)
    return runs


def check_trained_is_served(row: Row, tokenizer: Any) -> None:
    """Every answer: what is served before it begins the row, and what is trained is it and the end of its turn."""
    example = encode(row, tokenizer, max_length=100_000)
    assert len(example.labels) == len(example.input_ids) == example.total
    end, covered = end_of_turn_id(tokenizer), 0
    for index, message in enumerate(row.messages):
        if message.role != "assistant":
            continue
        served = prompt_ids(row.messages[:index], tokenizer)
        assert example.input_ids[: len(served)] == served
        stop = example.input_ids.index(end, len(served)) + 1
        completion = example.input_ids[len(served) : stop]
        assert tokenizer.decode(completion[:-1]) == message.content
        wanted = completion if message.weight != 0 else [-100] * len(completion)
        assert example.labels[len(served) : stop] == wanted
        assert set(example.labels[covered : len(served)]) <= {-100}
        covered = stop
        if index == len(row.messages) - 1:
            assert served + completion == example.input_ids
    assert example.trained == len(example.labels) - example.labels.count(-100)


CONVERSATIONS = [
    talk("Hi", "Hello"),
    talk("Hi", "Hello", system="Be kind."),
    talk("Hi", "Hello", system="Be kind.", role="developer"),
    talk("a", "b", "c", "d", "e", "f"),
    talk("a", "b", "c", "d", system="s", weights={1: 0}),
    talk("\n", "\n\nHello\n\n", " ", "  x ", system="\n\n"),
    talk("naïve 🙂 \u2028", "日本語 {'a': 1}\t"),
    talk("{{ messages }} {% raw %}", "</s> [INST] system\nuser"),
]


@pytest.mark.parametrize("row", CONVERSATIONS, ids=range(len(CONVERSATIONS)))
def test_trained_is_served(loaded: Loaded, row: Row) -> None:
    check_trained_is_served(row, loaded.tokenizer)


TEXT = st.text(alphabet=st.sampled_from("ab \n\t.é🙂0"), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(contents=st.lists(TEXT, min_size=2, max_size=6), system=st.none() | TEXT)
def test_trained_is_served_whatever_is_said(loaded: Loaded, contents: list[str], system: str | None) -> None:
    check_trained_is_served(talk(*contents[: len(contents) // 2 * 2], system=system), loaded.tokenizer)


@pytest.mark.parametrize("row", CONVERSATIONS[:5], ids=range(5))
def test_ids_are_those_of_the_template(loaded: Loaded, row: Row) -> None:
    turns = [{"role": m.role.replace("developer", "system"), "content": m.content} for m in row.messages]
    whole = loaded.tokenizer.apply_chat_template(turns, tokenize=True)["input_ids"]
    ids = encode(row, loaded.tokenizer, max_length=1000).input_ids
    assert whole[: len(ids)] == ids
    served = loaded.tokenizer.apply_chat_template(turns[:-1], tokenize=True, add_generation_prompt=True)["input_ids"]
    assert prompt_ids(row.messages[:-1], loaded.tokenizer) == served


def test_developer_is_system(loaded: Loaded) -> None:
    one, other = (talk("Hi", "Hello", system="Be kind.", role=role) for role in ("system", "developer"))
    assert encode(one, loaded.tokenizer, max_length=99) == encode(other, loaded.tokenizer, max_length=99)


@dataclass
class RequestMessage:
    role: str
    content: str


def test_requests_messages_are_served_like_rows(loaded: Loaded) -> None:
    row = talk("Hi", "Hello", "More")
    turns = [RequestMessage(message.role, message.content) for message in row.messages]
    assert prompt_ids(turns, loaded.tokenizer) == prompt_ids(row.messages, loaded.tokenizer)


def test_names_are_not_shown(loaded: Loaded) -> None:
    plain = talk("Hi", "Hello")
    named = Row(1, messages=(Message("user", "Hi", name="Ann"), plain.messages[1]))
    assert encode(named, loaded.tokenizer, max_length=99) == encode(plain, loaded.tokenizer, max_length=99)


def test_weights_choose_the_answers(loaded: Loaded) -> None:
    tokenizer = loaded.tokenizer
    contents = ("q", "one", "q", "two", "q", "three")
    for weights, kept in (({}, [1, 3, 5]), ({1: 0}, [3, 5]), ({3: 0, 5: 1}, [1, 5]), ({1: 0, 5: 0}, [3])):
        runs = trained_runs(talk(*contents, weights=weights), tokenizer)
        assert [tokenizer.decode(run) for run in runs] == [contents[index] + "<|im_end|>" for index in kept]


def test_what_follows_the_last_trained_token_is_left_out(loaded: Loaded) -> None:
    whole = encode(talk("q", "one", "q", "two", weights={3: 0}), loaded.tokenizer, max_length=99)
    assert whole == encode(talk("q", "one"), loaded.tokenizer, max_length=99)


def test_truncation_keeps_the_beginning(loaded: Loaded) -> None:
    row = talk("What is it?", "A heron, I think.")
    whole = encode(row, loaded.tokenizer, max_length=1000)
    start = len(prompt_ids(row.messages[:1], loaded.tokenizer))
    assert not whole.truncated
    for length in range(1, len(whole.input_ids) + 1):
        cut = encode(row, loaded.tokenizer, max_length=length)
        assert cut.input_ids == whole.input_ids[:length] and cut.labels == whole.labels[:length]
        assert cut.total == len(whole.input_ids) and cut.truncated == (length < cut.total)
        assert cut.trained == max(0, length - start)


def test_prompt_and_completion_are_raw_text_and_an_end(loaded: Loaded) -> None:
    tokenizer = loaded.tokenizer
    example = encode(Row(3, prompt="Once upon", completion=" a time"), tokenizer, max_length=99)
    served = text_prompt_ids("Once upon", tokenizer)
    assert served == tokenizer("Once upon")["input_ids"]
    assert example.input_ids[: len(served)] == served and example.line == 3
    assert example.input_ids == [*tokenizer("Once upon a time")["input_ids"], tokenizer.eos_token_id]
    assert example.labels == [-100] * len(served) + example.input_ids[len(served) :]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(prompt=TEXT, completion=TEXT)
def test_raw_prompts_are_served_as_trained(loaded: Loaded, prompt: str, completion: str) -> None:
    example = encode(Row(1, prompt=prompt, completion=completion), loaded.tokenizer, max_length=1000)
    served = text_prompt_ids(prompt, loaded.tokenizer)
    assert example.input_ids[: len(served)] == served
    answer = example.input_ids[len(served) :]
    assert answer[-1] == loaded.tokenizer.eos_token_id
    assert loaded.tokenizer.decode(answer[:-1]) == completion
    assert example.labels == [-100] * len(served) + answer


def byte_pairs(template: str | None = CHATML, *, eos: str | None = "<|im_end|>", bos: bool = False) -> Any:
    """A tokenizer that merges across everything but special tokens, as some real ones do with line ends."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ċ", "Ċ"), ("a", "b"), ("ĊĊ", "a"), ("Ġ", "a")]
    words = [*letters, *(left + right for left, right in merges)]
    core = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(text, special=True) for text in ("<|im_start|>", "<|im_end|>", "<s>", "</s>")])
    if bos:
        from tokenizers.processors import TemplateProcessing

        core.post_processor = TemplateProcessing(
            single="<s> $A </s>", special_tokens=[(text, core.token_to_id(text)) for text in ("<s>", "</s>")]
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=eos, bos_token="<s>")
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("answer", ["\nfoo", "\n\na", "b", "\n", "\n\n\n\n"])
def test_merges_across_the_beginning_of_an_answer_change_nothing_served(answer: str) -> None:
    tokenizer = byte_pairs()
    row = talk("x", answer, "y", answer, "z", "end", system="s")
    check_trained_is_served(row, tokenizer)
    crossing = tokenizer.apply_chat_template(
        [{"role": "user", "content": "x"}, {"role": "assistant", "content": answer}]
    )
    if answer.startswith("\n"):
        # The case is real: in one go, the line end of the prompt and that of the answer become one token.
        assert encode(talk("x", answer), tokenizer, max_length=99).input_ids != crossing["input_ids"][:-1]


def test_merges_across_prompt_and_completion_change_nothing_served() -> None:
    tokenizer = byte_pairs()
    example = encode(Row(1, prompt="xa", completion="b"), tokenizer, max_length=9)
    a, b, ab = (tokenizer.convert_tokens_to_ids(text) for text in ("a", "b", "ab"))
    assert tokenizer("xab")["input_ids"][1] == ab
    assert example.input_ids[1:] == [a, b, tokenizer.eos_token_id]


def test_beginning_and_end_tokens_of_the_tokenizer() -> None:
    tokenizer = byte_pairs(bos=True, eos="</s>")
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    x, ab = (tokenizer.convert_tokens_to_ids(text) for text in ("x", "ab"))
    assert tokenizer("x")["input_ids"] == [bos, x, eos]
    assert text_prompt_ids("x", tokenizer) == [bos, x]
    example = encode(Row(1, prompt="x", completion="ab"), tokenizer, max_length=9)
    assert example.input_ids == [bos, x, ab, eos] and example.labels == [-100, -100, ab, eos]
    # A template writes its own special tokens: none is added around it.
    assert prompt_ids(talk("x").messages, tokenizer)[0] == tokenizer.convert_tokens_to_ids("<|im_start|>")


def test_the_end_of_turn_need_not_be_the_end_of_sequence() -> None:
    tokenizer = byte_pairs(eos="</s>")
    assert end_of_turn_id(tokenizer) == tokenizer.convert_tokens_to_ids("<|im_end|>") != tokenizer.eos_token_id
    assert trained_runs(talk("q", "x"), tokenizer)[0][-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_templates_that_trim_and_end_with_the_end_of_sequence() -> None:
    tokenizer = byte_pairs(
        "<s>{% for m in messages %}{% if m['role'] == 'user' %}[{{ m['content'] | trim }}]"
        "{% else %} {{ m['content'] | trim }} {{ eos_token }}{% endif %}{% endfor %}",
        eos="</s>",
    )
    row = talk("  q ", "  x\n", "r", "y")
    example = encode(row, tokenizer, max_length=99)
    assert tokenizer.decode(example.input_ids) == "<s>[q] x </s>[r] y </s>"
    assert [tokenizer.decode(run) for run in trained_runs(row, tokenizer)] == [" x </s>", " y </s>"]
    for index in (1, 3):
        served = prompt_ids(row.messages[:index], tokenizer)
        assert example.input_ids[: len(served)] == served


REWRITES = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}(thinks){% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_template_that_rewrites_the_past_is_refused_by_name() -> None:
    tokenizer = byte_pairs(REWRITES)
    tokenizer.name_or_path = "org/rewriter"
    with pytest.raises(ValueError, match=r"chat template of org/rewriter writes an answer differently .* weight"):
        encode(talk("q", "one", "q", "two"), tokenizer, max_length=99)


def test_it_is_accepted_where_only_the_last_answer_is_trained() -> None:
    tokenizer = byte_pairs(REWRITES)
    row = talk("q", "one", "q", "two", weights={1: 0})
    example = encode(row, tokenizer, max_length=99)
    served = prompt_ids(row.messages[:3], tokenizer)
    assert example.input_ids[: len(served)] == served
    assert [tokenizer.decode(run) for run in trained_runs(row, tokenizer)] == ["(thinks)two<|im_end|>"]
    assert "(thinks)one" not in tokenizer.decode(example.input_ids)


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (None, "has no chat template; use rows of prompt and completion"),
        ("{% for m in messages %}{{ m['content'] }}\n{% endfor %}", "with no special token"),
        ("{{ raise_exception('no system role') }}", "refuses the conversation: no system role"),
        ("{{ messages[99]['content'] }}", "refuses the conversation"),
        ("{{ 1 / 0 }}", "refuses the conversation: division by zero"),
        ("{% for m in messages %}", "refuses the conversation"),
        ("{{ ''.__class__.__mro__ }}{{ messages.append(1) }}", "refuses the conversation"),
    ],
)
def test_a_template_that_cannot_be_used_is_a_clear_error(template: str | None, says: str) -> None:
    tokenizer = byte_pairs(template)
    with pytest.raises(ValueError, match=says):
        encode(talk("q", "a"), tokenizer, max_length=99)
    with pytest.raises(ValueError, match=says):
        end_of_turn_id(tokenizer)


def test_without_an_end_token_raw_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        encode(Row(1, prompt="a", completion="b"), byte_pairs(eos=None), max_length=9)


def test_a_changed_template_is_seen_at_once(loaded: Loaded) -> None:
    tokenizer = copy.deepcopy(loaded.tokenizer)
    before = prompt_ids(talk("q").messages, tokenizer)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    assert prompt_ids(talk("q").messages, tokenizer) != before


@pytest.mark.slow  # needs the real model, whose template opens a bare question with a system message of its own
@pytest.mark.parametrize("row", CONVERSATIONS, ids=range(len(CONVERSATIONS)))
def test_trained_is_served_by_the_real_template(row: Row) -> None:
    tokenizer = load_tokenizer("smollm2-135m-instruct")
    check_trained_is_served(row, tokenizer)
    assert end_of_turn_id(tokenizer) == tokenizer.eos_token_id
