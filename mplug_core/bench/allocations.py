"""How much memory tensors take while something runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mplug_core.training.storages import LiveStorages


class _Allocations(TorchDispatchMode):
    """Follows every tensor that an operation makes until nothing holds it."""

    def __init__(self, held: Iterable[Tensor]) -> None:
        super().__init__()
        self.storages = LiveStorages()
        for tensor in held:
            self.storages.ignore(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.storages.follow(leaf)
        return out


def peak_bytes(action: Callable[[], object], held: Iterable[Tensor]) -> int:
    """Most bytes that the tensors which ``action`` makes take at once.

    Operations' own scratch memory is not counted, nor are ``held``: the weights and inputs.
    """
    with _Allocations(held) as allocations:
        action()
    return allocations.storages.peak
