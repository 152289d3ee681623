"""The rules for one row: OpenAI's chat format and codes, plus plain prompt/completion rows.

The first seven codes below are those of OpenAI's published checker, so that tools built on it go on working; the
others are ours, for what it lets pass and training would then silently get wrong.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from core.text import clean

ROLES = ("system", "developer", "user", "assistant")
MESSAGE_KEYS = ("role", "content", "name", "function_call", "weight")
ROW_KEYS = ("messages", "prompt", "completion")

CODES: Mapping[str, str] = {
    "data_type": "the line is not a JSON object",
    "missing_messages_list": "`messages` is missing, empty or no list",
    "message_missing_key": "a message has no `role` or no `content`",
    "message_unrecognized_key": "a message has a key besides role, content, name, function_call and weight",
    "unrecognized_role": "a role besides system, developer, user and assistant",
    "missing_content": "`content` is empty or no text",
    "example_missing_assistant_message": "no assistant message, so nothing to learn",
    "invalid_json": "the line is not JSON (or not UTF-8)",
    "duplicate_key": "an object names the same key twice",
    "invalid_text": "text with a NUL or half of a surrogate pair",
    "line_too_long": "the line is longer than is read",
    "duplicate_role": "two messages of the same role in a row, or a second system message",
    "misplaced_system": "a system message that is not the first",
    "assistant_first": "an assistant message with nothing before it to answer",
    "last_message_not_assistant": "the conversation goes on after the last answer",
    "invalid_weight": "`weight` is not 0 or 1, or stands on a message that is not the assistant's",
    "no_trained_message": "every assistant message has weight 0",
    "invalid_name": "`name` is no text",
    "unsupported_function_call": "function calls are not trained here",
    "missing_prompt": "`prompt` is missing, empty or no text",
    "missing_completion": "`completion` is missing, empty or no text",
    "mixed_row_kinds": "chat rows and prompt/completion rows in one file or one row",
    "empty_file": "no rows at all",
    "too_few_examples": "fewer rows than the job asks for",
    "all_tokens_truncated": "no trained token is left within the longest row allowed",
    "not_encodable": "the model's chat template refuses the row, or cannot train it as it would be served",
    "model_not_usable": "the base model's tokenizer cannot be loaded",
}
"""Every code that a row or file can be refused with, and what it means."""

WARNINGS: Mapping[str, str] = {
    "few_examples": "fewer than ten rows",
    "blank_line": "a blank line, skipped",
    "truncated": "a row that is longer than allowed and is cut on the right",
    "row_unrecognized_key": "a key of the row that has no effect",
    "name_ignored": "`name` has no effect: chat templates do not show it to the model",
}
"""Every code that a row or file is only warned about."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str
    """system, developer, user or assistant."""
    content: str
    """What is said; never empty in a valid row."""
    weight: int | None = None
    """0: this answer is shown but not trained on; 1 or None: trained on. Assistant messages only."""
    name: str | None = None
    """Who speaks; kept, and not shown to the model."""


@dataclass(frozen=True, slots=True)
class Row:
    """One training example: a conversation, or a prompt with its completion."""

    line: int
    """Line of the file, from 1."""
    messages: tuple[Message, ...] = ()
    """The conversation; empty in prompt/completion rows."""
    prompt: str | None = None
    """Raw text before the completion; None in chat rows."""
    completion: str | None = None
    """Raw text to train on; None in chat rows."""

    @property
    def kind(self) -> Literal["chat", "completion"]:
        """Which of the two formats the row has."""
        return "chat" if self.prompt is None else "completion"


@dataclass(frozen=True, slots=True)
class RowProblem:
    """What is wrong with one line, or (line None) with the file."""

    line: int | None
    """Line of the file, from 1; None when the file as a whole is meant."""
    code: str
    """A key of `CODES` or `WARNINGS`."""
    message: str
    """What is wrong, where in the row, and what is expected."""


