"""Captions that name every object once, and the scorer that says whether a caption does.

Grammar: object = "a SIZE COLOR SHAPE"; a caption is a list of objects joined by "and", from left to right unless it
starts with another order ("from top to bottom"), or a chain ("A left of B left of C"). The start of a caption settles
its order, so the next object is never a guess. Chains are what teaches relation words.
"""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from random import Random

from .words import FULL, describe, distance
from .world import WORLD, Scene, SceneObject, World

_STARTS = ("", "there is ", "a picture of ")
_ORDERS = {
    "from left to right ": "left of",
    "from right to left ": "right of",
    "from top to bottom ": "above",
    "from bottom to top ": "below",
}
_CHAINS = ("left of", "right of", "above", "below")
_FILLERS = frozenset(word for phrase in (*_STARTS, *_ORDERS, *_CHAINS, "a", "an", "and") for word in phrase.split())

Mention = tuple[str | None, str, str]  # size if it is named, colour, shape


def captions(scene: Scene, rng: Random, world: World = WORLD) -> list[str]:
    """Two different captions: a list, and a list in another order or a chain."""
    if len(scene.objects) == 1:
        return [start + _listed(scene, "left of") for start in rng.sample(_STARTS, 2)]
    first = rng.choice(_STARTS) + _listed(scene, "left of")
    chains = [r for r in _CHAINS if all(distance(a, r, b) >= world.margin for a, b in _neighbours(scene, r))]
    if chains and rng.random() < 0.7:
        relation = rng.choice(chains)
        second = f" {relation} ".join(describe(o, FULL).with_article for o in _sorted(scene, relation))
    else:
        start = rng.choice(list(_ORDERS))
        second = start + _listed(scene, _ORDERS[start])
    return [first, second]


def _sorted(scene: Scene, relation: str) -> list[SceneObject]:
    """Objects so that each is on the ``relation`` side of the next."""
    return sorted(scene.objects, key=lambda o: -distance(o, relation, scene.objects[0]))


def _neighbours(scene: Scene, relation: str) -> list[tuple[SceneObject, SceneObject]]:
    row = _sorted(scene, relation)
    return list(pairwise(row))


def _listed(scene: Scene, relation: str) -> str:
    return " and ".join(describe(o, FULL).with_article for o in _sorted(scene, relation))


def parse_caption(caption: str, world: World = WORLD) -> list[Mention] | None:
    """The objects that a caption names, in its order; None if it is no caption of the grammar.

    A size may be left out; a stray attribute ("a red red circle", "a red and a circle") makes it invalid.
    """
    mentions: list[Mention] = []
    size = color = None
    for word in caption.lower().replace(".", " ").replace(",", " ").split():
        if word in world.sizes and size is None and color is None:
            size = word
        elif word in world.colors and color is None:
            color = word
        elif word in world.shapes and color is not None:
            mentions.append((size, color, word))
            size = color = None
        elif word not in _FILLERS or size or color:
            return None
    return None if size or color else mentions


def caption_correct(caption: str, scene: Scene, world: World = WORLD) -> bool:
    """Whether the caption names exactly the scene's objects, each once, in any order.

    Sizes count where they are named. What a chain says about positions is not checked.
    """
    mentions = parse_caption(caption, world)
    if mentions is None or len(mentions) != len(scene.objects):
        return False
    left = Counter((o.size, o.color, o.shape) for o in scene.objects)
    for mention in mentions:
        if mention[0] is not None:
            left[mention] -= 1
    if min(left.values()) < 0:
        return False
    pairs = Counter((color, shape) for (_, color, shape), n in left.items() for _ in range(n))
    return pairs == Counter((color, shape) for size, color, shape in mentions if size is None)
