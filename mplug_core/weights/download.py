"""One file over HTTP to its place on the disk: there it is complete and verified, or not at all.

What has arrived is kept beside as ``.NAME.part``, and gone on with if the server still has the same file: by its ETag
or date of change, or where the checksum is known. A file that was put to its place by hand is taken as if it had been
downloaded. Proxies are those of the environment.
"""

from __future__ import annotations

import errno
import hashlib
import http.client
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mplug_core.atomic import replace_text, sync_folder
from mplug_core.bounded import Unreadable, parse_json, read_json
from mplug_core.download import AGAIN, Address, Unavailable, open_address, reason_of
from mplug_core.errors import CheckpointError, shown_address
from mplug_core.json_text import to_json

Report = Callable[[str, int, "int | None"], None]
"""Told what is downloaded, how many bytes of it are there, and of how many (None: unknown)."""

CONNECT_TIMEOUT = 5.0
"""Seconds after which a server that can't be reached is given up: where there is no network nobody should wait."""
TIMEOUT = 20.0
"""Seconds without an answer, or without a byte, after which a connection is given up."""
ATTEMPTS = 5
"""Attempts in a row that bring nothing; a server that was never reached gets one."""
PAUSE = 0.5
"""Seconds before the second attempt; each further one waits twice as long, at most 8 s."""
MAX_LISTING = 1 << 24
_CHUNK = 1 << 20
_NO_PLACE = (
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG,
)  # fmt: skip


@dataclass(frozen=True)
class RemoteFile:
    """A file behind a URL. ``sha256`` in hexadecimal and ``size`` in bytes where they are known beforehand.

    ``by_hand`` is the hint for who can't download it here.
    """

    url: str = field(repr=False)
    by_hand: str
    size: int | None = None
    sha256: str | None = None

    @property
    def shown(self) -> str:
        """The URL as messages and notes have it."""
        return shown_address(self.url)


class _Broken(Exception):
    """A connection that failed; ``again``: it may be better the next time."""

    def __init__(self, reason: str, again: bool = True) -> None:
        super().__init__(reason)
        self.again = again


class _OtherFile(Exception):
    """What arrived before is of another file than what the server has now."""


def hidden(path: Path, suffix: str) -> Path:
    """A name beside ``path`` that nobody takes for a model."""
    return path.with_name(f".{path.name}{suffix}")


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def is_whole(path: Path, remote: RemoteFile) -> bool:
    """Whether a file is there and is ``remote``, as far as that is known. A checksum is computed once and noted."""
    try:
        status = path.stat()
    except OSError:
        return False
    if remote.size is not None and status.st_size != remote.size:
        return False
    if remote.sha256 is None:
        return True
    note = _read_note(hidden(path, ".json"))
    if [note.get("size"), note.get("changed")] != [status.st_size, status.st_mtime_ns]:
        note = {"url": remote.shown, "sha256": sha256_of(path), "size": status.st_size, "changed": status.st_mtime_ns}
        with suppress(OSError):  # a cache that can only be read is as good
            replace_text(hidden(path, ".json"), to_json(note) + "\n")
    return note.get("sha256") == remote.sha256


def fetch_file(remote: RemoteFile, path: Path, report: Report) -> None:
    """Have ``remote`` at ``path``, downloaded unless it is there; of several processes one does it.

    CheckpointError where it can't be had (code ``unreachable``, ``not_found``, ``denied``, ``no_file``), is another
    file (``checksum``), or has no place (``disk``).
    """
    if is_whole(path, remote):
        return
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path, report):
            if not is_whole(path, remote):
                transfer(remote, path, report)


def transfer(remote: RemoteFile, path: Path, report: Report) -> None:
    """:func:`fetch_file` for who holds the lock, whatever is at ``path``. OSError where the disk fails."""
    part = _Part(remote, path)
    failures = 0
    while True:
        before = part.arrived
        try:
            resumed = part.go_on(report)
            break
        except _OtherFile:
            part.discard()
        except _Broken as error:
            failures = 1 if part.arrived > before else failures + 1
            if not error.again or failures >= ATTEMPTS:
                raise unreachable(remote.shown, error, remote.by_hand) from error
            time.sleep(min(PAUSE * 2 ** (failures - 1), 8.0))
    if remote.sha256 is not None and (found := sha256_of(part.path)) != remote.sha256:
        part.discard()
        if resumed:  # parts of two files, perhaps: a server without ETags doesn't tell
            transfer(remote, path, report)
            return
        raise CheckpointError(
            f"{remote.shown} has another SHA-256 than it should: {found[:16]}..., not {remote.sha256[:16]}...",
            "the file has changed or was damaged on its way: it is not kept",
            "checksum",
        )
    part.keep()


