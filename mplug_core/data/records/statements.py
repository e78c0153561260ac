"""Statements on one image or on a pair, true or false."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mplug_core.data.records.files import File
from mplug_core.data.records.finding import read, subfolders
from mplug_core.data.records.reading import Entry, Item, Layout, Reading, own_entries, own_folder, places
from mplug_core.data.records.types import Format, Records, StatementRecord

_NLVR_PERMUTATIONS = 6
_NLVR_NAMES = (r"(?P<split>train|dev|test2?|hidden)\.jsonl?", r"(?P<split>hidden)(_final|2)\.jsonl?")
_NLVR2_NAMES = (r"(?P<split>train|dev|test\d?|tiny-dev|(un)?balanced_(dev|test\d))\.jsonl?",)


def read_statements(
    path: str | Path,
    split: str | None = None,
    format: Format | None = None,
    images: str | Path | None = None,
) -> Records[StatementRecord]:
    """Statements, in the order of the file; arguments as of :func:`read_captions`.

    Own format: {"images": [PATH, PATH] or "image": PATH, "statement", "label": true, false, or null where hidden}.

    NLVR2 has two images a statement. Its identifiers are SPLIT-SET-PAIR-SENTENCE: ``group`` is that without the pair.
    NLVR (Cornell) has one image, the strip of three boxes, in six permutations, and each is a record; ``identifier`` is
    SPLIT-IDENTIFIER-PERMUTATION, ``group`` is that without the permutation. Its hidden split (``hidden.json``) names no
    folders and may have no labels.

    Raises DataError where there is no such file or split, or nothing usable in it.
    """
    return read("statements", path, split, format, images)


def _own(entry: Entry) -> Iterable[Item]:
    label = entry.values.get("label")
    if label is not None or "label" not in entry.values:
        label = _label(entry)
    if "images" in entry.values or "image" not in entry.values:
        images: tuple[Any, ...] = entry.pair("images")
        image_id = str(entry.values["images"][0])
    else:
        images = (entry.path("image"),)
        image_id = entry.image_id()
    if "image_id" in entry.values:
        image_id = entry.image_id()
    # ALBEF's lists call it a sentence
    text = entry.text("sentence" if "sentence" in entry.values and "statement" not in entry.values else "statement")
    identifier = entry.identity("identifier", default="")
    record = StatementRecord(images, text, label, identifier, entry.word("group"), entry.word("kind"))
    return [Item(image_id, record, f"identifier {identifier}" if identifier else record)]


def _label(entry: Entry) -> bool:
    label = entry.values.get("label")
    if isinstance(label, str) and label.lower() in ("true", "false"):
        label = label.lower() == "true"
    if not isinstance(label, bool):
        raise entry.fault("label", "true or false")
    return label


def _hidden(entry: Entry) -> bool | None:
    """The label of an official file; hidden tests leave it out."""
    return None if entry.values.get("label") is None else _label(entry)


def _nlvr2_item(entry: Entry) -> Iterable[Item]:
    identifier = entry.text("identifier")
    parts = identifier.rsplit("-", 3)
    if len(parts) != 4 or not all(parts) or "\0" in identifier:
        raise entry.fault("identifier", "SPLIT-SET-PAIR-SENTENCE")
    split, images, pair, sentence = parts
    folder = entry.values.get("directory")
    folder = str(folder) if isinstance(folder, int | str) and "\0" not in str(folder) else ""
    paths = []
    for side in (0, 1):
        name = f"{split}-{images}-{pair}-img{side}.png"
        inside = (f"{folder}/{name}", f"{split}/{folder}/{name}") if folder else ()
        paths.append(entry.reading.image(name, *inside, f"{split}/{name}"))
    group = f"{split}-{images}-{sentence}"
    record = StatementRecord(tuple(paths), entry.text("sentence"), _hidden(entry), identifier, group)  # type: ignore[arg-type]
    return [Item(f"{split}-{images}", record, f"identifier {identifier}")]


def _nlvr_item(entry: Entry) -> Iterable[Item]:
    """A record for each permutation, also those whose image is not there: the reader counts them."""
    identifier, statement, label = entry.text("identifier"), entry.text("sentence"), _hidden(entry)
    if not re.fullmatch(r"\d+-\d+", identifier):
        raise entry.fault("identifier", "SET-SENTENCE, two numbers")
    folder = entry.identity("directory", default="")
    if "\0" in folder:
        raise entry.fault("directory", "a folder")
    split = _nlvr_split(entry.reading)
    group = f"{split}-{identifier}"
    for number in range(_NLVR_PERMUTATIONS):
        name = f"{group}-{number}.png"
        image = entry.reading.image(f"{folder}/{name}" if folder else name, name)
        record = StatementRecord((image,), statement, label, f"{group}-{number}", group)  # type: ignore[arg-type]
        yield Item(identifier.partition("-")[0], record, f"identifier {group}-{number}")


def _nlvr_split(reading: Reading) -> str:
    """Images carry the split's name: the file's, or that of its folder."""
    for name in (f"{reading.file.stem}.json", f"{reading.beside.name}.json"):
        for pattern in _NLVR_NAMES:
            if match := re.fullmatch(pattern, name):
                return match["split"]
    return reading.file.stem


def _nlvr_folders(reading: Reading) -> list[Path]:
    split = _nlvr_split(reading)
    folders = places("images", f"{split}/images", split)(reading)
    if "directory" in reading.file.sample:
        return folders
    # Images are in numbered folders, and the hidden split does not say in which.
    numbered = [sub for folder in folders if folder.is_dir() for sub in subfolders(folder) if sub.name.isdecimal()]
    return [*folders, *numbered]


def _looks(pattern: str, file: File) -> bool:
    identifier = file.sample.get("identifier") if file.shape == "lines" else None
    return isinstance(identifier, str) and "sentence" in file.sample and re.fullmatch(pattern, identifier) is not None


LAYOUTS = (
    Layout(
        "nlvr2", lambda file: _looks(r"[A-Za-z][\w-]*-\d+-\d+-\d+", file), own_entries, _nlvr2_item,
        places("images", "dev", "test1", "train", "images/dev", "images/test1", "images/test2", "images/train"),
        _NLVR2_NAMES, common=True,
    ),
    Layout(
        "nlvr", lambda file: _looks(r"\d+-\d+", file), own_entries, _nlvr_item, _nlvr_folders,
        _NLVR_NAMES, common=True,
    ),
    Layout(
        "json", lambda file: file.shape == "list", own_entries, _own, own_folder, (r"nlvr_(?P<split>\w+)\.json",),
    ),
    Layout("jsonl", lambda file: file.shape == "lines", own_entries, _own, own_folder),
)  # fmt: skip
