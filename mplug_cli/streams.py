"""Streams: what the command line names as images, and JSON Lines out.

Inputs are files, folders, glob patterns that the shell left alone, http(s) addresses, ``-`` for image bytes on
standard input, or paths on standard input. Standard input is read from its file descriptor: a thread that waits in
Python's buffered reader would hold a lock that the end of the process needs.
"""

from __future__ import annotations

import glob
import json
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

from mplug_core.data import web
from mplug_core.errors import ImageError, MplugError, UsageError

if TYPE_CHECKING:
    from PIL import Image

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jp2", ".ppm")
MAX_STREAM_BYTES = 256 << 20
MAX_DOWNLOAD_BYTES = web.MAX_BYTES

_CHUNK = 1 << 16
_STDIN = "-"
# How image files begin; a path never does.
_IMAGE_BYTES = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*")


@dataclass(frozen=True)
class Input:
    """One image to answer for: its name in the results, and what is already known to be wrong with it."""

    name: str
    fault: MplugError | None = None
    on_stdin: bool = False


@dataclass(frozen=True)
class Inputs:
    """All images of a call. ``plain`` says that the user named exactly one; ``total`` is None while unknown."""

    items: Iterable[Input]
    plain: bool
    total: int | None


def read_inputs(arguments: list[str], null_separated: bool = False) -> Inputs:
    """The images that ``arguments`` name, or without any the paths on standard input.

    UsageError where nothing is named, or standard input is not what it should be.
    """
    if not arguments:
        return Inputs(_paths_on_stdin(null_separated), plain=False, total=None)
    if null_separated:
        raise UsageError("--null is for paths on standard input, and images are named", "leave one of them out")
    if arguments.count(_STDIN) > 1:
        raise UsageError("'-' is given twice, and standard input holds one image", "name it once")
    if _STDIN in arguments and sys.stdin is not None and sys.stdin.isatty():
        raise UsageError(
            "'-' reads an image from standard input, which is a terminal", "for example: mplug caption - < photo.jpg"
        )
    items = [item for argument in arguments for item in _named(argument)]
    # a folder or pattern of one image gives what one of many gives, so that scripts can rely on it
    plain = len(arguments) == 1 and [item.name for item in items] == arguments
    return Inputs(items, plain, len(items))


def _named(argument: str) -> list[Input]:
    return [Input(_STDIN, on_stdin=True)] if argument == _STDIN else _expand(argument)


def _expand(name: str) -> list[Input]:
    """A path, pattern or address as images; what can't be is one input with a fault."""
    if web.is_address(name):
        return [Input(name)]
    if os.path.isdir(name):
        return _folder(name)
    if "\0" not in name and glob.has_magic(name) and not os.path.lexists(name):
        found = sorted(glob.glob(name, recursive=True))
        images = [item for path in found for item in (_folder(path, False) if os.path.isdir(path) else [Input(path)])]
        fault = ImageError(f"no image matches {name}", "check the pattern", "missing")
        return images or [Input(name, fault)]
    return [Input(name)]


def _folder(folder: str, must_have_some: bool = True) -> list[Input]:
    """The image files of a folder by their suffix, sorted; hidden ones and sub-folders are left out."""
    try:
        with os.scandir(folder) as entries:
            names = sorted(
                entry.name
                for entry in entries
                if entry.name.lower().endswith(IMAGE_SUFFIXES) and entry.name[0] != "." and not entry.is_dir()
            )
    except OSError as error:
        fault = ImageError(f"folder {folder} can't be read: {error.strerror}", "check its mode", "unreadable")
        return [Input(folder, fault)]
    if not names and must_have_some:
        hint = f"sub-folders are not searched; '{os.path.join(folder, '**', '*.jpg')}' in quotes does"
        return [Input(folder, ImageError(f"folder {folder} has no images", hint, "missing"))]
    return [Input(os.path.join(folder, name)) for name in names]


def _paths_on_stdin(null_separated: bool) -> Iterator[Input]:
    hint = "name image files, folders or addresses, or '-' for an image on standard input"
    if sys.stdin is None or sys.stdin.isatty():
        raise UsageError("no images are given", hint)
    chunks = _stdin_chunks()
    first = next(chunks, b"")
    if not first.strip():
        # Only blanks so far: read on only if there can be more.
        first += b"".join(chunks)
        if not first.strip():
            raise UsageError("no images are given, and standard input has no paths", hint)
        chunks = iter(())
    if first.startswith(_IMAGE_BYTES):
        raise UsageError("standard input holds an image, not paths", "mplug caption - reads it")
    if b"\0" in first and not null_separated:
        raise UsageError("standard input holds no lines of text", "--null reads paths that end in NUL, '-' an image")
    separator = b"\0" if null_separated else b"\n"
    return (item for path in _split(chain([first], chunks), separator) for item in _expand(os.fsdecode(path)))


