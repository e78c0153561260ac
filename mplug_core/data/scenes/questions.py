"""Questions with one right answer, in six kinds: color, shape, size, count, exists, relation.

Each answer is as likely as the others as far as the world allows. Yes/no relations come as twins on the same two
objects, one true and one false, so that nothing but their places in the picture tells them apart; relations are the
hardest kind and half of all questions.
"""

from __future__ import annotations

from random import Random

from .words import (
    ANY,
    COLOR,
    FULL,
    NUMBERS,
    OPPOSITE,
    PAIR,
    SHAPE,
    SIZE,
    Description,
    Fields,
    absent,
    clear_relations,
    describe,
    naming,
    perhaps,
    present,
)
from .world import WORLD, Scene, World

Question = tuple[str, str, str]  # question, answer, kind

KINDS = ("color", "shape", "size", "count", "exists", "relation")
# Makes counts other than "one" as frequent as they can be.
_COUNT_WEIGHTS = (0.5, 0.55, 2.0, 8.0, 16.0)


def questions(scene: Scene, rng: Random, world: World = WORLD, count: int = 6) -> list[Question]:
    """Up to ``count`` different questions: three relations where the scene has any, the rest of other kinds."""
    found = _relations(scene, rng, world)
    kinds = [k for k in KINDS if k != "relation"]
    rng.shuffle(kinds)
    for kind in kinds * 2:
        if len(found) >= count:
            break
        question = _SIMPLE[kind](scene, rng, world)
        if question is not None and question not in found:
            found.append(question)
    rng.shuffle(found)
    return found[:count]


def _attribute(scene: Scene, rng: Random, asked: str, references: tuple[Fields, ...]) -> Question | None:
    options = [
        (describe(o, fields), getattr(o, asked))
        for fields in references
        for o in scene.objects
        if describe(o, fields).count(scene) == 1
    ]
    if not options:
        return None
    referent, answer = rng.choice(options)
    return f"what {asked} is the {referent.text}", answer, asked


def _color(scene: Scene, rng: Random, world: World) -> Question | None:
    return _attribute(scene, rng, "color", (SHAPE, SHAPE, ("size", "shape"), SIZE))


def _shape(scene: Scene, rng: Random, world: World) -> Question | None:
    return _attribute(scene, rng, "shape", (COLOR, COLOR, ("size", "color"), SIZE))


def _size(scene: Scene, rng: Random, world: World) -> Question | None:
    return _attribute(scene, rng, "size", (SHAPE, COLOR, PAIR, PAIR))


def _count(scene: Scene, rng: Random, world: World) -> Question | None:
    fields = rng.choices((SHAPE, COLOR, SIZE, ANY), (4, 4, 1, 2))[0]
    by_count: dict[int, list[Description]] = {}
    for d in present((scene,), fields):
        by_count.setdefault(d.count(scene), []).append(d)
    nothing = absent((scene,), fields, rng, world)
    if nothing is not None:
        by_count[0] = [nothing]
    number = rng.choices(list(by_count), [_COUNT_WEIGHTS[min(n, 4)] for n in by_count])[0]
    return f"how many {rng.choice(by_count[number]).plural} are there", NUMBERS[number], "count"


def _exists(scene: Scene, rng: Random, world: World) -> Question | None:
    fields = rng.choice((SHAPE, COLOR, PAIR, PAIR, FULL, FULL))
    missing = absent((scene,), fields, rng, world)
    if missing is None:
        return None
    there = rng.choice(present((scene,), fields))
    thing, answer = rng.choice(((there, "yes"), (missing, "no")))
    return f"is there {thing.with_article}", answer, "exists"


_SIMPLE = {"color": _color, "shape": _shape, "size": _size, "count": _count, "exists": _exists}


def _relations(scene: Scene, rng: Random, world: World) -> list[Question]:
    """A twin of yes/no questions on one pair of objects, and a third question; [] if no relation is clear."""
    facts = clear_relations(scene, world)
    if not facts:
        return []
    a, relation, b = rng.choice(facts)
    subject, other = naming(a, scene).text, naming(b, scene).text
    found = [
        (f"is the {subject} {relation} the {other}", "yes", "relation"),
        (f"is the {subject} {OPPOSITE[relation]} the {other}", "no", "relation"),
    ]
    a, relation, b = rng.choice(facts)
    # Asked with an open answer only if nothing else could be meant.
    only = [
        (x, r, y)
        for x, r, y in facts
        if describe(x, PAIR).count(scene) == 1
        and not any(perhaps(o, r, y, world) for o in scene.objects if o is not x and o is not y)
    ]
    if only and rng.random() < 0.6:
        x, r, y = rng.choice(only)
        found.append((f"what is {r} the {naming(y, scene).text}", describe(x, PAIR).text, "relation"))
    else:
        # "left or right of": the order of the words is fixed, so it can't hint at the answer.
        words = "left or right of" if relation in ("left of", "right of") else "above or below"
        text = f"is the {naming(a, scene).text} {words} the {naming(b, scene).text}"
        found.append((text, relation.split()[0], "relation"))
    return found
