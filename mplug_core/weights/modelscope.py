"""ModelScope's folders of mPLUG: what their settings say of the task, the architecture and the decoding.

A folder holds ``configuration.json`` (the task), ``config.yaml`` (image size, beams, lengths), ``config_bert.json``
(the text layers), ``vocab.txt`` and ``pytorch_model.bin``. The settings are read where they are there, also beside the
authors' own checkpoints.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mplug_core.bounded import Unreadable, read_json, read_yaml, shown
from mplug_core.errors import CheckpointError
from mplug_core.recipe import quoted

TASK_FILE, SETTINGS, BERT, WEIGHTS = "configuration.json", "config.yaml", "config_bert.json", "pytorch_model.bin"
BERT_KEYS = {
    "hidden_size": int, "num_attention_heads": int, "text_encoder_layers": int, "fusion_layers": int,
    "stride_layer": int, "layer_norm_eps": float, "hidden_dropout_prob": float,
}  # fmt: skip
"""What is used of ``config_bert.json``."""
WRITING_TASKS = {"image-captioning": "caption", "visual-question-answering": "vqa"}
"""Tasks that write a text, and what they are called here."""
POSITIVE = ("hidden_size", "num_attention_heads", "stride_layer", "image_res", "beam_size", "max_length")
"""Numbers that can't be 0."""
DECODING_KEYS = {"beam_size": "beams", "min_length": "min_tokens", "max_length": "max_tokens"}


@dataclass(frozen=True)
class Settings:
    """What a folder says of its model; None or empty where it says nothing.

    ``decoding`` has fields of :class:`~mplug_core.generation.Decoding`, with the released beam search.
    """

    task: str | None = None
    bert: dict[str, Any] = field(default_factory=dict)
    image_size: int | None = None
    decoding: dict[str, Any] = field(default_factory=dict)


def is_modelscope(folder: Path) -> bool:
    """Whether a folder is laid out as ModelScope's are."""
    return (folder / TASK_FILE).is_file() and not (folder / "model.safetensors").is_file()


def read_settings(folder: Path) -> Settings:
    """The settings of a folder; CheckpointError for a file that can't be understood."""
    task = _mapping(folder / TASK_FILE).get("task")
    settings = _settings(folder)
    named = settings.get("bert_config")
    bert_file = folder / (Path(named).name if isinstance(named, str) else BERT)
    bert = _mapping(bert_file if bert_file.is_file() else folder / BERT)
    decoding: dict[str, Any] = {}
    if task in WRITING_TASKS:
        found = {ours: _count(folder, settings, theirs) for theirs, ours in DECODING_KEYS.items()}
        decoding = {ours: value for ours, value in found.items() if value is not None}
        shortest, longest = decoding.get("min_tokens"), decoding.get("max_tokens")
        if shortest is not None and longest is not None and shortest > longest:
            raise CheckpointError(
                f"{folder}: min_length {shortest} is above max_length {longest}", "download the folder again"
            )
        if decoding:
            decoding = {"strategy": "released", "length_penalty": 0.6, "no_repeat": 0, **decoding}
    return Settings(
        task if isinstance(task, str) else None,
        {key: _number(folder, bert, key, kind) for key, kind in BERT_KEYS.items() if bert.get(key) is not None},
        _count(folder, settings, "image_res"),
        decoding,
    )


def _settings(folder: Path) -> dict[str, Any]:
    """``config.yaml``. Where the folder isn't ModelScope's it may be anybody's: none where it makes no sense."""
    try:
        settings = _mapping(folder / SETTINGS)
        _count(folder, settings, "image_res")
    except CheckpointError:
        if is_modelscope(folder):
            raise
        return {}
    return settings


def _mapping(file: Path) -> dict[str, Any]:
    """The values of a JSON or YAML file; none where it isn't there."""
    if not file.is_file():
        return {}
    try:
        values = read_json(file) if file.suffix == ".json" else read_yaml(file)
    except Unreadable as error:
        raise CheckpointError(f"cannot read {file}: {error}", "download the folder again") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"cannot read {file}: it is no mapping", "download the folder again")
    return values


def _number(folder: Path, values: dict[str, Any], key: str, kind: type) -> Any:
    value = values[key]
    if isinstance(value, str) and kind is float:  # YAML reads 1e-12 as text
        try:
            value = float(value)
        except ValueError:
            value = None
    least = 1 if key in POSITIVE else 0
    if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else int):
        wanted = "must be a number"
    elif not least <= value < math.inf:  # not a number is in no range
        wanted = f"must be {least} or more"
    else:
        return value
    told = quoted(values[key]) if isinstance(values[key], str | int | float) else shown(values[key], 60)
    raise CheckpointError(f"{folder}: {key} is {told}, and {wanted}", "download the folder again")


def _count(folder: Path, values: dict[str, Any], key: str) -> int | None:
    return None if values.get(key) is None else _number(folder, values, key, int)