def _split(chunks: Iterable[bytes], separator: bytes) -> Iterator[bytes]:
    """The non-empty parts of a byte stream, each as soon as its end is seen."""
    rest = b""
    for chunk in chunks:
        *whole, rest = (rest + chunk).split(separator)
        yield from filter(None, map(_without_return if separator == b"\n" else bytes, whole))
    if last := _without_return(rest) if separator == b"\n" else rest:
        yield last


def _without_return(line: bytes) -> bytes:
    return line[:-1] if line.endswith(b"\r") else line


def lines_on_stdin(nothing: str, hint: str) -> Iterator[tuple[int, str]]:
    """(number, text) of the lines of JSON on standard input that are not blank, each as soon as its end is seen.

    UsageError at once, with ``nothing`` as the message, where standard input is a terminal or blank, or no JSON.
    """
    if sys.stdin is None or sys.stdin.isatty():
        raise UsageError(nothing, hint)
    chunks = _stdin_chunks()
    first = b""
    while not first.strip() and (chunk := next(chunks, b"")):
        first += chunk
    start = first.removeprefix(b"\xef\xbb\xbf").lstrip()
    if start.startswith(_IMAGE_BYTES):
        raise UsageError(f"{nothing}, and it holds an image", hint)
    if not start.startswith(b"{"):
        raise UsageError(nothing, hint)
    return _numbered(chain([first.removeprefix(b"\xef\xbb\xbf")], chunks))


def _numbered(chunks: Iterable[bytes]) -> Iterator[tuple[int, str]]:
    rest, number = b"", 0
    for chunk in chain(chunks, [b"\n"]):
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            number += 1
            if line.strip():
                yield number, line.decode("utf-8", "surrogateescape")


def _stdin_chunks() -> Iterator[bytes]:
    try:
        descriptor = sys.stdin.fileno()
    except (OSError, ValueError, AttributeError):  # not a file: whoever embeds us has put a buffer there
        yield sys.stdin.buffer.read()
        return
    while chunk := os.read(descriptor, _CHUNK):
        yield chunk


def open_input(item: Input, target: int | None = None) -> Image.Image:
    """The image as an upright RGB picture (see ``open_image``); raises MplugError if it can't be had."""
    from mplug_core.data.images import open_image

    if item.fault is not None:
        raise item.fault
    if item.on_stdin:
        return open_image(_image_on_stdin(), target=target, name="the image on standard input")
    if web.is_address(item.name):
        return open_image(download(item.name), target=target, name=item.name)
    return open_image(item.name, target=target)


def _image_on_stdin() -> bytes:
    if sys.stdin is None:
        raise ImageError("standard input is closed", "for example: mplug caption - < photo.jpg", "unreadable")
    data = bytearray()
    for chunk in _stdin_chunks():
        data += chunk
        if len(data) > MAX_STREAM_BYTES:
            limit = f"more than {MAX_STREAM_BYTES >> 20} MB"
            raise ImageError(f"the image on standard input has {limit}", "scale it down", "too_large")
    return bytes(data)


def download(address: str) -> bytes:
    """What is at an http(s) address; ImageError where it can't be had, or is larger than a command takes."""
    return web.download(address, MAX_DOWNLOAD_BYTES)


def write_line(text: str) -> None:
    """One line of results on stdout, at once. A closed pipe raises BrokenPipeError."""
    if sys.stdout is None:
        raise BrokenPipeError
    try:
        line = text.encode("utf-8", "surrogateescape")  # names that are no Unicode as the bytes that they are
    except UnicodeEncodeError:
        line = text.encode("utf-8", "backslashreplace")
    try:
        sys.stdout.buffer.write(line + b"\n")
        sys.stdout.buffer.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise MplugError(f"the results can't be written: {error.strerror}", "check where they go") from error


def json_line(values: dict[str, Any]) -> str:
    """One line of JSON, readable where it can be: names that are no Unicode are escaped, and come back as they were."""
    text = json.dumps(values, ensure_ascii=False)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return json.dumps(values)
    return text
