"""The native model folder: ``model.safetensors``, ``config.json``, ``vocab.txt``, ``recipe.yaml``, ``README.md``.

:func:`save_model` writes one complete or not at all; :func:`load_model` reads one by memory map, and so it does
released checkpoints in any of their layouts.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file

from mplug_core.atomic import whole_folder
from mplug_core.data.text import Tokenizer
from mplug_core.device import choose_dtype
from mplug_core.errors import CheckpointError, UsageError, values_without_secrets
from mplug_core.model.config import MplugConfig
from mplug_core.model.hollow import hollow
from mplug_core.model.mplug import MplugModel
from mplug_core.model.vision import VisualEncoder, resize_positions
from mplug_core.recipe import MODEL_VARIABLE, Recipe
from mplug_core.tasks.task import Ready
from mplug_core.weights import hub
from mplug_core.weights.faults import (
    absent_parts,
    check_conversion,
    check_finite,
    head_faults,
    raise_first,
    without_parts,
)
from mplug_core.weights.mapped import MappedPages
from mplug_core.weights.official import Conversion, patches
from mplug_core.weights.quantised import (
    QUANTISATION,
    SCALE,
    check_quantisation,
    computes_int8,
    dequantise,
    describe_quantisation,
    is_quantised,
    quantised_names,
    with_int8_layers,
)
from mplug_core.weights.released import read_released, released_files
from mplug_core.weights.sharded import files_of, index_in
from mplug_core.weights.tensor_files import TensorFile

CARD, RECIPE = "README.md", "recipe.yaml"
"""Texts beside the weights, which a folder takes over from the model that it was made of."""
OWN = "visual.backbone."
"""What the names of our visual tensors begin with, and those of no released file."""
LEAVABLE = ("text", "fusion", "decoder")
"""Parts of a model that some task does without."""
FINETUNE = "mplug finetune --model makes a complete model of it"
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
    dtype: torch.dtype | None = torch.bfloat16,
    state: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write a model folder, whole or not at all. ``state`` (default: the model's own) is stored as ``dtype``."""
    texts = {} if card is None else {CARD: card}
    if recipe is not None:
        # what was set, also to a default: left out, the named size would take its place when read again
        # the folder may be handed on, so that passwords of addresses stay here
        values = values_without_secrets(recipe.model_dump(mode="json", exclude_unset=True))
        texts[RECIPE] = yaml.safe_dump(values, sort_keys=False)
    write_folder(folder, model.config, tokenizer, model.state_dict() if state is None else state, dtype, texts)


def write_folder(
    folder: str | Path,
    config: MplugConfig,
    tokenizer: Tokenizer,
    state: Mapping[str, torch.Tensor],
    dtype: torch.dtype | None = None,
    texts: Mapping[str, str] | None = None,
    written: Callable[[torch.Tensor], None] | None = None,
) -> None:
    """Write a model folder, whole or not at all, one tensor after the other.

    Floating-point tensors are stored as ``dtype`` (None: as they are), but for the scales of int8 rows. ``texts`` go
    beside the weights by their names; ``written`` gets each tensor of ``state`` that is in the file. CheckpointError
    where the disk doesn't take it.
    """
    try:
        with whole_folder(Path(folder)) as beside:
            _write_weights(beside / "model.safetensors", state, dtype, written)
            config.save(beside / "config.json")
            tokenizer.save(beside / "vocab.txt")
            quantised = {QUANTISATION: describe_quantisation(state)} if is_quantised(state) else {}
            for name, text in {**(texts or {}), **quantised}.items():
                (beside / name).write_text(text, encoding="utf-8")
    except OSError as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"cannot write {folder}: {reason}", "check the disk and its space") from error


def texts_beside(place: Path) -> dict[str, str]:
    """The model card and the recipe of a model's folder, as far as there are any; CheckpointError for what is no text.

    A file has none: what is beside it may be of anything.
    """
    texts = {}
    for file in [place / name for name in (CARD, RECIPE) if place.is_dir() and (place / name).is_file()]:
        try:
            texts[file.name] = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8 text"
            raise CheckpointError(f"cannot read {file}: {reason}") from error
    return texts


def _write_weights(
    file: Path,
    state: Mapping[str, torch.Tensor],
    dtype: torch.dtype | None,
    written: Callable[[torch.Tensor], None] | None,
) -> None:
    types = {n: dtype if dtype and value.is_floating_point() else value.dtype for n, value in state.items()}
    # rounded, scales would change all weights of their row in the same direction
    types |= {name + SCALE: state[name + SCALE].dtype for name in quantised_names(state)}
    out = TensorFile(file, {name: (types[name], tuple(value.shape)) for name, value in state.items()})
    try:
        for name in out.order:
            out.add(name, state[name].detach().to(types[name]))
            if written is not None:
                written(state[name])
        out.close()
    except BaseException:
        out.abandon()
        raise


