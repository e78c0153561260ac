"""A model for somewhere else: a folder of another number type, or with int8 weights, or at another image size.

What is exported is a native folder again; :mod:`mplug_core.weights.onnx` writes graphs for other runtimes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mplug_core.errors import CheckpointError
from mplug_core.model.config import MplugConfig
from mplug_core.model.hollow import hollow
from mplug_core.model.mplug import MplugModel
from mplug_core.weights.conversion import check_values
from mplug_core.weights.destination import check_destination
from mplug_core.weights.folder import CARD, Stored, read_model, texts_beside, write_folder
from mplug_core.weights.official import missing_by_part
from mplug_core.weights.quantised import quantise

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass
class Source:
    """A model to export: tensors as floats by our names, and the texts beside them."""

    stored: Stored
    state: dict[str, Tensor]
    texts: dict[str, str]

    @property
    def config(self) -> MplugConfig:
        return self.stored.config


def read_source(spec: str | None, image_size: int | None = None) -> Source:
    """A model by ``--model``'s rules, for images of ``image_size`` pixels (default: its own).

    Parts that a checkpoint came without are left out. CheckpointError where the backbone takes no images of that size,
    for a model that can't answer, and for weights that were never trained.
    """
    stored = read_model(spec, image_size).whole()
    check_values(stored)
    return Source(stored, stored.floats(), texts_beside(stored.path))


def build(source: Source) -> MplugModel:
    """The model itself, in fp32 and evaluation mode."""
    model = MplugModel(source.config)
    state = {name: value.float() if value.is_floating_point() else value for name, value in source.state.items()}
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise CheckpointError(f"{source.stored.path}: tensors don't fit config.json: {reason}") from error
    return model.eval().requires_grad_(False)


def export_safetensors(source: Source, target: Path, dtype: str, card: str, force: bool = False) -> None:
    """Write a native folder in ``dtype`` (one of :data:`DTYPES`), whole or not at all.

    CheckpointError for a weight that overflows the type, MplugError for a target that is in the way.
    """
    check_destination(target, source.stored.path, force)
    chosen = DTYPES[dtype]
    if chosen == torch.float16:
        largest = torch.finfo(torch.float16).max
        for name, value in source.state.items():
            if value.is_floating_point() and float(value.abs().amax()) > largest:
                raise CheckpointError(f"{name} holds numbers beyond the range of fp16", "--dtype bf16")
    _save(source, target, source.state, chosen, card)


def export_int8(source: Source, target: Path, dtype: str, card: str, force: bool = False) -> None:
    """Write a native folder with int8 weights; what is not quantised is stored in ``dtype``."""
    check_destination(target, source.stored.path, force)
    with hollow():
        model = MplugModel(source.config)
    _save(source, target, quantise(model, source.state), DTYPES[dtype], card)


def _save(source: Source, target: Path, state: dict[str, Tensor], dtype: torch.dtype, card: str) -> None:
    with hollow():
        model = MplugModel(source.config)
    missing = missing_by_part(source.config, source.state)
    unknown = source.state.keys() - model.state_dict().keys()
    if missing or unknown:
        name = next(iter(missing.values()))[0] if missing else min(unknown)
        what = "lacks" if missing else "has an unknown tensor"
        raise CheckpointError(f"{source.stored.path} {what} {name}", "config.json and weights are of different models")
    write_folder(target, source.config, source.stored.tokenizer, state, dtype, {**source.texts, CARD: card})