class Checker:
    """Checks the lines of one file; remembers the kind of its first row, since kinds must not mix."""

    def __init__(self) -> None:
        """Start a file."""
        self._kind: str | None = None
        self.problems: list[RowProblem] = []
        self.warnings: list[RowProblem] = []

    def check(self, line: int, data: bytes) -> Row | None:
        """Check one line; what is found is appended to `problems` and `warnings`.

        Args:
            line: its number, from 1.
            data: its bytes, without the line end.

        Returns:
            The row, or None when there was a problem.
        """
        before = len(self.problems)
        row = _OneRow(line, self.problems, self.warnings).read(data)
        if row is not None and self._kind not in (None, row.kind):
            text = f"this is a {row.kind} row, but the file began with {self._kind} rows; use one kind per file"
            self.problems.append(RowProblem(line, "mixed_row_kinds", text))
        elif row is not None:
            self._kind = row.kind
        return row if len(self.problems) == before else None


_EXAMPLE = (
    '; a row is one JSON object on one line, like {"messages": [{"role": "user", "content": "..."}, '
    '{"role": "assistant", "content": "..."}]}'
)


class _RepeatedKeyError(ValueError):
    pass


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        raise _RepeatedKeyError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} is given twice")
    return result


def _constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


class _OneRow:
    """The checks of one line, one method per thing checked."""

    def __init__(self, line: int, problems: list[RowProblem], warnings: list[RowProblem]) -> None:
        self.line, self.problems, self.warnings = line, problems, warnings

    def fail(self, code: str, message: str) -> None:
        self.problems.append(RowProblem(self.line, code, message))

    def warn(self, code: str, message: str) -> None:
        self.warnings.append(RowProblem(self.line, code, message))

    def read(self, data: bytes) -> Row | None:
        try:
            value = json.loads(data.decode(), object_pairs_hook=_object, parse_constant=_constant)
        except _RepeatedKeyError as error:
            self.fail("duplicate_key", str(error))
            return None
        except UnicodeDecodeError as error:
            self.fail("invalid_json", f"byte {error.start + 1} of the line is not UTF-8")
            return None
        except json.JSONDecodeError as error:
            self.fail("invalid_json", f"{error.msg} at column {error.colno}{_EXAMPLE if data[:1] not in b'{[' else ''}")
            return None
        except (ValueError, RecursionError) as error:
            self.fail("invalid_json", str(error)[:200])
            return None
        if not isinstance(value, dict):
            self.fail("data_type", f"expected a JSON object, found {_kind_of(value)}")
            return None
        for key in value.keys() - set(ROW_KEYS):
            self.warn(
                "row_unrecognized_key", f"{key[:80]!r} has no effect; rows hold messages, or prompt and completion"
            )
        if {"positive", "negative"} <= value.keys() and value.keys().isdisjoint({"messages", "completion"}):
            code = "missing_completion" if "prompt" in value else "missing_messages_list"
            self.fail(code, "this looks like a steering pair: fit a vector to such rows with `gradhelm vectors fit`")
            return None
        if (hint := _foreign(value)) is not None:
            self.fail("missing_messages_list", hint)
            return None
        has_pair = "prompt" in value or "completion" in value
        if "messages" in value and has_pair:
            self.fail("mixed_row_kinds", "the row has both messages and prompt/completion; keep one of them")
            return None
        return self.pair(value) if has_pair else self.chat(value)

    def pair(self, value: dict[str, Any]) -> Row | None:
        for key in ("prompt", "completion"):
            text = value.get(key)
            if not isinstance(text, str) or not text:
                self.fail(f"missing_{key}", f"`{key}` must be a text that is not empty, found {_kind_of(text)}")
                return None
            if not self.is_text(text, key):
                return None
        return Row(self.line, prompt=value["prompt"], completion=value["completion"])

    def chat(self, value: dict[str, Any]) -> Row | None:
        items = value.get("messages")
        if not isinstance(items, list) or not items:
            hint = "" if items is None else f", found {_kind_of(items)}"
            self.fail("missing_messages_list", f"`messages` must be a list with at least one message{hint}")
            return None
        before = len(self.problems)
        messages = [self.message(item, f"messages[{index}]") for index, item in enumerate(items)]
        if len(self.problems) > before:
            return None
        whole = tuple(message for message in messages if message is not None)
        self.conversation(whole)
        return Row(self.line, messages=whole) if len(self.problems) == before else None

    def message(self, item: Any, where: str) -> Message | None:
        if not isinstance(item, dict):
            self.fail("data_type", f"{where} must be an object with role and content, found {_kind_of(item)}")
            return None
        if extra := [key for key in item if key not in MESSAGE_KEYS]:
            self.fail(
                "message_unrecognized_key", f"{where}.{clean(extra[0][:80])}: allowed are {', '.join(MESSAGE_KEYS)}"
            )
        if item.get("function_call") is not None:
            self.fail("unsupported_function_call", f"{where}: function calls are not trained here; remove the row")
            return None
        if missing := [key for key in ("role", "content") if key not in item]:
            self.fail("message_missing_key", f"{where} has no {' and no '.join(missing)}")
            return None
        role, content = item["role"], item["content"]
        if not isinstance(role, str) or role not in ROLES:
            self.fail("unrecognized_role", f"{where}.role is {str(role)[:80]!r}; allowed are {', '.join(ROLES)}")
        if not isinstance(content, str) or not content:
            self.fail("missing_content", f"{where}.content must be a text that is not empty, found {_kind_of(content)}")
            return None
        if not self.is_text(content, f"{where}.content"):
            return None
        name = item.get("name")
        if name is not None and not isinstance(name, str):
            self.fail("invalid_name", f"{where}.name must be a text, found {_kind_of(name)}")
            return None
        if name is not None:
            self.warn("name_ignored", f"{where}.name is not shown to the model")
        return Message(str(role), content, self.weight(item, str(role), where), name)

    def weight(self, item: dict[str, Any], role: str, where: str) -> int | None:
        weight = item.get("weight")
        if weight is None:
            return None
        if type(weight) is not int or weight not in (0, 1):
            self.fail("invalid_weight", f"{where}.weight is {clean(str(weight)[:80])}; allowed are 0 and 1")
        elif role != "assistant":
            self.fail(
                "invalid_weight", f"{where} is a {clean(role[:80])} message; only assistant messages take a weight"
            )
        else:
            return weight
        return None

    def conversation(self, messages: tuple[Message, ...]) -> None:
        roles = ["system" if message.role == "developer" else message.role for message in messages]
        answers = [message for message in messages if message.role == "assistant"]
        if not answers:
            return self.fail(
                "example_missing_assistant_message", "no assistant message, so nothing to learn from this row"
            )
        for index, (role, following) in enumerate(itertools.pairwise(roles), 1):
            if role == following or (following == "system" and "system" in roles[:index]):
                return self.fail("duplicate_role", f"messages[{index}] repeats the role {following}; merge the two")
            if following == "system":
                return self.fail("misplaced_system", f"messages[{index}] is a system message; it must come first")
        if roles[0] == "assistant":
            self.fail("assistant_first", "messages[0] is the assistant's, with nothing before it to answer")
        if roles[-1] != "assistant":
            self.fail(
                "last_message_not_assistant", f"the last message is the {roles[-1]}'s; end with an assistant message"
            )
        if all(message.weight == 0 for message in answers):
            self.fail("no_trained_message", "every assistant message has weight 0, so nothing is trained")
        return None

    def is_text(self, text: str, where: str) -> bool:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            self.fail("invalid_text", f"{where} has half of a surrogate pair at character {error.start + 1}")
            return False
        if "\x00" in text:
            self.fail("invalid_text", f"{where} has a NUL at character {text.index(chr(0)) + 1}")
            return False
        return True


def _foreign(value: dict[str, Any]) -> str | None:
    """How to write a row of two widespread formats that are not read here."""
    if not value.keys().isdisjoint({"messages", "prompt", "completion"}):
        return None
    if "conversations" in value:
        return (
            "this looks like a ShareGPT row: rename `conversations` to `messages`, in each `from` to `role` (human is "
            "user, gpt is assistant) and `value` to `content`"
        )
    if {"instruction", "output"} <= value.keys():
        return (
            "this looks like an Alpaca row: write messages, a user's with the instruction and its input, and an "
            "assistant's with the output"
        )
    return None


def _kind_of(value: Any) -> str:
    names = {
        dict: "an object",
        list: "a list",
        str: "a text",
        bool: "true or false",
        int: "a number",
        float: "a number",
    }
    if value in ("", []):
        return f"an empty {'text' if value == '' else 'list'}"
    return names.get(type(value), "nothing")
