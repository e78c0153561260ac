"""Streams: what the command line names as images, and JSON Lines out.

Inputs are files, folders, glob patterns that the shell left alone, http(s) addresses, ``-`` for image bytes on
standard input, or paths on standard input. Standard input is read from its file descriptor: a thread that waits in
Python's buffered reader would hold a lock that the end of the process needs.
"""

from __future__ import annotations

import errno
import glob
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

from mplug_cli import show
from mplug_core.bounded import Unreadable, as_text, size_shown
from mplug_core.data.embedded import is_data_url, shown_name
from mplug_core.data.folders import Listing, images_in, matching, read_file
from mplug_core.download import is_address
from mplug_core.errors import DataError, ImageError, MplugError, UsageError, shortened
from mplug_core.json_text import to_json

if TYPE_CHECKING:
    from PIL import Image

MAX_STREAM_BYTES = 256 << 20
MAX_PATH_BYTES = 1 << 16
"""Of a line that names an image: no system has longer paths."""
MAX_LINE_BYTES = 64 << 20
"""Of a line of JSON, in which an image may be a data: URL."""
MAX_TEXT_BYTES = 256 << 20
"""Of a file of texts, one a line."""
MAX_BLANK_BYTES = 64 << 20
"""Blanks at the beginning of standard input after which nothing more is expected."""

