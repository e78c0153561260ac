"""Bytes that tensors hold, from when they are made until nothing holds them."""

from __future__ import annotations

import weakref

from torch import Tensor


class LiveStorages:
    """Counts each storage once, however many tensors are views of it: ``live`` bytes now, ``peak`` the most at once."""

    def __init__(self) -> None:
        self.live = self.peak = 0
        self._known: set[int] = set()

    def ignore(self, tensor: Tensor) -> None:
        """Never count what ``tensor`` or a view of it holds: it was there before."""
        self._known.add(tensor.untyped_storage()._cdata)

    def follow(self, tensor: Tensor) -> None:
        """Count a tensor's storage until it is freed."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size
