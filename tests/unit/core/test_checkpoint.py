"""Checkpoints: bitwise back, whole or not there, and never a damaged one chosen."""

from __future__ import annotations

import errno
import json
import os
import pickle
import random
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core import checkpoint
from core.checkpoint import (
    damage,
    flatten_optimizer,
    latest,
    load,
    prune,
    rng_state,
    save,
    set_rng_state,
    unflatten_optimizer,
)

TENSORS = {"w": torch.arange(12, dtype=torch.float32).reshape(3, 4), "b": torch.tensor([1.5, float("nan")])}


@contextmanager
def file_size_limit(limit: int) -> Iterator[None]:
    """A real failing write: the kernel refuses to let any file grow beyond `limit` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def equal(left: Any, right: Any) -> bool:
    """Equal kinds, shapes, order and bits (so NaN equals itself and -0.0 is not 0.0)."""
    if isinstance(left, torch.Tensor):
        bits = [tensor.contiguous().flatten().view(torch.uint8) for tensor in (left, right)] if left.numel() else []
        return left.dtype == right.dtype and left.shape == right.shape and (not bits or torch.equal(*bits))
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return list(left) == list(right) and all(equal(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(equal(one, other) for one, other in zip(left, right, strict=True))
    return repr(left) == repr(right)


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8, torch.bool],
)
def test_every_kind_of_tensor_comes_back_bitwise(tmp_path: Path, dtype: torch.dtype) -> None:
    base = torch.randn(4, 6).mul(10).to(dtype)
    tensors = {
        "plain": base,
        "transposed": base.t(),
        "view": base[1:3, 2:],
        "tied": base,
        "row": base[2],
        "scalar": base[0, 0],
        "empty": base[:0],
    }
    state = load(save(tmp_path, step=1, tensors=tensors, state={})).tensors
    assert state.keys() == tensors.keys()
    assert all(equal(state[name], tensors[name].clone()) for name in tensors)


def test_a_parameter_is_saved_as_it_is_without_its_graph(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.randn(3))
    got = load(save(tmp_path, step=1, tensors={"w": weight, "y": weight * 2}, state={})).tensors
    assert equal(got["w"], weight.detach()) and not got["w"].requires_grad
    assert equal(got["y"], (weight * 2).detach())


def test_a_small_view_of_a_large_storage_stays_small(tmp_path: Path) -> None:
    path = save(tmp_path, step=1, tensors={"v": torch.zeros(1_000_000)[:3]}, state={})
    assert (path / checkpoint.TENSORS).stat().st_size < 1000


def test_state_comes_back(tmp_path: Path) -> None:
    state = {"a": [1, 2.5, None, True, "ü\ud7ff"], "b": {"c": {}}, "best": float("inf"), "x": 0.1 + 0.2}
    got = load(save(tmp_path, step=3, tensors={}, state=state))
    assert got.step == 3 and got.state == state and got.tensors == {}


@pytest.mark.parametrize(
    ("state", "says"),
    [
        ({"a": {1: 2}}, "state.a has the key 1"),
        ({"a": [torch.zeros(1)]}, r"state.a\[0\] is a Tensor"),
        ({"a": {3}}, "state.a is a set"),
        ({"a": b"x"}, "state.a is a bytes"),
    ],
)
def test_state_that_json_would_change_is_refused_before_anything_is_written(
    tmp_path: Path, state: dict[str, Any], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        save(tmp_path / "new", step=1, tensors=TENSORS, state=state)
    assert not (tmp_path / "new").exists()


def test_a_negative_step_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="negative"):
        save(tmp_path, step=-1, tensors=TENSORS, state={})


def test_layout_and_manifest(tmp_path: Path) -> None:
    def extra(folder: Path) -> None:
        (folder / "adapter").mkdir()
        (folder / "adapter" / "config.json").write_text("{}")

    path = save(tmp_path, step=10, tensors=TENSORS, state={"a": 1}, extra=extra)
    assert path == tmp_path / "step-00000010"
    assert [item.name for item in tmp_path.iterdir()] == [path.name]
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["format"] == "gradhelm-checkpoint/1" and manifest["step"] == 10
    assert list(manifest["files"]) == ["adapter/config.json", "state.json", "tensors.safetensors"]
    assert damage(path) is None
    (path / "adapter" / "config.json").write_text("[]")
    assert damage(path) == "adapter/config.json is altered"


def test_steps_beyond_eight_digits_sort_as_numbers(tmp_path: Path) -> None:
    for step in (99_999_999, 100_000_000):
        save(tmp_path, step=step, tensors={}, state={})
    newest = latest(tmp_path)
    assert newest is not None and newest.name == "step-100000000"


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, step=1, tensors=TENSORS, state={"try": 1})
    path = save(tmp_path, step=1, tensors=TENSORS, state={"try": 2})
    assert load(path).state == {"try": 2}
    assert len(list(tmp_path.iterdir())) == 1


def test_latest_of_nothing_is_none(tmp_path: Path) -> None:
    assert latest(tmp_path / "none") is None
    (tmp_path / "step-x").mkdir()
    (tmp_path / "step-00000001").write_text("a file")
    assert latest(tmp_path) is None


@pytest.mark.parametrize("how", ["truncate", "flip"])
def test_none_of_200_damaged_checkpoints_is_chosen(tmp_path: Path, how: str) -> None:
    rng = random.Random(7)
    root = tmp_path / "checkpoints"
    good = save(root, step=1, tensors=TENSORS, state={"n": 1})
    pristine = save(tmp_path / "other", step=2, tensors=TENSORS, state={"n": 2, "list": list(range(20))})
    files = sorted(pristine.iterdir())
    chosen = 0
    for _ in range(200):
        shutil.rmtree(root / pristine.name, ignore_errors=True)
        shutil.copytree(pristine, root / pristine.name)
        target = root / pristine.name / rng.choice(files).name
        raw = bytearray(target.read_bytes())
        if how == "truncate":
            del raw[rng.randrange(len(raw)) :]
        else:
            raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        target.write_bytes(raw)
        chosen += latest(root) != good
        with pytest.raises(ValueError, match="cannot be used"):
            load(root / pristine.name)
    assert chosen == 0
    shutil.rmtree(root / pristine.name)
    shutil.copytree(pristine, root / pristine.name)
    assert latest(root) == root / pristine.name


@pytest.mark.parametrize("name", [checkpoint.TENSORS, checkpoint.STATE, checkpoint.MANIFEST])
def test_a_missing_file_is_damage(tmp_path: Path, name: str) -> None:
    older = save(tmp_path, step=1, tensors=TENSORS, state={})
    newer = save(tmp_path, step=2, tensors=TENSORS, state={})
    (newer / name).unlink()
    assert damage(newer) and latest(tmp_path) == older


def test_a_checkpoint_under_another_name_is_damage(tmp_path: Path) -> None:
    save(tmp_path, step=1, tensors=TENSORS, state={}).rename(tmp_path / "step-00000009")
    assert latest(tmp_path) is None


@pytest.mark.parametrize("file", ["../secret", "/etc/hostname", "a/../../secret"])
def test_a_manifest_cannot_reach_outside(tmp_path: Path, file: str) -> None:
    path = save(tmp_path / "root", step=1, tensors=TENSORS, state={})
    (tmp_path / "root" / "secret").write_text("x")
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][file] = manifest["files"]["state.json"]
    (path / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    assert damage(path) == f"{file} is missing"


def test_a_link_in_place_of_a_file_is_damage(tmp_path: Path) -> None:
    path = save(tmp_path, step=1, tensors=TENSORS, state={})
    (path / "state.json").rename(tmp_path / "elsewhere.json")
    (path / "state.json").symlink_to(tmp_path / "elsewhere.json")
    assert damage(path) == "state.json is missing"


def test_nothing_is_a_pickle(tmp_path: Path) -> None:
    path = save(tmp_path, step=1, tensors=TENSORS, state={"rng": rng_state()})
    for file in path.iterdir():
        with (
            pytest.raises((pickle.UnpicklingError, ValueError, EOFError, IndexError, KeyError)),
            open(file, "rb") as raw,
        ):
            pickle.load(raw)


def test_a_full_disk_leaves_the_last_good_checkpoint_and_no_debris(tmp_path: Path) -> None:
    good = save(tmp_path, step=1, tensors=TENSORS, state={})
    big = {"w": torch.zeros(300_000)}
    with file_size_limit(1_000_000), pytest.raises(OSError, match="too large") as caught:
        save(tmp_path, step=2, tensors=big, state={})
    assert caught.value.errno == errno.EFBIG
    with file_size_limit(1_000_000), pytest.raises(OSError, match="too large"):
        save(tmp_path, step=2, tensors={}, state={"text": "x" * 1_200_000})
    assert [item.name for item in tmp_path.iterdir()] == [good.name]
    assert latest(tmp_path) == good
    assert latest(tmp_path) != save(tmp_path, step=2, tensors=big, state={})
    assert latest(tmp_path) == tmp_path / "step-00000002"


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("mount") is None, reason="mounting a small disk needs root")
def test_a_really_full_disk(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "none", disk], check=False, capture_output=True
    ).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        good = save(disk / "c", step=1, tensors=TENSORS, state={})
        for size in (100_000, 240_000, 250_000, 255_000, 262_144, 400_000):
            try:
                save(disk / "c", step=2, tensors={"w": torch.zeros(size)}, state={"text": "x" * 9000})
            except OSError as error:
                assert error.errno == errno.ENOSPC
                assert [item.name for item in (disk / "c").iterdir()] == [good.name]
                assert latest(disk / "c") == good
            else:
                shutil.rmtree(disk / "c" / "step-00000002")
        assert size == 400_000
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_failing_extra_leaves_nothing(tmp_path: Path) -> None:
    good = save(tmp_path, step=1, tensors=TENSORS, state={})

    def fail(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, step=2, tensors=TENSORS, state={}, extra=fail)
    assert [item.name for item in tmp_path.iterdir()] == [good.name]


def test_debris_of_a_killed_save_is_passed_over_and_cleared(tmp_path: Path) -> None:
    good = save(tmp_path, step=1, tensors=TENSORS, state={})
    shutil.copytree(good, tmp_path / ".tmp-99-step-00000002")
    assert latest(tmp_path) == good
    save(tmp_path, step=3, tensors=TENSORS, state={})
    assert sorted(item.name for item in tmp_path.iterdir()) == ["step-00000001", "step-00000003"]


def test_a_kill_between_the_two_renames_of_a_replacement_loses_nothing(tmp_path: Path) -> None:
    code = (
        "import os, sys, torch; from pathlib import Path; from core import checkpoint\n"
        "real = Path.rename\n"
        "def rename(path, target):\n"
        "    if path.name.startswith('.') and path.name.endswith('-step-00000002') and '-replaced-' not in path.name:\n"
        "        if Path(target).parent.joinpath('second').exists():\n"
        "            os._exit(9)\n"
        "    return real(path, target)\n"
        "Path.rename = rename\n"
        "root = Path(sys.argv[1])\n"
        "checkpoint.save(root, step=2, tensors={'w': torch.ones(2)}, state={'round': 1})\n"
        "(root / 'second').touch()\n"
        "checkpoint.save(root, step=2, tensors={'w': torch.ones(2)}, state={'round': 2})\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)]).returncode == 9
    assert not (tmp_path / "step-00000002").exists()
    found = latest(tmp_path)
    assert found == tmp_path / "step-00000002" and load(found).state == {"round": 1}
    shutil.move(found, tmp_path / f".tmp-{2**22 + 1}-replaced-{found.name}")
    save(tmp_path, step=3, tensors=TENSORS, state={})  # which clears what kills left
    assert load(found).state == {"round": 1}
    shutil.move(found, tmp_path / f".tmp-{os.getppid()}-replaced-{found.name}")
    assert latest(tmp_path) == tmp_path / "step-00000003" and not found.exists(), "somebody is at it just now"


def test_a_process_killed_while_saving_leaves_a_good_checkpoint(tmp_path: Path) -> None:
    code = (
        "import sys, torch; from pathlib import Path; from core.checkpoint import save, prune\n"
        "for step in range(100000):\n"
        "    save(Path(sys.argv[1]), step=step, tensors={'w': torch.full((50000,), step)}, state={'step': step})\n"
        "    prune(Path(sys.argv[1]), 2)\n"
        "    print(step, flush=True)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    try:
        for _ in range(25):
            done = int(child.stdout.readline())
    finally:
        child.kill()
        rest = child.stdout.read()
        child.wait()
        child.stdout.close()
    done = int(rest.split()[-1]) if rest.split() else done
    newest = latest(tmp_path)
    assert newest is not None
    got = load(newest)
    assert got.step in (done, done + 1) and got.state == {"step": got.step}
    assert torch.equal(got.tensors["w"], torch.full((50000,), got.step))


def test_keep_deletes_the_others(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step=step, tensors={}, state={})
    save(tmp_path, step=4, tensors={}, state={}, keep={2})
    assert sorted(item.name[-1] for item in tmp_path.iterdir()) == ["2", "4"]


def test_prune_keeps_the_newest_and_the_protected(tmp_path: Path) -> None:
    for step in range(1, 8):
        save(tmp_path, step=step, tensors={}, state={})
    assert prune(tmp_path, 2, {1, 7}) == [4, 3, 2]
    assert sorted(item.name[-1] for item in tmp_path.iterdir()) == ["1", "5", "6", "7"]
    assert prune(tmp_path, 0) == [6, 5, 1]
    assert prune(tmp_path, 0) == []
    assert prune(tmp_path / "none", 3) == []


def test_prune_never_deletes_the_last_complete_one(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step=step, tensors=TENSORS, state={})
    (tmp_path / "step-00000003" / checkpoint.TENSORS).write_bytes(b"cut")
    assert prune(tmp_path, 1) == [1]
    newest = latest(tmp_path)
    assert newest is not None and newest.name == "step-00000002"


def optimizers() -> list[torch.optim.Optimizer]:
    torch.manual_seed(3)

    def parameters() -> list[torch.nn.Parameter]:
        return [torch.nn.Parameter(torch.randn(4, 3)), torch.nn.Parameter(torch.randn(3))]

    groups = [{"params": [p], "lr": 0.1 * (i + 1), "name": f"group {i}"} for i, p in enumerate(parameters())]
    return [
        torch.optim.AdamW(parameters(), lr=1e-3, betas=(0.8, 0.95), amsgrad=True),
        torch.optim.AdamW(groups, lr=torch.tensor(1e-3), foreach=False),
        torch.optim.SGD(parameters(), lr=0.1, momentum=0.9),
        torch.optim.SGD(parameters(), lr=0.1),
        torch.optim.Adafactor(parameters()),
        torch.optim.LBFGS(parameters()),
        torch.optim.Rprop(parameters(), lr=0.1),
    ]


@pytest.mark.parametrize("index", range(len(optimizers())))
def test_optimizers_come_back_without_loss_and_go_on_bitwise(tmp_path: Path, index: int) -> None:
    def step(optimizer: torch.optim.Optimizer) -> None:
        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = torch.stack(
                [(p.float() - 0.3).pow(2).sum() for group in optimizer.param_groups for p in group["params"]]
            ).sum()
            loss.backward()
            return loss

        optimizer.step(closure)

    def parameters(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
        return [p.detach() for group in optimizer.param_groups for p in group["params"]]

    one = optimizers()[index]
    for _ in range(3):
        step(one)
    before = one.state_dict()
    tensors, data = flatten_optimizer(before)
    held = {f"p{i}": p for i, p in enumerate(parameters(one))}
    got = load(save(tmp_path, step=3, tensors={**tensors, **held}, state={"optimizer": data}))
    after = unflatten_optimizer(got.tensors, got.state["optimizer"])
    assert equal(after, before)

    other = optimizers()[index]
    for i, parameter in enumerate(parameters(other)):
        parameter.copy_(got.tensors[f"p{i}"])
    other.load_state_dict(after)
    for _ in range(3):
        step(one)
        step(other)
    assert equal(parameters(one), parameters(other))


LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(alphabet=st.characters(exclude_categories=["Cs"]))
    | st.builds(torch.tensor, st.lists(st.floats(width=32), max_size=3))
)
KEYS = st.text(alphabet="ab.$_", max_size=8) | st.integers() | st.sampled_from(["$tensor", "$tuple", "$dict", "1", ""])
TREES = st.dictionaries(
    KEYS,
    st.recursive(
        LEAVES,
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.lists(inner, max_size=3).map(tuple)
            | st.dictionaries(KEYS, inner, max_size=3)
        ),
        max_leaves=10,
    ),
    max_size=4,
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(TREES)
def test_any_nesting_comes_back(tree: dict[Any, Any]) -> None:
    tensors, data = flatten_optimizer(tree)
    assert equal(unflatten_optimizer(tensors, json.loads(json.dumps(data))), tree)


@pytest.mark.parametrize(
    ("state", "says"),
    [
        ({"state": {0: {"f": object()}}}, "state.0.f is a object"),
        ({"a": {(1, 2): 3}}, "a has keys other than"),
        ({"a": np.float32(1)}, "a is a float32"),
    ],
)
def test_what_cannot_be_stored_is_named(state: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        flatten_optimizer(state)


@pytest.mark.parametrize(
    "data", [{}, {"tree": {"$tensor": "gone"}}, {"tree": [1]}, {"tree": {"$dict": 3}}, {"tree": None}]
)
def test_state_that_does_not_fit_together_is_refused(data: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="optimizer state"):
        unflatten_optimizer({}, data)


def draw() -> tuple[list[float], list[float], list[float]]:
    return (
        [random.random(), random.gauss(0, 1)],
        [float(x) for x in np.random.standard_normal(3)],
        torch.randn(3).tolist(),
    )


def test_random_generators_go_on_where_they_stood() -> None:
    random.gauss(0, 1)
    np.random.standard_normal(1)  # leaves a cached second value
    torch.randn(3)
    state = json.loads(json.dumps(rng_state(), allow_nan=False))
    first = draw()
    draw()
    set_rng_state(state)
    assert draw() == first


@pytest.mark.parametrize(
    "change", [{"python": None}, {"numpy": {}}, {"torch": "AAAA"}, {"torch": "%"}, {"cuda": ["AAAA"] * 99}]
)
def test_a_foreign_random_state_is_refused(change: dict[str, Any]) -> None:
    before = rng_state()
    try:
        with pytest.raises(ValueError):
            set_rng_state({**before, **change})
    finally:
        set_rng_state(before)
