"""From a path that a user gave to the file that is meant: splits in folders, and formats by what files look like."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from mplug_core.data.folders import is_folder
from mplug_core.data.records.files import File, is_file
from mplug_core.data.records.reading import Layout, Reading, Source, read_records, selection, usable
from mplug_core.data.records.types import Records
from mplug_core.errors import DataError, UsageError

_EXTENSIONS = (".jsonl", ".json", ".csv", ".txt")
_SUBFOLDERS = ("", "annotations", "data", "questions")
_EXPECTED = {
    "captions": 'JSON Lines {"image": ..., "caption": ...}, COCO captions JSON, or CSV with the header image,caption',
    "questions": 'JSON Lines {"image": ..., "question": ..., "answer": ...}, VQA v2 questions, or CSV with the header '
    "question,answer,image_id",
    "phrases": 'JSON Lines {"image": ..., "phrase": ..., "box": ...}, refs(...).p, COCO instances JSON, or the '
    "folder of Flickr30k Entities",
    "statements": 'JSON Lines {"images": [..., ...], "statement": ..., "label": ...}, or those of NLVR2 or NLVR',
    "entailments": 'JSON Lines {"image": ..., "hypothesis": ..., "label": ...}, or those of SNLI-VE',
}


class NotHere(DataError):
    """There is nothing of this kind at a path; of other kinds there may be."""


def read(
    kind: str,
    path: str | Path,
    split: str | None = None,
    format: str | None = None,
    images: str | Path | None = None,
    text_only: bool = False,
    opened: bool = True,
) -> Records[Any]:
    """Records of a kind ("captions", ...); DataError where there is no such file or split, or nothing to use.

    With ``opened`` false the images only name what a record is about: none has to be there.
    """
    named, chosen = selection(split)
    reading = Reading(find(kind, Path(path), named, format), images, text_only)
    found = usable(reading, read_records(reading, chosen, keep=not opened))
    return found if opened else replace(found, missing=[])


def layouts(kind: str) -> tuple[Layout, ...]:
    """The formats of a kind, in the order in which they are recognised."""
    # The kinds' modules stand on this one.
    from mplug_core.data.records import captions, entailments, phrases, questions, statements

    modules = {
        "captions": captions, "questions": questions, "phrases": phrases, "statements": statements,
        "entailments": entailments,
    }  # fmt: skip
    return modules[kind].LAYOUTS


def find(kind: str, path: Path, split: str | None, format: str | None = None) -> Source:
    """The source of a kind and split at a path."""
    formats = _chosen(kind, format)
    if not os.path.isdir(path):
        return _in_file(kind, path, split, formats, format)
    splits = _splits(kind, path, formats, format)
    if split is not None:
        return splits[split]() if split in splits else _inner_or_longer(kind, path, split, splits)
    if "" in splits:
        return _alone(splits[""](), path, kind)
    if len(splits) == 1:
        return next(iter(splits.values()))()
    if splits:
        raise DataError(f"{path} has several splits of {kind}", f"name one of {', '.join(sorted(splits))}")
    raise NotHere(f"there are no {kind} in the folder {path}", f"expected {kind}.jsonl there; or name the file")


def sources(
    kind: str, path: Path, format: str | None = None, faults: list[DataError] | None = None
) -> dict[str, Source]:
    """Split -> source, of all splits at a path, also those inside of files; a file without splits has the name "".

    What is wrong with one split of several is put into ``faults``; without such a list, and where no split is left, it
    is raised.
    """
    formats = _chosen(kind, format)
    if os.path.isdir(path):
        found, wrong = {}, []
        for name, make in _splits(kind, path, formats, format).items():
            try:
                found[name] = make()
            except DataError as error:
                wrong.append(error)
        if wrong and (faults is None or not found):
            raise wrong[0]
        if faults is not None:
            faults += wrong
    else:
        found = {"": _in_file(kind, path, None, formats, format, alone=False)}
    if "" in found and (inner := _inside(found[""])):
        whole = found.pop("")
        found |= {name: Source(whole.file, whole.layout, name, True) for name in inner if name not in found}
    return found


def _chosen(kind: str, format: str | None) -> tuple[Layout, ...]:
    every = layouts(kind)
    if format is None:
        return every
    if found := tuple(layout for layout in every if layout.name == format):
        return found
    raise DataError(f"{kind} have no format {format}", f"formats: {', '.join(layout.name for layout in every)}")


def _in_file(
    kind: str, path: Path, split: str | None, formats: Sequence[Layout], format: str | None, alone: bool = True
) -> Source:
    if not is_file(path):
        if re.match(r"(https?|s3):/", str(path), re.IGNORECASE):
            raise UsageError(f"{path} is an address, and records are read from files", "download it, and name the file")
        raise DataError(f"there is no data at {path}", "check the path")
    source = _source(kind, path, formats, format)
    if split is None:
        return _alone(source, path, kind) if alone else source
    inner = _inside(source)
    if split in inner:
        return Source(source.file, source.layout, split, True)
    if inner:
        raise _no_split(kind, path, split, inner)
    raise DataError(f"{path} is one file: it has no split {split}", "name the split's file, or a folder")


def _alone(source: Source, path: Path, kind: str) -> Source:
    """A source of which no split was named: it has none, or one."""
    inner = _inside(source)
    if len(inner) > 1:
        raise DataError(f"{path} has several splits of {kind}", f"name one of {', '.join(sorted(inner))}")
    return Source(source.file, source.layout, inner[0], True) if inner else source


def _inside(source: Source) -> list[str]:
    return source.layout.inside(source.file) if source.layout.inside else []


def _inner_or_longer(kind: str, path: Path, split: str, splits: dict[str, Callable[[], Source]]) -> Source:
    named = [key for key in splits if key]
    inner: list[str] = []
    if "" in splits:
        whole = splits[""]()
        inner = _inside(whole)
        if split in inner:
            return Source(whole.file, whole.layout, split, True)
    # "val" for annotations/captions_val2017.json, where it is the only one.
    longer = [key for key in named if key.startswith(split)]
    if len(longer) == 1:
        return splits[longer[0]]()
    raise _no_split(kind, path, split, sorted({*named, *inner}))


def _no_split(kind: str, path: Path, split: str, splits: Sequence[str]) -> DataError:
    near = get_close_matches(split, splits, 1)
    hint = f"there are {', '.join(sorted(splits))}" if splits else f"expected {split}/{kind}.jsonl there"
    return DataError(f"{path} has no {kind} of split {split}" + (f": is it {near[0]}?" if near else ""), hint)


def _splits(kind: str, folder: Path, formats: Sequence[Layout], format: str | None) -> dict[str, Callable[[], Source]]:
    """Split ("" if the name has none) -> how to get its source, which may mean reading the file."""
    splits: dict[str, Callable[[], Source]] = {}
    patterns: dict[tuple[str, str], int] = {}

    def add(split: str, path: Path, among: Sequence[Layout] = formats) -> None:
        splits.setdefault(split, lambda: _source(kind, path, among, format, split or None))

    def add_official(split: str, pattern: int, path: Path, layout: Layout) -> None:
        # of one layout's names for one split the earlier pattern counts, whatever the alphabet says
        if pattern < patterns.get((split, layout.name), pattern):
            del splits[split]
        if split not in splits:
            patterns[split, layout.name] = pattern
        add(split, path, (layout,))

    for entry, name in _entries(folder):
        if (split := _own_split(kind, name)) and os.path.isfile(entry):
            add(split[1] or "", entry)
            continue
        for layout in formats:
            found = _match(layout, name, entry)
            if found is not None:
                add_official(*found, entry, layout)
                break
    for sub in subfolders(folder):
        for own in (f"{kind}.jsonl", f"{kind}.jsonl.gz"):
            if os.path.isfile(sub / own):
                add(sub.name, sub / own)
        # NLVR: dev/dev.json, hidden/hidden_final.json
        for file in (sub / f"{sub.name}{end}.json" for end in ("", "_final", "2")):
            for layout in formats:
                if layout.common and os.path.isfile(file) and _match(layout, file.name, file) is not None:
                    add(sub.name, file, (layout,))
    if not splits:
        for layout in formats:
            if layout.looks(whole := File(folder)):
                splits[""] = lambda whole=whole, layout=layout: Source(whole, layout)
                break
    return splits


def _own_split(kind: str, name: str) -> tuple[str, str | None] | None:
    """(name, split) of ``captions_val.jsonl``; None where a file is not called after the kind."""
    stem, extension = os.path.splitext(name)
    if extension not in _EXTENSIONS or not (stem == kind or stem.startswith(f"{kind}_")):
        return None
    return stem, stem[len(kind) + 1 :] or None


def _match(layout: Layout, name: str, path: Path) -> tuple[str, int] | None:
    """The split in a name ("" for none) that fits a layout, and by which of its patterns; None if it doesn't."""
    for number, pattern in enumerate(layout.names):
        if match := re.fullmatch(pattern, name):
            try:
                if layout.common and not layout.looks(File(path)):
                    return None
            except DataError:
                return None
            return match.groupdict().get("split") or "", number
    return None


