"""Files of ``torch.save``, read without running what is pickled in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mplug_core.errors import CheckpointError


def read_pickled(file: Path, hint: str = "give a file of tensors") -> Any:
    """Tensors and plain values of a file, on the CPU; CheckpointError if it is not there, damaged or holds more."""
    try:
        return torch.load(file, weights_only=True, map_location="cpu")
    except Exception as error:  # a damaged pickle may fail in any way
        reason = getattr(error, "strerror", None) or next(iter(str(error).splitlines()), "it is empty")
        raise CheckpointError(f"cannot read {file}: {reason}", hint) from error
