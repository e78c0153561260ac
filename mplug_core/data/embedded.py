"""Images that are themselves texts: data: URLs and base64, as web pages and services hand them on."""

from __future__ import annotations

import base64
import binascii
import os
import re
from urllib.parse import unquote_to_bytes

from mplug_core.errors import ImageError, shown_address

MAX_CHARACTERS = 1 << 28
_SHORTEST = 40  # characters of base64; no image is smaller
_ALPHABET = re.compile(r"[A-Za-z0-9+/_-]+={0,2}")
_IMAGES = (
    b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"\0\0\0\x0cjP", b"qoif", b"\0\0\1\0",
)  # fmt: skip
_BLANKS = str.maketrans("", "", " \t\r\n")


def is_data_url(text: str) -> bool:
    """Whether a text is meant as a ``data:`` URL."""
    return text[:5].lower() == "data:"


def shown_name(text: str) -> str:
    """What a named image is called in results and messages: a path as it is, an address without its secrets, and of
    an image that is a text the beginning and the length."""
    if is_data_url(text) or (len(text) > 4096 and _ALPHABET.fullmatch(text.translate(_BLANKS))):
        head = text[:64].partition(",")[0] if is_data_url(text) else "base64"
        return f"{head[:40]} ({len(text):,} characters)"
    return shown_address(text)


def image_in_text(text: str, name: str) -> bytes | None:
    """The encoded image that a text is; None for any other text, such as a path. ImageError for one that is damaged."""
    if is_data_url(text):
        if len(text) > MAX_CHARACTERS:
            raise ImageError(f"{name} has more than {MAX_CHARACTERS >> 20} MB", "scale it down", "too_large")
        kind, comma, content = text.partition(",")
        if not comma:
            raise ImageError(f"{name} has no data behind a comma", "data:image/png;base64,...", "broken")
        if kind.rstrip().lower().endswith(";base64"):
            return _decoded(unquote_to_bytes(content).decode("latin-1") if "%" in content else content, name)
        return unquote_to_bytes(content)
    if not _SHORTEST <= len(text) <= MAX_CHARACTERS or _is_there(text):
        return None
    packed = text.translate(_BLANKS)
    if _ALPHABET.fullmatch(packed) is None or not _begins_as_an_image(packed):
        return None
    return _decoded(packed, name)


def _decoded(text: str, name: str) -> bytes:
    packed = text.translate(_BLANKS).translate(str.maketrans("-_", "+/")).rstrip("=")
    try:
        return base64.b64decode(packed + "=" * (-len(packed) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError(f"{name} is damaged base64", "encode it again", "broken") from error


def _begins_as_an_image(packed: str) -> bool:
    try:
        head = base64.b64decode(packed[:32].translate(str.maketrans("-_", "+/")))
    except (binascii.Error, ValueError):
        return False
    return head.startswith(_IMAGES) or head[8:12] == b"WEBP" or head[4:8] == b"ftyp"


def _is_there(path: str) -> bool:
    """Whether there is a file of that name; a text that is too long for a name is none."""
    return len(path) < 4096 and os.path.lexists(path)
