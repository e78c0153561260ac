"""Writing a pack: samples in the order of the input, shards of a bounded size, the index last.

The same input gives the same bytes. A shard is complete or absent; after each, ``progress.json`` says where the input
was, and the same call goes on from there. A pack that is replaced stays until the new one, made in a hidden folder
inside, is complete. A folder has one writer at a time. What can't be packed is left out, counted, and named in
``left_out.jsonl``.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import re
import shutil
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from mplug_core.atomic import BUILDING, HIDDEN, finish_replacing, is_being_replaced, replace_contents, sole_writer
from mplug_core.bounded import read_json, readable
from mplug_core.data.ahead import batches_ahead
from mplug_core.data.folders import NotAFile, read_file
from mplug_core.data.images import format_of, open_image, picture_shape
from mplug_core.data.placement import cut, turn_of, turned
from mplug_core.data.shards.download import MAX_BYTES, download
from mplug_core.data.shards.index import (
    FORMAT,
    INDEX,
    KIND_NAMES,
    VERSION,
    FileEntry,
    KindSummary,
    PackIndex,
    ShardEntry,
    dump_index,
    is_pack_folder,
    write_atomically,
)
from mplug_core.data.shards.inputs import Fault, Item, Picture, open_inputs
from mplug_core.data.shards.reading import pack_places
from mplug_core.data.shards.samples import END, MAX_JSON, rows_of, tar_sample, texts_of, values_of
from mplug_core.errors import DataError, ImageError, MplugError, UsageError
from mplug_core.json_text import to_json
from mplug_core.outputs import is_within, path_shown

PROGRESS = "progress.json"
LEFT_OUT = "left_out.jsonl"
_OURS = re.compile(
    r"\d{5,9}\.(tar|idx|jsonl\.gz)|index\.json|progress\.json|left_out\.jsonl"
    r"|\.(\d{5,9}\.(tar|idx|jsonl\.gz)|(index|progress)\.json)\.part"
)
_EXTENSION = {"JPEG": "jpg", "MPO": "jpg", "TIFF": "tif", "JPEG2000": "jp2", "HEIF": "heic"}
_SLACK = 100
"""Bad entries more than twice the share that may be bad, with which a run ends early."""
_VALUES = 100_000
"""Distinct values (answers, phrases) that are counted at most."""


@dataclass(frozen=True)
class PackOptions:
    """What determines the bytes of a pack. ``shard_size``: bytes; a shard has at least one sample."""

    source: str
    split: str | None = None
    format: str | None = None
    images: str | None = None
    tasks: tuple[str, ...] = ()
    text_only: bool = False
    shard_size: int = 256_000_000
    max_samples: int | None = None


@dataclass
class PackReport:
    """What was packed; ``first_bad`` has a line for the first entries that were left out."""

    folder: Path
    index: PackIndex
    bytes: int
    first_bad: list[str] = field(default_factory=list)


def pack(
    options: PackOptions,
    out: Path,
    workers: int = 8,
    max_bad: float = 0.01,
    force: bool = False,
    timeout: float = 20.0,
    retries: int = 2,
    progress: Callable[[int, int], None] = lambda samples, bad: None,
) -> PackReport:
    """Pack a data set into the folder ``out``.

    ``workers`` threads read or download images (``timeout`` seconds, ``retries`` more attempts) and decode each once.
    DataError where ``out`` holds something else (a finished pack is replaced with ``force`` alone), where nothing can
    be packed, and where more than the share ``max_bad`` of the entries is bad; UsageError where ``out`` holds what is
    packed; MplugError where another process writes there, or the disk doesn't take it.
    """
    with _writing(out):
        _check_target(out, force)
    for path in (options.source, options.images):
        if path is not None and is_within(path, out):
            raise UsageError(f"{path_shown(path)} is in {path_shown(out)}, which is replaced", "name another OUT")
    items = open_inputs(options.source, options.split, options.format, options.images, options.tasks, options.text_only)
    with _writing(out), sole_writer(out):
        finish_replacing(out, _is_ours, INDEX)
        _check_target(out, force)
        # what is whole stays until the new one is; with both files a kill came when all but one call was done
        place = out / BUILDING if is_pack_folder(out) and (force or not (out / PROGRESS).exists()) else out
        state = _State.begin(options, place, force and place == out)
        report = _pack(options, items, place, state, workers, max_bad, timeout, retries, progress)
        if place != out:
            replace_contents(place, out, _is_ours, INDEX)
        return replace(report, folder=out)


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise MplugError(f"cannot write {path_shown(out)}: {reason}", "the same command goes on") from error


def _check_target(out: Path, force: bool) -> None:
    """DataError where ``out`` holds something else than a pack, or a finished one that isn't to be replaced."""
    if out.exists() and not out.is_dir():
        raise DataError(f"{out} is a file", "name a folder")
    there = sorted(set(os.listdir(out)) - HIDDEN) if out.exists() else []
    foreign = [name for name in there if not _is_ours(name)]
    if there and PROGRESS not in there and not is_pack_folder(out) and not _was_interrupted(out, there):
        foreign = there  # shards of someone else
    if foreign:
        raise DataError(f"{out} holds other files: {foreign[0]}", "name a new folder")
    if INDEX in there and PROGRESS not in there and not force:
        raise DataError(f"{out} is a pack already", "--force replaces it")


