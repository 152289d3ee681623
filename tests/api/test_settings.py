"""Settings: where values come from, and the shipped file."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from service import settings_errors
from service.api.parts import cpu_threads
from service.settings import Settings, load_settings
from service.settings_errors import check_environment

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("core", "trainers", "steering", "service", "benchmarks", "demo")


def test_the_shipped_file_holds_the_defaults_and_all_of_them() -> None:
    shipped = load_settings(ROOT / "configs" / "service.yaml")
    assert shipped.model_dump() == Settings().model_dump()
    text = (ROOT / "configs" / "service.yaml").read_text()
    hidden = {"home", "database_url", "run_argv", "validate_argv"}
    named = set(Settings.model_fields) - hidden
    for group in ("limits", "jobs", "engine"):
        named |= set(type(getattr(shipped, group)).model_fields) - hidden
    assert not [name for name in sorted(named) if f"{name}:" not in text]
    assert text.startswith("# gradhelm serve --config configs/service.yaml\n")


def test_the_environment_wins_over_the_file_and_the_file_over_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "s.yaml"
    file.write_text("port: 9000\njobs:\n  max_running: 3\n  threads: 4\n")
    monkeypatch.setenv("GRADHELM_JOBS__THREADS", "7")
    monkeypatch.setenv("GRADHELM_ALLOWED_HOSTS", '["gpu.example.org"]')
    settings = load_settings(file)
    assert (settings.port, settings.jobs.max_running, settings.jobs.threads) == (9000, 3, 7)
    assert settings.allowed_hosts == ("gpu.example.org",) and settings.engine.rows == 16


@pytest.mark.parametrize(
    ("given", "sharers", "threads"), [("3", 1, 3), ("", 1, 4), ("", 3, 1), ("", 9, 1), ("no", 2, 2)]
)
def test_threads_that_no_setting_names_come_from_the_machine(
    monkeypatch: pytest.MonkeyPatch, given: str, sharers: int, threads: int
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2, 3})
    assert cpu_threads(sharers) == threads


@pytest.mark.parametrize(
    "text",
    ["prot: 1", "jobs: {max_runing: 1}", "port: 70000", "log_level: loud", "engine: {device: tpu}", "[1]", "a: ]"],
)
def test_a_mistake_in_the_file_is_an_error(tmp_path: Path, text: str) -> None:
    file = tmp_path / "s.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"\w"):
        load_settings(file)


def test_a_file_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no settings file"):
        load_settings(tmp_path / "none.yaml")


def test_yaml_cannot_build_objects(tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_text('log_level: !!python/object/apply:os.system ["touch /tmp/canary"]\n')
    with pytest.raises(ValueError, match=r"\w"):
        load_settings(file)


def test_the_home_folder_is_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = Settings(home=Path("data"))
    assert settings.home == tmp_path / "data" and settings.database == f"sqlite:///{tmp_path / 'data' / 'gradhelm.db'}"


@pytest.mark.parametrize(
    ("variable", "said"),
    [
        ("GRADHELM_PORTT", "GRADHELM_PORTT; did you mean GRADHELM_PORT?"),
        ("GRADHELM_ENGINE__ROW", "GRADHELM_ENGINE__ROW; did you mean GRADHELM_ENGINE__ROWS?"),
        ("GRADHELM_APIKEY", "did you mean GRADHELM_API_KEY?"),
        ("GRADHELM_ENGINE__ROWS__X", "unset GRADHELM_ENGINE__ROWS__X"),
        ("gradhelm_prot", "did you mean GRADHELM_PORT?"),
    ],
)
def test_a_variable_that_nothing_reads_is_an_error(variable: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "9000")
    with pytest.raises(ValueError, match=r"^nothing reads") as error:
        load_settings()
    assert said in str(error.value)


def test_a_variable_that_is_near_nothing_gets_no_suggestion(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADHELM_QQQQQQ", "1")
    with pytest.raises(ValueError, match=r"GRADHELM_QQQQQQ; docs/configuration.md"):
        load_settings()


def test_every_variable_that_the_code_reads_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that the source names, settings or not."""
    sources = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    named = {name for path in sources for name in re.findall(r"\bGRADHELM_[A-Z_]*[A-Z]\b", path.read_text())}
    assert {"GRADHELM_HOME", "GRADHELM_API_KEY", "GRADHELM_WHEEL_DIR", "GRADHELM_EVAL_DATA", "GRADHELM_JOB_ID"} <= named
    monkeypatch.setattr("os.environ", {"HOME": "/", **dict.fromkeys(named - {"GRADHELM_PORT"}, "[]")})
    check_environment(Settings, os.environ)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prot: 1", "{file}: there is no setting prot; did you mean port? These exist: "),
        (
            "engine: {row: 1}",
            "{file}: there is no setting engine.row; did you mean engine.rows? These exist: threads, ",
        ),
        ("port: 70000", "{file}: port: input should be less than or equal to 65535, and 70000 is not"),
        ("engine: 3", "{file}: engine: input should be a valid dictionary"),
        ("{port: -1, prot: 1}", "; {file}: there is no setting prot"),
    ],
)
def test_a_mistake_in_the_file_is_said_in_words(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "s.yaml"
    file.write_text(text)
    with pytest.raises(ValueError) as error:
        load_settings(file)
    assert said.format(file=file) in str(error.value)
    assert "pydantic" not in str(error.value) and "validation error" not in str(error.value)


def test_a_bad_value_of_the_environment_names_its_variable_and_no_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADHELM_ENGINE__ROWS", "many")
    with pytest.raises(ValueError, match=r"^GRADHELM_ENGINE__ROWS: .*'many' is not$"):
        load_settings()
    monkeypatch.delenv("GRADHELM_ENGINE__ROWS")
    monkeypatch.setenv("GRADHELM_ALLOWED_HOSTS", "gpu.example.org")
    with pytest.raises(ValueError, match=r"allowed_hosts.*JSON"):
        load_settings()
    monkeypatch.delenv("GRADHELM_ALLOWED_HOSTS")

    class Settled(Settings):
        database_url: int  # type: ignore[assignment]

    monkeypatch.setenv("GRADHELM_DATABASE_URL", "postgresql://me:secret@host/db")
    with pytest.raises(ValidationError) as refused:
        Settled()
    assert "secret" not in settings_errors.explain(Settings, refused.value, None)


LINKS = {
    "GRADHELM_SERVICE_HOST": "10.0.0.1",
    "GRADHELM_SERVICE_PORT": "8000",
    "GRADHELM_SERVICE_PORT_HTTP": "8000",
    "GRADHELM_PORT": "tcp://10.0.0.1:8000",
    "GRADHELM_PORT_8000_TCP": "tcp://10.0.0.1:8000",
    "GRADHELM_PORT_8000_TCP_PROTO": "tcp",
    "GRADHELM_PORT_8000_TCP_PORT": "8000",
    "GRADHELM_PORT_8000_TCP_ADDR": "10.0.0.1",
    "GRADHELM_API_SERVICE_HOST": "10.0.0.2",
    "GRADHELM_API_PORT": "udp://10.0.0.2:53",
    "GRADHELM_API_PORT_53_UDP_ADDR": "10.0.0.2",
}


def test_what_kubernetes_sets_for_a_service_of_our_name_is_no_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in LINKS.items():
        monkeypatch.setenv(name, value)
    file = tmp_path / "s.yaml"
    file.write_text("port: 9000\n")
    assert load_settings().port == 8000 and load_settings(file).port == 9000
    monkeypatch.setenv("GRADHELM_PORT", "9001")
    assert load_settings(file).port == 9001, "a number is a setting"


@pytest.mark.parametrize("name", ["GRADHELM_API_PORT", "GRADHELM_SERVICE_HOSTS", "GRADHELM_PORT_X", "GRADHELM_HOSTS"])
def test_what_only_resembles_those_is_still_an_error(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "8000")
    with pytest.raises(ValueError, match=f"^nothing reads the environment variable {name}"):
        load_settings()
