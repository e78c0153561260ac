"""Files and folders that are replaced whole: written beside, on the disk before they are named, renamed at the end.

What is written beside ``NAME`` is called ``.NAME-xxxxxxxx.new``, a name of its own for every writer, and is locked by
the process that writes it. So whoever writes ``NAME`` next can tell what a killed process has left, and removes it. A
folder that several calls fill, one after the other, has one writer at a time (:func:`sole_writer`).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import io
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import BinaryIO, TextIO

from mplug_core.errors import MplugError

EXCHANGE = 2
"""Flag of Linux's ``renameat2``: two names change places, with no moment at which one of them is missing."""
HERE = -100
"""``AT_FDCWD``: paths are as given."""
LOCK = ".lock"
"""The file in a folder that its one writer locks, and removes at the end."""
BUILDING = ".building"
"""A folder inside a folder: what is to take the place of the folder's contents, while it is being made."""
READY, MOVING, REPLACED = ".ready", ".moving", ".replaced"
"""The same when it is whole, when it moves in, and what it has replaced."""
HIDDEN = frozenset({LOCK, BUILDING, READY, MOVING, REPLACED})
"""What a folder that has a sole writer holds of its writing."""
_OLD = ".old"
_ATTEMPTS = 20
"""Temporary names that are tried: another process may have the name, or take the file for one that was left."""
_LONGEST = 200
"""Bytes of a name that its temporary name repeats: a name may have 255."""
_ABANDONED = 24 * 3600.0
"""Seconds after which a file has been left by a dead process, where the file system knows no locks."""
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL, errno.EBADF)


def sync_file(file: Path) -> None:
    """Have the disk hold what was written to a file."""
    with open(file, "rb") as stream:
        os.fsync(stream.fileno())


def sync_folder(folder: Path) -> None:
    """Have the disk hold the names in a folder, where the system can say so."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):  # file systems without such a call
            raise
    finally:
        os.close(handle)


# -- temporary names -------------------------------------------------------------------------------------------------


def _stem(name: str) -> str:
    """As much of a name as a temporary name repeats."""
    while len(os.fsencode(name)) > _LONGEST:
        name = name[:-1]
    return name


@contextlib.contextmanager
def _beside(target: Path, make: Callable[[Path], int]) -> Iterator[tuple[Path, int]]:
    """A new path beside ``target`` and an open handle on it, which ``make`` gives; this process has it locked."""
    for attempt in range(_ATTEMPTS):
        path = target.with_name(f".{_stem(target.name)}-{secrets.token_hex(4)}.new")
        try:
            handle = make(path)
        except (FileExistsError, FileNotFoundError):
            if attempt + 1 == _ATTEMPTS:
                raise
            continue
        try:
            # between the two calls another process may have taken it for one that was left
            if _lock(handle) is not False and os.path.lexists(path):
                yield path, handle
                return
        finally:
            os.close(handle)
    raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN), str(target))


def _new_file(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o666)


def _new_folder(path: Path) -> int:
    path.mkdir()
    return os.open(path, os.O_RDONLY)


def _lock(handle: int) -> bool | None:
    """Whether this process has the lock of an open file or folder now; None where the file system knows no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return None
        return False
    return True


def _is(path: Path, handle: int) -> bool:
    """Whether a path still leads to what a handle is open on."""
    try:
        found, held = os.stat(path), os.fstat(handle)
    except OSError:
        return False
    return (found.st_dev, found.st_ino) == (held.st_dev, held.st_ino)


def _remove(path: Path) -> None:
    """Remove a file or a folder, as far as that goes."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def remove_if_left(path: Path) -> bool:
    """Remove a temporary file or folder unless a living process writes it; whether it has gone."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError:
        return not os.path.lexists(path)
    try:
        locked = _lock(handle)
        if locked is None:
            locked = time.time() - os.fstat(handle).st_mtime > _ABANDONED
        if not locked:
            return False
        _remove(path)
    finally:
        os.close(handle)
    return not os.path.lexists(path)