def _is_ours(name: str) -> bool:
    return _OURS.fullmatch(name) is not None


def _was_interrupted(out: Path, there: Sequence[str]) -> bool:
    """Whether a folder without index and progress is one that was begun or being replaced when a kill came."""
    if is_being_replaced(out, INDEX) or any(name.endswith(".idx") for name in there):
        return True
    return all(name.endswith(".part") for name in there)


def _pack(
    options: PackOptions, items: Iterator[Item | Fault], out: Path, state: _State, workers: int, max_bad: float,
    timeout: float, retries: int, progress: Callable[[int, int], None],
) -> PackReport:  # fmt: skip
    """Go on from ``state`` to the end, in ``out``."""
    writer = _Writer(options, out, state)
    items = islice(items, state.consumed, None)

    def prepare(item: Item | Fault) -> _Prepared:
        return _prepare(item, timeout, retries + 1)

    size = max(16, 2 * workers)
    for batch in batches_ahead(items, prepare, size, workers):
        for _, made in batch:
            if isinstance(made, MplugError):
                raise made
            writer.add(made)
            if writer.full:
                break
        progress(writer.samples, writer.bad)
        writer.judge(2 * max_bad, _SLACK)  # hopeless: not after hours of downloads
        if writer.full:
            break
    writer.judge(max_bad)
    index = writer.finish()
    return PackReport(out, index, sum(shard.bytes for shard in index.shards), writer.first_bad)


# -- one sample ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Prepared:
    """Encoded images with their extensions, the JSON, and a line for each that is bad. No JSON: nothing is left."""

    images: list[tuple[str, bytes]]
    values: dict[str, Any] | None
    bad: list[dict[str, str]]


def _prepare(item: Item | Fault, timeout: float, attempts: int) -> _Prepared:
    """Read and check the images of an item; records that need a bad one are left out with it."""
    if isinstance(item, Fault):
        return _Prepared([], None, [{"name": item.name, "code": item.code, "message": item.message}])
    encoded: dict[int, tuple[str, bytes]] = {}
    bad = []
    lost = False
    for row, picture in enumerate(item.pictures):
        try:
            encoded[row] = _encoded(picture, timeout, attempts)
        except ImageError as error:
            bad.append({"name": picture.name, "code": error.code, "message": error.message})
            lost = True
    records = dict(item.records)
    if "phrases" in records:
        records["phrases"], others = _upright_phrases(item, encoded)
        bad += others
        lost = lost or bool(others)
    if not lost:
        names = [picture.name for picture in item.pictures]
        return _Prepared(list(encoded.values()), {"images": names, **records}, bad)
    kept = {kind: [r for r in rows if all(row in encoded for row in rows_of(r))] for kind, rows in records.items()}
    used = sorted({row for records in kept.values() for record in records for row in rows_of(record)})
    if not used:
        return _Prepared([], None, bad)
    new_row = {row: number for number, row in enumerate(used)}
    moved = {kind: [_moved(record, new_row) for record in records] for kind, records in kept.items() if records}
    names = [item.pictures[row].name for row in used]
    return _Prepared([encoded[row] for row in used], {"images": names, **moved}, bad)


