"""Encoded pictures without what is not pixels: the second try for files whose metadata a decoder can't take.

Text, colour profiles and dates may be damaged, or larger than a decoder allows, in files that every browser shows. What
says how the pixels lie is kept: size, palette, transparency, and of EXIF the orientation.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

from PIL import Image

ORIENTATION = 0x0112

# TIFF tags that say where pixels are and what they mean
_TIFF_TAGS = frozenset((
    254, 255, 256, 257, 258, 259, 262, 263, 266, 273, 274, 277, 278, 279, 284, 292, 293, 317, 320, 321, 322, 323, 324,
    325, 332, 333, 334, 338, 339, 340, 341, 347, 512, 513, 514, 515, 517, 518, 519, 520, 521, 529, 530, 531, 532,
))  # fmt: skip


def without_metadata(data: bytes) -> bytes | None:
    """The bytes of a PNG, JPEG, WebP or TIFF without metadata; None for other formats and for what has none to lose."""
    try:
        if data.startswith(b"\x89PNG\r\n\x1a\n"):
            plain = _png(data)
        elif data.startswith(b"\xff\xd8"):
            plain = _jpeg(data)
        elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            plain = _webp(data)
        elif data[:4] in (b"II*\0", b"MM\0*"):
            plain = _tiff(data)
        else:
            return None
    except (struct.error, IndexError, ValueError):
        return None
    return None if plain == data else plain


def _orientation(exif: bytes) -> bytes:
    """EXIF that has nothing but the orientation of ``exif``; empty where that says nothing."""
    try:
        read = Image.Exif()
        read.load(exif)
        turned = read.get(ORIENTATION, 1)
        if turned not in range(2, 9):
            return b""
        kept = Image.Exif()
        kept[ORIENTATION] = turned
        return kept.tobytes()  # with "Exif\0\0" in front
    except Exception:  # damaged EXIF turns nothing
        return b""


def _png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _png(data: bytes) -> bytes:
    view, place = memoryview(data), 8
    parts: list[bytes | memoryview] = [view[:8]]
    while place + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, place)
        end = place + 12 + length
        if not kind[0] & 0x20:  # upper case: a decoder has to know it; damage there is the decoder's to find
            parts.append(view[place:end])
        elif kind in (b"tRNS", b"eXIf") and data[end - 4 : end] == struct.pack(
            ">I", zlib.crc32(view[place + 4 : end - 4])
        ):
            if kind == b"tRNS":
                parts.append(view[place:end])
            elif exif := _orientation(b"Exif\0\0" + data[place + 8 : end - 4]):
                parts.append(_png_chunk(b"eXIf", exif[6:]))
        place = end
    return b"".join(parts)


def _jpeg(data: bytes) -> bytes:
    place, parts = 2, [data[:2]]
    while data[place] == 0xFF:
        marker = data[place + 1]
        if marker == 0xFF:
            place += 1
            continue
        if marker == 0xDA or 0xD0 <= marker <= 0xD9:  # pixels from here on
            break
        (length,) = struct.unpack_from(">H", data, place + 2)
        segment = data[place : place + 2 + length]
        if marker == 0xE1 and segment[4:10] == b"Exif\0\0":
            if exif := _orientation(segment[4:]):
                parts.append(b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif)
        elif not (0xE1 <= marker <= 0xED or marker in (0xEF, 0xFE)):  # APP0 and APP14 say what colours are
            parts.append(segment)
        place += 2 + length
    return b"".join([*parts, data[place:]])


def _webp(data: bytes) -> bytes:
    kept: list[bytes] = []
    exif = b""
    for kind, content in _riff(data):
        if kind == b"EXIF":
            exif = _orientation(content)
        elif kind == b"VP8X":
            kept.append(_riff_chunk(kind, bytes([content[0] & ~0x2C]) + content[1:]))  # no profile, EXIF and XMP
        elif kind in (b"VP8 ", b"VP8L", b"ALPH", b"ANIM", b"ANMF"):
            kept.append(_riff_chunk(kind, content))
    if exif and kept and kept[0].startswith(b"VP8X"):
        kept[0] = kept[0][:8] + bytes([kept[0][8] | 0x08]) + kept[0][9:]
        kept.append(_riff_chunk(b"EXIF", exif[6:]))
    body = b"WEBP" + b"".join(kept)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _riff(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    place = 12
    while place + 8 <= len(data):
        kind, length = struct.unpack_from("<4sI", data, place)
        if place + 8 + length > len(data) and kind in (b"EXIF", b"XMP ", b"ICCP"):
            return  # longer than the file: there is nothing behind it
        yield kind, data[place + 8 : place + 8 + length]
        place += 8 + length + length % 2


def _riff_chunk(kind: bytes, content: bytes) -> bytes:
    return kind + struct.pack("<I", len(content)) + content + b"\0" * (len(content) % 2)


def _tiff(data: bytes) -> bytes:
    """The same file, whose first directory lists what is needed alone."""
    order = "<" if data[:2] == b"II" else ">"
    (place,) = struct.unpack_from(f"{order}I", data, 4)
    (count,) = struct.unpack_from(f"{order}H", data, place)
    entries = [data[place + 2 + 12 * k : place + 14 + 12 * k] for k in range(count)]
    kept = [entry for entry in entries if len(entry) == 12 and struct.unpack(f"{order}H", entry[:2])[0] in _TIFF_TAGS]
    if len(kept) == count:
        return data
    listed = struct.pack(f"{order}H", len(kept)) + b"".join(kept) + bytes(4)
    return data[:place] + listed + data[place + len(listed) :]
