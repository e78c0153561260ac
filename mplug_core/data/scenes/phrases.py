"""Referring phrases: each points at exactly one object of the scene, by attributes, by place or by a relation."""

from __future__ import annotations

from random import Random

from .words import (
    ANY,
    COLOR,
    FULL,
    PAIR,
    SHAPE,
    SIZE,
    SUPERLATIVES,
    clear_relations,
    describe,
    distance,
    naming,
    perhaps,
    present,
)
from .world import WORLD, Box, Scene, World

Phrase = tuple[str, Box]  # phrase, box in fractions of the image


def phrases(scene: Scene, rng: Random, world: World = WORLD, count: int = 2) -> list[Phrase]:
    """Up to ``count`` different phrases; attributes half of the time, places and relations where they are clear."""
    found: dict[str, Box] = {}
    for _ in range(3 * count):
        if len(found) == count:
            break
        way = rng.choices((_by_attributes, _by_place, _by_relation), (2, 1, 1))[0]
        options = way(scene, world) or _by_attributes(scene, world)
        phrase, box = rng.choice(options)
        found[phrase] = box
    return list(found.items())


def _by_attributes(scene: Scene, world: World) -> list[Phrase]:
    return [
        (f"the {describe(o, fields).text}", o.box)
        for fields in (SHAPE, COLOR, SIZE, PAIR, PAIR, FULL, FULL)
        for o in scene.objects
        if describe(o, fields).count(scene) == 1
    ]


def _by_place(scene: Scene, world: World) -> list[Phrase]:
    """The outermost of two or more that the same words fit, half a margin beyond the next."""
    found = []
    for fields in (ANY, SHAPE, COLOR, SIZE):
        for d in present((scene,), fields):
            group = d.among(scene)
            for word, relation in SUPERLATIVES.items():
                for o in group:
                    others = [p for p in group if p is not o]
                    if others and all(distance(o, relation, p) >= world.margin / 2 for p in others):
                        found.append((f"the {word} {d.text}", o.box))
    return found


def _by_relation(scene: Scene, world: World) -> list[Phrase]:
    """An object that only its place tells from another of the same description."""
    found = []
    for a, relation, b in clear_relations(scene, world):
        for fields in (SHAPE, COLOR, ANY):
            d = describe(a, fields)
            rivals = [o for o in d.among(scene) if o is not a and o is not b]
            needed = fields == ANY or d.count(scene) > 1
            if needed and not any(perhaps(o, relation, b, world) for o in rivals):
                found.append((f"the {d.text} {relation} the {naming(b, scene).text}", a.box))
    return found
