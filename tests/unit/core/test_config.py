"""Configuration: every way to fill it, every way to get it wrong, and its documentation."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jsonschema_rs
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from core.config import ConfigError, dump, fields_doc, json_schema, parse, resolve, write_yaml
from core.config_yaml import read_yaml


@dataclass(frozen=True, kw_only=True, slots=True)
class Optimizer:
    """How parameters move."""

    name: Literal["adamw", "sgd"] = "adamw"
    """Which rule."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of
    the two moments."""
    rank: int = field(default=8, metadata={"schema": {"minimum": 1}})
    """Rank of the update."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, not {self.rank}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One run."""

    model: str
    """Reference of the base model."""
    learning_rate: float = 1e-4
    """Step size, per step."""
    epochs: int = 3
    """Passes over the data."""
    max_steps: int | None = None
    """Stop here."""
    batch_size: int | Literal["auto"] = "auto"
    """Rows in a step."""
    warmup: int | float = 0
    """Steps, or a share of them."""
    pack: bool = False
    """Whether rows share a place."""
    output: Path = Path("runs/x")
    """Where results go."""
    eval_file: Path | None = None
    """What to evaluate on."""
    layers: tuple[int, ...] = ()
    """Which blocks."""
    tags: list[str] = field(default_factory=list)
    """Free words."""
    method: Mapping[str, Any] = field(default_factory=lambda: {"name": "lora"})
    """Name and settings of the method."""
    limits: dict[str, int] = field(default_factory=dict)
    """Bytes by name."""
    optimizer: Optimizer = Optimizer()
    """How parameters move."""
    second: Optimizer | None = None
    """A second one."""


def test_defaults_and_origins() -> None:
    got = resolve(Run, data={"model": "tiny-llama"})
    assert got.value == Run(model="tiny-llama")
    assert got.origin["model"] == "request"
    assert got.origin["optimizer.betas"] == "default" and got.origin["method.name"] == "default"
    assert got.origin.keys() >= {"learning_rate", "optimizer.name", "second", "limits"}


def test_later_sources_win_and_are_named(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: a\nepochs: 1\nmethod: {name: full, decay: 0.1}\noptimizer:\n  rank: 2\n")
    got = resolve(
        Run,
        file=file,
        data={"epochs": 2, "optimizer": {"name": "sgd"}},
        overrides=["epochs=5", "method.decay=1e-2", "optimizer.betas=[0.5, 0.6]"],
        data_origin="request body",
    )
    assert got.value.epochs == 5
    assert got.value.method == {"name": "full", "decay": 0.01}
    assert got.value.optimizer == Optimizer(name="sgd", betas=(0.5, 0.6), rank=2)
    assert {name: where for name, where in got.origin.items() if where != "default"} == {
        "model": "file",
        "epochs": "command line",
        "method.name": "file",
        "method.decay": "command line",
        "optimizer.name": "request body",
        "optimizer.rank": "file",
        "optimizer.betas": "command line",
    }


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("model=123", "model", "123"),
        ("model=no", "model", "no"),
        ("model=a: [b", "model", "a: [b"),
        ("model=a=b", "model", "a=b"),
        ("model=", "model", ""),
        ("learning_rate=1e-3", "learning_rate", 1e-3),
        ("learning_rate=2", "learning_rate", 2.0),
        ("epochs=1e1", "epochs", 10),
        ("max_steps=null", "max_steps", None),
        ("max_steps=7", "max_steps", 7),
        ("batch_size=auto", "batch_size", "auto"),
        ("batch_size=4", "batch_size", 4),
        ("pack=true", "pack", True),
        ("eval_file=null", "eval_file", None),
        ("eval_file=a/b.jsonl", "eval_file", Path("a/b.jsonl")),
        ("layers=[1, 2]", "layers", (1, 2)),
        ("tags=[a, b]", "tags", ["a", "b"]),
        ("limits.disk=5", "limits", {"disk": 5}),
        ("method={name: full, deep: {x: [1]}}", "method", {"name": "full", "deep": {"x": [1]}}),
        ("method.target=[q, v]", "method", {"target": ["q", "v"]}),
        ("second.rank=3", "second", Optimizer(rank=3)),
        ("second=null", "second", None),
    ],
)
def test_key_equals_value(text: str, name: str, value: Any) -> None:
    got = resolve(Run, overrides=["model=m", text]).value
    assert getattr(got, name) == value
    assert type(getattr(got, name)) is type(value)


def test_an_int_stays_an_int_and_a_float_a_float_where_both_may_stand() -> None:
    assert repr(parse(Run, {"model": "m", "warmup": 1}).warmup) == "1"
    assert repr(parse(Run, {"model": "m", "warmup": 1.0}).warmup) == "1.0"
    assert repr(resolve(Run, overrides=["model=m", "warmup=0.5"]).value.warmup) == "0.5"