def unreachable(what: str, reason: object, by_hand: str) -> CheckpointError:
    """The error for what no server gives us."""
    return CheckpointError(f"{what} can't be downloaded: {reason}", by_hand, "unreachable")


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Errors of the disk inside the block become CheckpointError with code ``disk``."""
    try:
        yield
    except OSError as error:
        raise no_place(path, error) from error


def no_place(path: Path, error: OSError, variable: str = "MPLUG_HOME") -> CheckpointError:
    """The error for a file that could not be written; ``variable`` is what puts the cache elsewhere."""
    reason = error.strerror or str(error)
    return CheckpointError(f"cannot write {path}: {reason}", f"{variable}=FOLDER keeps models elsewhere", "disk")


def is_disk_error(error: BaseException) -> bool:
    """Whether an error says that a disk is full or may not be written."""
    return isinstance(error, OSError) and error.errno in _NO_PLACE


@contextmanager
def locked(path: Path, report: Report) -> Iterator[None]:
    """Be the only process that downloads to ``path``."""
    from filelock import FileLock, Timeout

    lock = FileLock(str(hidden(path, ".lock")))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        report(f"{path.name} (another process downloads it)", 0, None)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def read_listing(url: str, by_hand: str) -> Any:
    """The JSON behind a URL; CheckpointError as for :func:`fetch_file`."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            with _open(RemoteFile(url, by_hand), {"Accept": "application/json"}) as answer:
                data = answer.read(MAX_LISTING + 1)
            break
        except (OSError, http.client.HTTPException) as error:
            fault = _Broken(reason_of(error))
        except _Broken as error:
            fault = error
        if not fault.again or attempt == ATTEMPTS:
            raise unreachable(url, fault, by_hand) from fault
        time.sleep(min(PAUSE * 2 ** (attempt - 1), 8.0))
    try:
        return parse_json(data)
    except Unreadable as error:
        raise CheckpointError(f"{url} answers with no list of files", by_hand, "no_file") from error


class _Part:
    """What has arrived of a file, and a note about which file that is."""

    def __init__(self, remote: RemoteFile, target: Path) -> None:
        self.remote, self.target = remote, target
        self.path, self.note = hidden(target, ".part"), hidden(target, ".part.json")
        self.reached = False

    @property
    def arrived(self) -> int:
        try:
            return self.path.stat().st_size
        except OSError:
            return 0

    def go_on(self, report: Report) -> bool:
        """Receive what is missing; returns whether there was something before.

        _Broken where the connection fails, _OtherFile where the server's file is another one now.
        """
        known = _read_note(self.note)
        start = self.arrived if self._is_resumable(known) else 0
        if start and start == known.get("total"):
            return True
        headers = {"Range": f"bytes={start}-"} if start else {}
        if start and known["validator"]:
            headers["If-Range"] = known["validator"]
        with _open(self.remote, headers, again=self.reached) as answer:
            self.reached = True
            start, total = self._agreed(answer, start, known)
            self._check(answer, start, total)
            if not start:
                self.path.unlink(missing_ok=True)
                about = {"url": self.remote.shown, "sha256": self.remote.sha256, "total": total}
                replace_text(self.note, to_json(about | {"validator": _validator(answer)}) + "\n")
            self._receive(answer, start, total, report)
        return start > 0

    def _is_resumable(self, known: dict[str, Any]) -> bool:
        same = known.get("url") == self.remote.shown and known.get("sha256") == self.remote.sha256
        return same and bool(known.get("validator") or self.remote.sha256)

    def _agreed(self, answer: Any, start: int, known: dict[str, Any]) -> tuple[int, int | None]:
        """Where the answer begins in the file, and how long the file is."""
        length = answer.headers.get("Content-Length", "")
        if not start and answer.status == 206:
            raise _Broken("the server sends a part that nobody asked for", again=False)
        if answer.status != 206:  # all of it: the file is another one now, or the server knows no parts
            return 0, int(length) if length.isdecimal() else self.remote.size
        match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", answer.headers.get("Content-Range", "").strip())
        total = known.get("total") if match is None or match[2] == "*" else int(match[2])
        validator = _validator(answer)
        if (
            match is None
            or int(match[1]) != start
            or total != known.get("total")
            or (validator and known["validator"] and validator != known["validator"])
        ):
            raise _OtherFile
        return start, total

    def _check(self, answer: Any, start: int, total: int | None) -> None:
        """CheckpointError for an answer that can't be the file; OSError where the disk has no room for it."""
        url, by_hand = self.remote.shown, self.remote.by_hand
        kind = answer.headers.get_content_type()
        if kind in ("text/html", "application/xhtml+xml"):
            raise CheckpointError(
                f"{url} answers with a web page, not with a file", f"is there a login or a proxy? {by_hand}", "no_file"
            )
        if answer.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise CheckpointError(f"{url} is only sent compressed", by_hand, "no_file")
        if self.remote.size is not None and total is not None and total != self.remote.size:
            raise CheckpointError(
                f"{url} has {total:,} bytes, {self.remote.size:,} were announced", "try again later", "checksum"
            )
        chunked = "chunked" in answer.headers.get("Transfer-Encoding", "").lower()
        if total is None and not chunked and self.remote.sha256 is None:
            raise CheckpointError(
                f"{url}: the server doesn't say where the file ends",
                f"add #sha256=HEX to the URL, or {by_hand}",
                "no_file",
            )
        free = shutil.disk_usage(self.path.parent).free + (0 if start else self.arrived)
        if total is not None and total - start > free:
            raise OSError(errno.ENOSPC, f"{(total - start) / 1e9:.1f} GB are to come, {free / 1e9:.1f} GB are free")

    def _receive(self, answer: Any, start: int, total: int | None, report: Report) -> None:
        arrived = start
        with open(self.path, "r+b" if start else "wb") as stream:
            stream.seek(start)
            stream.truncate()
            try:
                while chunk := _read(answer):
                    if not arrived:
                        self._look_at(chunk)
                    stream.write(chunk)
                    arrived += len(chunk)
                    report(self.target.name, arrived, total)
            finally:
                stream.flush()
                os.fsync(stream.fileno())
        if total is not None and arrived != total:
            raise _Broken(f"the connection broke after {arrived:,} of {total:,} bytes")

    def _look_at(self, beginning: bytes) -> None:
        """CheckpointError where the first bytes are those of something that stands for a file."""
        if re.match(rb"\s*<(!doctype html|html)", beginning[:512], re.IGNORECASE):
            raise CheckpointError(
                f"{self.remote.shown} answers with a web page, not with a file",
                f"is there a login or a proxy? {self.remote.by_hand}",
                "no_file",
            )
        if beginning.startswith(b"version https://git-lfs"):
            raise CheckpointError(
                f"{self.remote.shown} is a git-lfs pointer, not the file",
                "give the address of the file itself",
                "no_file",
            )

    def discard(self) -> None:
        self.path.unlink(missing_ok=True)
        self.note.unlink(missing_ok=True)

    def keep(self) -> None:
        """Put the whole file to its place, with a note of what it is."""
        status = self.path.stat()
        about = {"url": self.remote.shown, "sha256": self.remote.sha256}
        about |= {"size": status.st_size, "changed": status.st_mtime_ns}
        os.replace(self.path, self.target)
        self.note.unlink(missing_ok=True)
        if self.remote.sha256 is None:
            hidden(self.target, ".json").unlink(missing_ok=True)
            sync_folder(self.target.parent)
        else:
            replace_text(hidden(self.target, ".json"), to_json(about) + "\n")


