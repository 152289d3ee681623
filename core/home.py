"""Where Gradhelm keeps its data on this machine."""

from __future__ import annotations

import os
from pathlib import Path


def home() -> Path:
    """The data folder: ``$GRADHELM_HOME``, or ``~/.gradhelm``. It is not created here."""
    return Path(os.environ.get("GRADHELM_HOME") or Path.home() / ".gradhelm").expanduser().resolve()
