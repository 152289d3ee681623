"""``python -m trainers replay``: from a journal to the model that its run made."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from trainers.journal.reader import Journal, read


def run(arguments: Sequence[str]) -> str:
    """Runs the command line.

    Args:
        arguments: Without the program's name and ``replay``.

    Returns:
        One line that says what was made, and where it lies.

    Raises:
        ValueError: The journal cannot be replayed.
        OSError: It cannot be read, or the artifact cannot be written.
    """
    parser = argparse.ArgumentParser(
        prog="python -m trainers replay", description="Make the tuned model of a zeroth-order run from its journal."
    )
    parser.add_argument("journal", type=Path, metavar="JOURNAL", help="the journal of the run")
    parser.add_argument("output", type=Path, metavar="FOLDER", help="where the artifact goes; must not exist")
    parser.add_argument("--model", help="the base, where the journal does not name it or has another name for it")
    parser.add_argument("--step", type=int, help="the last step to take; all unless given")
    options = parser.parse_args(arguments)
    return make(read(options.journal), options.output, model=options.model, step=options.step)


def make(journal: Journal, output: Path, *, model: str | None = None, step: int | None = None) -> str:
    """Replays a journal and saves what comes out.

    Args:
        journal: As read.
        output: Folder of the artifact: scales of a quantised base, or a whole model.
        model: Reference of the base; by default what the journal says.
        step: The last step to take; by default that of the journal.

    Returns:
        One line that says which step this is of, whether of a finished run, and where it lies.

    Raises:
        ValueError: The folder exists, or the journal cannot be replayed.
    """
    if output.exists():
        raise ValueError(f"{output} exists: give a new name")
    from core.models.quant.scales import save_scales
    from core.models.save import save_merged
    from trainers.journal.base import begin
    from trainers.journal.replay import rebuild, replay

    base = begin(journal.header, model)
    optimizer = rebuild(journal.header, base.tensors)
    made = replay(journal, optimizer, base.tensors, step=step)
    card = {
        "base": str(base.loaded.ref),
        "base_fingerprint": base.loaded.fingerprint,
        "journal": {
            "step": made.step,
            "finished": made.finished,
            "chain": journal.chain_at(made.step).hex(),
            "tensors": made.tensors.hex(),
        },
    }
    if base.layers:
        save_scales(base.layers, output, card=card)
    else:
        save_merged(base.loaded.model, base.loaded.tokenizer, output, card=card)
    cut = "" if journal.cut is None else f"; the journal was cut at byte {journal.end}: {journal.cut}"
    return f"{made.label}: {output}{cut}"
