"""Where the public data sets are: ``--data-dir`` or ``GRADHELM_EVAL_DATA`` names their folder; none is shipped here."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

VARIABLE = "GRADHELM_EVAL_DATA"
NEEDED = {
    "pretrain_optimizers": (
        "text/wikitext2_valid.txt",
        "text/wikitext2_test.txt",
        "text/tinyshakespeare.txt",
    ),
    "finetune_optimizers": ("gsm8k/train.jsonl", "gsm8k/test.jsonl"),
}


def missing(script: str, given: str | None = None) -> str | None:
    """Why a script cannot run for want of its data, or None."""
    names = NEEDED.get(script, ())
    folder = given or os.environ.get(VARIABLE)
    if names and not folder:
        return f"{script} needs public data: give --data-dir or set {VARIABLE} to the folder with {', '.join(names)}"
    absent = [name for name in names if not (Path(str(folder)) / name).is_file()]
    return f"{script} needs {', '.join(absent)} in {folder}" if absent else None


def folder(script: str, given: str | None = None) -> Path:
    """The folder of the data; ends the program with the reason where something is missing."""
    if (reason := missing(script, given)) is not None:
        raise SystemExit(reason)
    return Path(given or os.environ[VARIABLE])


def digest(script: str, folder: Path) -> str:
    """SHA-256 of all files that a script reads, in their order."""
    content = hashlib.sha256()
    for name in NEEDED[script]:
        content.update((folder / name).read_bytes())
    return content.hexdigest()