@contextmanager
def _open(remote: RemoteFile, headers: dict[str, str], again: bool = False) -> Iterator[Any]:
    """The answer to a GET. CheckpointError for one that says no, _Broken where there is none.

    ``again``: the server answered before, so that a failure to connect may pass.
    """
    headers = {"Accept-Encoding": "identity", **headers}
    try:
        with open_address(Address.parse(remote.url), headers, TIMEOUT, CONNECT_TIMEOUT) as answer:
            yield answer
    except Unavailable as error:
        if error.status == 416 and "Range" in headers:
            raise _OtherFile from error
        if error.status in AGAIN:
            raise _Broken(f"status {error.status}") from error
        if error.code == "status" and not 300 <= error.status < 400:
            raise _refused(remote, error.status) from error
        cut = isinstance(getattr(error.__cause__, "reason", error.__cause__), ConnectionResetError)
        raise _Broken(str(error), again=error.again and (again or cut)) from error


def _refused(remote: RemoteFile, status: int) -> CheckpointError:
    if status in (404, 410):
        return CheckpointError(f"there is no {remote.shown} (status {status})", "check the name", "not_found")
    if status in (401, 403):
        return CheckpointError(f"{remote.shown} may not be read (status {status})", remote.by_hand, "denied")
    return CheckpointError(f"{remote.shown} can't be had: status {status}", remote.by_hand, "unreachable")


def _read(answer: Any) -> bytes:
    try:
        return answer.read1(_CHUNK)
    except (OSError, http.client.HTTPException) as error:
        raise _Broken(reason_of(error)) from error


def _validator(answer: Any) -> str | None:
    """What tells whether the file is still the same: a strong ETag, else its date of change."""
    etag = answer.headers.get("ETag", "")
    return etag if etag and not etag.startswith("W/") else answer.headers.get("Last-Modified")


def _read_note(path: Path) -> dict[str, Any]:
    try:
        note = read_json(path)
    except Unreadable:
        return {}
    return note if isinstance(note, dict) else {}
