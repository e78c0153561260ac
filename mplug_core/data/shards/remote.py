"""Where the files of a pack are: a local folder, read in place, or a URL, whose files are fetched whole into a cache.

The cache is a folder of files named by their SHA-256, shared by all processes of a machine and all runs, and kept
below a size: what was used longest ago goes first. A file is in it complete and verified or not at all.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mplug_core.data.shards.index import FORMAT, INDEX, FileEntry, PackIndex, is_pack_folder, parse_index
from mplug_core.download import Address, Unavailable, fetch_bytes, fetch_to, is_address
from mplug_core.errors import DataError, UsageError, shown_address
from mplug_core.home import cache_home

SCHEMES = ("http", "https", "s3")
MAX_INDEX = 1 << 28
ATTEMPTS = 3
TIMEOUT = 60
"""Seconds without a byte after which a connection is given up."""
PAUSE = 1.0
"""Seconds before the second attempt; each further one waits twice as long, at most 8 s."""
_CHUNK = 1 << 20
_STALE = 3600  # seconds since the last byte of a file whose process must be gone


def is_url(path: str | Path) -> bool:
    """Whether a path is meant as a URL, also one that is refused (``pipe:``)."""
    text = str(path)
    return "://" in text or "::" in text.split("/", 1)[0] or text.lower().startswith(("pipe:", "file:"))


def checked_url(url: str) -> str:
    """``url`` without a slash at the end; DataError for every scheme but http, https and s3, UsageError for an http
    address that is none."""
    hint = f"give a local path, or {', '.join(SCHEMES)}"
    url = url.strip()
    scheme, _, rest = url.partition("://")
    if "::" in url.split("/", 1)[0] or scheme.lower() not in SCHEMES or not rest.strip("/"):
        raise DataError(f"{shown_address(url)} is no URL that is opened here", hint)
    if is_address(url):
        try:
            Address.parse(url)
        except Unavailable as error:
            raise UsageError(f"{shown_address(url)} is no address: {error}", hint) from error
    return url.rstrip("/")


class Unreachable(DataError):
    """A file of a pack can't be had as the index describes it."""

    default_code = "unreachable"


