"""Boxes with their phrases drawn on a picture, and the file that it goes to."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from mplug_core.errors import UsageError
from mplug_core.outputs import output_file, unwritable

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
# Okabe and Ito's colours, which colour-blind people can tell apart.
_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
_LONGEST_LABEL = 60


@contextmanager
def place_for_picture(file: Path, source: str, model: str | None) -> Iterator[Callable[[Image.Image], None]]:
    """A function that writes a picture to ``file``, whole or not at all, in the format that the suffix names.

    UsageError where ``file`` has no such suffix, is the image ``source`` itself or a file of ``model``, MplugError
    where nothing can be written: at once, before anything is computed.
    """
    suffix = file.suffix.lower()
    if suffix not in SUFFIXES:
        raise UsageError(f"--draw {file}: the name has to end in an image format", f"one of {', '.join(SUFFIXES)}")
    with output_file(file, "--draw", {"the image itself": source, "--model": model}, lambda file: False) as out:
        assert out is not None

        def write(picture: Image.Image) -> None:
            from PIL import Image

            data = io.BytesIO()
            try:
                picture.save(data, Image.registered_extensions()[suffix])
            except (OSError, ValueError, KeyError) as error:  # of a format that takes no picture of this size
                raise unwritable(file, error, "--draw names a file of another format") from error
            out.write(data.getvalue())

        yield write


def draw_boxes(picture: Image.Image, boxes: Sequence[tuple[Sequence[float], str]]) -> Image.Image:
    """A copy of ``picture`` with each box (x0, y0, x1, y1 in pixels) and its label; lines grow with the picture."""
    from PIL import Image, ImageDraw, ImageFont

    drawn = Image.new("RGB", picture.size)
    drawn.paste(picture)
    width, height = drawn.size
    line = max(2, round(max(width, height) / 250))
    font = ImageFont.load_default(max(10, round(max(width, height) / 36)))
    pen = ImageDraw.Draw(drawn)
    for number, (box, label) in enumerate(boxes):
        colour = _COLOURS[number % len(_COLOURS)]
        # the line runs inside the picture, also where the box ends at its border
        x0, x1 = (min(max(round(v), 0), width - 1) for v in box[::2])
        y0, y1 = (min(max(round(v), 0), height - 1) for v in box[1::2])
        pen.rectangle((x0, y0, x1, y1), outline=colour, width=line)
        text = _short(label, lambda t: pen.textlength(t, font), width - 4 * line)
        left, top, right, bottom = pen.textbbox((0, 0), text, font)
        wide, high = right - left + 2 * line, bottom - top + 2 * line
        at = (max(0, min(x0, width - wide)), y0 - high if y0 >= high else y0)
        pen.rectangle((*at, at[0] + wide, at[1] + high), fill=colour)
        pen.text((at[0] + line - left, at[1] + line - top), text, _on(colour), font)
    return drawn


def _short(label: str, length: Callable[[str], float], room: float) -> str:
    """One line that fits: the beginning, and dots."""
    text = " ".join("".join(c if c.isprintable() else " " for c in label).split())
    if len(text) <= _LONGEST_LABEL and length(text) <= room:
        return text
    text = text[:_LONGEST_LABEL]
    while text and length(text + "...") > room:
        text = text[:-1]
    return text.rstrip() + "..."


def _on(colour: str) -> str:
    """Black or white, whichever is easier to read on a colour."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "white"
