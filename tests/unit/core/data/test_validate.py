"""The short process that judges a job's files: verdict, counts, exit codes."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from core.data import validate as module
from core.data.chat import encode
from core.data.source import rows, scan
from core.data.validate import check_tokens, main, validate, write_json
from core.models.load import load_tokenizer

ROW = {"messages": [{"role": "user", "content": "Where is it?"}, {"role": "assistant", "content": "Under the bridge."}]}
LONG = {"messages": [{"role": "user", "content": "word " * 300}, {"role": "assistant", "content": "Too late."}]}
CUT = {"messages": [{"role": "user", "content": "Tell me."}, {"role": "assistant", "content": "word " * 300}]}
BAD = {"messages": [{"role": "user", "content": "Hi"}]}


@pytest.fixture(autouse=True, scope="module")
def model(tiny_llama: Path) -> Path:
    """All files here are judged for the tiny Llama."""
    return tiny_llama


def write(path: Path, *content: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return path


def judge(train: Path, eval_file: Path | None = None, **settings: Any) -> dict[str, Any]:
    result = validate("tiny-llama", train, eval_file, **{"max_length": 100, **settings})
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert result["ok"] == (result["problem_count"] == 0)
    return result


def test_good_files_are_counted(tmp_path: Path) -> None:
    train, held_out = write(tmp_path / "t.jsonl", *[ROW] * 11, CUT), write(tmp_path / "e.jsonl", ROW)
    got = judge(train, held_out)
    examples = [encode(row, load_tokenizer("tiny-llama"), max_length=100) for row in rows(train)]
    assert got["ok"] and got["param"] is None and got["code"] is None and got["problems"] == []
    assert (got["rows"], got["kind"], got["truncated"]) == (12, "chat", 1)
    assert got["tokens"] == sum(len(example.input_ids) for example in examples)
    assert got["trained_tokens"] == sum(example.trained for example in examples)
    assert got["longest_row"] == 100 and got["longest_row_untruncated"] == examples[-1].total > 100
    assert got["eval"]["rows"] == 1 and got["eval"]["trained_tokens"] == examples[0].trained
    assert got["model"] == "tiny-llama" and got["max_length"] == 100
    assert [(w["file"], w["line"], w["code"]) for w in got["warnings"]] == [
        ("training_file", 12, "truncated"),
        ("validation_file", None, "few_examples"),
    ]


def test_rows_whose_trained_tokens_are_all_cut_away_are_named(tmp_path: Path) -> None:
    got = judge(write(tmp_path / "t.jsonl", ROW, LONG, ROW, CUT, LONG))
    assert [(p["file"], p["line"], p["code"]) for p in got["problems"]] == [
        ("training_file", 2, "all_tokens_truncated"),
        ("training_file", 5, "all_tokens_truncated"),
    ]
    assert (got["param"], got["code"]) == ("training_file", "all_tokens_truncated")
    assert got["message"].startswith("line 2: none of the row's trained tokens is within the first 100 of its ")
    assert judge(write(tmp_path / "t.jsonl", ROW, LONG), max_length=1000)["ok"]


def test_faults_of_the_text_come_with_line_and_code(tmp_path: Path) -> None:
    got = judge(write(tmp_path / "t.jsonl", ROW, BAD))
    assert got["problems"] == [
        {
            "file": "training_file",
            "line": 2,
            "code": "example_missing_assistant_message",
            "message": "no assistant message, so nothing to learn from this row",
        }
    ]
    assert got["message"].startswith("line 2: no assistant message")


def test_the_validation_file_is_the_parameter_when_only_it_is_bad(tmp_path: Path) -> None:
    good, bad = write(tmp_path / "t.jsonl", ROW), write(tmp_path / "e.jsonl", BAD, ROW)
    got = judge(good, bad)
    assert (got["ok"], got["param"], got["code"]) == (False, "validation_file", "example_missing_assistant_message")
    assert got["rows"] == 1 and got["eval"]["rows"] == 1
    both = judge(bad, bad)
    assert both["param"] == "training_file" and both["problem_count"] == 2
    cut = judge(good, write(tmp_path / "e.jsonl", LONG))
    assert (cut["param"], cut["code"]) == ("validation_file", "all_tokens_truncated")
    assert {problem["file"] for problem in both["problems"]} == {"training_file", "validation_file"}


def test_an_empty_file_has_no_line(tmp_path: Path) -> None:
    got = judge(write(tmp_path / "t.jsonl"))
    assert got["problems"][0]["line"] is None and got["code"] == "empty_file"
    assert got["message"] == "the file holds no rows; write one JSON object per line"


def test_at_most_a_hundred_are_named_and_all_are_counted(tmp_path: Path) -> None:
    got = judge(write(tmp_path / "t.jsonl", *[LONG] * 130, *[CUT] * 110), write(tmp_path / "e.jsonl", *[LONG] * 50))
    assert len(got["problems"]) == 100 and got["problem_count"] == 180
    assert len(got["warnings"]) == 100 and got["warning_count"] == 110
    assert got["truncated"] == 240
    got = judge(write(tmp_path / "t.jsonl", *[BAD] * 130), write(tmp_path / "e.jsonl", *[BAD] * 50))
    assert len(got["problems"]) == 100 and got["problem_count"] == 180


def test_a_least_number_of_rows_may_be_asked_for(tmp_path: Path) -> None:
    train = write(tmp_path / "t.jsonl", *[ROW] * 9)
    assert judge(train)["ok"]
    assert judge(train, min_rows=10)["code"] == "too_few_examples"


@pytest.mark.parametrize("model", ["tiny-camel", "https://example.org/model", "/nowhere/model"])
def test_a_model_that_cannot_be_used_is_the_users_fault(tmp_path: Path, model: str) -> None:
    got = validate(model, write(tmp_path / "t.jsonl", ROW), None, max_length=9)
    assert (got["ok"], got["param"], got["code"]) == (False, "model", "model_not_usable")
    assert got["problems"][0]["file"] is None and got["message"]


def test_a_row_that_the_template_refuses_is_named(tmp_path: Path) -> None:
    tokenizer = copy.deepcopy(load_tokenizer("tiny-llama"))
    tokenizer.chat_template = (
        "{% if 'bridge' in messages[-1]['content'] %}{{ raise_exception('no bridges') }}{% endif %}"
        "{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"
    )
    path = write(tmp_path / "t.jsonl", CUT, ROW, CUT)
    report, got = check_tokens(path, scan(path), tokenizer, max_length=100)
    assert [(problem.line, problem.code) for problem in got.problems] == [(2, "not_encodable")]
    assert got.problems[0].message.endswith("refuses the conversation: no bridges")
    assert report.truncated == 2 and got.problem_count == 1


def test_prompt_rows(tmp_path: Path) -> None:
    got = judge(write(tmp_path / "t.jsonl", {"prompt": "2 + 2 =", "completion": " 4"}))
    assert got["ok"] and got["kind"] == "completion" and 2 <= got["trained_tokens"] < got["tokens"]


def arguments(tmp_path: Path, train: Path, *more: str) -> list[str]:
    out = tmp_path / "out" / "validation.json"
    return ["--model", "tiny-llama", "--train", str(train), "--max-length", "100", "--out", str(out), *more]


@pytest.mark.parametrize(("row", "code"), [(ROW, 0), (LONG, 2), (BAD, 2)])
def test_exit_codes(tmp_path: Path, row: object, code: int) -> None:
    train = write(tmp_path / "t.jsonl", row)
    assert main(arguments(tmp_path, train, "--eval", str(train))) == code
    assert [item.name for item in (tmp_path / "out").iterdir()] == ["validation.json"]
    assert json.loads((tmp_path / "out" / "validation.json").read_text())["ok"] == (code == 0)


@pytest.mark.parametrize("more", [["--max-length", "1"], ["--max-length", "x"], ["--what"]])
def test_wrong_usage_is_no_verdict(tmp_path: Path, more: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments(tmp_path, tmp_path / "t.jsonl", *more))
    assert caught.value.code == 64 and "core.data.validate: " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_as_a_process_bad_text_is_judged_without_loading_a_model(tmp_path: Path) -> None:
    code = (
        "import sys; from core.data.validate import main; code = main(sys.argv[1:])\n"
        "sys.exit(code if not {'torch', 'transformers'} & sys.modules.keys() else 99)"
    )
    train = write(tmp_path / "t.jsonl", ROW, BAD)
    done = subprocess.run([sys.executable, "-c", code, *arguments(tmp_path, train)], check=False, env=os.environ)
    assert done.returncode == 2
    assert json.loads((tmp_path / "out" / "validation.json").read_text())["problem_count"] == 1


def test_as_a_process_our_own_fault_is_no_verdict(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "core.data.validate", *arguments(tmp_path, tmp_path)]
    broken = subprocess.run(command, check=False, capture_output=True, env=os.environ)
    assert broken.returncode == 1 and b"IsADirectoryError" in broken.stderr
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_gone_is_a_verdict(tmp_path: Path) -> None:
    gone, good = tmp_path / "gone.jsonl", write(tmp_path / "t.jsonl", ROW)
    assert main(arguments(tmp_path, gone)) == 2
    for files, param in (((gone,), "training_file"), ((good, gone), "validation_file")):
        result = judge(*files)
        assert (result["ok"], result["param"], result["code"]) == (False, param, "file_not_found")
        assert result["problem_count"] == 1 and "upload it again" in result["message"]


def test_a_file_that_goes_while_it_is_read_is_a_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "t.jsonl", ROW)

    def last_look(path: Path, **settings: Any) -> Any:
        found = scan(path, **settings)
        path.unlink()
        return found

    monkeypatch.setattr(module.source, "scan", last_look)
    result = judge(path)
    assert (result["ok"], result["code"], result["rows"]) == (False, "file_not_found", 0)


@pytest.mark.slow  # imports torch in a process of its own: several seconds, and the exit codes are tested above
def test_as_a_process_good_files_pass(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "core.data.validate", *arguments(tmp_path, write(tmp_path / "t.jsonl", ROW))]
    assert subprocess.run(command, check=False, env=os.environ).returncode == 0


def test_a_verdict_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    write_json(tmp_path / "v.json", {"a": 1})
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "v.json", {"a": ["x" * 100_000, float("nan")]})
    assert [item.name for item in tmp_path.iterdir()] == ["v.json"]
    assert json.loads((tmp_path / "v.json").read_text()) == {"a": 1}


def test_the_limit_is_what_the_documentation_says() -> None:
    assert module.MAX_PROBLEMS == 100
