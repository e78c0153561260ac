"""Where a picture lies in the model's square, and what that means for the records on it.

Cropping, mirroring and fitting a picture moves what a box points at and what "left" means. A :class:`Placement` says
where the picture went; :func:`adapt` gives the record that is true of the picture as the model sees it, or None where
there is none. Coordinates are shares: 0..1 of a picture's or of the square's width and height.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

from mplug_core.data.records import PhraseRecord
from mplug_core.errors import DataError

Box = tuple[float, float, float, float]
"""Corners x0, y0, x1, y1."""

_EDGE = 1e-6  # rounding, no crop

VISIBLE = 0.8
"""A box of which a crop leaves less than this share is no longer what its phrase means."""


@dataclass(frozen=True)
class Placement:
    """The map from a picture to the square: ``square = offset + scale * picture`` on each axis, in shares.

    A negative ``x_scale`` mirrors. Of a crop the scales are above 1 and parts of the picture lie outside the square; of
    a padded picture a scale is below 1.
    """

    x_scale: float = 1.0
    y_scale: float = 1.0
    x_offset: float = 0.0
    y_offset: float = 0.0

    @classmethod
    def of_region(cls, region: Box, flipped: bool, target: Box = (0.0, 0.0, 1.0, 1.0)) -> Placement:
        """The ``region`` of the picture, mirrored if ``flipped``, fills the ``target`` box of the square."""
        x_scale = (target[2] - target[0]) / (region[2] - region[0])
        y_scale = (target[3] - target[1]) / (region[3] - region[1])
        if flipped:
            return cls(-x_scale, y_scale, target[2] + x_scale * region[0], target[1] - y_scale * region[1])
        return cls(x_scale, y_scale, target[0] - x_scale * region[0], target[1] - y_scale * region[1])

    @property
    def flipped(self) -> bool:
        return self.x_scale < 0

    @property
    def crops(self) -> bool:
        """Whether a part of the picture lies outside the square."""
        corners = self.to_square((0.0, 0.0, 1.0, 1.0))
        return min(corners) < -_EDGE or max(corners) > 1 + _EDGE

    def to_square(self, box: Iterable[float]) -> Box:
        """A box of the picture as a box of the square, not cut at its border."""
        x0, y0, x1, y1 = (float(v) for v in box)
        return _in_order(
            self.x_offset + self.x_scale * x0, self.y_offset + self.y_scale * y0,
            self.x_offset + self.x_scale * x1, self.y_offset + self.y_scale * y1,
        )  # fmt: skip

    def to_picture(self, box: Iterable[float]) -> Box:
        """A box of the square as a box of the picture, cut at the picture's border."""
        x0, y0, x1, y1 = (float(v) for v in box)
        return cut(_in_order(
            (x0 - self.x_offset) / self.x_scale, (y0 - self.y_offset) / self.y_scale,
            (x1 - self.x_offset) / self.x_scale, (y1 - self.y_offset) / self.y_scale,
        ))  # fmt: skip

    def visible(self, box: Iterable[float]) -> float:
        """The share of a picture's box that lies in the square; 0 for a box without area or with a NaN."""
        inside = cut(tuple(float(v) for v in box))
        whole = area(inside)
        if not whole > 0:  # also where it is NaN
            return 0.0
        return area(cut(self.to_square(inside))) / (whole * abs(self.x_scale) * self.y_scale)


WHOLE = Placement()
"""The picture squashed to the square."""


ON_ITS_SIDE = {5: 5, 6: 8, 7: 7, 8: 6}
"""EXIF orientations by which width and height change places, and what turns a picture back."""
SAME_SHAPE = 0.02
"""How far the ratio of the sides may be off: thumbnails are rounded."""


def turned(box: Iterable[float], orientation: int) -> Box:
    """A box in shares of a file's picture as a box of the picture that an EXIF orientation of 5 to 8 makes of it."""
    x0, y0, x1, y1 = box
    match orientation:
        case 5:
            return (y0, x0, y1, x1)
        case 6:
            return (1 - y1, x0, 1 - y0, x1)
        case 7:
            return (1 - y1, 1 - x1, 1 - y0, 1 - x0)
        case 8:
            return (y0, 1 - x1, y1, 1 - x0)
    return (x0, y0, x1, y1)


def turn_of(size: tuple[int, int] | None, shape: tuple[tuple[int, int], int] | None) -> int:
    """The EXIF orientation by which a picture is turned that a file states the ``size`` of: 1 where it is upright.

    ``shape``: its size as it is shown, and its own orientation. DataError where the size is another picture's.
    """
    if size is None or shape is None or _same_shape(size, shape[0]):
        return 1
    upright, orientation = shape
    if orientation in ON_ITS_SIDE and _same_shape(size[::-1], upright):
        return orientation
    stated, found = (" x ".join(map(str, sides)) for sides in (size, upright))
    raise DataError(f"its box is on a picture of {stated} pixels, and the picture has {found}", code="other_picture")


def _same_shape(one: tuple[int, int], other: tuple[int, int]) -> bool:
    if max(abs(one[0] - other[0]), abs(one[1] - other[1])) <= 1:
        return True
    across, down = one[0] * other[1], one[1] * other[0]
    return abs(across - down) <= SAME_SHAPE * max(across, down)