class LocalFolder:
    """A pack on this machine; its files are read where they are."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.name = folder, str(folder)

    def index(self) -> PackIndex:
        try:
            data = (self.folder / INDEX).read_bytes()
        except OSError as error:
            raise DataError(f"{self.folder / INDEX} can't be read: {error.strerror}", "check the path") from error
        return parse_index(data, str(self.folder / INDEX))

    def file(self, name: str, entry: FileEntry, verify: bool = False) -> Path:
        """The file; Unreachable where it is missing, has another size or, if ``verify``, another checksum."""
        path = self.folder / name
        try:
            size = os.stat(path).st_size
            if size != entry.bytes:
                raise Unreachable(f"{path} has {size:,} bytes, its index says {entry.bytes:,}", "copy it again")
            if verify and sha256_of(path) != entry.sha256:
                raise Unreachable(f"{path} has another checksum than its index says", "copy it again")
        except OSError as error:
            raise Unreachable(f"{path} can't be read: {error.strerror}", "copy it again") from error
        return path

    def ahead(self, files: list[tuple[str, FileEntry]]) -> None:
        """Nothing to fetch."""


class RemoteFolder:
    """A pack behind a URL."""

    def __init__(self, url: str, cache: Path, limit: int, attempts: int = ATTEMPTS) -> None:
        """``limit``: bytes that the cache may hold."""
        self.url = checked_url(url)
        self.name = shown_address(self.url)
        self._address = Address.parse(self.url) if is_address(self.url) else None
        self.cache, self.limit, self.attempts = cache, limit, attempts
        self._system: tuple[int, Any] | None = None
        self._ahead: tuple[int, threading.Thread] | None = None

    def index(self) -> PackIndex:
        data = self._tried(INDEX, self._read_index)
        return parse_index(data, self._shown(INDEX))

    def file(self, name: str, entry: FileEntry, verify: bool = False) -> Path:
        """The file in the cache, fetched if it isn't there; Unreachable where it can't be had or is another one."""
        path = self.cache / f"{entry.sha256}{os.path.splitext(name)[1]}"
        if not self._there(path, entry):
            self.cache.mkdir(parents=True, exist_ok=True)
            with self._locked(f"{entry.sha256}.lock"):  # one process fetches, the others find it
                if not self._there(path, entry):
                    self._tried(name, lambda: self._fetch(name, entry, path))
        return path

    def ahead(self, files: list[tuple[str, FileEntry]]) -> None:
        """Fetch these in the background, one such thread a process; failures show when the file is asked for.

        At most a quarter of the cache, so that what is in use stays.
        """
        if self._ahead and self._ahead[0] == os.getpid() and self._ahead[1].is_alive():
            return
        missing, room = [], self.limit // 4
        for name, entry in files:
            if (room := room - entry.bytes) < 0:
                break
            if not (self.cache / f"{entry.sha256}{os.path.splitext(name)[1]}").is_file():
                missing.append((name, entry))
        if not missing:
            return

        def fetch() -> None:
            for name, entry in missing:
                with suppress(DataError, OSError):
                    self.file(name, entry)

        thread = threading.Thread(target=fetch, daemon=True)
        self._ahead = (os.getpid(), thread)
        thread.start()

    def _there(self, path: Path, entry: FileEntry) -> bool:
        """Whether the cache has the file; notes that it was used."""
        try:
            if os.stat(path).st_size != entry.bytes:
                return False
            os.utime(path)
        except OSError:
            return False
        return True

    @property
    def _s3(self) -> Any:
        """fsspec's file system, made anew in each process: its threads don't survive a fork."""
        if self._system is None or self._system[0] != os.getpid():
            import fsspec

            try:
                self._system = (os.getpid(), fsspec.filesystem("s3", skip_instance_cache=True))
            except ImportError as error:
                raise DataError("s3:// needs a package that isn't here", "pip install 'mplug[s3]'") from error
        return self._system[1]

    def _shown(self, name: str) -> str:
        """A file of the pack as messages call it."""
        return self._address.inside(name).shown if self._address else f"{self.name}/{name}"

    def _read_index(self) -> bytes:
        if self._address:
            data = fetch_bytes(self._address.inside(INDEX), MAX_INDEX, TIMEOUT, 10 * TIMEOUT)
        else:
            data = self._s3.cat_file(f"{self.url}/{INDEX}")
        if len(data) > MAX_INDEX:
            raise DataError(f"{self._shown(INDEX)} is larger than {MAX_INDEX >> 20} MB", "is it the index of a pack?")
        return data

    def _fetch(self, name: str, entry: FileEntry, path: Path) -> None:
        part, shown = self._make_room(entry.bytes, path), self._shown(name)
        try:
            if self._address:
                fetch_to(self._address.inside(name), part, entry.bytes, TIMEOUT)
            else:
                self._s3.get_file(f"{self.url}/{name}", str(part), callback=_bounded(shown, entry.bytes))
            size = part.stat().st_size
            if size != entry.bytes:
                raise _Different(f"{shown} has {size:,} bytes, its index says {entry.bytes:,}")
            if sha256_of(part) != entry.sha256:
                raise _Different(f"{shown} has another checksum than its index says")
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)

    def _tried(self, name: str, work: Any) -> Any:
        """``work()`` on a file, again after a pause where the connection fails; Unreachable in the end."""
        what = self._shown(name)
        for attempt in range(self.attempts):
            if attempt:
                time.sleep(min(PAUSE * 2 ** (attempt - 1), 8.0))
            try:
                return work()
            except DataError:
                raise
            except Exception as error:  # each protocol has errors of its own
                if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
                    raise DataError(f"{self.cache} can't take {what}: {error.strerror}", "set data.cache") from error
                last = error
                if isinstance(error, FileNotFoundError | PermissionError):
                    break
                if isinstance(error, Unavailable) and not error.again:
                    break
        reason = str(last) or type(last).__name__
        if isinstance(last, FileNotFoundError) or (isinstance(last, Unavailable) and last.is_gone):
            reason = "there is no such file"
        shown = reason if isinstance(last, _Different) else f"{what} can't be fetched: {reason}"
        raise Unreachable(shown, "check the URL and the server") from last

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        with open(self.cache / f".{name}", "a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.flock(file, fcntl.LOCK_UN)

    def _make_room(self, needed: int, path: Path) -> Path:
        """Remove what was used longest ago until ``needed`` bytes fit; the file to fetch them into.

        Its name says how much it will be, so that those who fetch at the same time know. Readers that have a removed
        file open keep it.
        """
        if needed > self.limit:
            raise DataError(f"a file of {needed:,} bytes, the cache may hold {self.limit:,}", "raise data.cache_gb")
        part = path.with_name(f".{path.name}.{needed}.{os.getpid()}.part")
        with self._locked("room.lock"):
            part.touch()
            total, found = 0, []
            for file in self.cache.iterdir():
                with suppress(OSError, ValueError, IndexError):
                    status = file.stat()
                    if not file.name.startswith("."):
                        total += status.st_size
                        found.append((status.st_mtime, status.st_size, file))
                    elif file.suffix == ".part" and time.time() - status.st_mtime > _STALE:
                        file.unlink()
                    elif file.suffix == ".part":
                        total += int(file.name.split(".")[-3])
            for _, size, file in sorted(found, key=lambda item: item[0]):
                if total <= self.limit:
                    break
                with suppress(OSError):
                    file.unlink()
                    total -= size
        return part


class _Different(Exception):
    """What came isn't what the index describes; tried again like a broken connection."""


