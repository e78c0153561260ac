"""Models by name: ``hf:org/name``, ``ms:org/name``, ``https://...``, or a short name; each becomes a local path.

:func:`find` takes what is in the cache and downloads what is not; :func:`pull` asks the server for what it has now.
Nothing is downloaded where ``MPLUG_OFFLINE`` or ``HF_HUB_OFFLINE`` is set.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from difflib import get_close_matches
from pathlib import Path, PurePath, PurePosixPath
from typing import Protocol
from urllib.parse import urlsplit

from mplug_core.download import Address, Unavailable, is_address
from mplug_core.errors import CheckpointError, shown_address
from mplug_core.weights.cache import home, is_offline, place_of_url
from mplug_core.weights.download import RemoteFile, Report, fetch_file, is_whole
from mplug_core.weights.registry import RELEASED
from mplug_core.weights.repository import ALONE

SCHEMES = ("hf:", "ms:", "https://", "http://")
_report: ContextVar[Report] = ContextVar("report", default=lambda what, done, total: None)


class Source(Protocol):
    """One place that a model may come from."""

    spec: str

    @property
    def place(self) -> Path:
        """Where it is kept on this machine."""

    @property
    def by_hand(self) -> str:
        """The hint for who can't download it here."""

    def cached(self) -> Path | None:
        """The model on this machine, without asking anybody; None where it isn't whole."""

    def pull(self, report: Report) -> Path:
        """The model as the server has it now; CheckpointError where it can't be had."""


class UrlModel:
    """A file of weights behind ``https://...[#sha256=HEX]``. What was once downloaded is final."""

    def __init__(self, spec: str) -> None:
        self.spec = spec
        try:
            address = Address.parse(spec)
        except Unavailable as error:
            shown = shown_address(spec)
            raise CheckpointError(f"{shown} is no URL: {error}", "https://host/model.pth", "bad_name") from error
        if PurePosixPath(urlsplit(address.url).path).suffix.lower() not in ALONE:
            raise CheckpointError(
                f"{address.shown} leads to no file of weights ({', '.join(ALONE)})",
                "a repository is hf:org/name or ms:org/name; anything else: download it and give --model PATH",
                "bad_name",
            )
        self.place = place_of_url(address.url)
        self.by_hand = f"fetch it by hand as {self.place}"
        self.remote = RemoteFile(spec, self.by_hand, sha256=_sha256_in(address.shown, address.fragment))

    def cached(self) -> Path | None:
        return self.place if is_whole(self.place, self.remote) else None

    def pull(self, report: Report) -> Path:
        fetch_file(self.remote, self.place, report)
        return self.place


def _sha256_in(spec: str, fragment: str) -> str | None:
    if not fragment:
        return None
    match = re.fullmatch(r"sha256=([0-9a-f]{64})", fragment.lower())
    if match is None:
        raise CheckpointError(f"{spec}: expected #sha256= and 64 hexadecimal digits", "or leave it out", "bad_name")
    return match[1]


def is_remote(spec: str) -> bool:
    """Whether ``spec`` names a model somewhere else; a path of that name comes first."""
    return spec in RELEASED or spec.lower().startswith(SCHEMES)


def sources(spec: str) -> list[Source]:
    """The places that ``spec`` may come from, in their order; CheckpointError for what is no name."""
    if spec in RELEASED:
        return [source for inner in RELEASED[spec].sources for source in sources(inner)]
    if is_address(spec):
        return [UrlModel(spec)]
    scheme = spec.split(":", 1)[0].lower()
    if scheme == "hf":
        from mplug_core.weights.huggingface import HuggingFaceModel

        return [HuggingFaceModel("hf:" + spec[3:])]
    if scheme == "ms":
        from mplug_core.weights.modelscope_hub import ModelScopeModel

        return [ModelScopeModel("ms:" + spec[3:])]
    raise CheckpointError(f"{spec} names no model", hint_for(spec), "bad_name")


