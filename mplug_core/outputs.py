"""What a command writes, checked before it works: none of its inputs, and in a place that can be written.

A file is whole or not there, also on a full disk (:mod:`mplug_core.atomic`).
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from mplug_core.atomic import is_stream, whole_bytes
from mplug_core.errors import MplugError, UsageError, shortened

PROBE = ".mplug-probe-"
"""How a folder is called that is made for a moment, to see whether one can be made."""
Inputs = Mapping[str, "str | Path | None"]
"""Paths that a command reads, by what they are called in messages; what is no path on this machine is passed over."""


class Output:
    """A file that is being written; texts go there as UTF-8. MplugError where the disk doesn't take them."""

    def __init__(self, file: Path, stream: BinaryIO) -> None:
        self.file, self.stream = file, stream

    def write(self, content: str | bytes) -> int:
        """Returns the length of ``content``."""
        data = content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content
        self._try(self.stream.write, data)
        return len(content)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        self._try(self.stream.flush)

    def _try(self, call: Callable[..., object], *arguments: object) -> None:
        try:
            call(*arguments)
        except BrokenPipeError:  # whoever read it has gone
            raise
        except OSError as error:
            raise unwritable(self.file, error) from error


@contextlib.contextmanager
def output_file(
    file: Path | None, option: str, inputs: Inputs, replaces: Callable[[Path], bool] = lambda file: True
) -> Iterator[Output | None]:
    """The file that ``option`` names, which takes its place when the block ends well; None for None.

    Files in the folders among ``inputs`` are inputs, too, unless ``replaces`` says that they are of the kind that is
    written. UsageError for an input, MplugError where the file can't be written: before the block, as far as that is
    known then.
    """
    if file is None:
        yield None
        return
    refuse_input(file, option, inputs, replaces)
    whole = whole_bytes(file)
    try:
        stream = whole.__enter__()
    except (OSError, ValueError) as error:
        raise unwritable(file, error, f"{option} names a file in a folder that can be written") from error
    try:
        yield Output(file, stream)
    except BaseException as error:
        with contextlib.suppress(OSError):  # of a stream that takes no more
            whole.__exit__(type(error), error, error.__traceback__)
        raise
    try:
        whole.__exit__(None, None, None)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise unwritable(file, error) from error


def unwritable(file: Path, error: Exception, hint: str = "make room there, or name another file") -> MplugError:
    """The error for a file or folder that can't be written."""
    reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
    return MplugError(f"{path_shown(file)} can't be written: {reason}", hint)


def path_shown(path: str | Path) -> str:
    """A path as messages have it: of a long one its beginning and its end."""
    return shortened(str(path), 120)


def refuse_input(file: Path, option: str, inputs: Inputs, replaces: Callable[[Path], bool] = lambda file: True) -> None:
    """UsageError where ``file`` is one of ``inputs``, whatever it is called, or lies in one of them (see
    :func:`output_file`)."""
    for name, path in inputs.items():
        if path is None:
            continue
        if is_same(file, path) and not is_stream(file):
            raise UsageError(f"{option} would write over {path_shown(path)}, which is {name}", "name another file")
        if os.path.isdir(path) and _is_inside(file, path) and not replaces(file):
            raise UsageError(f"{option} would write over {path_shown(file)}, a file of {name}", "name another file")


def is_same(one: str | Path, other: str | Path) -> bool:
    """Whether two paths lead to the same file or folder: by links, hard links, or another spelling."""
    with contextlib.suppress(OSError, ValueError):  # what isn't there
        return os.path.samefile(one, other)
    with contextlib.suppress(OSError, ValueError):
        return os.path.realpath(one) == os.path.realpath(other)
    return False


def is_within(path: str | Path, folder: str | Path) -> bool:
    """Whether a path that is there is a folder or lies in it."""
    return os.path.exists(path) and Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def _is_inside(file: Path, folder: str | Path) -> bool:
    """Whether there is such a file, and it lies in a folder, or is another name of a file that does."""
    with contextlib.suppress(OSError, ValueError):
        status = os.stat(file)
        if not stat.S_ISREG(status.st_mode) or not status.st_size:
            return False
        if Path(os.path.realpath(file)).is_relative_to(os.path.realpath(folder)):
            return True
        if status.st_nlink > 1:
            return any(
                entry.inode() == status.st_ino and os.path.samefile(entry.path, file)
                for place, _, _ in os.walk(folder)
                for entry in os.scandir(place)
            )
    return False


def require_writable(path: str | Path, hint: str) -> None:
    """MplugError unless a folder can be made at a path, whose parents need not be there, or in it where it is there."""
    try:
        place = Path(os.path.realpath(path))
        with contextlib.suppress(FileNotFoundError):
            os.lstat(place)  # tells of names that are too long
        while not os.path.lexists(place):
            place = place.parent
        if not place.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{path_shown(place)} is a file")
        os.rmdir(tempfile.mkdtemp(prefix=PROBE, dir=place))
    except (OSError, ValueError) as error:
        raise unwritable(Path(path), error, hint) from error