def sweep(target: Path) -> None:
    """Remove what killed processes have left beside ``target``; a folder that one had put aside gets its name back."""
    ours = re.compile(re.escape(f".{_stem(target.name)}-") + rf"[0-9a-f]{{8}}\.new({re.escape(_OLD)})?")
    with contextlib.suppress(OSError):
        found = sorted(name for name in os.listdir(target.parent) if ours.fullmatch(name))
        for name in [name for name in found if name.endswith(_OLD)]:
            aside = target.with_name(name)
            if _is_written(target.with_name(name.removesuffix(_OLD))):
                continue
            if not os.path.lexists(target):
                os.rename(aside, target)
            else:
                _remove(aside)
        for name in found:
            if not name.endswith(_OLD):  # which have been seen to, and are not locked where a living process has them
                remove_if_left(target.with_name(name))


def _is_written(path: Path) -> bool:
    """Whether a living process has a temporary folder locked."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        return _lock(handle) is False
    finally:
        os.close(handle)


# -- files -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def whole_file(file: str | Path) -> Iterator[TextIO]:
    """A text file (UTF-8) to write, as of :func:`whole_bytes`."""
    with whole_bytes(file) as stream:
        text = io.TextIOWrapper(stream, encoding="utf-8", write_through=True)  # type: ignore[arg-type]
        try:
            yield text
        finally:
            text.detach()


@contextlib.contextmanager
def whole_bytes(file: str | Path) -> Iterator[BinaryIO]:
    """A file to write, which takes the place of ``file``, or of what that is a link to, when the block ends.

    Where the block fails, all is as it was before. What is not a regular file, such as a pipe, is written directly.
    OSError where it can't be written, from the start where that is known then.
    """
    file = Path(file)
    if file.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(file))
    if is_stream(file):
        with open(file, "ab") as stream:
            yield stream
        return
    file = Path(os.path.realpath(file))
    sweep(file)
    beside = None
    try:
        with _beside(file, _new_file) as (beside, handle), open(handle, "wb", closefd=False) as stream:
            yield stream
            stream.flush()
            if file.exists():
                shutil.copymode(file, beside)
            sync_file(beside)
            os.replace(beside, file)
    finally:
        if beside is not None:
            beside.unlink(missing_ok=True)
    sync_folder(file.parent)


def is_stream(file: Path) -> bool:
    """Whether a path is that of a pipe, a terminal, a device, or else of what no file can take the place of."""
    if not os.path.exists(file):
        return False
    return not os.path.isfile(file) or str(file).startswith(("/dev/std", "/dev/fd/", "/proc/"))


def replace_text(file: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with whole_file(file) as stream:
        stream.write(text)


# -- folders ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A new folder to fill, which then is put in the place of ``folder``, or of what that is a link to.

    Where filling it fails, all is as it was before. NotADirectoryError for a file.
    """
    folder = Path(os.path.realpath(folder))
    if folder.is_file():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    folder.parent.mkdir(parents=True, exist_ok=True)
    sweep(folder)
    beside = None
    try:
        with _beside(folder, _new_folder) as (beside, _):
            yield beside
            _sweep_older(folder, {path.name for path in beside.iterdir()})
            replace_folder(beside, folder)
    finally:
        if beside is not None:
            shutil.rmtree(beside, ignore_errors=True)


def _sweep_older(folder: Path, names: Collection[str]) -> None:
    """Remove what kills of earlier versions have left: folders ``.NAME-xxxxxxxx`` of files that are called so."""
    ours = re.compile(re.escape(f".{folder.name}-") + r"[a-z0-9_]{8}")
    for path in [path for path in folder.parent.iterdir() if ours.fullmatch(path.name)]:
        with contextlib.suppress(OSError):
            if path.is_dir() and not path.is_symlink() and {inside.name for inside in path.iterdir()} <= set(names):
                remove_if_left(path)


