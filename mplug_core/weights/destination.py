"""Where a model may be written: nothing is lost but another model, and that only by who says so."""

from __future__ import annotations

import os
from pathlib import Path

from mplug_core.errors import MplugError, UsageError
from mplug_core.outputs import is_within, require_writable
from mplug_core.weights.quantised import QUANTISATION

NATIVE = {"model.safetensors", "config.json", "vocab.txt", "recipe.yaml", "README.md", QUANTISATION}
"""Files of a model folder."""
GRAPHS = {"meta.json", "vocab.txt", "README.md"}
"""Files of a folder of ONNX graphs, beside the graphs and their weights."""


def check_destination(target: str | Path, source: Path | None = None, force: bool = False) -> None:
    """MplugError unless ``target`` is free, an empty folder or, with ``force``, a folder of a model and nothing else,
    in a place that can be written.

    ``source`` is what is to be written there; UsageError where it is replaced, or a folder that it lies in.
    """
    place = Path(os.path.realpath(target))
    if source is not None and is_within(source, place):
        raise UsageError(f"{target} is where the model is that is to be written", "name another folder")
    there = os.path.lexists(place)
    if there and not place.is_dir():
        raise MplugError(f"{target} is a file", "name a folder")
    require_writable(place.parent if there else place, "name a folder in one that can be written")
    if not there:
        return
    try:
        inside = sorted(place.iterdir())
    except OSError as error:
        raise MplugError(f"cannot read {target}: {error.strerror}", "name another folder") from error
    if not inside:
        return
    if not _is_model(inside):
        raise MplugError(f"{target} exists and is no model folder, or holds more", "name a folder that doesn't exist")
    if not force:
        raise MplugError(f"{target} exists", "--force replaces it")


def _is_model(inside: list[Path]) -> bool:
    """Whether a folder that holds this is a model folder, or one of graphs, and has nothing else in it."""
    if not all(path.is_file() for path in inside):
        return False
    names = {path.name for path in inside}
    if {"model.safetensors", "config.json"} <= names <= NATIVE:
        return True
    return "meta.json" in names and all(name.endswith((".onnx", ".onnx.data")) for name in names - GRAPHS)
