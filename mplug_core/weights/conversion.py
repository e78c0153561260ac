"""A model of any layout to a native folder, with an account of every tensor: used, dropped and why, or missing."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mplug_core.errors import CheckpointError
from mplug_core.model.config import MplugConfig
from mplug_core.weights.destination import check_destination
from mplug_core.weights.faults import broken_values, check_finite, shown
from mplug_core.weights.folder import Stored, find_model, read_model, texts_beside, write_folder
from mplug_core.weights.official import PARTS, Entry, expected_shapes, part_of


@dataclass
class Group:
    """Tensors of one fate: their names in the checkpoint (and ours, where they are used), and their size."""

    names: dict[str, str | None] = field(default_factory=dict)
    parameters: int = 0
    bytes: int = 0

    def add(self, name: str, entry: Entry, ours: str | None = None) -> None:
        dtype, shape = entry
        self.names[name] = ours
        self.parameters += torch.Size(shape).numel()
        self.bytes += torch.Size(shape).numel() * dtype.itemsize

    def as_dict(self) -> dict[str, Any]:
        names: Any = self.names if any(self.names.values()) else list(self.names)
        return {"tensors": len(self.names), "parameters": self.parameters, "bytes": self.bytes, "names": names}


@dataclass
class Account:
    """What became of a checkpoint: ``used`` and ``missing`` by part, ``dropped`` by reason.

    ``missing`` has our parameters that the model is now without, and ``allowed`` which parts were let go.
    """

    source: str
    layout: str
    task: str | None
    config: MplugConfig
    used: dict[str, Group]
    dropped: dict[str, Group]
    missing: dict[str, Group]
    allowed: list[str]
    bytes: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        sections = {"used": self.used, "dropped": self.dropped, "missing": self.missing}
        shown = {name: {key: group.as_dict() for key, group in groups.items()} for name, groups in sections.items()}
        config = self.config.model_dump(mode="json")
        about = {"source": self.source, "layout": self.layout, "task": self.task, "bytes": self.bytes}
        return {**about, **shown, "allowed": self.allowed, "config": config}


def convert_model(
    source: str | None,
    target: str | Path,
    *,
    image_size: int | None = None,
    allow_missing: Collection[str] = (),
    dtype: torch.dtype | None = None,
    force: bool = False,
) -> Account:
    """Write the model that ``source`` names as a native folder ``target``, whole or not at all.

    ``image_size`` in pixels resizes the positions, ``dtype`` is what weights, also int8 ones, are stored as (None: as
    they are), ``allow_missing`` names parts that the model may be without. The model card and the recipe of a native
    folder go along. MplugError where ``target`` exists
    (``force`` replaces a model folder, nothing else); CheckpointError for a part that is missing, of a wrong shape or
    never trained.
    """
    target = Path(target)
    check_destination(target, find_model(source), force)
    stored = read_model(source, image_size, allow_missing).whole(allow_missing, hint=None)
    check_values(stored)
    account = _account(stored, allow_missing)
    state = stored.floats() if dtype else stored.state
    texts = texts_beside(stored.path) if stored.account is None else {}
    write_folder(target, stored.config, stored.tokenizer, state, dtype, texts, stored.release)
    account.bytes = (target / "model.safetensors").stat().st_size
    return account


def check_values(stored: Stored) -> None:
    """CheckpointError for weights that are not finite, and for those of a released checkpoint that are all the same;
    tensors are given back as they are read."""
    for name, value in stored.state.items():
        check_finite(name, value, stored.path)
        fault = broken_values(name, value) if stored.account is not None else None
        if fault:
            raise CheckpointError(f"{stored.path}: {fault}", "take another checkpoint")
        stored.release(value)


def _account(stored: Stored, allowed: Iterable[str]) -> Account:
    """The account of a model that is whole, with what was left out for it."""
    config, gone = stored.config, stored.gone
    used: dict[str, Group] = {}
    dropped: dict[str, Group] = {}
    missing: dict[str, Group] = {}
    conversion = stored.account
    if conversion is None:
        for name, value in stored.state.items():
            used.setdefault(part_of(name), Group()).add(name, (value.dtype, tuple(value.shape)), name)
        return Account(str(stored.path), stored.layout, None, config, _by_part(used), {}, {}, [])
    for name, ours in conversion.used.items():
        part = part_of(ours)
        if part in gone:
            reason = f"of {shown(part)}, which the model is without"
            dropped.setdefault(reason, Group()).add(name, conversion.entries[name])
        else:
            used.setdefault(part, Group()).add(name, conversion.entries[name], ours)
    for name, reason in conversion.dropped.items():
        dropped.setdefault(reason, Group()).add(name, conversion.entries[name])
    expected = expected_shapes(conversion.config)
    for part, names in stored.missing.items():
        for name in names:
            missing.setdefault(part, Group()).add(name, (torch.float32, tuple(expected[name])))
    if config.fusion == "none":
        missing.setdefault("fusion", Group())
    if not config.decoder_layers:
        missing.setdefault("decoder", Group())
    let = [part for part in PARTS if part in allowed and part in gone]
    return Account(
        str(stored.path), stored.layout, stored.task, config, _by_part(used), dropped, _by_part(missing), let
    )


def _by_part(groups: dict[str, Group]) -> dict[str, Group]:
    """In the order of the model; parts of other models come last."""
    order = [*(part for part in PARTS if part in groups), *(part for part in groups if part not in PARTS)]
    return {part: groups[part] for part in order}