def replace_folder(new: Path, folder: Path) -> None:
    """Put ``new``, whole on the disk, in the place of ``folder``; what was there goes only when the new one stands.

    The two change names in one call where the system can. Elsewhere a kill between two calls leaves both whole, the
    old one under a hidden name, which the next call gives back.
    """
    for file in new.rglob("*"):
        if file.is_file():
            sync_file(file)
    sync_folder(new)
    old = new.with_name(new.name + _OLD)
    if old.exists():  # of a kill
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.rename(old, folder)
    if not folder.exists():
        os.rename(new, folder)
    else:
        shutil.copymode(folder, new)
        if exchange(new, folder):
            old = new
        else:
            os.rename(folder, old)
            try:
                os.rename(new, folder)
            except OSError:
                os.rename(old, folder)
                raise
    sync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def exchange(one: Path, other: Path) -> bool:
    """Have two folders change names at once; False where the system or the file system can't."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    return rename(HERE, os.fsencode(one), HERE, os.fsencode(other), EXCHANGE) == 0


def copy_folder(folder: Path, target: Path, linked: str = ".safetensors") -> None:
    """A copy of a flat folder in ``target``; files that end in ``linked``, which nobody edits, share their place on
    disk."""
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(folder.iterdir()):
        if file.suffix == linked:
            with contextlib.suppress(OSError):  # another file system, or one without links
                os.link(file, target / file.name)
                continue
        shutil.copyfile(file, target / file.name)


# -- folders with one writer -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, which is made where there is none; a dead process holds none.

    MplugError where another process holds it.
    """
    sweep(Path(os.path.realpath(folder)))
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with _locked(folder):
            yield
    finally:
        if made:
            with contextlib.suppress(OSError):  # what has something in it stays
                folder.rmdir()


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    file = folder / LOCK
    while True:
        handle = os.open(file, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
        try:
            locked = _lock(handle)
            if locked is None:
                locked = _lock_by_name(handle)
            if not locked:
                raise MplugError(f"another process writes {folder}", "wait until it ends, or name another folder")
            if not os.fstat(handle).st_nlink:  # its holder has just removed it
                continue
            try:
                yield
            finally:
                if _is(file, handle):
                    file.unlink(missing_ok=True)
            return
        finally:
            os.close(handle)


def _lock_by_name(handle: int) -> bool:
    """Whether a lock file names no other living process; this one, from now on. Where no file can be locked."""
    words = os.pread(handle, 1000, 0).decode(errors="replace").split()
    host, pid = socket.gethostname(), os.getpid()
    if len(words) == 2 and words[1].isdecimal():
        if words[0] != host:
            return time.time() - os.fstat(handle).st_mtime > _ABANDONED
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(words[1]), 0)
            return False
    os.ftruncate(handle, 0)
    os.pwrite(handle, f"{host} {pid}".encode(), 0)
    return True


def replace_contents(new: Path, folder: Path, ours: Callable[[str], bool], last: str) -> None:
    """Put what is in ``new``, a folder inside ``folder``, in the place of what is in ``folder`` and is ``ours``.

    ``last`` is the file that says that the folder is whole. The folder is replaced at once where it holds nothing else
    and can be renamed. Elsewhere its entries are replaced one by one, ``last`` first taken away and last put there,
    and after a kill :func:`finish_replacing` goes on. Only for the folder's sole writer.
    """
    folder = Path(os.path.realpath(folder))
    for file in new.rglob("*"):
        if file.is_file():
            sync_file(file)
    if all(ours(name) or name in (LOCK, new.name) for name in os.listdir(folder)) and _replaced(new, folder):
        return
    os.rename(new, folder / READY)
    finish_replacing(folder, ours, last)


def _replaced(new: Path, folder: Path) -> bool:
    """Whether a folder inside another could take its place: not that of a mount point, nor of the working folder."""
    here = Path(os.path.realpath(os.getcwd()))
    if folder in (here, *here.parents):
        return False
    beside = folder.with_name(f".{_stem(folder.name)}-{secrets.token_hex(4)}.new")
    handle = os.open(new, os.O_RDONLY)
    try:
        _lock(handle)
        os.rename(new, beside)
        replace_folder(beside, folder)
    except OSError:
        if not _is(folder, handle):
            if beside.exists():
                os.rename(beside, new)
            return False
    finally:
        os.close(handle)
    return True


def is_being_replaced(folder: Path, last: str) -> bool:
    """Whether a kill came amid :func:`replace_contents`."""
    return any((folder / name / last).is_file() for name in (READY, MOVING))


def finish_replacing(folder: Path, ours: Callable[[str], bool], last: str) -> None:
    """Do the rest of :func:`replace_contents` where a kill came amid it. Only for the folder's sole writer."""
    ready, moving, replaced = folder / READY, folder / MOVING, folder / REPLACED
    if (ready / last).is_file():
        replaced.mkdir(exist_ok=True)
        for name in sorted(filter(ours, os.listdir(folder)), key=lambda name: name != last):
            os.rename(folder / name, replaced / name)
        os.rename(ready, moving)
    if (moving / last).is_file():
        for name in sorted(os.listdir(moving), key=lambda name: name == last):
            os.rename(moving / name, folder / name)
        sync_folder(folder)
    shutil.rmtree(moving, ignore_errors=True)
    shutil.rmtree(replaced, ignore_errors=True)
