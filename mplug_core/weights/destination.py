"""Where a model may be written: nothing is lost but another model, and that only by who says so."""

from __future__ import annotations

import os
from pathlib import Path

from mplug_core.errors import MplugError
from mplug_core.weights.quantised import QUANTISATION

NATIVE = {"model.safetensors", "config.json", "vocab.txt", "recipe.yaml", "README.md", QUANTISATION}
"""Files of a model folder."""
GRAPHS = {"meta.json", "vocab.txt", "README.md"}
"""Files of a folder of ONNX graphs, beside the graphs and their weights."""


def check_destination(target: str | Path, source: Path | None = None, force: bool = False) -> None:
    """MplugError unless ``target`` is free, an empty folder or, with ``force``, a folder of a model and nothing else.

    ``source`` is what is to be written there; neither it nor a folder that it lies in is replaced.
    """
    place = Path(os.path.realpath(target))
    if not place.exists():
        return
    there = None if source is None else Path(os.path.realpath(source))
    if there is not None and place in (there, *there.parents):
        raise MplugError(f"{target} is where the model is that is to be written", "name another folder")
    if not place.is_dir():
        raise MplugError(f"{target} is a file", "name a folder")
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
