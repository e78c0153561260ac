"""Building models without weights, on the meta device: for the tensors of a file, or to know shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from mplug_core.model.compiler import without_compiler

INITIALISERS = frozenset((
    "normal_", "uniform_", "trunc_normal_", "constant_", "zeros_", "ones_", "xavier_normal_", "xavier_uniform_",
    "kaiming_normal_", "kaiming_uniform_", "orthogonal_", "zero_", "fill_", "erfinv_", "clamp_", "mul_", "add_",
))  # fmt: skip
"""What fills weights, by name: of ``torch.nn.init`` and of tensors."""


@contextmanager
def hollow() -> Iterator[None]:
    """Models that are built within have shapes but no weights, and nothing is spent on initialising them."""
    with without_compiler(), torch.device("meta"), _Unfilled():
        yield


class _Unfilled(TorchFunctionMode):
    """Skips what would fill a tensor that has no values: on the meta device that is a lot of Python."""

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(function, "__name__", None) in INITIALISERS:
            tensor = args[0] if args else kwargs.get("tensor")
            if isinstance(tensor, torch.Tensor) and tensor.is_meta:
                return tensor
        return function(*args, **kwargs)
