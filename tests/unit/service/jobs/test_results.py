"""Artifacts become rows; vectors are read without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from sqlalchemy import select

from service.db.engine import read
from service.db.tables import Model, Vector
from service.jobs.check_pairs import main as check_pairs
from service.jobs.results import NoResult, vector_header
from tests.unit.service.jobs.world import World


def vector_bytes() -> bytes:
    import torch

    from steering.vector import SteeringVector

    vector = SteeringVector(
        directions={2: torch.ones(4), 0: torch.zeros(4) + 0.5},
        site="block", fingerprint="sha256:" + "0" * 64, base="tiny-llama", method="mean_difference",
        data_hash="sha256:" + "1" * 64, norms={0: 1.0, 2: 2.0}, metadata={"rows": 3},
    )  # fmt: skip
    return vector.to_bytes()


def test_a_fitted_vector_is_registered(world: World) -> None:
    job_id = world.submit(kind="steering_fit", method="mean_difference", resolved={"site": "block"}, suffix="calm")
    world.tick(2)
    artifact = world.folder(job_id) / "artifact"
    artifact.mkdir()
    (artifact / "vector.safetensors").write_bytes(vector_bytes())
    world.executor.finish(world.folder(job_id), 0)
    world.tick()
    job = world.job(job_id)
    assert job.status == "succeeded" and job.result_vector == "vec_" + job_id.removeprefix("steerjob-")
    with read(world.store.engine) as session:
        (row,) = session.scalars(select(Vector)).all()
    assert (row.name, row.layers, row.site, row.fingerprint) == ("calm", [0, 2], "block", "sha256:" + "0" * 64)
    assert Path(row.path).read_bytes() == (artifact / "vector.safetensors").read_bytes()
    assert row.metadata_["rows"] == 3
    assert f"New steering vector created: {row.id}" in world.messages(job_id)


@pytest.mark.parametrize(
    "data",
    [b"", b"\xff" * 9, b"\x02\x00\x00\x00\x00\x00\x00\x00{}", (20).to_bytes(8, "little") + b'{"__metadata__":{}}  '],
)
def test_what_is_no_vector_is_no_result(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "v").write_bytes(data)
    with pytest.raises(NoResult):
        vector_header(tmp_path / "v")


def test_the_check_of_pairs(tmp_path: Path) -> None:
    good, bad, out = tmp_path / "good", tmp_path / "bad", tmp_path / "out.json"
    good.write_text('{"positive": "yes", "negative": "no"}\n')
    bad.write_text('{"positive": "yes", "negative": "no"}\n{"positive": "same", "negative": "same"}\n')
    assert check_pairs(["--model", "m", "--train", str(good), "--max-length", "9", "--out", str(out)]) == 0
    assert json.loads(out.read_text())["rows"] == 1
    assert check_pairs(["--train", str(tmp_path / "gone.jsonl"), "--out", str(out)]) == 2
    gone = json.loads(out.read_text())
    assert (gone["code"], gone["param"], gone["problem_count"]) == ("file_not_found", "training_file", 1)
    assert check_pairs(["--train", str(bad), "--out", str(out)]) == 2
    verdict = json.loads(out.read_text())
    assert (verdict["code"], verdict["param"], verdict["problems"][0]["line"]) == ("identical_pair", "training_file", 2)


def test_the_scheduler_and_the_supervisor_import_little() -> None:
    """The server never imports torch; the supervisor not even site-packages."""
    modules = "service.jobs.scheduler, service.executors.local, service.jobs.check_pairs"
    code = f"import sys, {modules}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[4])
    code = "import sys, service.jobs.supervisor; assert not {'sqlalchemy', 'yaml', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-S", "-c", code], check=True, cwd=Path(__file__).parents[4])


def test_two_jobs_that_share_a_short_name_both_end(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = iter(["ftjob-" + letter * 16 + "sameTAIL" for letter in "ab"])
    monkeypatch.setattr("service.jobs.store.new_id", lambda _prefix: next(ids))
    made = []
    for _ in range(2):
        job_id = world.running()
        for step in (2, 2, 4):  # a resumed run saves a step again
            saved = world.folder(job_id) / f"saved-{step}"
            world.emit(job_id, {"kind": "artifact", "artifact": "checkpoint", "path": str(saved), "step": step})
        world.tick()
        world.finish(job_id)
        world.tick(2)
        assert world.status(job_id) == "succeeded"
        saved_as = [row.model_id for row in world.store.checkpoints(job_id, available=False).data]
        made.append((world.job(job_id).result_model, saved_as))
    short, whole = "ft:tiny-llama:local::sameTAIL", f"ft:tiny-llama:local::{'b' * 16}sameTAIL"
    assert made == [(name, [f"{name}:ckpt-step-{step}" for step in (4, 2)]) for name in (short, whole)]
    with read(world.store.engine) as session:
        assert set(session.scalars(select(Model.id))) == {short, whole}
