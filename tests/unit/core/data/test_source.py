"""Rows: each rule with its code and line, and files made to break the reader."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.data import lines, rules, source
from core.data.source import DataError, Message, Row, looks_like_json_lines, rows, scan

USER = {"role": "user", "content": "Hi"}
SYSTEM = {"role": "system", "content": "Be kind."}
ANSWER = {"role": "assistant", "content": "Hello"}
GOOD = json.dumps({"messages": [USER, ANSWER]})


def file_of(tmp_path: Path, *content: object) -> Path:
    """A file with one line per argument: text and bytes as they are, all else as JSON."""
    path = tmp_path / "data.jsonl"
    raw = [
        item if isinstance(item, bytes) else item.encode() if isinstance(item, str) else json.dumps(item).encode()
        for item in content
    ]
    path.write_bytes(b"\n".join(raw) + b"\n")
    return path


def chat(*messages: object) -> dict[str, Any]:
    return {"messages": list(messages)}


BAD: list[tuple[str, object, str]] = [
    ("data_type", [1, 2], "expected a JSON object, found a list"),
    ("data_type", '"text"', "found a text"),
    ("data_type", "null", "found nothing"),
    ("data_type", chat(USER, "hello", ANSWER), r"messages\[1\] must be an object"),
    ("missing_messages_list", {}, "`messages` must be a list"),
    ("missing_messages_list", {"messages": []}, "found an empty list"),
    ("missing_messages_list", {"messages": {"role": "user"}}, "found an object"),
    ("missing_messages_list", {"messages": None}, "`messages`"),
    ("missing_messages_list", {"text": "old format"}, "`messages`"),
    ("message_missing_key", chat(USER, {"role": "assistant"}), r"messages\[1\] has no content"),
    ("message_missing_key", chat({"content": "x"}, ANSWER), r"messages\[0\] has no role"),
    ("message_missing_key", chat({}, ANSWER), "has no role and no content"),
    ("message_unrecognized_key", chat({**USER, "mood": 1}, ANSWER), r"messages\[0\].mood: allowed are role"),
    ("unrecognized_role", chat({"role": "human", "content": "x"}, ANSWER), "role is 'human'; allowed are system"),
    ("unrecognized_role", chat({"role": 3, "content": "x"}, ANSWER), "role is '3'"),
    ("unrecognized_role", chat({"role": "tool", "content": "x"}, ANSWER), "role is 'tool'"),
    ("missing_content", chat({"role": "user", "content": ""}, ANSWER), "found an empty text"),
    ("missing_content", chat({"role": "user", "content": None}, ANSWER), "found nothing"),
    ("missing_content", chat({"role": "user", "content": [{"type": "text"}]}, ANSWER), "found a list"),
    ("example_missing_assistant_message", chat(USER), "no assistant message"),
    ("invalid_json", '{"messages": ', r"at column \d+$"),
    ("invalid_json", "question,answer", "a row is one JSON object on one line, like "),
    ("missing_messages_list", {"conversations": [{"from": "human", "value": "x"}]}, "ShareGPT row: rename"),
    ("missing_messages_list", {"instruction": "x", "input": "", "output": "y"}, "Alpaca row: write messages"),
    ("invalid_json", "{'messages': []}", "at column"),
    ("invalid_json", '{"messages": []} {}', "at column 18"),
    ("invalid_json", b'{"messages": "\xff"}', "byte 15 of the line is not UTF-8"),
    ("invalid_json", b'{"a": "\xed\xa0\x80"}', "not UTF-8"),
    ("invalid_json", '{"weight": NaN}', "NaN is not JSON"),
    ("invalid_json", '{"weight": -Infinity}', "Infinity is not JSON"),
    ("invalid_json", "[" * 100_000, "."),
    ("invalid_json", '{"a": ' + "9" * 10_000 + "}", "."),
    ("invalid_json", b'{"messages": \x00}', "at column"),
    ("invalid_json", b'{"messages": "a\x00b"}', "control character"),
    ("duplicate_key", '{"messages": [], "messages": []}', "'messages' is given twice"),
    ("duplicate_key", '{"messages": [{"role": "user", "content": "a", "role": "system"}]}', "'role' is given twice"),
    ("invalid_text", chat({"role": "user", "content": "a\ud800"}, ANSWER), "half of a surrogate pair at character 2"),
    ("invalid_text", chat({"role": "user", "content": "ab\x00"}, ANSWER), "NUL at character 3"),
    ("invalid_text", {"prompt": "\x00", "completion": "b"}, "prompt has a NUL"),
    ("duplicate_role", chat(USER, USER, ANSWER), r"messages\[1\] repeats the role user"),
    ("duplicate_role", chat(USER, ANSWER, ANSWER), r"messages\[2\] repeats the role assistant"),
    ("duplicate_role", chat(SYSTEM, SYSTEM, USER, ANSWER), r"messages\[1\] repeats the role system"),
    ("duplicate_role", chat(SYSTEM, {**SYSTEM, "role": "developer"}, USER, ANSWER), "repeats the role system"),
    ("duplicate_role", chat(SYSTEM, USER, SYSTEM, USER, ANSWER), r"messages\[2\] repeats the role system"),
    ("misplaced_system", chat(USER, SYSTEM, USER, ANSWER), "it must come first"),
    ("assistant_first", chat(ANSWER), "nothing before it"),
    ("assistant_first", chat(ANSWER, USER, ANSWER), "nothing before it"),
    ("last_message_not_assistant", chat(USER, ANSWER, USER), "the last message is the user's"),
    ("invalid_weight", chat(USER, {**ANSWER, "weight": 2}), "weight is 2; allowed are 0 and 1"),
    ("invalid_weight", chat(USER, {**ANSWER, "weight": True}), "weight is True"),
    ("invalid_weight", chat(USER, {**ANSWER, "weight": 1.0}), "weight is 1.0"),
    ("invalid_weight", chat({**USER, "weight": 1}, ANSWER), "only assistant messages take a weight"),
    ("invalid_weight", chat(USER, {**ANSWER, "weight": "\ud800\0"}), r"weight is \\ud800\\x00; allowed"),
    ("message_unrecognized_key", chat({**USER, "\ud800": 1}, ANSWER), r"messages\[0\]\.\\ud800: allowed"),
    ("no_trained_message", chat(USER, {**ANSWER, "weight": 0}), "every assistant message has weight 0"),
    ("invalid_name", chat({**USER, "name": 3}, ANSWER), "name must be a text, found a number"),
    ("unsupported_function_call", chat(USER, {"role": "assistant", "function_call": {"name": "f"}}), "not trained"),
    ("missing_prompt", {"completion": "b"}, "`prompt` must be a text"),
    ("missing_prompt", {"prompt": "", "completion": "b"}, "found an empty text"),
    ("missing_completion", {"prompt": "a"}, "`completion` must be a text"),
    ("missing_completion", {"prompt": "a", "completion": 3}, "found a number"),
    ("mixed_row_kinds", {"messages": [USER, ANSWER], "prompt": "a"}, "both messages and prompt/completion"),
    ("mixed_row_kinds", {"prompt": "a", "completion": "b"}, "the file began with chat rows"),
]


@pytest.mark.parametrize(("code", "line", "says"), BAD)
def test_every_fault_has_its_code_and_line(tmp_path: Path, code: str, line: object, says: str) -> None:
    path = file_of(tmp_path, GOOD, "", line, GOOD)
    got = scan(path)
    assert [(problem.line, problem.code) for problem in got.problems] == [(3, code)]
    assert re.search(says, got.problems[0].message)
    assert len(got.problems[0].message) < 300
    assert got.rows == 2 and got.problem_count == 1 and not got.ok
    with pytest.raises(DataError, match="line 3: ") as caught:
        list(rows(path))
    assert caught.value.problems == got.problems


def test_every_code_is_documented_and_every_documented_code_is_tested() -> None:
    tested = {code for code, _, _ in BAD} | {"line_too_long", "empty_file", "too_few_examples"}
    # Those that take a tokenizer are tested in test_validate.py.
    tested |= {"all_tokens_truncated", "not_encodable", "model_not_usable"}
    assert tested == set(rules.CODES)


def test_several_faults_of_a_row_are_all_named(tmp_path: Path) -> None:
    path = file_of(tmp_path, chat({"role": "human", "content": "", "x": 1}, {"role": "user"}))
    assert [problem.code for problem in scan(path).problems] == [
        "message_unrecognized_key",
        "unrecognized_role",
        "missing_content",
        "message_missing_key",
    ]


def test_rows_are_read_as_written(tmp_path: Path) -> None:
    path = file_of(
        tmp_path,
        chat(SYSTEM, USER, {**ANSWER, "weight": 0}, {**USER, "name": "Ann"}, {**ANSWER, "weight": 1}),
        chat({"role": "developer", "content": "ünï"}, USER, {**ANSWER, "function_call": None}),
    )
    assert list(rows(path)) == [
        Row(
            1,
            messages=(
                Message("system", "Be kind."),
                Message("user", "Hi"),
                Message("assistant", "Hello", weight=0),
                Message("user", "Hi", name="Ann"),
                Message("assistant", "Hello", weight=1),
            ),
        ),
        Row(2, messages=(Message("developer", "ünï"), Message("user", "Hi"), Message("assistant", "Hello"))),
    ]
    got = scan(path)
    assert got.ok and got.kind == "chat" and got.rows == 2
    assert [(warning.line, warning.code) for warning in got.warnings] == [(1, "name_ignored"), (None, "few_examples")]


def test_prompt_and_completion_rows(tmp_path: Path) -> None:
    path = file_of(tmp_path, {"prompt": "a", "completion": " b"}, {"prompt": " ", "completion": "\n"})
    assert list(rows(path)) == [Row(1, prompt="a", completion=" b"), Row(2, prompt=" ", completion="\n")]
    assert {row.kind for row in rows(path)} == {"completion"}
    assert scan(path).kind == "completion"


def test_a_chat_row_after_prompt_rows_is_mixed_too(tmp_path: Path) -> None:
    got = scan(file_of(tmp_path, {"prompt": "a", "completion": "b"}, GOOD))
    assert [(problem.line, problem.code) for problem in got.problems] == [(2, "mixed_row_kinds")]


@pytest.mark.parametrize("raw", [b"", b"\n\n \n\r\n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\r\n"])
def test_an_empty_file_is_a_fault_of_the_file(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "e.jsonl"
    path.write_bytes(raw)
    assert [(problem.line, problem.code) for problem in scan(path).problems] == [(None, "empty_file")]
    with pytest.raises(DataError, match="holds no rows"):
        list(rows(path))


def test_few_rows_are_a_warning_or_a_fault_as_asked(tmp_path: Path) -> None:
    path = file_of(tmp_path, *[GOOD] * 9)
    assert [warning.code for warning in scan(path).warnings] == ["few_examples"]
    assert [problem.code for problem in scan(path, min_rows=10).problems] == ["too_few_examples"]
    path = file_of(tmp_path, *[GOOD] * 10)
    assert scan(path).warnings == [] and scan(path, min_rows=10).ok


@pytest.mark.parametrize("ending", [b"\n", b"\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("last", [True, False])
def test_line_ends_and_byte_order_marks(tmp_path: Path, ending: bytes, mark: bytes, last: bool) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(mark + ending.join([GOOD.encode()] * 3) + (ending if last else b""))
    assert [row.line for row in rows(path)] == [1, 2, 3]


def test_text_separators_do_not_end_a_line(tmp_path: Path) -> None:
    text = "a\u2028b\x85c\x0bd"
    path = file_of(
        tmp_path,
        json.dumps(chat({"role": "user", "content": text}, ANSWER), ensure_ascii=False).replace("\x0b", "\\u000b"),
        "bad",
    )
    assert next(rows(path)).messages[0].content == text
    assert scan(path).problems[0].line == 2


def test_blank_lines_are_counted_skipped_and_mentioned(tmp_path: Path) -> None:
    got = scan(file_of(tmp_path, "", GOOD, "  \t", GOOD))
    assert got.ok and got.rows == 2
    assert [warning.line for warning in got.warnings if warning.code == "blank_line"] == [1, 3]


def test_keys_of_the_row_without_effect_are_mentioned(tmp_path: Path) -> None:
    got = scan(file_of(tmp_path, {**chat(USER, ANSWER), "tools": [], "id": 7}))
    assert sorted(w.message.split()[0] for w in got.warnings if w.code == "row_unrecognized_key") == ["'id'", "'tools'"]


def test_at_most_so_many_problems_are_kept_and_all_are_counted(tmp_path: Path) -> None:
    path = file_of(tmp_path, *["x"] * 250, *[""] * 300)
    got = scan(path)
    assert len(got.problems) == 100 and got.problem_count == 250 and got.problems[-1].line == 100
    assert len(got.warnings) == 100 and got.warning_count == 300
    assert len(scan(path, max_problems=3).problems) == 3


def test_the_error_names_the_first_fault_and_the_number_of_others() -> None:
    error = DataError([rules.RowProblem(4, "a", "first"), rules.RowProblem(5, "b", "second")])
    assert str(error) == "line 4: first [a] (and 1 more)"
    assert str(DataError([rules.RowProblem(None, "a", "whole")])) == "whole [a]"


def test_a_long_line_is_named_and_the_next_ones_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", len(GOOD))
    long = GOOD + " "
    path = file_of(tmp_path, GOOD, long, GOOD, long * 9000, GOOD, long)
    got = scan(path)
    assert [(problem.line, problem.code) for problem in got.problems] == [(n, "line_too_long") for n in (2, 4, 6)]
    assert got.rows == 3
    path.write_bytes(GOOD.encode() + b"\r\n" + GOOD.encode() + b"\r\n" + long.encode())
    assert [problem.line for problem in scan(path).problems] == [3]


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "big.jsonl"
    with open(path, "wb") as file:
        file.write(b"{" + b"x" * (30 * 1024 * 1024) + b"\n")
        file.write(b'{"x": 1}\n' * 20_000)
    tracemalloc.start()
    try:
        got = scan(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert got.problem_count == 20_001
    assert got.problems[0].code == "line_too_long"
    assert peak < 20 * 1024 * 1024


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(st.binary(max_size=40) | st.sampled_from([GOOD.encode(), b"{", b'{"messages": [{}]}']), max_size=6))
def test_any_bytes_get_a_verdict(tmp_path_factory: pytest.TempPathFactory, content: list[bytes]) -> None:
    path = tmp_path_factory.mktemp("any") / "f"
    path.write_bytes(b"\n".join(content))
    got = scan(path)
    assert got.problem_count == len(got.problems)
    try:
        read = list(rows(path))
    except DataError as error:
        assert not got.ok and error.problems[0] == got.problems[0]
    else:
        assert got.ok and len(read) == got.rows


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "weight", "name", "x"]), inner, max_size=4)
    ),
    max_leaves=8,
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "role": st.sampled_from(["user", "assistant", "x", 1]),
            "content": JSON,
            "weight": JSON,
            "name": JSON,
        },
    )
    | JSON,
    max_size=4,
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.fixed_dictionaries({}, optional={"messages": MESSAGES | JSON, "prompt": JSON, "completion": JSON}) | JSON)
def test_any_json_gets_a_verdict(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    path = tmp_path_factory.mktemp("any") / "f"
    path.write_text(json.dumps(value) + "\n")
    got = scan(path)
    assert got.rows + bool(got.problems) == 1
    assert {problem.code for problem in got.problems} <= set(rules.CODES)
    assert {warning.code for warning in got.warnings} <= set(rules.WARNINGS)


@pytest.mark.parametrize(
    "head",
    [GOOD.encode(), b"\xef\xbb\xbf" + GOOD.encode(), b"\n\r\n {" + b'"a": 1}', b'{"broken": ', b"{" + b"x" * 4096],
)
def test_what_may_be_json_lines_passes_the_first_look(head: bytes) -> None:
    assert looks_like_json_lines(head) is None


@pytest.mark.parametrize(
    ("head", "says"),
    [
        (b"", "is empty"),
        (b"\xef\xbb\xbf", "is empty"),
        (b" \r\n\n", "is empty"),
        (b"\n" * 4096, "blank lines only"),
        (b'[{"messages": []}]', "one JSON array"),
        (b'{\n  "messages": []\n}', "over several lines"),
        (b"prompt,completion\na,b\n", "does not begin with"),
        (b"\xff\xfe{\x00", "UTF-16"),
        (b"\xfe\xff\x00{", "UTF-16"),
        (b"PK\x03\x04abc", "ZIP"),
        (b"\x1f\x8b\x08", "gzip"),
        (b"PAR1", "Parquet"),
        (b"%PDF-1.7", "PDF"),
        (b"GGUF\x03", "GGUF"),
        (b"\x7fELF\x00\x00", "binary"),
        (b'{"a": \x00\x00', "binary"),
        (b"<html>", "does not begin with"),
    ],
)
def test_what_cannot_be_json_lines_is_told_why(head: bytes, says: str) -> None:
    reason = looks_like_json_lines(head)
    assert reason is not None and says in reason


def test_the_module_does_not_import_torch() -> None:
    code = "import sys, core.data.source; sys.exit(bool({'torch', 'transformers'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False, env=os.environ).returncode == 0
    assert source.FEW_ROWS == 10
