"""How texts speak about objects: descriptions ("large red circle", "red objects") and relations ("left of").

Relations have margins: ``clearly`` is only true where anyone would say so, ``perhaps`` wherever someone could. A text
is made only if its claim is clear and every other reading is out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from random import Random

from .world import Scene, SceneObject, World

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight")
# Relation -> axis, and the sign of (subject's centre - object's centre) on it.
RELATIONS = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
SUPERLATIVES = {"leftmost": "left of", "rightmost": "right of", "highest": "above", "lowest": "below"}

# Which attributes a description names.
Fields = tuple[str, ...]
SHAPE: Fields = ("shape",)
COLOR: Fields = ("color",)
SIZE: Fields = ("size",)
PAIR: Fields = ("color", "shape")
FULL: Fields = ("size", "color", "shape")
ANY: Fields = ()


@dataclass(frozen=True)
class Description:
    """A kind of objects; attributes that are None are left open."""

    size: str | None = None
    color: str | None = None
    shape: str | None = None

    def matches(self, thing: SceneObject) -> bool:
        return (
            (self.size is None or self.size == thing.size)
            and (self.color is None or self.color == thing.color)
            and (self.shape is None or self.shape == thing.shape)
        )

    def among(self, scene: Scene) -> list[SceneObject]:
        return [o for o in scene.objects if self.matches(o)]

    def count(self, scene: Scene) -> int:
        return sum(self.matches(o) for o in scene.objects)

    @property
    def text(self) -> str:
        return " ".join(w for w in (self.size, self.color, self.shape or "object") if w)

    @property
    def plural(self) -> str:
        return self.text + ("es" if self.text.endswith("s") else "s")

    @property
    def with_article(self) -> str:
        return f"{'an' if self.text[0] in 'aeiou' else 'a'} {self.text}"


def describe(thing: SceneObject, fields: Fields) -> Description:
    return Description(**{f: getattr(thing, f) for f in fields})


def present(scenes: Iterable[Scene], fields: Fields) -> list[Description]:
    """The different descriptions by ``fields`` of what the scenes hold, in order of appearance."""
    return list(dict.fromkeys(describe(o, fields) for scene in scenes for o in scene.objects))


def possible(world: World, split: str, fields: Fields) -> dict[Description, float]:
    """All descriptions by ``fields`` -> how likely an object of ``split`` fits."""
    weights: dict[Description, float] = {}
    for (color, shape), weight in world.pair_weights(split).items():
        for size in world.sizes:
            values = {"size": size, "color": color, "shape": shape}
            thing = Description(**{f: values[f] for f in fields})
            weights[thing] = weights.get(thing, 0.0) + weight
    return weights


def absent(scenes: tuple[Scene, ...], fields: Fields, rng: Random, world: World) -> Description | None:
    """A description that fits nothing in any of the ``scenes``; None if everything is there.

    Drawn with the frequency of real objects, so that the words alone don't tell; near misses (one attribute off) are
    preferred, so that knowing the words in the picture is not enough.
    """
    objects = [o for scene in scenes for o in scene.objects]
    candidates = {
        d: weight * (1 + 2 * max(sum(getattr(d, f) == getattr(o, f) for f in fields) for o in objects))
        for d, weight in possible(world, scenes[0].split, fields).items()
        if not any(d.matches(o) for o in objects)
    }
    return rng.choices(list(candidates), list(candidates.values()))[0] if candidates else None


def naming(thing: SceneObject, scene: Scene) -> Description:
    """The usual unambiguous name: colour and shape, with the size only where it is needed."""
    short = describe(thing, PAIR)
    return short if short.count(scene) == 1 else describe(thing, FULL)


def distance(a: SceneObject, relation: str, b: SceneObject) -> float:
    """How far ``a``'s centre is on the ``relation`` side of ``b``'s, in fractions of the image; below 0: other side."""
    axis, sign = RELATIONS[relation]
    return sign * (a.center[axis] - b.center[axis])


def clearly(a: SceneObject, relation: str, b: SceneObject, world: World) -> bool:
    """Far enough on that side, and much further than it is off along the other axis."""
    along = distance(a, relation, b)
    across = abs(a.center[1 - RELATIONS[relation][0]] - b.center[1 - RELATIONS[relation][0]])
    return along >= world.margin and across <= 0.6 * along


def perhaps(a: SceneObject, relation: str, b: SceneObject, world: World) -> bool:
    """Not clearly out: on that side, or so near to the middle that someone may take it for that."""
    return distance(a, relation, b) > -world.margin / 4


def clear_relations(scene: Scene, world: World) -> list[tuple[SceneObject, str, SceneObject]]:
    """All (subject, relation, object) that are clearly true; each pair occurs in both directions."""
    return [
        (a, r, b)
        for a in scene.objects
        for b in scene.objects
        if a is not b
        for r in RELATIONS
        if clearly(a, r, b, world)
    ]
