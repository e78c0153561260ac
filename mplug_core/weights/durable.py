"""Files and folders that outlive a kill or a power cut: on the disk before anything names them, replaced at once."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

EXCHANGE = 2
"""Flag of Linux's ``renameat2``: two names change places, with no moment at which one of them is missing."""
HERE = -100
"""``AT_FDCWD``: paths are as given."""


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


def replace_text(file: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    beside = file.with_name(f".{file.name}.new")
    try:
        beside.write_text(text, encoding="utf-8")
        sync_file(beside)
        os.replace(beside, file)
    finally:
        beside.unlink(missing_ok=True)
    sync_folder(file.parent)


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A new folder to fill, which then is put in the place of ``folder``, or of what that is a link to.

    Where filling it fails, all is as it was before. NotADirectoryError for a file.
    """
    folder = Path(os.path.realpath(folder))
    if folder.is_file():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield beside
        beside.chmod(0o755)
        replace_folder(beside, folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def replace_folder(new: Path, folder: Path) -> None:
    """Put ``new``, whole on the disk, in the place of ``folder``; what was there goes only when the new one stands.

    The two change names in one call where the system can. Elsewhere a kill between two calls leaves both whole, the
    old one under a hidden name.
    """
    for file in new.rglob("*"):
        if file.is_file():
            sync_file(file)
    sync_folder(new)
    old = new.with_name(new.name + ".old")
    if not folder.exists():
        os.rename(new, folder)
    elif exchange(new, folder):
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
    """A copy of a flat folder beside; files that end in ``linked``, which nobody edits, share their place on disk."""
    target.mkdir(parents=True)
    for file in sorted(folder.iterdir()):
        if file.suffix == linked:
            with contextlib.suppress(OSError):  # another file system, or one without links
                os.link(file, target / file.name)
                continue
        shutil.copyfile(file, target / file.name)
