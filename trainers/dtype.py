"""What a model computes in."""

from __future__ import annotations

from typing import Literal

import torch


def resolve_dtype(wanted: Literal["auto", "float32", "bfloat16"]) -> Literal["float32", "bfloat16"]:
    """Turns ``auto`` into bfloat16 on a GPU that has it, else float32.

    A CPU without AVX512-BF16 or AMX emulates bfloat16, slower than it computes in float32; one that has them is still
    given float32, since only that resumes bitwise whatever kernel is picked.

    Args:
        wanted: As the run file says.

    Returns:
        The dtype's name.
    """
    if wanted != "auto":
        return wanted
    return "bfloat16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "float32"
