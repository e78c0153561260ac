"""The world that scenes are drawn from: vocabularies as data, the scene graph, and sampling from a seed.

Geometry is in fractions of the image (0..1), so that a scene is the same at every resolution. Scene ``index`` of a
``seed`` and ``split`` depends on nothing else: not on how many scenes are made, nor on how many processes make them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Any

from mplug_core.errors import DataError

Point = tuple[float, float]
Box = tuple[float, float, float, float]  # x0, y0, x1, y1

SPLIT_NAMES = ("train", "val", "held_out")
CURTAIN_SIDES = ("left", "right", "top", "bottom")


def _regular(corners: int, phase: float = 0.0) -> tuple[Point, ...]:
    """Outline of a regular polygon with its first corner straight up, turned by ``phase`` radians."""
    angles = (phase + 2 * math.pi * i / corners for i in range(corners))
    return tuple((math.sin(a), -math.cos(a)) for a in angles)


_CROSS = tuple(
    (x / 3, y / 3)
    for x, y in (
        (-1, -3),
        (1, -3),
        (1, -1),
        (3, -1),
        (3, 1),
        (1, 1),
        (1, 3),
        (-1, 3),
        (-1, 1),
        (-3, 1),
        (-3, -1),
        (-1, -1),
    )
)


@dataclass(frozen=True)
class World:
    """What can occur. A richer world is another instance: names, outlines, colours and sizes are data.

    The default has evenly spaced hues and two sizes with a gap between them, so that no attribute is a matter of taste.
    """

    shapes: Mapping[str, tuple[Point, ...]] = field(
        default_factory=lambda: {
            "circle": _regular(48),
            "square": _regular(4, math.pi / 4),
            "triangle": _regular(3),
            "cross": _CROSS,
        }
    )
    colors: Mapping[str, tuple[int, int, int]] = field(
        default_factory=lambda: {
            "red": (215, 35, 40),
            "green": (35, 165, 55),
            "blue": (40, 70, 225),
            "yellow": (245, 225, 45),
            "purple": (165, 45, 190),
            "cyan": (40, 205, 225),
        }
    )
    sizes: Mapping[str, tuple[float, float]] = field(
        # Longer side of the object's box as a fraction of the image.
        default_factory=lambda: {"small": (0.17, 0.19), "large": (0.27, 0.30)}
    )
    counts: Mapping[int, float] = field(default_factory=lambda: {1: 0.12, 2: 0.26, 3: 0.32, 4: 0.30})
    held_out: tuple[tuple[str, str], ...] = (("red", "square"), ("blue", "triangle"), ("yellow", "cross"))
    echo: float = 0.5  # chance that an object takes its shape or colour from an earlier one: counts above one
    curtain: float = 0.5  # share of scenes where a curtain may hide more; see entailments
    curtain_depth: tuple[float, float] = (0.315, 0.335)  # deeper than the largest object, which could be behind it
    gap: float = 0.04  # least free space between two boxes
    border: float = 0.02  # least free space to the edge of the image and of the curtain
    tilt: float = 10.0  # objects are turned by up to this many degrees
    margin: float = 1 / 6  # least distance of two centres for a spatial relation to be spoken of

    def __post_init__(self) -> None:
        pairs = set(self.held_out)
        if unknown := [p for p in pairs if p[0] not in self.colors or p[1] not in self.shapes]:
            raise DataError(f"held-out pairs that this world does not have: {unknown}")
        seen = [(c, s) for c in self.colors for s in self.shapes if (c, s) not in pairs]
        if {c for c, _ in seen} != set(self.colors) or {s for _, s in seen} != set(self.shapes):
            raise DataError("every colour and every shape must occur outside the held-out pairs")

    def pair_weights(self, split: str) -> dict[tuple[str, str], float]:
        """How likely an object of ``split`` has each (colour, shape): held-out pairs have no entry in train and val.

        Texts about absent objects draw from this too; otherwise "a red square" would mean "no" before looking.
        """
        pairs = [(c, s) for c in self.colors for s in self.shapes]
        if split != "held_out":
            return {p: 1.0 for p in pairs if p not in self.held_out}
        total = sum(self.counts.values())
        forced = sum(w / n for n, w in self.counts.items()) / total  # share of objects that must be a held-out pair
        return {
            p: (1 - forced) / len(pairs) + (forced / len(self.held_out) if p in self.held_out else 0.0) for p in pairs
        }


WORLD = World()

SMALL_WORLD = World(
    shapes={name: WORLD.shapes[name] for name in ("circle", "square", "triangle")},
    colors={name: WORLD.colors[name] for name in ("red", "green", "blue", "yellow")},
    counts={1: 0.3, 2: 0.4, 3: 0.3},
    held_out=(("red", "square"),),
    curtain=0.0,
)
"""Learned in minutes: three shapes, four colours, one to three objects."""

WORLDS = {"full": WORLD, "small": SMALL_WORLD}
"""Worlds by name."""


@dataclass(frozen=True)
class SceneObject:
    """One object; ``box`` encloses it tightly, in fractions of the image; ``angle`` in degrees."""

    shape: str
    color: str
    size: str
    box: Box
    angle: float = 0.0

    @property
    def center(self) -> Point:
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2


@dataclass(frozen=True)
class Scene:
    """Objects in no particular order (no two alike in shape, colour and size) and the curtain's box, if any."""

    objects: tuple[SceneObject, ...]
    curtain: Box | None = None
    split: str = "train"

    def to_record(self, image: str, size: int) -> dict[str, Any]:
        """The line of scenes.jsonl: boxes in pixels of an image ``size`` x ``size``."""

        def pixels(box: Box) -> list[float]:
            return [round(v * size, 1) for v in box]

        return {
            "image": image,
            "size": [size, size],
            "objects": [
                {"shape": o.shape, "color": o.color, "size": o.size, "box": pixels(o.box)} for o in self.objects
            ],
            "curtain": pixels(self.curtain) if self.curtain else None,
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any], split: str = "train") -> Scene:
        """The scene graph of a line of scenes.jsonl (angles are not kept there)."""
        width, height = record["size"]

        def fractions(box: list[float]) -> Box:
            return box[0] / width, box[1] / height, box[2] / width, box[3] / height

        objects = tuple(SceneObject(o["shape"], o["color"], o["size"], fractions(o["box"])) for o in record["objects"])
        curtain = record.get("curtain")
        return cls(objects, fractions(curtain) if curtain else None, split)