def find_model(spec: str | None) -> Path:
    """The folder or file that ``spec``, else ``MPLUG_MODEL``, else the embedded model, stands for.

    The weights of a native folder stand for it; of a run folder it is ``best/`` where there is one, else ``model/``.
    What is no path may be a name that :mod:`~mplug_core.weights.hub` knows: it is downloaded unless it is in the cache.
    """
    spec = spec or os.environ.get(MODEL_VARIABLE)
    if not spec or spec == "mini":
        if not (EMBEDDED / "model.safetensors").is_file():
            raise CheckpointError("this installation has no embedded model", "give --model FOLDER")
        return EMBEDDED
    place = Path(spec)
    if place.is_file():
        of_folder = place.name == "model.safetensors" and (place.parent / "config.json").is_file()
        return place.parent if of_folder else place
    if not place.is_dir():
        if hub.is_remote(spec):
            return hub.find(spec)
        raise CheckpointError(f"no model folder {spec}", hub.hint_for(spec))
    if (place / "model.safetensors").exists():
        return place
    # a run folder holds its last model in model/, and the one with the best score in best/ where it was asked to; a
    # checkpoint of it has model/, too
    inside = [place / name for name in ("best", "model")]
    if (place / "checkpoints" / "latest").is_file():
        with contextlib.suppress(OSError, UnicodeDecodeError):
            name = (place / "checkpoints" / "latest").read_text(encoding="utf-8").strip()
            inside.append(place / "checkpoints" / Path(name).name / "model")
    return next((folder for folder in inside if (folder / "model.safetensors").is_file()), place)


@dataclass
class Stored:
    """What a model's folder or file holds: tensors by our names, perhaps not of every part (``missing``, by part).

    ``release`` gives the memory back that a tensor took which was read and will not be read again. ``account`` is of a
    released checkpoint, with its layout and, where it is told, its task; ``gone`` are parts that were left out.
    """

    config: MplugConfig
    tokenizer: Tokenizer
    state: dict[str, torch.Tensor]
    path: Path
    missing: dict[str, list[str]] = field(default_factory=dict)
    release: Callable[[torch.Tensor], None] = lambda tensor: None
    account: Conversion | None = None
    layout: str = "native"
    task: str | None = None
    gone: frozenset[str] = frozenset()

    def whole(self, allowed: Collection[str] = (), hint: str | None = FINETUNE) -> Stored:
        """A model that can answer: without the parts that a released checkpoint came without, and what rests on them.

        CheckpointError where only one of the two heads of retrieval is there, but for the ``allowed`` parts.
        """
        if self.account is None:
            return self
        faults = {part: fault for part, fault in head_faults(self.state).items() if part not in allowed}
        raise_first(faults, str(self.path), hint)
        gone = absent_parts(self.config, self.missing)
        config, state = without_parts(self.config, self.state, gone)
        return replace(self, config=config, state=state, gone=frozenset(gone))

    def floats(self) -> dict[str, torch.Tensor]:
        """The tensors with int8 weights, where there are any, as floats."""
        return dequantise(self.state) if is_quantised(self.state) else self.state

    @property
    def name(self) -> str:
        return hub.name_of(self.path)


def read_model(spec: str | None = None, image_size: int | None = None, allow_missing: Collection[str] = ()) -> Stored:
    """The tensors of a model, by memory map where the format allows it: of a native folder, of a run or one of its
    checkpoints, of a released checkpoint's file, of a folder with one, of ModelScope's folder.

    ``image_size`` in pixels resizes the positions of patches or cells. CheckpointError for what is no model, is
    damaged, or lacks what the rest of it works with, but for the parts that ``allow_missing`` names.
    """
    place = find_model(spec)
    if place.is_dir() and is_native(place):
        return read_native(place, image_size)
    found = read_released(place, image_size)
    conversion = found.conversion
    check_conversion(conversion, str(found.file), found.task, allow_missing)
    return Stored(
        conversion.config, found.tokenizer, conversion.state, place, conversion.missing, found.release, conversion,
        found.layout, found.task,
    )  # fmt: skip


def is_native(folder: Path) -> bool:
    """Whether a folder is to be read as one of ours: by its weights, or its configuration where no others are."""
    if (folder / "model.safetensors").exists():
        return True
    if not (folder / "config.json").exists():
        return False
    index = index_in(folder)
    if index is None:
        return not released_files(folder)
    return any(name.startswith(OWN) for names in files_of(index).values() for name in names)


def weight_files(folder: Path) -> list[Path]:
    """The files of a native folder's weights: one, or those that an index names."""
    whole, index = folder / "model.safetensors", index_in(folder)
    return [whole] if whole.exists() or index is None else list(files_of(index))


def read_description(folder: Path) -> tuple[MplugConfig, Tokenizer]:
    """Configuration and vocabulary of a native folder; CheckpointError where they, or int8 weights, don't fit."""
    config = MplugConfig.load(folder / "config.json")
    tokenizer = Tokenizer.load(folder / "vocab.txt")
    if tokenizer.vocab_size != config.vocab_size:
        raise CheckpointError(
            f"{folder}: {tokenizer.vocab_size} pieces in vocab.txt, {config.vocab_size} in config.json"
        )
    check_quantisation(folder)
    return config, tokenizer


