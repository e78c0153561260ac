"""What is in folders, and what may be opened: the one walk of all commands.

One entry never costs the others: a link that leads nowhere or in a circle, a file or folder that can't be read, a pipe,
socket or device is that entry's own fault. A folder is visited once however many links lead to it. Order is by name.
"""

from __future__ import annotations

import errno
import glob
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from mplug_core.bounded import read_up_to

IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".pjpeg", ".pjp", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif",
    ".heic", ".heif", ".hif", ".jp2", ".ppm", ".pgm", ".pbm", ".ico", ".qoi",
)  # fmt: skip
"""How names of images end, in lower case: the one list of folders, arguments and packs."""

_OF_SHELL = ("/proc/", "/dev/fd/")  # where pipes are that the shell gave to this process


def has_image_suffix(name: str) -> bool:
    """Whether a name ends as names of images do, whatever the case."""
    return name.lower().endswith(IMAGE_SUFFIXES)


@dataclass
class Listing:
    """What a walk has found: paths of images in order, the folders that could not be read, and how many other files
    were passed over."""

    images: list[str] = field(default_factory=list)
    unreadable: list[tuple[str, OSError]] = field(default_factory=list)
    passed_over: int = 0


def images_in(folder: str) -> Listing:
    """The images of a folder by their suffix, in the order of their names; hidden entries and sub-folders are left out.

    A link that leads nowhere counts as the image that its name says: opening it says what is wrong.
    """
    listing = Listing()
    try:
        with os.scandir(folder) as entries:
            found = sorted((entry.name, is_folder(entry)) for entry in entries if not entry.name.startswith("."))
    except OSError as error:
        listing.unreadable.append((folder, error))
        return listing
    files = [name for name, folder_like in found if not folder_like]
    listing.images = [os.path.join(folder, name) for name in files if has_image_suffix(name)]
    listing.passed_over = len(files) - len(listing.images)
    return listing


def matching(pattern: str) -> Listing:
    """The files that a pattern matches, and the images of the folders that it matches, each once, in order.

    ``**`` stands for any number of folders; hidden ones are left out.
    """
    listing = Listing()
    folders, files = [], []
    for path in dict.fromkeys(_matching(pattern, listing)):
        (folders if os.path.isdir(path) else files).append(path)
    if os.path.basename(pattern.rstrip(os.sep)) == "**":  # everything below: what is no image was not asked for
        listing.images = []
    else:
        listing.images = files
    seen: set[tuple[int, int]] = set()
    for folder in folders:
        if _is_new(folder, seen):
            inside = images_in(folder)
            bare = folder == os.curdir and not pattern.startswith(os.curdir)  # names are then as "*.jpg" has them
            listing.images += map(os.path.basename, inside.images) if bare else inside.images
            listing.unreadable += inside.unreadable
            listing.passed_over += inside.passed_over
    if "**" in pattern.split(os.sep):  # two of them in one pattern can still reach a folder by two ways
        listing.images = list({_place_of(path): path for path in reversed(listing.images)}.values())
    listing.images = sorted(dict.fromkeys(listing.images))
    return listing


def _place_of(path: str) -> tuple[str, str]:
    folder, name = os.path.split(path)
    return os.path.realpath(folder or os.curdir), name


def _matching(pattern: str, listing: Listing) -> Iterator[str]:
    steps = pattern.split(os.sep)
    if "**" not in steps:
        yield from glob.iglob(pattern)
        return
    place = steps.index("**")
    before, after = os.sep.join(steps[:place]), steps[place + 1 :]
    while after and after[0] == "**":
        after = after[1:]
    after = [step for step in after if step]
    bases = sorted(glob.iglob(before)) if glob.has_magic(before) else [before]
    for base in bases:
        for folder in folders_below(base if base or not pattern.startswith(os.sep) else os.sep, listing):
            if after:
                yield from _matching(os.path.join(glob.escape(folder), *after), listing)
            else:
                yield folder or os.curdir


def folders_below(folder: str, listing: Listing) -> Iterator[str]:
    """A folder and all below it that aren't hidden, each once: first those that are really there, then links."""
    seen: set[tuple[int, int]] = set()
    waiting, links = [folder], []
    while waiting or links:
        place = waiting.pop() if waiting else links.pop(0)
        if not os.path.isdir(place or os.curdir) or not _is_new(place or os.curdir, seen):
            continue
        yield place
        inner: list[str] = []
        try:
            with os.scandir(place or os.curdir) as entries:
                for entry in entries:
                    if entry.name.startswith(".") or not is_folder(entry):
                        continue
                    (links if entry.is_symlink() else inner).append(os.path.join(place, entry.name))
        except OSError as error:
            listing.unreadable.append((place, error))
            continue
        waiting += sorted(inner, reverse=True)
        links.sort()


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder or leads to one; a link in a circle doesn't."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _is_new(folder: str, seen: set[tuple[int, int]]) -> bool:
    try:
        status = os.stat(folder)
    except OSError:
        return True  # listing it says what is wrong
    key = (status.st_dev, status.st_ino)
    if key in seen:
        return False
    seen.add(key)
    return True


class NotAFile(OSError):
    """Something else than a regular file; ``what`` says in words what it is."""

    def __init__(self, what: str, path: str) -> None:
        super().__init__(errno.EINVAL, f"it is {what}, not a file", path)
        self.what = what


def open_file(path: str | Path) -> BinaryIO:
    """A regular file, or a pipe that the shell made for this process (``<(curl ...)``), to read bytes from.

    NotAFile at once for a folder, a named pipe, a socket or a device, which could make us wait for ever; other OSErrors
    as of ``open``.
    """
    mode = os.stat(path).st_mode
    if stat.S_ISREG(mode) or (stat.S_ISFIFO(mode) and os.path.realpath(path).startswith(_OF_SHELL)):
        return open(path, "rb")
    if stat.S_ISDIR(mode):
        raise NotAFile("a folder", str(path))
    if stat.S_ISFIFO(mode):
        raise NotAFile("a named pipe", str(path))
    raise NotAFile("a socket" if stat.S_ISSOCK(mode) else "a device", str(path))


def read_file(path: str | Path, most: int) -> bytes:
    """A file's bytes, at most ``most`` and one more, by which a caller knows that there are more."""
    with open_file(path) as file:
        return read_up_to(file, most + 1)
