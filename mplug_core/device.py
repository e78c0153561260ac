"""Which device to compute on, and in which numbers. Importing this module does not import torch."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

from mplug_core.errors import MplugError, UsageError

if TYPE_CHECKING:
    import torch

_DEVICE = re.compile(r"cpu|mps|cuda(:\d+)?")

DTYPE_VARIABLE = "MPLUG_DTYPE"
DTYPES = ("float32", "bfloat16", "float16")

UNITS = ("amx_bf16", "avx512_bf16", "bf16")
"""Capabilities of CPUs, any of which multiplies bf16 matrices."""
MATRIX_UNITS = ("amx_bf16",)
"""Those that do so several times faster than they multiply fp32."""


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


def asked_dtype() -> str | None:
    """The type that ``MPLUG_DTYPE`` names, None for ``auto``; UsageError for another. Answers without torch."""
    name = os.environ.get(DTYPE_VARIABLE, "").strip() or "auto"
    if name not in ("auto", *DTYPES):
        raise UsageError(f"{DTYPE_VARIABLE}={name} is no type", f"auto, {', '.join(DTYPES)}")
    return None if name == "auto" else name


def check_dtype(name: str | None) -> None:
    """UsageError for a type that is none. Answers without torch."""
    if name is not None and name not in DTYPES:
        raise UsageError(f"no --dtype {name!r}", ", ".join(DTYPES))


def choose_dtype(device: torch.device, matrices: bool) -> torch.dtype:
    """What a model answers in: ``MPLUG_DTYPE``, else bf16 on CUDA, and on a CPU with units for matrices of it.

    On CPUs that holds for models that are all ``matrices``: convolutions there are no faster in bf16, as far as was
    measured slower, so that a model with a convolutional encoder computes in fp32 like everything else.
    """
    import torch

    if (name := asked_dtype()) is not None:
        return getattr(torch, name)
    if device.type == "cuda" or (device.type == "cpu" and matrices and _has_any(MATRIX_UNITS)):
        return torch.bfloat16
    return torch.float32


def multiplies_bf16(device: torch.device) -> bool:
    """Whether a device has units for bf16 products. Of a CPU that this version of torch can't ask: no."""
    import torch

    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return _has_any(UNITS)


def _has_any(units: tuple[str, ...]) -> bool:
    import torch

    known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(known.get(unit) for unit in units)
