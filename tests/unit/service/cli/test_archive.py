"""Unpacking is all or nothing, and never outside its folder."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from service.cli.archive import unpack
from service.cli.errors import CliError, UsageProblem


def tar(*members: tuple[tarfile.TarInfo | str, bytes]) -> io.BytesIO:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for member, data in members:
            info = tarfile.TarInfo(member) if isinstance(member, str) else member
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    stream.seek(0)
    return stream


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = kind
    info.linkname = target
    return info


def manifest(**files: bytes) -> bytes:
    return json.dumps({"files": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}}).encode()


def test_files_and_folders_arrive(tmp_path: Path) -> None:
    stream = tar((special("inner", tarfile.DIRTYPE), b""), ("inner/a.txt", b"one"), ("./b.txt", b"two"))
    written = unpack(stream, tmp_path / "model")
    assert written == [tmp_path / "model/b.txt", tmp_path / "model/inner/a.txt"]
    assert (tmp_path / "model/inner/a.txt").read_bytes() == b"one"


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    unpack(tar(("a", b"1")), tmp_path / "model")
    assert (tmp_path / "model/a").read_bytes() == b"1"


HOSTILE: dict[str, Callable[[], io.BytesIO]] = {
    "parent": lambda: tar(("../evil", b"x")),
    "parent inside": lambda: tar(("a/../../evil", b"x")),
    "absolute": lambda: tar(("/tmp/gradhelm-evil", b"x")),
    "backslash": lambda: tar(("..\\evil", b"x")),
    "symbolic link": lambda: tar((special("a", tarfile.SYMTYPE, "/etc/passwd"), b"")),
    "through a link": lambda: tar((special("d", tarfile.SYMTYPE, ".."), b""), ("d/evil", b"x")),
    "hard link": lambda: tar(("ok", b"x"), (special("a", tarfile.LNKTYPE, "ok"), b"")),
    "device": lambda: tar((special("a", tarfile.CHRTYPE), b"")),
    "pipe": lambda: tar((special("a", tarfile.FIFOTYPE), b"")),
    "twice": lambda: tar(("a", b"1"), ("a", b"2")),
    "the folder itself": lambda: tar((".", b"x")),
    "nothing": lambda: tar(),
    "no tar": lambda: io.BytesIO(b"<html>not a tar</html>" * 100),
    "cut short": lambda: io.BytesIO(tar(("a", b"x" * 5000)).getvalue()[:3000]),
    "compressed": lambda: io.BytesIO(b"\x1f\x8b\x08" + b"\0" * 2000),
    "changed file": lambda: tar(("a", b"changed"), ("manifest.json", manifest(a=b"original"))),
    "missing file": lambda: tar(("b", b"x"), ("manifest.json", manifest(a=b"x", b=b"x"))),
    "broken manifest": lambda: tar(("a", b"x"), ("manifest.json", b"[1, 2]")),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_archives_leave_nothing(name: str, tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    with pytest.raises(CliError):
        unpack(HOSTILE[name](), inside / "model")
    assert list(tmp_path.rglob("*")) == [inside]
    assert not Path("/tmp/gradhelm-evil").exists()


def test_a_matching_manifest_is_accepted(tmp_path: Path) -> None:
    unpack(tar(("x/a", b"1"), ("x/manifest.json", manifest(a=b"1"))), tmp_path / "model")
    assert (tmp_path / "model/x/a").read_bytes() == b"1"


def test_what_is_there_stays(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine").write_text("keep")
    (tmp_path / "link").symlink_to(tmp_path)
    for name in ("full", "full/mine", "link"):
        with pytest.raises(UsageProblem, match="choose another name"):
            unpack(tar(("a", b"1")), tmp_path / name)
    assert (tmp_path / "full/mine").read_text() == "keep"