@pytest.mark.parametrize(
    ("data", "key", "says"),
    [
        ({}, "model", "model is missing; it must be text"),
        ({"model": 3}, "model", "model must be text, not 3"),
        ({"model": None}, "model", "model must be text, not None"),
        ({"epoch": 3}, "epoch", "unknown setting epoch; did you mean epochs?"),
        ({"epoch": 3}, "epoch", "epochs? These exist: batch_size, "),
        ({"zzz": 3}, "zzz", "unknown setting zzz; these exist: batch_size, "),
        ({"epochs": "3"}, "epochs", "epochs must be a whole number, not '3'"),
        ({"epochs": 2.5}, "epochs", "epochs must be a whole number, not 2.5"),
        ({"epochs": True}, "epochs", "epochs must be a whole number, not True"),
        ({"pack": 1}, "pack", "pack must be true or false, not 1"),
        ({"learning_rate": "fast"}, "learning_rate", "learning_rate must be a number, not 'fast'"),
        ({"learning_rate": float("nan")}, "learning_rate", "must be a number, not nan"),
        ({"learning_rate": float("inf")}, "learning_rate", "must be a number, not inf"),
        ({"learning_rate": 10**400}, "learning_rate", "must be a number"),
        ({"batch_size": "big"}, "batch_size", "batch_size must be a whole number or 'auto', not 'big'"),
        ({"max_steps": []}, "max_steps", "max_steps must be a whole number or null, not []"),
        ({"output": ""}, "output", "output must be a path"),
        ({"layers": 3}, "layers", "layers must be a list whose items are each a whole number, not 3"),
        ({"layers": [1, "x"]}, "layers[1]", "layers[1] must be a whole number, not 'x'"),
        ({"method": "lora"}, "method", "method must be a mapping, not 'lora'"),
        ({"method": {1: 2}}, "method", "method must be a mapping"),
        ({"limits": {"a": "b"}}, "limits.a", "limits.a must be a whole number, not 'b'"),
        ({"optimizer": {"rnak": 3}}, "optimizer.rnak", "unknown setting optimizer.rnak; did you mean optimizer.rank?"),
        ({"optimizer": {"name": "adam"}}, "optimizer.name", "optimizer.name must be one of 'adamw', 'sgd', not 'adam'"),
        ({"optimizer": {"betas": [1]}}, "optimizer.betas", "must be a list of 2: a number, a number, not [1]"),
        ({"optimizer": None}, "optimizer", "optimizer must be a mapping of settings, not None"),
        ({"optimizer": {"rank": 0}}, "optimizer", "optimizer: rank must be at least 1, not 0"),
        ({"second": {"rank": "x"}}, "second.rank", "second.rank must be a whole number, not 'x'"),
        ({"second": 3}, "second", "second must be a mapping or null, not 3"),
        ({"model": "m" * 3, "tags": "x" * 500}, "tags", "..."),
    ],
)
def test_a_wrong_setting_is_named_with_its_value_and_what_is_allowed(data: dict[str, Any], key: str, says: str) -> None:
    whole = data if "model" in data or key == "model" else {"model": "m", **data}
    with pytest.raises(ConfigError) as caught:
        parse(Run, whole)
    assert says in str(caught.value)
    assert caught.value.key == key
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("text", ["epochs", "=3", ".epochs=3", "optimizer.=3", ""])
def test_a_malformed_override_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="key=value"):
        resolve(Run, overrides=["model=m", text])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"- a\n- b\n", "must hold a mapping"),
        (b"model: [\n", "is no YAML"),
        (b"model: a\nmodel: b\n", "'model' is given twice"),
        (b"a: 1\n---\nb: 2\n", "is no YAML"),
        (b"model: !!python/object/apply:os.system [ls]\n", "is no YAML"),
        (b"model: !!python/name:os.system\n", "is no YAML"),
        (b"\xff\xfe", "is no YAML"),
        (b"model: " + b"x" * 2_000_000, "over 1048576 bytes"),
        (b"? [a, b]\n: 3\n", "is no YAML|unknown setting"),
    ],
)
def test_a_bad_file_is_refused(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "r.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=says):
        resolve(Run, file=tmp_path / "r.yaml")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*none\.yaml: No such file"):
        resolve(Run, file=tmp_path / "none.yaml")


def test_an_empty_file_is_an_empty_mapping(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("# nothing yet\n")
    assert resolve(Run, file=tmp_path / "r.yaml", overrides=["model=m"]).value == Run(model="m")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1.e3", 1000.0),
        (".5", 0.5),
        ("+3", 3),
        ("0x1f", 31),
        ("010", "010"),
        ("1:30", "1:30"),
        ("1_000", "1_000"),
        ("no", "no"),
        ("on", "on"),
        ("True", True),
        ("~", None),
        ("", None),
        ("2026-01-01", "2026-01-01"),
        ("e3", "e3"),
        (".inf", float("inf")),
        ("{a: &x [1], b: *x}", {"a": [1], "b": [1]}),
        ("{<<: {a: 1}, b: 2}", {"a": 1, "b": 2}),
    ],
)
def test_plain_scalars_follow_yaml_1_2(text: str, value: Any) -> None:
    assert read_yaml(text) == value
    assert type(read_yaml(text)) is type(value)


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(PLAIN)
def test_what_is_written_is_read_back(data: Any) -> None:
    assert read_yaml(write_yaml(data)) == data


