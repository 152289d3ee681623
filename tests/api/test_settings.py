"""Settings: where values come from, and the shipped file."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.api.parts import cpu_threads
from service.settings import Settings, load_settings

ROOT = Path(__file__).resolve().parents[2]


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