def outline(world: World, shape: str, angle: float) -> list[Point]:
    """Corners of ``shape`` turned by ``angle`` degrees, moved and scaled: box centred on 0, longer side 1."""
    c, s = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    points = [(x * c - y * s, x * s + y * c) for x, y in world.shapes[shape]]
    x0, x1 = min(x for x, _ in points), max(x for x, _ in points)
    y0, y1 = min(y for _, y in points), max(y for _, y in points)
    scale = 1 / max(x1 - x0, y1 - y0)
    return [((x - (x0 + x1) / 2) * scale, (y - (y0 + y1) / 2) * scale) for x, y in points]


def stream(seed: int, split: str, index: int, purpose: str) -> Random:
    """Random numbers of their own for each purpose, so that a change in one leaves the others as they are."""
    return Random(f"mplug scenes {seed} {split} {index} {purpose}")


def sample_scene(seed: int, split: str, index: int, world: World = WORLD) -> Scene:
    """Scene ``index`` of ``split`` ("train", "val": no held-out pair; "held_out": at least one in each scene)."""
    if split not in SPLIT_NAMES:
        raise DataError(f"no split of scenes is called {split!r}", hint=f"one of {', '.join(SPLIT_NAMES)}")
    rng = stream(seed, split, index, "scene")
    count = rng.choices(list(world.counts), list(world.counts.values()))[0]
    kinds = _sample_kinds(rng, split, count, world)
    # The curtain is drawn independently of the objects, so that it says nothing about them.
    curtain = _sample_curtain(rng, world) if rng.random() < world.curtain else None
    return Scene(_sample_layout(rng, kinds, curtain, world), curtain, split)


