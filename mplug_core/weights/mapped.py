"""Pages of mapped files: given back when what was read from them is not needed any more.

A page of a mapped file stays in memory once it was read, so that converting all tensors of a file would hold the file
beside what they became. A tensor whose pages are given back can still be read: the system fetches them again.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

from torch import Tensor

DONT_NEED = 4
"""``MADV_DONTNEED`` of Linux. On memory that is not a file's it would erase: only ranges of the file are given back."""


class MappedPages:
    """Where files are mapped into this process, as Linux tells it; elsewhere nowhere, and nothing is given back."""

    def __init__(self, *files: Path) -> None:
        self._ranges: list[tuple[int, int]] = []
        names = {os.path.realpath(file) for file in files}
        try:
            lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
        except OSError:
            return
        for line in lines:
            fields = line.split(maxsplit=5)
            if len(fields) == 6 and fields[5] in names:
                begin, _, end = fields[0].partition("-")
                self._ranges.append((int(begin, 16), int(end, 16)))

    def release(self, tensor: Tensor) -> None:
        """Give the whole pages of a tensor back, if it lies in the file and nobody has written to it."""
        if tensor.device.type != "cpu" or not tensor.numel():
            return
        # of a view, such as the first row of a table, the pages that it spans
        span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        begin = tensor.data_ptr()
        end = begin + span * tensor.element_size()
        if not any(low <= begin and end <= high for low, high in self._ranges):
            return
        page = mmap.PAGESIZE
        begin, end = -(-begin // page) * page, end // page * page
        if begin < end:
            ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), DONT_NEED)
