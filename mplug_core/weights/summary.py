"""What can be said of a model without loading it: its place, size and parts, what it can do, how it was trained."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from mplug_core.errors import CheckpointError, RecipeError
from mplug_core.model.config import MplugConfig
from mplug_core.model.hollow import hollow
from mplug_core.model.mplug import MplugModel
from mplug_core.recipe import Recipe, check_recipe, read_yaml
from mplug_core.weights import hub
from mplug_core.weights.card import Card, read_card
from mplug_core.weights.faults import head_faults, shown
from mplug_core.weights.folder import find_model, is_native, read_description, read_model, weight_files
from mplug_core.weights.official import missing_by_part, part_of
from mplug_core.weights.quantised import SCALE

DTYPES = {
    "BF16": "bf16", "F16": "fp16", "F32": "fp32", "F64": "fp64", "I8": "int8", "U8": "uint8", "I64": "int64",
    "I32": "int32", "BOOL": "bool",
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64", torch.int8: "int8",
    torch.uint8: "uint8", torch.int64: "int64", torch.int32: "int32", torch.bool: "bool",
}  # fmt: skip
NEEDS = {
    "caption": ("visual", "decoder"),
    "vqa": ("visual", "text", "fusion", "decoder"),
    "retrieval": ("visual", "text", "contrastive"),
    "grounding": ("visual", "text", "fusion", "decoder"),
    "statements": ("visual", "text", "fusion", "classifiers"),
    "entailment": ("visual", "text", "fusion", "classifiers"),
}
"""The parts that each task uses."""
OBJECTIVES = {
    "caption": "caption", "vqa": "answer", "grounding": "box", "statements": "statement", "entailment": "entailment",
}  # fmt: skip
"""The objective that tells what else a task needs of the architecture."""


@dataclass(frozen=True)
class TensorHead:
    """A stored tensor as its file describes it."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def count(self) -> int:
        return prod(self.shape)


@dataclass
class Summary:
    """A model as its files describe it.

    ``bytes`` on disk; ``dtypes`` how many numbers are stored in each type; ``parameters`` by part; ``missing`` names of
    parameters that the files lack, by part; ``tasks`` with None or the reason why not; ``tokens`` of an image.
    """

    name: str
    path: Path
    kind: str
    bytes: int
    dtypes: dict[str, int]
    parameters: dict[str, int]
    config: MplugConfig
    tokens: int
    missing: dict[str, list[str]]
    tasks: dict[str, str | None]
    recipe: Recipe | None = None
    card: Card | None = None
    notes: list[str] = field(default_factory=list)


def summarise(spec: str | None = None) -> Summary:
    """Describe the model that ``spec`` stands for, by ``--model``'s rules.

    Of a native folder only the header of the weights is read. CheckpointError where it is no model.
    """
    place = find_model(spec)
    if (place / "config.json").is_file() and is_native(place) and weight_files(place)[0].is_file():
        return _native(place)
    stored = read_model(spec)  # mapped, not loaded
    heads = {name: TensorHead(tuple(t.shape), DTYPES.get(t.dtype, str(t.dtype))) for name, t in stored.state.items()}
    size = place.stat().st_size if place.is_file() else folder_size(place)
    summary = _summary(stored.path, "released checkpoint", size, stored.config, heads, stored.missing)
    for part, fault in head_faults(stored.state).items():  # nothing loads it
        summary.tasks = {task: why or f"{shown(part)} {fault}" for task, why in summary.tasks.items()}
    return summary


def _native(folder: Path) -> Summary:
    config, _ = read_description(folder)
    heads = {name: head for file in weight_files(folder) for name, head in read_heads(file).items()}
    unread = {name: torch.empty(head.shape, device="meta") for name, head in heads.items()}
    missing = missing_by_part(config, unread)
    quantised = any(head.dtype == "int8" for head in heads.values())
    kind = "int8 model folder" if quantised else "model folder"
    summary = _summary(folder, kind, folder_size(folder), config, heads, missing)
    try:
        summary.card = read_card(folder)
    except CheckpointError as error:
        summary.notes.append(error.message)
    if (folder / "recipe.yaml").is_file():
        try:
            summary.recipe = check_recipe(read_yaml(folder / "recipe.yaml"))
        except RecipeError as error:
            summary.notes.append(f"recipe.yaml is not understood: {error.message}")
    return summary


def read_heads(file: Path) -> dict[str, TensorHead]:
    """Shapes and types of a safetensors file, from its header."""
    try:
        with safe_open(file, framework="pt") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}
            return {
                name: TensorHead(tuple(s.get_shape()), DTYPES.get(s.get_dtype(), s.get_dtype().lower()))
                for name, s in slices.items()
            }
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {file}: {error}", "copy the folder again") from error


def folder_size(folder: Path) -> int:
    """Bytes of the files directly in a folder."""
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())


def _summary(
    path: Path,
    kind: str,
    size: int,
    config: MplugConfig,
    heads: dict[str, TensorHead],
    missing: dict[str, list[str]],
) -> Summary:
    with hollow():
        model = MplugModel(config)
    dtypes: Counter[str] = Counter()
    parameters: Counter[str] = Counter()
    learned = {name for name, _ in model.named_parameters()}
    for name, head in heads.items():
        if name.endswith(SCALE):
            continue
        if name in learned:
            dtypes[head.dtype] += head.count
            parameters[part_of(name)] += head.count
    rows, columns = model.visual.token_grid
    tokens = rows * columns + config.summary_tokens + (model.visual.is_transformer and 1)
    return Summary(
        hub.name_of(path), path, kind, size, dict(dtypes.most_common()), dict(parameters), config, int(tokens), missing,
        abilities(config, missing),
    )  # fmt: skip


def abilities(config: MplugConfig, missing: dict[str, list[str]]) -> dict[str, str | None]:
    """Each task, with None where the model has what it takes, else what it lacks. How well is another question."""
    found: dict[str, str | None] = {}
    for task, parts in NEEDS.items():
        left_out = [shown(part).removeprefix("the ") for part in parts if part in config.absent]
        absent = [part for part in parts if missing.get(part)]
        lack = config.lacks_for(OBJECTIVES[task]) if task in OBJECTIVES else None
        if left_out:
            found[task] = f"it has no {' and no '.join(left_out)}"
        elif lack:
            found[task] = f"it has no {lack.partition(':')[0].removeprefix('model.')}"
        elif absent:
            found[task] = f"its {' and '.join(absent)} {'is' if len(absent) == 1 else 'are'} not in the checkpoint"
        else:
            found[task] = None
    return found
