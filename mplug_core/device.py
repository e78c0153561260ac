"""Which device to compute on."""

from __future__ import annotations

import re

from mplug_core.errors import MplugError, UsageError

_DEVICE = re.compile(r"cpu|mps|cuda(:\d+)?")


def check_device(name: str | None) -> None:
    """UsageError unless ``name`` is one that a machine can have; answers without torch."""
    if name is not None and not _DEVICE.fullmatch(name):
        raise UsageError(f"no device {name!r}", "cpu, cuda, cuda:N or mps")


def choose_device(name: str | None) -> str:
    """``name`` if this machine has it, MplugError if not; by default CUDA where there is any, else the CPU."""
    check_device(name)
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda"):
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if int(name.partition(":")[2] or 0) >= found:
            raise MplugError(f"no device {name} here", f"CUDA devices found: {found}; try --device cpu", "device")
    if name == "mps" and not torch.backends.mps.is_available():
        raise MplugError("no device mps here", "try --device cpu", "device")
    return name