def _bounded(url: str, most: int) -> Any:
    """A callback of fsspec that ends a transfer of more than was announced."""
    import fsspec

    class Bounded(fsspec.callbacks.Callback):
        def relative_update(self, inc: int = 1) -> None:
            super().relative_update(inc)
            if self.value > most:
                raise _Different(f"{url} has more than {most:,} bytes")

    return Bounded()


Folder = LocalFolder | RemoteFolder


def default_cache() -> Path:
    """``$MPLUG_CACHE/shards`` or ``~/.cache/mplug/shards``."""
    root = os.environ.get("MPLUG_CACHE")
    return (Path(os.path.expanduser(root)) if root else cache_home() / "mplug") / "shards"


def locate(
    path: str, split: str | None = None, format: str | None = None, cache: str | None = None, cache_gb: float = 50.0
) -> Folder | None:
    """The pack at a path or URL, or in its folder ``split``; None where a local path is no pack.

    DataError for a URL of another scheme, for ``format: shards`` where there is no pack, and for another format on one.
    """
    if is_url(path):
        if format not in (None, "shards"):
            raise DataError(f"{path} can't be read as {format}", "only packs are read from URLs: mplug data pack")
        url = _in_split(checked_url(path), split)
        return RemoteFolder(url, Path(os.path.expanduser(cache)) if cache else default_cache(), int(cache_gb * 1e9))
    for folder in (Path(path) / split, Path(path)) if split else (Path(path),):
        if is_pack_folder(folder):
            if split and folder == Path(path):
                raise DataError(f"{path} is one pack: it has no split {split}", "leave the split out")
            if format not in (None, "shards"):
                raise DataError(f"{folder} is a pack, not {format}", "leave the format out")
            return LocalFolder(folder)
    if format == "shards":
        raise DataError(f"{path} has no {INDEX} with format {FORMAT}", "mplug data pack makes one")
    return None


def _in_split(url: str, split: str | None) -> str:
    """The URL of a split's folder; a query stays behind it."""
    if not split:
        return url
    before, asked, query = url.partition("?")
    return f"{before.rstrip('/')}/{split}{asked}{query}"


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