_CHUNK = 1 << 16
_STDIN = "-"
_BOM = b"\xef\xbb\xbf"
_BLANKS = b" \t\r\n\v\f"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
# How image files begin; a path never does.
_IMAGE_BYTES = (b"\xff\xd8\xff", b"\x89PNG", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*")


def _is_image(start: bytes) -> bool:
    """Whether a file that begins so is an image; ``BM`` and ``RIFF`` begin paths, too."""
    bitmap = start.startswith(b"BM") and start[6:10] == bytes(4)
    return start.startswith(_IMAGE_BYTES) or bitmap or (start.startswith(b"RIFF") and start[8:12] == b"WEBP")


@dataclass(frozen=True)
class Input:
    """One image to answer for: its name in the results, and what is already known to be wrong with it."""

    name: str
    fault: MplugError | None = None
    on_stdin: bool = False

    @property
    def shown(self) -> str:
        """The name as results have it: of an address without what is secret, of a data: URL its beginning."""
        return shown_name(self.name)


@dataclass(frozen=True)
class Inputs:
    """All images of a call. ``plain`` says that the user named exactly one; ``total`` is None while unknown."""

    items: Iterable[Input]
    plain: bool
    total: int | None


def read_inputs(arguments: list[str], null_separated: bool = False, quiet: bool = False) -> Inputs:
    """The images that ``arguments`` name, or without any the paths on standard input.

    How many files of folders are no images is said on stderr, once and unless ``quiet``. UsageError where nothing is
    named, or standard input is not what it should be.
    """
    if not arguments:
        return Inputs(_paths_on_stdin(null_separated, quiet), plain=False, total=None)
    if null_separated:
        raise UsageError("--null is for paths on standard input, and images are named", "leave one of them out")
    if arguments.count(_STDIN) > 1:
        raise UsageError("'-' is given twice, and standard input holds one image", "name it once")
    if _STDIN in arguments and sys.stdin is not None and sys.stdin.isatty():
        raise UsageError(
            "'-' reads an image from standard input, which is a terminal", "for example: mplug caption - < photo.jpg"
        )
    passed = _PassedOver()
    items = [item for argument in arguments for item in _named(argument, passed)]
    passed.tell(quiet)
    # a folder or pattern of one image gives what one of many gives, so that scripts can rely on it
    plain = len(arguments) == 1 and [item.name for item in items] == arguments
    return Inputs(items, plain, len(items))


class _PassedOver:
    """Counts the files of folders that are no images by their names."""

    def __init__(self) -> None:
        self.count = 0

    def tell(self, quiet: bool) -> None:
        if self.count:
            files = "1 file that is not an image" if self.count == 1 else f"{self.count:,} files that are not images"
            show.note(f"passed over {files}", quiet)


def _named(argument: str, passed: _PassedOver) -> list[Input]:
    return [Input(_STDIN, on_stdin=True)] if argument == _STDIN else _expand(argument, passed)


def _expand(name: str, passed: _PassedOver) -> list[Input]:
    """A path, pattern or address as images; what can't be is one input with a fault."""
    if is_address(name) or is_data_url(name):
        return [Input(name)]
    if os.path.isdir(name):
        return _folder(name, passed)
    if "\0" not in name and glob.has_magic(name) and not os.path.lexists(name):
        listing = matching(name)
        passed.count += listing.passed_over
        fault = ImageError(f"no image matches {name}", "check the pattern", "missing")
        return _inputs(listing) or [Input(name, fault)]
    return [Input(name)]


def _folder(folder: str, passed: _PassedOver) -> list[Input]:
    """The image files of a folder; one input with a fault where there are none."""
    listing = images_in(folder)
    passed.count += listing.passed_over
    if listing.images or listing.unreadable:
        return _inputs(listing)
    hint = f"sub-folders are not searched; '{os.path.join(folder, '**', '*.jpg')}' in quotes does"
    return [Input(folder, ImageError(f"folder {folder} has no images", hint, "missing"))]


def _inputs(listing: Listing) -> list[Input]:
    faults = [
        Input(folder, ImageError(f"folder {folder} can't be read: {error.strerror}", "check its mode", "unreadable"))
        for folder, error in listing.unreadable
    ]
    return [Input(path) for path in listing.images] + faults


def _paths_on_stdin(null_separated: bool, quiet: bool) -> Iterator[Input]:
    hint = "name image files, folders or addresses, or '-' for an image on standard input"
    if sys.stdin is None or sys.stdin.isatty():
        raise UsageError("no images are given", hint)
    blanks = _BLANKS + b"\0" if null_separated else _BLANKS
    first, chunks = _beginning(_stdin_chunks(), blanks)
    first = first.removeprefix(_BOM)
    if not first.strip(blanks):
        raise UsageError("no images are given, and standard input has no paths", hint)
    if first.startswith(_UTF16):
        raise UsageError("standard input is UTF-16 text", "save the list of paths as UTF-8")
    if _is_image(first):
        raise UsageError("standard input holds an image, not paths", "mplug caption - reads it")
    if b"\0" in first and not null_separated:
        raise UsageError("standard input holds no lines of text", "--null reads paths that end in NUL, '-' an image")
    return _listed(chain([first], chunks), b"\0" if null_separated else b"\n", quiet)


def _listed(chunks: Iterable[bytes], separator: bytes, quiet: bool) -> Iterator[Input]:
    passed = _PassedOver()
    for path, whole in _split(chunks, separator, MAX_PATH_BYTES):
        name = os.fsdecode(path if separator == b"\0" else path.removesuffix(b"\r"))
        if whole:
            yield from _expand(name, passed) if name else ()
        else:
            name = shortened(name, 100)
            message = f"{name} is a line of more than {MAX_PATH_BYTES:,} bytes"
            yield Input(name, ImageError(message, "give one path a line", "missing"))
    passed.tell(quiet)


def _beginning(chunks: Iterator[bytes], blanks: bytes = _BLANKS) -> tuple[bytes, Iterator[bytes]]:
    """The bytes up to and with the first chunk that is not blank, and the chunks behind; blanks alone have an end."""
    first = bytearray()
    for chunk in chunks:
        first += chunk
        if chunk.strip(blanks) or len(first) > MAX_BLANK_BYTES:
            break
    return bytes(first), chunks


def _split(chunks: Iterable[bytes], separator: bytes, most: int) -> Iterator[tuple[bytes, bool]]:
    """(part, True) of a byte stream, each as soon as its end is seen, also empty ones but not at the end.

    Of a part of more than ``most`` bytes its beginning and False; what follows of it is not kept.
    """
    rest, too_long = bytearray(), False
    for chunk in chunks:
        begin = 0
        while (end := chunk.find(separator, begin)) >= 0:
            rest += chunk[begin : min(end, begin + most + 1)]
            yield bytes(rest[:most]), not too_long and len(rest) <= most
            rest, too_long, begin = bytearray(), False, end + 1
        if len(rest) <= most:
            rest += chunk[begin:]
        too_long = too_long or len(rest) > most
        if too_long:
            del rest[most:]
    if rest:
        yield bytes(rest), not too_long


def lines_on_stdin(nothing: str, hint: str) -> Iterator[tuple[int, str | None]]:
    """(number, text) of the lines of JSON on standard input that are not blank, each as soon as its end is seen; None
    for a line of more than :data:`MAX_LINE_BYTES`.

    UsageError at once, with ``nothing`` as the message, where standard input is a terminal or blank, or no JSON.
    """
    if sys.stdin is None or sys.stdin.isatty():
        raise UsageError(nothing, hint)
    first, chunks = _beginning(_stdin_chunks())
    first = first.removeprefix(_BOM)
    start = first.lstrip()
    if _is_image(start):
        raise UsageError(f"{nothing}, and it holds an image", hint)
    if not start.startswith(b"{"):
        raise UsageError(nothing, hint)
    return _numbered(chain([first], chunks))


def _numbered(chunks: Iterable[bytes]) -> Iterator[tuple[int, str | None]]:
    for number, (line, whole) in enumerate(_split(chunks, b"\n", MAX_LINE_BYTES), 1):
        if not whole:
            yield number, None
        elif line.strip():
            yield number, line.decode("utf-8", "surrogateescape")


def _stdin_chunks() -> Iterator[bytes]:
    try:
        descriptor = sys.stdin.fileno()
    except (OSError, ValueError, AttributeError):  # not a file: whoever embeds us has put a buffer there
        yield sys.stdin.buffer.read()
        return
    while chunk := os.read(descriptor, _CHUNK):
        yield chunk


def read_input(what: str, limit: int) -> str:
    """The text on standard input, of at most ``limit`` bytes; UsageError where it is a terminal, or no such text."""
    if sys.stdin is None or sys.stdin.isatty():
        raise UsageError(f"'-' reads {what} from standard input, and nothing is sent there", "name a file instead")
    data = _all_on_stdin(limit)
    if len(data) > limit:
        raise UsageError(f"standard input has more than {size_shown(limit)}, and is to be {what}", "send less")
    try:
        return as_text(data)
    except Unreadable as error:
        raise UsageError(f"standard input is to be {what}: {error}", "send UTF-8 text") from error


def open_input(item: Input, target: int | None = None) -> Image.Image:
    """The image as an upright RGB picture (see ``open_image``); raises MplugError if it can't be had."""
    from mplug_core.data.images import open_image
    from mplug_core.data.pictures import open_source

    if item.fault is not None:
        raise item.fault
    if item.on_stdin:
        return open_image(_image_on_stdin(), target=target, name="the image on standard input")
    return open_source(item.name, target)


def _image_on_stdin() -> bytes:
    if sys.stdin is None:
        raise ImageError("standard input is closed", "for example: mplug caption - < photo.jpg", "unreadable")
    data = _all_on_stdin(MAX_STREAM_BYTES)
    if len(data) > MAX_STREAM_BYTES:
        limit = f"more than {MAX_STREAM_BYTES >> 20} MB"
        raise ImageError(f"the image on standard input has {limit}", "scale it down", "too_large")
    return data


def _all_on_stdin(most: int) -> bytes:
    """Standard input, or more than ``most`` bytes of it, by which a caller knows that there are more."""
    data = bytearray()
    for chunk in _stdin_chunks():
        data += chunk
        if len(data) > most:
            break
    return bytes(data)


def read_text(name: str, what: str, hint: str) -> str:
    """The UTF-8 text of a file, or of standard input for ``-``; DataError where it can't be read, is no text, or is
    larger than :data:`MAX_TEXT_BYTES`."""
    shown = "standard input" if name == "-" else name
    try:
        data = _all_on_stdin(MAX_TEXT_BYTES) if name == "-" else read_file(name, MAX_TEXT_BYTES)
        if len(data) > MAX_TEXT_BYTES:
            raise DataError(f"{shown} has more than {MAX_TEXT_BYTES >> 20} MB", hint)
        return data.decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"{what} {name} can't be read: {error.strerror}", hint) from error
    except ValueError as error:  # also a NUL character in the name
        raise DataError(f"{shown} is not UTF-8 text", hint) from error


