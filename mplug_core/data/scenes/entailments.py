"""Entailment, neutral and contradiction, with a neutral that the words can't give away.

Half of the scenes have a curtain that may hide more objects. "there is a red circle" is entailed if one is to be seen;
otherwise it is contradicted, or neutral if there is a curtain that could hide one. "there is no red circle" is
contradicted if one is to be seen; otherwise entailed, or neutral with a curtain. So the same sentence takes all three
labels and only the picture decides. Within each template the labels are even: a curtain gives 2/3 neutral, its absence
2/3 of the label that a curtain would undo. (A guess that sees only whether there is a curtain is right in
(2/3 + 1/2) / 2 = 58 %; one that sees the text alone, in a third.)
"""

from __future__ import annotations

from random import Random

from .words import (
    COLOR,
    FULL,
    NUMBERS,
    OPPOSITE,
    PAIR,
    SHAPE,
    Description,
    absent,
    clear_relations,
    describe,
    perhaps,
    possible,
    present,
)
from .world import WORLD, Scene, World

Entailment = tuple[str, str]  # hypothesis, label
# A template gives (a sentence that what is to be seen settles, one that more objects could still change), or None.
Instances = tuple[str, str] | None

_FIELDS = (SHAPE, COLOR, PAIR, PAIR, FULL)


def entailments(scene: Scene, rng: Random, world: World = WORLD, count: int = 2) -> list[Entailment]:
    """Up to ``count`` different hypotheses with their labels."""
    found: dict[str, str] = {}
    for _ in range(20 * count):
        if len(found) == count:
            break
        template, positive = rng.choice(_TEMPLATES)
        instances = template(scene, rng, world)
        if instances is None:
            continue
        settled, open_ = instances
        # Settled for good: more objects can't undo that a red circle is there. Open: with a curtain nobody knows.
        if rng.random() < 1 / 3:
            found.setdefault(settled, "entailment" if positive else "contradiction")
        elif scene.curtain is not None:
            found.setdefault(open_, "neutral")
        else:
            found.setdefault(open_, "contradiction" if positive else "entailment")
    return list(found.items())


def _there_and_not(scene: Scene, rng: Random, world: World) -> tuple[Description, Description] | None:
    fields = rng.choice(_FIELDS)
    missing = absent((scene,), fields, rng, world)
    return (rng.choice(present((scene,), fields)), missing) if missing is not None else None


def _there_is(scene: Scene, rng: Random, world: World) -> Instances:
    found = _there_and_not(scene, rng, world)
    return found and (f"there is {found[0].with_article}", f"there is {found[1].with_article}")


def _there_is_no(scene: Scene, rng: Random, world: World) -> Instances:
    found = _there_and_not(scene, rng, world)
    return found and (f"there is no {found[0].text}", f"there is no {found[1].text}")


def _amounts(scene: Scene, rng: Random, world: World, text: str) -> Instances:
    fields = rng.choice((SHAPE, COLOR))
    number = rng.choice((2, 2, 3))
    kinds = list(possible(world, scene.split, fields))
    enough = [d for d in kinds if d.count(scene) >= number]
    fewer = [d for d in kinds if 0 < d.count(scene) < number] or [d for d in kinds if d.count(scene) < number]
    if not (enough and fewer):
        return None
    many, few = rng.choice(enough).plural, rng.choice(fewer).plural
    return text.format(NUMBERS[number], many), text.format(NUMBERS[number], few)


def _at_least(scene: Scene, rng: Random, world: World) -> Instances:
    return _amounts(scene, rng, world, "there are at least {} {}")


def _fewer_than(scene: Scene, rng: Random, world: World) -> Instances:
    return _amounts(scene, rng, world, "there are fewer than {} {}")


def _every(scene: Scene, rng: Random, world: World) -> Instances:
    """ "every circle is red": settled by a circle of another colour."""
    weights = possible(world, scene.split, PAIR)
    seen = {describe(o, SHAPE): {p.color for p in scene.objects if p.shape == o.shape} for o in scene.objects}
    open_ = [(d, next(iter(colors))) for d, colors in seen.items() if len(colors) == 1]
    settled = [
        (d, color)
        for d, colors in seen.items()
        for color in world.colors
        if colors != {color} and Description(color=color, shape=d.shape) in weights
    ]
    if not (open_ and settled):
        return None
    a, b = (f"every {d.text} is {color}" for d, color in (rng.choice(settled), rng.choice(open_)))
    return a, b


def _related(scene: Scene, rng: Random, world: World) -> Instances:
    """ "a red circle is left of a blue square", and the same two the other way round."""
    options = []
    for a, relation, b in clear_relations(scene, world):
        first, second = describe(a, PAIR), describe(b, PAIR)
        turned = OPPOSITE[relation]
        if first != second and not any(
            perhaps(x, turned, y, world) for x in first.among(scene) for y in second.among(scene)
        ):
            options.append((first, relation, second))
    if not options:
        return None
    first, relation, second = rng.choice(options)
    text = "{} is {} {}"
    return (
        text.format(first.with_article, relation, second.with_article),
        text.format(first.with_article, OPPOSITE[relation], second.with_article),
    )


# Template -> whether objects that are to be seen can prove it (or else can only refute it).
_TEMPLATES = (
    (_there_is, True),
    (_there_is_no, False),
    (_at_least, True),
    (_fewer_than, False),
    (_every, False),
    (_related, True),
)