@pytest.mark.parametrize(
    "text", ["1e5", "no", "null", "0x1f", "010", "true", "2026-01-01", "<<", "", " a", "a: b", "~"]
)
def test_texts_that_look_like_something_else_stay_texts(text: str) -> None:
    assert read_yaml(write_yaml({"a": text})) == {"a": text}
    assert yaml.safe_load(write_yaml({"a": "yes we can"})) == {"a": "yes we can"}


def test_dump_and_parse_are_inverse() -> None:
    run = resolve(
        Run, overrides=["model=m", "layers=[1]", "eval_file=x", "second.rank=2", "method.deep.x=3", "tags=[a]"]
    ).value
    plain = dump(run)
    assert json.loads(json.dumps(plain)) == plain
    assert parse(Run, plain) == run
    assert parse(Run, read_yaml(write_yaml(plain))) == run


def test_dump_shares_nothing_with_the_configuration() -> None:
    run = parse(Run, {"model": "m", "method": {"name": "x", "list": [1]}})
    dump(run)["method"]["list"].append(2)
    assert run.method == {"name": "x", "list": [1]}


def test_inputs_are_not_changed() -> None:
    data: dict[str, Any] = {"model": "m", "method": {"name": "x"}, "optimizer": {"rank": 2}}
    before = json.dumps(data)
    resolve(Run, data=data, overrides=["method.name=y", "optimizer.rank=9"])
    assert json.dumps(data) == before


def test_documentation_is_what_stands_under_the_fields() -> None:
    docs = fields_doc(Run)
    assert list(docs)[:3] == ["model", "learning_rate", "epochs"]
    assert docs["model"].required and docs["model"].doc == "Reference of the base model."
    assert docs["optimizer.betas"].doc == "Decay rates of the two moments."
    assert docs["optimizer.betas"].default == [0.9, 0.999]
    assert docs["batch_size"].type == "a whole number or 'auto'"
    assert docs["output"].default == "runs/x" and docs["method"].default == {"name": "lora"}
    assert docs["second.rank"].doc == "Rank of the update."
    assert all(doc.doc for doc in docs.values())


@dataclass(frozen=True, kw_only=True)
class Child(Optimizer):
    rank: int = 4
    """Its own rank."""
    extra: bool = False


def test_inherited_fields_keep_their_documentation_and_a_missing_one_is_empty() -> None:
    docs = fields_doc(Child)
    assert docs["name"].doc == "Which rule."
    assert docs["rank"].doc == "Its own rank."
    assert docs["extra"].doc == ""


def test_schema_describes_defaults_bounds_and_documentation() -> None:
    schema = json_schema(Run)
    jsonschema_rs.Draft202012Validator(schema)
    assert schema["required"] == ["model"] and schema["additionalProperties"] is False
    assert schema["properties"]["learning_rate"] == {
        "type": "number",
        "description": "Step size, per step.",
        "default": 1e-4,
    }
    assert schema["properties"]["optimizer"]["properties"]["rank"]["minimum"] == 1
    assert schema["properties"]["optimizer"]["description"] == "How parameters move."
    json.dumps(schema)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"epochs": 2},
        {"epochs": 2.0},
        {"epochs": "2"},
        {"batch_size": "auto"},
        {"batch_size": "x"},
        {"layers": [1, 2]},
        {"layers": [1.5]},
        {"eval_file": None},
        {"eval_file": ""},
        {"pack": None},
        {"unknown": 1},
        {"optimizer": {"betas": [0.1, 0.2]}},
        {"optimizer": {"betas": [0.1]}},
        {"optimizer": {"betas": [0.1, 0.2, 0.3]}},
        {"optimizer": {"rank": 0}},
        {"second": None},
        {"second": {"rank": 3}},
        {"second": {"rnk": 3}},
        {"limits": {"a": 1}},
        {"limits": {"a": "b"}},
        {"method": {"anything": [1]}},
        {"method": 3},
    ],
)
def test_schema_and_parse_agree(change: dict[str, Any]) -> None:
    data = {"model": "m", **change}
    valid = jsonschema_rs.Draft202012Validator(json_schema(Run)).is_valid(data)
    try:
        parse(Run, data)
        accepted = True
    except ConfigError:
        accepted = False
    assert accepted == valid


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Run(model="m").epochs = 3  # type: ignore[misc]