def write_line(text: str) -> None:
    """One line of results on stdout, at once: line breaks in ``text`` are escaped, and for a terminal all that is not
    printable but tabs. A closed pipe raises BrokenPipeError, all else that takes no results MplugError.
    """
    if is_terminal(sys.stdout):
        text = show.printable(text, keep="\t")
    elif "\n" in text or "\r" in text:
        text = text.replace("\n", "\\n").replace("\r", "\\r")
    try:
        line = text.encode("utf-8", "surrogateescape")  # names that are no Unicode as the bytes that they are
    except UnicodeEncodeError:
        line = text.encode("utf-8", "backslashreplace")
    write_bytes(line + b"\n")


def write_text(text: str) -> None:
    """A document of several lines on stdout, each as of :func:`write_line`."""
    for line in text.split("\n"):
        write_line(line)


def write_bytes(data: bytes) -> None:
    """Bytes on stdout, at once; raises as :func:`write_line` does."""
    if sys.stdout is None:
        raise MplugError("the results can't be written: standard output is closed", "check where they go")
    try:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise cannot_write(error) from error


def cannot_write(error: OSError) -> MplugError:
    """What to say where standard output does not take the results."""
    reason = "standard output is closed" if error.errno == errno.EBADF else error.strerror
    return MplugError(f"the results can't be written: {reason}", "check where they go")


def is_terminal(stream: Any) -> bool:
    """Whether a standard stream is there and is a terminal."""
    return stream is not None and not stream.closed and stream.isatty()


def json_line(values: Any) -> str:
    """One line of JSON, readable where it can be: what is not printable and names that are no Unicode are escaped, and
    come back as they were."""
    text = to_json(values, ensure_ascii=False)
    # such characters are within strings alone, where JSON has escapes of its own for them
    return text if text.isprintable() else "".join(c if c.isprintable() else to_json(c)[1:-1] for c in text)