def _entries(folder: Path) -> Iterator[tuple[Path, str]]:
    """(path, name without .gz) of what is in a folder or its usual sub-folders; own files without split first."""
    for sub in _SUBFOLDERS:
        place = folder / sub
        try:
            names = sorted(os.listdir(place)) if os.path.isdir(place) else []
        except OSError as error:
            if sub:
                continue  # one folder inside doesn't cost the others
            raise DataError(f"{place} can't be read: {error.strerror}", "check the folder") from error
        order = {extension: rank for rank, extension in enumerate(_EXTENSIONS)}
        names.sort(key=lambda name: order.get(os.path.splitext(name.removesuffix(".gz"))[1], len(order)))
        for name in names:
            yield place / name, name.removesuffix(".gz")


def subfolders(folder: Path) -> list[Path]:
    """The folders in a folder, sorted."""
    try:
        with os.scandir(folder) as entries:
            return sorted(Path(entry.path) for entry in entries if is_folder(entry))
    except OSError as error:
        raise DataError(f"{folder} can't be read: {error.strerror}", "check the folder") from error


def _source(kind: str, path: Path, formats: Sequence[Layout], format: str | None, split: str | None = None) -> Source:
    """How to read a file: as the user said, or as it looks."""
    file = File(path)
    if format is not None:
        return Source(file, formats[0], split)
    if file.shape != "folder":
        _ = file.head  # an empty file is said to be empty
    for layout in formats:
        if layout.looks(file):
            return Source(file, layout, split)
    if other := _other_kind(kind, file):
        raise NotHere(f"{path} holds {other}, not {kind}", f"give a {kind}.jsonl")
    raise NotHere(f"{path} is in no known format", f"expected {_EXPECTED[kind]}")


def _other_kind(kind: str, file: File) -> str | None:
    """Another kind that a file holds, by a layout of that kind's own."""
    for other in _EXPECTED:
        official = [layout for layout in layouts(other) if layout.name not in ("jsonl", "json")]
        if other != kind and any(layout.looks(file) for layout in official):
            return other
    return None