def read_native(folder: Path, image_size: int | None = None) -> Stored:
    """The tensors of a native folder; CheckpointError if it is none."""
    config, tokenizer = read_description(folder)
    files = weight_files(folder)
    state: dict[str, torch.Tensor] = {}
    for file in files:
        try:
            state |= load_file(file)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"cannot read {file}: {error}", "copy the folder again") from error
    if image_size is not None and image_size != config.vision.image_size:
        config = resize(config, state, image_size)
    return Stored(config, tokenizer, state, folder, release=MappedPages(*files).release)


def resize(config: MplugConfig, state: dict[str, torch.Tensor], image_size: int) -> MplugConfig:
    """The configuration for another image size; the positions of patches or cells in ``state`` are resized to it."""
    resized = config.model_copy(update={"vision": config.vision.model_copy(update={"image_size": image_size})})
    with hollow():
        visual = VisualEncoder(resized)
    if visual.is_transformer:
        patches(image_size, visual.backbone.patch_embed.patch_size[0])
    patch_positions, cell_positions = "visual.backbone.pos_embed", "grid_positions"
    if visual.is_transformer and patch_positions in state:
        rows = state[patch_positions][0]
        state[patch_positions] = resize_positions(rows, visual.grid, visual.backbone.num_prefix_tokens)[None]
    if cell_positions in state:
        state[cell_positions] = resize_positions(state[cell_positions], visual.token_grid, 0)
    return resized


def load_model(
    spec: str | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    without: Iterable[str] = (),
    image_size: int | None = None,
) -> Loaded:
    """Read a model for inference, in ``dtype`` (default: see :func:`~mplug_core.device.choose_dtype`).

    Parameters are mapped from the file, not built and overwritten; those of another type are converted one after the
    other. ``without`` names parts (of :data:`LEAVABLE`) that the task at hand does not use (for captions ``text`` and
    ``fusion``): they stay on the meta device, and a call of one is a CheckpointError. ``image_size`` in pixels: see
    :func:`read_model`. CheckpointError for a folder that is not a model, whose tensors don't fit its configuration, or
    with weights that are not finite.
    """
    without = _checked(without)
    stored = read_model(spec, image_size)
    folder = stored.path
    whole = stored.whole()
    config, state = whole.config, whole.state
    skipped = tuple(f"{part}." for part in without)
    device = torch.device(device)
    with hollow():
        model = MplugModel(config)
    if dtype is None:  # int8 kernels take fp32 activations
        dtype = choose_dtype(device, matrices=model.visual.is_transformer and not is_quantised(state))
    if is_quantised(state):  # int8 weights stay as they are where the device computes with them
        state = with_int8_layers(model, state) if computes_int8(device, dtype) else dequantise(state)
    if state is not stored.state:
        stored.state.clear()
    wanted = {}
    for name in list(state):
        value = state.pop(name)
        if skipped and name.startswith(skipped):
            continue
        check_finite(name, value, folder, state)
        wanted[name] = value.to(device, dtype) if value.is_floating_point() else value.to(device)
        if wanted[name] is not value:
            stored.release(value)
    try:
        fit = model.load_state_dict(wanted, strict=False, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"{folder}: tensors don't fit config.json: {str(error).splitlines()[-1]}") from error
    missing = [name for name in fit.missing_keys if not name.startswith(skipped)] if skipped else fit.missing_keys
    if missing or fit.unexpected_keys:
        gaps = f"lacks {missing[0]}" if missing else f"has an unknown tensor {fit.unexpected_keys[0]}"
        raise CheckpointError(f"{folder}/model.safetensors {gaps}", "config.json and weights are of different models")
    fill_buffers(model, skipped)
    for part in without:
        if (left := getattr(model, part)) is not None:
            left.register_forward_pre_hook(partial(_refuse, part))
    return Loaded(model.eval().requires_grad_(False), stored.tokenizer, stored.name, folder)


def _checked(without: Iterable[str]) -> tuple[str, ...]:
    """Parts to leave out; UsageError for what is none of :data:`LEAVABLE`."""
    if isinstance(without, str):
        raise UsageError(f"several parts may be left out, not {without!r}", f"give a list, such as [{without!r}]")
    without = tuple(without)
    for part in without:
        if part not in LEAVABLE:
            raise UsageError(f"no part {part!r} that can be left out", f"of {', '.join(LEAVABLE)}")
    return without


def _refuse(part: str, module: torch.nn.Module, arguments: object) -> None:
    raise CheckpointError(f"the model was loaded without its {part}", "load the whole model")


def fill_buffers(model: MplugModel, skipped: tuple[str, ...] = ()) -> None:
    """Give a model that was built on the meta device the buffers that no file holds, such as window masks."""
    hollow = [name for name, buffer in model.named_buffers() if buffer.is_meta and not name.startswith(skipped or "\0")]
    if not hollow:
        return
    computed = dict(MplugModel(model.config).named_buffers())
    for name in hollow:
        owner, _, last = name.rpartition(".")
        model.get_submodule(owner)._buffers[last] = computed[name].to(model.temperature.device)