def upright(record: PhraseRecord, shape: tuple[tuple[int, int], int] | None) -> PhraseRecord:
    """A phrase with its box and size as the picture is shown; ``shape`` and errors as of :func:`turn_of`."""
    turn = turn_of(record.size, shape)
    if turn == 1:
        return record
    return dataclasses.replace(record, box=cut(turned(record.box, turn)), size=record.size[::-1])


def _in_order(x0: float, y0: float, x1: float, y1: float) -> Box:
    return (x1, y0, x0, y1) if x1 < x0 else (x0, y0, x1, y1)


def cut(box: Iterable[float]) -> Box:
    """The part of a box within 0..1; all zeros for a box with a number that is not finite."""
    values = tuple(box)
    if not all(isfinite(v) for v in values):
        return (0.0, 0.0, 0.0, 0.0)
    return tuple(min(max(v, 0.0), 1.0) for v in values)  # type: ignore[return-value]


def area(box: Box) -> float:
    """0 for a box whose corners are in the wrong order."""
    return max(box[2] - box[0], 0.0) * max(box[3] - box[1], 0.0)


_SIDE = re.compile(r"\b(left|right)(?=(?:most|hand|side|ward|wards|ish|er)?\b)", re.IGNORECASE)
_OTHER = {"left": "right", "right": "left"}
_DIRECTION = re.compile(
    r"\b(?:(?:left|right)(?:most|hand|side|ward|wards|ish|er)?|(?:top|bottom|upper|lower|left|right)(?:most)?|middle|"
    r"cent(?:er|re)|corner|edge|side|highest|lowest|first|second|third|last|end)\b",
    re.IGNORECASE,
)
# "right behind her" is close behind, "left behind" forgotten; "on the right behind her" is a side
_ADVERB = re.compile(
    r"(?<!\bthe )(?<!\bon )(?<!\bto )(?<!\bat )(?<!\bfar )(?<!\btop )(?<!\bbottom )(?<!\bupper )(?<!\blower )"
    r"\b(?:right (?=(?:next|behind|beside|above|below|under|beneath|before|after|now|away|across|in front)\b)"
    r"|left (?=(?:behind|over|open|alone|unattended)\b)|all right\b)",
    re.IGNORECASE,
)
_OF_A_PAIR = re.compile(
    r"\b(?:left|right)(?:[- ]?(?:most|hand|side))?(?= (?:image|photo|picture|photograph|pic)s?\b)"
    r"|\b(?:image|photo|picture|photograph|pic)s? (?:on|at|to) the (?:left|right)\b",
    re.IGNORECASE,
)


def swap_sides(text: str) -> str:
    """The text as it is true of the mirrored picture: left and right, leftmost and rightmost, ... change places.

    "right behind", "left over" and the like, which name no side, stay.
    """
    kept = [match.span() for match in _ADVERB.finditer(text)]

    def other(match: re.Match[str]) -> str:
        word = match[1]
        if any(start <= match.start() < stop for start, stop in kept):
            return word
        swapped = _OTHER[word.lower()]
        return swapped.upper() if word.isupper() else swapped.title() if word[0].isupper() else swapped

    return _SIDE.sub(other, text)


def names_direction(phrase: str) -> bool:
    """Whether a phrase says where in the picture something is, which a crop may make wrong."""
    return _DIRECTION.search(phrase) is not None


def adapt(record: Any, placements: Sequence[Placement]) -> Any | None:
    """The record that is true of its images as the model sees them, None where there is none.

    A phrase's box becomes a box of the square. It is left out where less than :data:`VISIBLE` of its box is in sight,
    where it names a direction in a cropped picture, and where its box has no area. On a mirrored picture every text
    changes its sides. A statement on a pair that names a side of the pictures themselves is left out where one of them
    is mirrored ("the left image" is none: a pair keeps its order). A record with a method ``placed`` decides for
    itself.
    """
    if hasattr(record, "placed"):
        return record.placed(placements)
    if isinstance(record, PhraseRecord):
        record = _adapt_box(record, placements[0])
    if record is None or not any(placement.flipped for placement in placements):
        return record
    if len(placements) > 1:
        return None if _SIDE.search(_OF_A_PAIR.sub("", record.statement)) else record
    swapped = {}
    for name in TEXTS:
        value = getattr(record, name, None)
        if isinstance(value, str):
            swapped[name] = swap_sides(value)
        elif isinstance(value, tuple):
            swapped[name] = tuple(swap_sides(text) for text in value)
    return dataclasses.replace(record, **swapped)


TEXTS = ("captions", "question", "answers", "phrase", "statement", "hypothesis", "premise")
"""The fields of records that speak of the picture."""


def _adapt_box(record: PhraseRecord, placement: Placement) -> PhraseRecord | None:
    if placement.visible(record.box) < VISIBLE:
        return None
    if placement.crops and names_direction(record.phrase):
        return None
    box = cut(placement.to_square(cut(record.box)))
    return record if box == record.box else dataclasses.replace(record, box=box)