def hint_for(spec: str) -> str:
    """What to do about a name that is neither a path nor known: of a path, where it ends to be there."""
    if near := get_close_matches(spec, RELEASED, n=1):
        return f"is it {near[0]}? mplug model ls has the names"
    if near_path := _nearest_path(spec):
        return f"is it {near_path}?"
    if _looks_like_path(spec):
        missing = _first_missing(Path(spec))
        here = f"there is no {missing.name} {'here' if str(missing.parent) == '.' else f'in {missing.parent}'}"
        # a name of two parts, of which the first is nowhere, may be one of Hugging Face's
        org = re.fullmatch(r"([\w-][\w.-]*)/[\w-][\w.-]*", spec)
        if org and missing.name == org[1] not in FOLDERS and PurePosixPath(spec).suffix.lower() not in ALONE:
            return f"{here}; if it is a model of Hugging Face: hf:{spec}"
        return f"{here}: a folder with config.json and model.safetensors, a run folder, or a released checkpoint"
    return "a folder with config.json and model.safetensors, a released checkpoint, hf:org/name, or mplug model ls"


FOLDERS = ("runs", "models", "model", "checkpoints", "weights", "data", "output", "out", "tmp", "home")
"""What people call their folders: no organisation on a hub is meant."""


def _looks_like_path(spec: str) -> bool:
    """Whether a name is meant as a path: it has a slash, a suffix of weights, or begins like one."""
    separators = [separator for separator in ("/", os.sep, os.altsep) if separator]
    return spec.startswith(("~", ".")) or any(s in spec for s in separators) or bool(PurePath(spec).suffix)


def _first_missing(path: Path) -> Path:
    """The first part of a path that is not there."""
    for part in (*reversed(path.parents), path):
        if not os.path.lexists(part):
            return part
    return path


def _nearest_path(spec: str) -> str | None:
    """What is there and is spelled nearly as ``spec``, in its first part that is not there; None without such."""
    missing = _first_missing(Path(spec))
    try:
        names = [name for name in os.listdir(missing.parent) if name[0] != "."]
    except OSError:
        return None
    near = get_close_matches(missing.name, names, n=1, cutoff=0.75)
    if not near:
        return None
    rest = Path(spec).relative_to(missing).parts
    found = missing.parent.joinpath(near[0], *rest)
    return str(found) if os.path.exists(found) else str(missing.parent / near[0])


def cached(spec: str) -> Path | None:
    """The model on this machine, without asking anybody; None where it isn't whole."""
    return next((path for source in sources(spec) if (path := source.cached()) is not None), None)


def find(spec: str) -> Path:
    """The folder or file of a model: from the cache, else downloaded. CheckpointError where it can't be had."""
    return cached(spec) or pull(spec)


def pull(spec: str, offline: bool = False) -> Path:
    """The folder or file of a model as its server has it now, or if ``offline`` from the cache."""
    places = sources(spec)
    if offline or is_offline():
        if (path := cached(spec)) is not None:
            return path
        if places[0].place.is_file():
            raise CheckpointError(f"{places[0].place} has another SHA-256 than asked for", "remove it", "checksum")
        hint = f"mplug model pull {spec} where there is a network, or {places[0].by_hand}"
        raise CheckpointError(f"{spec} is not in the cache, and downloads are off", hint, "offline")
    faults: list[CheckpointError] = []
    for source in sorted(places, key=lambda source: source.cached() is None):
        try:
            return source.pull(_report.get())
        except CheckpointError as error:
            if error.code == "disk":
                raise
            faults.append(error)
    if len(faults) == 1:
        raise faults[0]
    raise CheckpointError("; ".join(fault.message for fault in faults), faults[0].hint, faults[0].code)


def name_of(path: Path) -> str:
    """What a model is called: ``org/name`` where its folder is one of a cache, else as its file or folder is."""
    if path.is_file():
        return path.stem
    for parent in path.parents:
        if parent.name.startswith("models--"):
            return parent.name.removeprefix("models--").replace("--", "/", 1)
        if parent == home() / "models" / "ms":
            return "/".join(path.relative_to(parent).parts[:2])
    return path.name


@contextmanager
def reported(report: Report) -> Iterator[None]:
    """Have downloads inside the block tell ``report(what, bytes there, bytes in all or None)``."""
    token = _report.set(report)
    try:
        yield
    finally:
        _report.reset(token)
