"""Tensors of a checkpoint by the names that they had before somebody wrapped the model or the file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mplug_core.errors import CheckpointError, shortened

WRAPPED = frozenset(("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"))
"""What ``torch.compile``, data parallelism, FSDP and activation checkpointing put into names, wherever a wrapped module
stands."""
LONGEST_NAME = 500
DEEPEST = 8
"""Mappings inside one another, of which the innermost has the tensors."""
DAMAGED = "take the file from where it was published"


def plain_name(name: str) -> str:
    """A tensor's name without what wrappers have put into it."""
    if len(name) > LONGEST_NAME:
        raise CheckpointError(f"a tensor has the name {shortened(name, 80)}, which is too long", DAMAGED)
    return ".".join(part for part in name.split(".") if part not in WRAPPED)


def innermost(content: Any, keys: Sequence[str]) -> Any:
    """What a file holds under the first of ``keys`` that it has, also one inside another, as far as there are such."""
    for _ in range(DEEPEST):
        if not isinstance(content, Mapping):
            return content
        inner = next((key for key in keys if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            return content
        content = content[inner]
    raise CheckpointError(f"its tensors are more than {DEEPEST} mappings deep", DAMAGED)


def named_tensors(content: Mapping[Any, Any]) -> dict[str, Tensor]:
    """The tensors of a mapping by their plain names; CheckpointError for two of one name that differ."""
    tensors: dict[str, Tensor] = {}
    for key, value in content.items():
        if isinstance(value, Tensor):
            name = plain_name(str(key))
            if name in tensors and not same(tensors[name], value):
                raise CheckpointError(f"two different tensors of this checkpoint are {name}", "is it a mix of models?")
            tensors[name] = value
    return tensors


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same; without looking where they are one, or where there is nothing to look at."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return one.is_meta or other.is_meta or one.data_ptr() == other.data_ptr() or torch.equal(one, other)


def check_storage(name: str, value: Tensor) -> None:
    """CheckpointError for a tensor that is larger than what is stored of it: a few bytes that are repeated for ever."""
    if value.layout != torch.strided or value.is_quantized:
        raise CheckpointError(f"{shortened(name, 80)} is no plain tensor", DAMAGED)
    if not value.is_meta and value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise CheckpointError(f"{shortened(name, 80)} is larger than what the file holds of it", DAMAGED)
