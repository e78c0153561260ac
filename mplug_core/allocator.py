"""How the C library treats memory that a step or a batch frees: on a CPU the next one wants it back at once."""

from __future__ import annotations

import ctypes
import sys

MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1
"""Parameters of glibc's ``mallopt``."""
LARGE = 1 << 30


def keep_freed_memory() -> bool:
    """Have freed blocks below a gigabyte stay with the process; False where the C library is not glibc.

    By default large blocks are given back to the system, and a step asks for them again page by page, which for
    optimizers on flat tensors takes a fifth of its time, and for captions of the embedded model a third. The process
    then stays as large as its largest step or batch.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(MMAP_THRESHOLD, LARGE)) and bool(mallopt(TRIM_THRESHOLD, -1))