def _upright_phrases(
    item: Item, encoded: dict[int, tuple[str, bytes]]
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """The phrases of an item with their boxes as the pictures are shown, and a line for each box of another picture."""
    shapes = {row: picture_shape(data) for row, (_, data) in encoded.items()}
    phrases, bad = [], []
    for phrase in item.records["phrases"]:
        row = phrase["image"]
        try:
            turn = turn_of(phrase.get("size"), shapes.get(row))
        except DataError as error:
            name = item.pictures[row].name
            bad.append({"name": name, "code": error.code, "message": f"{phrase['phrase'][:60]}: {error.message}"})
            continue
        if turn != 1:
            phrase = phrase | {"box": cut(turned(phrase["box"], turn)), "size": phrase["size"][::-1]}
        phrases.append(phrase)
    return phrases, bad


def _moved(record: dict[str, Any], new_row: dict[int, int]) -> dict[str, Any]:
    """A record with the new rows of its images."""
    rows = [new_row[row] for row in rows_of(record)]
    return record | ({"images": rows} if "images" in record else {"image": rows[0]})


def _encoded(picture: Picture, timeout: float, attempts: int) -> tuple[str, bytes]:
    """Extension and bytes of an image as they are, after decoding it once; ImageError if it can't be used."""
    data = picture.data
    if picture.url is not None:
        data = download(picture.url, timeout, attempts)
    elif data is None:
        data = _read(picture.path)  # type: ignore[arg-type]
    if not data:
        raise ImageError(f"{picture.name} is empty", code="empty")
    try:
        kind = format_of(open_image(data, target=32))  # JPEG is decoded small: damage shows all the same
    except ImageError as error:
        raise ImageError(error.message.replace("the image data", picture.name, 1), error.hint, error.code) from error
    return _EXTENSION.get(kind, kind.lower()), data


def _read(path: Path) -> bytes:
    try:
        data = read_file(path, MAX_BYTES)
    except NotAFile as error:
        raise ImageError(f"{path} is {error.what}, not a file", code="missing") from error
    except FileNotFoundError as error:
        raise ImageError(f"{path} does not exist", code="missing") from error
    except (OSError, ValueError) as error:
        raise ImageError(f"{path} can't be read: {getattr(error, 'strerror', error)}", code="unreadable") from error
    if len(data) > MAX_BYTES:
        raise ImageError(f"{path} has more than {MAX_BYTES >> 20} MB", code="too_large")
    return data


# -- the files -------------------------------------------------------------------------------------------------------


@dataclass
class _State:
    """``progress.json``: finished shards, and how many entries of the input are in them or left out."""

    options: dict[str, Any]
    consumed: int = 0
    samples: int = 0
    images: int = 0
    per_sample: int = 0
    bad: int = 0
    left_out_bytes: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    first_bad: list[str] = field(default_factory=list)
    kinds: dict[str, dict[str, Any]] = field(default_factory=dict)
    shards: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def begin(cls, options: PackOptions, out: Path, force: bool) -> _State:
        """The state to go on from; a new one with ``force``, or where ``out`` is new.

        What was begun otherwise in a hidden folder is begun anew; elsewhere that is a DataError.
        """
        values = json.loads(to_json(vars(options) | {"version": VERSION, "stamp": _stamp(options.source)}))
        out.mkdir(exist_ok=True)
        there = sorted(filter(_is_ours, os.listdir(out)))
        if PROGRESS in there and not force:
            hidden = out.name == BUILDING
            try:
                state = cls._read(out / PROGRESS)
                if state.options == values:
                    for name in there:
                        if name.endswith(".part"):
                            (out / name).unlink()
                    return state
                changed = [key for key in values if state.options.get(key) != values[key]]
                raise DataError(f"{out} was begun with another {', '.join(changed)}", "--force begins anew")
            except DataError:
                if not hidden:
                    raise
        for name in there:
            (out / name).unlink()
        shutil.rmtree(out / BUILDING, ignore_errors=True)
        state = cls(values)
        state.write(out)
        return state

    def write(self, out: Path) -> None:
        write_atomically(out / PROGRESS, to_json(vars(self)).encode())

    @classmethod
    def _read(cls, file: Path) -> _State:
        try:
            return cls(**read_json(file, 1 << 28))  # of a pack of a million files it is long
        except (ValueError, TypeError) as error:
            raise DataError(f"{file} is damaged", "--force begins anew") from error


class _Writer:
    """Collects samples into shards."""

    def __init__(self, options: PackOptions, out: Path, state: _State) -> None:
        self.options, self.out, self.state = options, out, state
        self.entries, self.samples, self.bad = state.consumed, state.samples, state.bad
        self.first_bad = list(state.first_bad)
        self._left_out = Counter(state.left_out)
        self._kinds = {kind: _Tally.of(values) for kind, values in state.kinds.items()}
        self._images, self._per_sample = state.images, state.per_sample
        self._log = open(out / LEFT_OUT, "ab")  # noqa: SIM115
        self._log.truncate(min(state.left_out_bytes, self._log.tell()))
        self._log.seek(0, os.SEEK_END)  # truncating leaves the position, which the next state would tell
        self._shard: _ShardFile | None = None

    @property
    def full(self) -> bool:
        """Whether there are as many samples as were wanted."""
        return self.options.max_samples is not None and self.samples >= self.options.max_samples

    def add(self, made: _Prepared) -> None:
        """Write one entry of the input; a shard that has its size is finished before."""
        sample = text = b""
        if made.values is not None:
            text = to_json(made.values, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
            if len(text) > MAX_JSON:
                name = next(iter(made.values["images"]), "")
                made = _Prepared([], None, [{"name": name, "code": "too_large", "message": "too many texts"}])
        if made.values is not None:
            sample = tar_sample(f"{self.samples:09d}", made.images, text)
            if self._shard is not None and self._shard.size + len(sample) + len(END) > self.options.shard_size:
                self._close_shard()
        for line in made.bad:
            self._note_bad(line)
        self.entries += 1
        if made.values is None:
            return
        if self._shard is None:
            self._shard = _ShardFile(self.out, len(self.state.shards), self.samples)
        self._shard.add(sample, text)
        self.samples += 1
        self._images += len(made.images)
        self._per_sample = max(self._per_sample, len(made.images))
        for kind in KIND_NAMES:
            if kind in made.values:
                self._kinds.setdefault(kind, _Tally()).add(kind, made.values[kind])

    def judge(self, max_bad: float, slack: int = 0) -> None:
        """DataError where more than the share ``max_bad`` of the entries and ``slack`` are bad."""
        if self.bad > max_bad * self.entries + slack:
            self._log.flush()
            raise DataError(
                f"{self.bad:,} of {self.entries:,} entries are bad, first: {'; '.join(self.first_bad[:3])} "
                f"(all: {self.out / LEFT_OUT})",
                "repair them, or allow more with --max-bad",
            )

    def finish(self) -> PackIndex:
        """Write the last shard and the index; DataError where there is no sample."""
        if self._shard is not None:
            self._close_shard()
        self._log.close()
        if not self.samples:
            raise DataError(f"nothing in {self.options.source} can be packed", "see " + str(self.out / LEFT_OUT))
        index = PackIndex(
            format=FORMAT, version=VERSION, source=readable(Path(self.options.source).name),
            text_only=self._images == 0, samples=self.samples, images=self._images, per_sample=self._per_sample,
            kinds={kind: self._kinds[kind].summary() for kind in KIND_NAMES if kind in self._kinds},
            left_out=dict(sorted(self._left_out.items())),
            shards=[ShardEntry.model_validate(values) for values in self.state.shards],
        )  # fmt: skip
        if not self.bad:
            (self.out / LEFT_OUT).unlink()
        write_atomically(self.out / INDEX, dump_index(index))
        (self.out / PROGRESS).unlink(missing_ok=True)
        return index

    def _note_bad(self, line: dict[str, str]) -> None:
        self.bad += 1
        self._left_out[line["code"]] += 1
        if len(self.first_bad) < 5:
            self.first_bad.append(f"{line['name']}: {line['code']}")
        self._log.write((to_json(line, ensure_ascii=False) + "\n").encode("utf-8", "replace"))

    def _close_shard(self) -> None:
        assert self._shard is not None
        self.state.shards.append(self._shard.finish().model_dump(mode="json"))
        self._shard = None
        self._log.flush()
        state = self.state
        state.consumed, state.samples, state.images = self.entries, self.samples, self._images
        state.per_sample, state.bad, state.left_out = self._per_sample, self.bad, dict(self._left_out)
        state.left_out_bytes, state.first_bad = self._log.tell(), self.first_bad
        state.kinds = {kind: tally.as_json() for kind, tally in self._kinds.items()}
        state.write(self.out)


class _ShardFile:
    """A tar being written beside its place, and what goes beside it."""

    def __init__(self, out: Path, number: int, first: int) -> None:
        self.out, self.first, self.stem = out, first, f"{number:05d}"
        self._part = out / f".{self.stem}.tar.part"
        self._file = open(self._part, "wb")  # noqa: SIM115
        self._digest = hashlib.sha256()
        self._texts = io.BytesIO()
        self._zip = gzip.GzipFile(fileobj=self._texts, mode="wb", mtime=0, filename="")
        self._places, self._checks = [0], []

    @property
    def size(self) -> int:
        return self._places[-1]

    def add(self, sample: bytes, text: bytes) -> None:
        self._file.write(sample)
        self._digest.update(sample)
        self._places.append(self.size + len(sample))
        self._checks.append(zlib.crc32(sample))
        self._zip.write(text + b"\n")

    def finish(self) -> ShardEntry:
        """All three files in their places."""
        self._file.write(END)
        self._digest.update(END)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._zip.close()
        offsets, texts = pack_places(self._places, self._checks), self._texts.getvalue()
        entry = ShardEntry(
            name=f"{self.stem}.tar", first=self.first, samples=len(self._checks), bytes=self.size + len(END),
            sha256=self._digest.hexdigest(), offsets=_entry(offsets), texts=_entry(texts),
        )  # fmt: skip
        write_atomically(self.out / entry.offsets_name, offsets)
        write_atomically(self.out / entry.texts_name, texts)
        os.replace(self._part, self.out / entry.name)
        return entry


def _entry(data: bytes) -> FileEntry:
    return FileEntry(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


class _Tally:
    """Counts over the records of a kind."""

    def __init__(self) -> None:
        self.records = self.images = self.texts = self.words = self.longest = 0
        self.shortest: int | None = None
        self.values: Counter[str] = Counter()

    @classmethod
    def of(cls, values: dict[str, Any]) -> _Tally:
        tally = cls()
        vars(tally).update(values | {"values": Counter(values["values"])})
        return tally

    def as_json(self) -> dict[str, Any]:
        return vars(self) | {"values": dict(self.values)}

    def add(self, kind: str, records: list[dict[str, Any]]) -> None:
        self.records += len(records)
        self.images += len({row for record in records for row in rows_of(record)})
        for record in records:
            for text in texts_of(kind, record):
                words = len(text.split())
                self.texts, self.words, self.longest = self.texts + 1, self.words + words, max(self.longest, words)
                self.shortest = words if self.shortest is None else min(self.shortest, words)
            for value in values_of(kind, record):
                if value in self.values or len(self.values) < _VALUES:
                    self.values[value] += 1

    def summary(self) -> KindSummary:
        words = {
            "shortest": float(self.shortest or 0), "mean": round(self.words / max(self.texts, 1), 1),
            "longest": float(self.longest),
        }  # fmt: skip
        most = sorted(self.values.items(), key=lambda item: (-item[1], item[0]))[:10]
        return KindSummary(
            records=self.records, images=self.images, words=words, values=dict(most), distinct=len(self.values)
        )


def _stamp(source: str) -> str:
    """Names, sizes and times of the files at the top of a source: another source doesn't go on with this pack."""

    def lines() -> Iterator[str]:
        files = sorted(Path(source).iterdir()) if os.path.isdir(source) else [Path(source)]
        for file in files:
            if file.is_file():
                status = file.stat()
                yield f"{file.name} {status.st_size} {status.st_mtime_ns}"

    try:
        return hashlib.sha256("\n".join(lines()).encode("utf-8", "replace")).hexdigest()[:16]
    except OSError:
        return ""