def _sample_kinds(rng: Random, split: str, count: int, world: World) -> list[tuple[str, str, str]]:
    """``count`` different (shape, colour, size)."""
    allowed = set(world.pair_weights(split))
    kinds: list[tuple[str, str, str]] = []
    while len(kinds) < count:
        color, shape = rng.choice(list(world.colors)), rng.choice(list(world.shapes))
        if split == "held_out" and not kinds:
            color, shape = rng.choice(world.held_out)
        elif kinds and rng.random() < world.echo:
            like = rng.choice(kinds)
            shape, color = (like[0], color) if rng.random() < 0.5 else (shape, like[1])
        kind = (shape, color, rng.choice(list(world.sizes)))
        if (color, shape) in allowed and kind not in kinds:
            kinds.append(kind)
    return kinds


def _sample_curtain(rng: Random, world: World) -> Box:
    depth = rng.uniform(*world.curtain_depth)
    return {
        "left": (0.0, 0.0, depth, 1.0),
        "right": (1 - depth, 0.0, 1.0, 1.0),
        "top": (0.0, 0.0, 1.0, depth),
        "bottom": (0.0, 1 - depth, 1.0, 1.0),
    }[rng.choice(CURTAIN_SIDES)]


def _free_space(curtain: Box | None) -> Box:
    if curtain is None:
        return 0.0, 0.0, 1.0, 1.0
    x0, y0, x1, y1 = curtain
    if y1 - y0 == 1.0:
        return (x1, 0.0, 1.0, 1.0) if x0 == 0.0 else (0.0, 0.0, x0, 1.0)
    return (0.0, y1, 1.0, 1.0) if y0 == 0.0 else (0.0, 0.0, 1.0, y0)


def _sample_layout(
    rng: Random, kinds: list[tuple[str, str, str]], curtain: Box | None, world: World, attempts: int = 2000
) -> tuple[SceneObject, ...]:
    """Places for all ``kinds``: what to draw is settled before, so that crowded scenes do not bias the vocabulary."""
    x0, y0, x1, y1 = _free_space(curtain)
    x0, y0, x1, y1 = x0 + world.border, y0 + world.border, x1 - world.border, y1 - world.border
    for attempt in range(attempts):
        ease = 1 - attempt / attempts  # crowded scenes move towards the small end of each size
        objects: list[SceneObject] = []
        # Large objects first: they find a place less easily.
        for shape, color, size in sorted(kinds, key=lambda k: -world.sizes[k[2]][1]):
            low, high = world.sizes[size]
            side = low + (high - low) * ease * rng.random()
            angle = rng.uniform(-world.tilt, world.tilt)
            corners = outline(world, shape, angle)
            w = 2 * side * max(x for x, _ in corners)
            h = 2 * side * max(y for _, y in corners)
            if w > x1 - x0 or h > y1 - y0:
                break
            for _ in range(30):
                x, y = rng.uniform(x0, x1 - w), rng.uniform(y0, y1 - h)
                box = (x, y, x + w, y + h)
                if not any(_closer(box, other.box, world.gap) for other in objects):
                    objects.append(SceneObject(shape, color, size, box, angle))
                    break
            else:
                break
        if len(objects) == len(kinds):
            rng.shuffle(objects)
            return tuple(objects)
    raise DataError(f"no place for {len(kinds)} objects", hint="this World needs smaller sizes, gaps or counts")


def _closer(a: Box, b: Box, gap: float) -> bool:
    return a[0] - gap < b[2] and b[0] - gap < a[2] and a[1] - gap < b[3] and b[1] - gap < a[3]
