"""True and false statements on two images.

A template is used on a couple of images only if it has both a true and a false instance there, with descriptions of
the same detail; then a coin decides. So each template is true half of the time, whatever it names, and both images
are needed.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from .words import ANY, COLOR, FULL, NUMBERS, PAIR, SHAPE, SIZE, Description, Fields, absent, present
from .world import WORLD, Scene, World

Statement = tuple[str, bool]
Counts = tuple[int, int]  # how many the left and the right image have
Template = tuple[str, Callable[[Counts], bool], bool]  # text, its truth, whether it is about existence

_NUMBER_TEMPLATE = "both images have the same number of {many}"

_TEMPLATES: tuple[Template, ...] = (
    ("both images contain {one}", lambda n: n[0] > 0 and n[1] > 0, True),
    ("neither image contains {one}", lambda n: n[0] == n[1] == 0, True),
    ("exactly one image contains {one}", lambda n: (n[0] > 0) != (n[1] > 0), True),
    ("only the left image contains {one}", lambda n: n[0] > 0 and n[1] == 0, True),
    ("only the right image contains {one}", lambda n: n[1] > 0 and n[0] == 0, True),
    ("the left image has more {many} than the right image", lambda n: n[0] > n[1], False),
    ("the right image has more {many} than the left image", lambda n: n[1] > n[0], False),
    ("the left image has fewer {many} than the right image", lambda n: n[0] < n[1], False),
    ("the right image has fewer {many} than the left image", lambda n: n[1] < n[0], False),
    (_NUMBER_TEMPLATE, lambda n: n[0] == n[1], False),
)
# Makes up for templates that seldom have both a true and a false instance.
_WEIGHTS = (6, 1, 1.5, 1, 1, 1, 1, 1, 1, 4)


def statements(left: Scene, right: Scene, rng: Random, world: World = WORLD, count: int = 2) -> list[Statement]:
    """Up to ``count`` different statements on the couple."""
    found: dict[str, bool] = {}
    for _ in range(20 * count):
        if len(found) == count:
            break
        if rng.random() < 0.1:
            statement = _total(left, right, rng)
        else:
            statement = _instance(rng.choices(_TEMPLATES, _WEIGHTS)[0], left, right, rng, world)
        if statement is not None:
            found.setdefault(*statement)
    return list(found.items())


def _counts(d: Description, left: Scene, right: Scene) -> Counts:
    return d.count(left), d.count(right)


def _instance(template: Template, left: Scene, right: Scene, rng: Random, world: World) -> Statement | None:
    text, truth, about_existence = template
    fields: Fields = rng.choice((SHAPE, COLOR, PAIR, PAIR, FULL) if about_existence else (SHAPE, COLOR, SIZE, ANY))
    if fields == ANY and (text == _NUMBER_TEMPLATE or len(left.objects) == len(right.objects)):
        return None  # "objects" has one instance only: even by the symmetry of left and right, if they differ
    candidates = present((left, right), fields)
    if about_existence:
        nowhere = absent((left, right), fields, rng, world)
        candidates += [nowhere] if nowhere is not None else []
    # Ways to be true or false (only left, both, ...) are drawn first, so that no single one stands for the label.
    ways: dict[bool, dict[tuple[int, ...], list[Description]]] = {True: {}, False: {}}
    for d in candidates:
        n = _counts(d, left, right)
        way = (min(n[0], 1), min(n[1], 1)) if about_existence else ((n[0] > n[1]) - (n[0] < n[1]),)
        ways[truth(n)].setdefault(way, []).append(d)
    if fields != ANY and not (ways[True] and ways[False]):
        return None
    label = rng.random() < 0.5
    if not ways[label]:
        return None
    d = rng.choice(ways[label][rng.choice(list(ways[label]))])
    return text.format(one=d.with_article, many=d.plural), label


def _total(left: Scene, right: Scene, rng: Random) -> Statement | None:
    """The number of one kind in both images together; false instances take another kind's number of the couple."""
    fields = rng.choice((SHAPE, COLOR))
    kinds = present((left, right), fields)
    totals = [sum(_counts(d, left, right)) for d in kinds]
    pairs = [(d, n, m) for d, n in zip(kinds, totals, strict=True) for m in totals if m != n]
    if not pairs:
        return None
    d, right_number, wrong_number = rng.choice(pairs)
    label = rng.random() < 0.5
    number = right_number if label else wrong_number
    noun = d.text if number == 1 else d.plural
    return f"the two images together contain {NUMBERS[number]} {noun}", label
