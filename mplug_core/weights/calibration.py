"""Storing a calibration with a model: of a native folder only ``config.json`` changes, or a copy of the folder is made.

What is stored is fitted by :class:`~mplug_core.tasks.confidence.Evidence`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from mplug_core.atomic import replace_text, whole_folder
from mplug_core.bounded import read_json
from mplug_core.errors import CheckpointError, MplugError, UsageError
from mplug_core.json_text import to_json
from mplug_core.model.config import Calibration
from mplug_core.outputs import require_writable
from mplug_core.recipe import MODEL_VARIABLE
from mplug_core.weights.destination import NATIVE, check_destination
from mplug_core.weights.folder import EMBEDDED, find_model, is_native

COPY = "name a folder for a calibrated copy"


def check_calibrated(spec: str | None, target: Path | None, force: bool = False) -> Path:
    """The folder of the model ``spec`` (as for ``--model``), whose calibration may be stored in ``target`` or, for
    None, in the folder itself.

    CheckpointError for a model that is not a native folder; UsageError for one that is not the user's to change: a
    download, a checkpoint of a run, or the embedded model, unless ``spec`` is its folder.
    """
    folder = find_model(spec)
    if not folder.is_dir() or not is_native(folder):
        raise CheckpointError(f"{folder} is no model folder", "make one of it: mplug model convert")
    if target is not None:
        check_destination(target, folder, force)
        return folder
    if force:
        raise UsageError("--force is for a copy", "leave it out")
    name = spec or os.environ.get(MODEL_VARIABLE) or "mini"
    if folder == EMBEDDED and name == "mini":
        raise UsageError("the embedded model is part of the package", COPY)
    if not os.path.exists(name):
        raise UsageError(f"{name} is a download, which stays as it is", COPY)
    if (folder.parent / "manifest.json").is_file():
        raise UsageError(f"{folder} is part of a checkpoint, which stays as it is", COPY)
    require_writable(folder, COPY)
    return folder


def save_calibration(folder: Path, found: Mapping[str, Calibration], target: Path | None = None) -> Path:
    """Add to the calibration of the model in ``folder``, or of a copy of it in ``target``; returns where it is.

    Kinds that are not in ``found`` stay calibrated as they are. Files are whole or not changed; MplugError where they
    can't be written.
    """
    try:
        values = read_json(folder / "config.json")
        values["calibration"] = {
            **values.get("calibration", {}), **{kind: part.model_dump() for kind, part in found.items()}
        }  # fmt: skip
        text = to_json(values, indent=1) + "\n"
        if target is None:
            replace_text(folder / "config.json", text)
            return folder
        with whole_folder(target) as beside:
            for file in sorted(file for file in folder.iterdir() if file.name in NATIVE):
                shutil.copyfile(file, beside / file.name)
            (beside / "config.json").write_text(text, encoding="utf-8")
        return target
    except OSError as error:
        raise MplugError(f"cannot write {target or folder}: {error.strerror or error}", COPY) from error
