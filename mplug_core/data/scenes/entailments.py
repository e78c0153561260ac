"""Entailment, neutral and contradiction, without shortcuts: only objects with all the named attributes tell the label.

Half of the scenes have a curtain that may hide more objects. There are two families of hypotheses:

- About existence: "there is a red circle" is entailed if one is to be seen; otherwise it is contradicted, or neutral
  if a curtain could hide one. "there is no red circle" is its opposite; a blue circle refutes "every circle is red".
- About one object: "the red circle is small" is entailed or contradicted by the red circle that is to be seen, with a
  curtain or without. If none is to be seen, a curtain may hide it: neutral.

Three rules keep guesses near chance. Each named attribute is to be seen somewhere in the picture. A label is drawn
among hypotheses that are alike in template and in how often each named attribute is to be seen, so that neither the
picture nor the words one by one tell anything. Scenes without a curtain, where nothing is neutral, give fewer
hypotheses. (A guess that sees the template and whether there is a curtain is right in half of the first family and of
the scenes without a curtain, and in a third of the rest: 41 % in all.)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from random import Random

from .words import FULL, NUMBERS, OPPOSITE, PAIR, Description, Fields, clear_relations, describe, possible
from .world import WORLD, Scene, World

Entailment = tuple[str, str]  # hypothesis, label

ENTAILED, NEUTRAL, CONTRADICTED = "entailment", "neutral", "contradiction"

_SIZE_SHAPE: Fields = ("size", "shape")
_SIZE_COLOR: Fields = ("size", "color")


@dataclass(frozen=True)
class _Claim:
    """A hypothesis with its label on a scene; ``named``: what it speaks of; ``weight``: how often it is drawn.

    What is to be seen has weight 1; the rest as much as such objects are frequent, so that the words don't tell it.
    """

    text: str
    label: str
    named: tuple[Description, ...]
    weight: float = 1.0


class _View:
    """What is to be seen of a scene, and what its world could hide."""

    def __init__(self, scene: Scene, world: World) -> None:
        self.scene, self.world = scene, world
        self.seen = Counter((field, getattr(o, field)) for o in scene.objects for field in FULL)
        self.allowed = set(world.pair_weights(scene.split))
        self._kinds: dict[Fields, dict[Description, float]] = {}

    def kinds(self, fields: Fields) -> dict[Description, float]:
        """Descriptions by ``fields`` of which each attribute is to be seen, -> how frequent such objects are."""
        if fields not in self._kinds:
            weights = possible(self.world, self.scene.split, fields)
            seen = {value for _, value in self.seen}
            self._kinds[fields] = {d: w for d, w in weights.items() if {d.size, d.color, d.shape} - {None} <= seen}
        return self._kinds[fields]

    def counts(self, d: Description) -> list[tuple[str, int]]:
        """How many objects have each named attribute, whatever else they are."""
        return [(field, self.seen[field, value]) for field in FULL if (value := getattr(d, field)) is not None]

    def values(self, field: str) -> list[str]:
        return [value for known, value in self.seen if known == field]

    def agree(self, d: Description, field: str, value: str) -> Description | None:
        """``d`` with one more attribute; None if the world has no such object."""
        whole = replace(d, **{field: value})
        either = whole.color is None or whole.shape is None
        return whole if either or (whole.color, whole.shape) in self.allowed else None


Template = Callable[[_View], Iterator[_Claim]]


def entailments(scene: Scene, rng: Random, world: World = WORLD, count: int = 2) -> list[Entailment]:
    """Different hypotheses with their labels: about ``count`` a scene, more with a curtain than without.

    A scene of one object gives none: all that is to be seen is true of it.
    """
    hidden = scene.curtain is not None
    if world.curtain:
        count = 5 * count if hidden else (count + 1) // 2
    view = _View(scene, world)
    made: dict[Template, dict[Fields, list[dict[str, list[_Claim]]]]] = {}
    found: dict[str, str] = {}
    for _ in range(count):
        # A template that does not fit is not replaced: the families' shares decide how much can be guessed.
        template, _, with_curtain, without = rng.choices(_TEMPLATES, [t[1] for t in _TEMPLATES])[0]
        if template not in made:
            made[template] = _alike(view, template(view), with_curtain if hidden else without)
        if not made[template]:
            continue
        groups = made[template][rng.choice(list(made[template]))]
        claims = rng.choice(groups)
        claims = claims[rng.choice(list(claims))]
        claim = rng.choices(claims, [c.weight for c in claims])[0]
        found.setdefault(claim.text, claim.label)
    return list(found.items())


def _alike(
    view: _View, claims: Iterator[_Claim], labels: tuple[str, ...]
) -> dict[Fields, list[dict[str, list[_Claim]]]]:
    """Claims by the attributes that they name, in groups in which each attribute is seen equally often.

    Only groups that have all ``labels``.
    """
    groups: dict[tuple[tuple[str, int], ...], dict[str, list[_Claim]]] = {}
    for claim in claims:
        key = tuple(pair for d in claim.named for pair in view.counts(d))
        groups.setdefault(key, {label: [] for label in labels})[claim.label].append(claim)
    found: dict[Fields, list[dict[str, list[_Claim]]]] = {}
    for key, group in groups.items():
        if all(group.values()):
            found.setdefault(tuple(field for field, _ in key), []).append(group)
    return found


# ---- about existence


def _settled(view: _View, proven: bool, positive: bool) -> str:
    """The label of a claim that what is to be seen proves (or, if not ``positive``, refutes), or else leaves open."""
    if proven:
        return ENTAILED if positive else CONTRADICTED
    if view.scene.curtain is not None:
        return NEUTRAL
    return CONTRADICTED if positive else ENTAILED


def _there_is(view: _View) -> Iterator[_Claim]:
    for fields in (PAIR, _SIZE_SHAPE, _SIZE_COLOR, FULL):
        for d, weight in view.kinds(fields).items():
            there = d.count(view.scene) > 0
            label = _settled(view, there, True)
            yield _Claim(f"there is {d.with_article}", label, (d,), 1.0 if there else weight)


def _there_is_no(view: _View) -> Iterator[_Claim]:
    for fields in (PAIR, _SIZE_SHAPE, _SIZE_COLOR, FULL):
        for d, weight in view.kinds(fields).items():
            there = d.count(view.scene) > 0
            label = _settled(view, there, False)
            yield _Claim(f"there is no {d.text}", label, (d,), 1.0 if there else weight)


def _amounts(view: _View, text: str, positive: bool) -> Iterator[_Claim]:
    for fields in (PAIR, _SIZE_SHAPE, _SIZE_COLOR):
        for d, weight in view.kinds(fields).items():
            label = _settled(view, d.count(view.scene) >= 2, positive)
            yield _Claim(text.format(NUMBERS[2], d.plural), label, (d,), weight)


def _at_least(view: _View) -> Iterator[_Claim]:
    yield from _amounts(view, "there are at least {} {}", True)


def _fewer_than(view: _View) -> Iterator[_Claim]:
    yield from _amounts(view, "there are fewer than {} {}", False)


def _every(view: _View) -> Iterator[_Claim]:
    """ "every circle is red": refuted by a circle of another colour."""
    for shape in view.values("shape"):
        own = {o.color for o in view.scene.objects if o.shape == shape}
        for color in view.values("color"):
            if d := view.agree(Description(shape=shape), "color", color):
                yield _Claim(f"every {shape} is {color}", _settled(view, own != {color}, False), (d,))


# ---- about one object


def _is(view: _View) -> Iterator[_Claim]:
    return _attributes(view, "the {} is {}", (ENTAILED, CONTRADICTED))


def _is_not(view: _View) -> Iterator[_Claim]:
    return _attributes(view, "the {} is not {}", (CONTRADICTED, ENTAILED))


def _attributes(view: _View, text: str, if_true_false: tuple[str, str]) -> Iterator[_Claim]:
    """ "the red circle is small", "the small circle is red", "the small red object is a circle"."""
    for asked in FULL:
        for subject, weight in view.kinds(tuple(f for f in FULL if f != asked)).items():
            own = [getattr(o, asked) for o in subject.among(view.scene)]
            if len(own) > 1 or (not own and view.scene.curtain is None):
                continue  # no one knows which is meant, or nothing is
            for value in view.values(asked):
                whole = view.agree(subject, asked, value)
                if whole is None:
                    continue
                said = Description(shape=value).with_article if asked == "shape" else value
                label = if_true_false[own != [value]] if own else NEUTRAL
                # The subject is named twice, so that groups are of one question: size, colour or shape.
                yield _Claim(text.format(subject.text, said), label, (subject, whole), 1.0 if own else weight)


def _related(view: _View) -> Iterator[_Claim]:
    """ "the red circle is left of the blue square"."""
    scene = view.scene
    facts = [
        (first, relation, second)
        for a, relation, b in clear_relations(scene, view.world)
        if (first := describe(a, PAIR)).count(scene) == 1 and (second := describe(b, PAIR)).count(scene) == 1
    ]

    def claim(label: str, first: Description, relation: str, second: Description, weight: float = 1.0) -> _Claim:
        return _Claim(f"the {first.text} is {relation} the {second.text}", label, (first, second), weight)

    for first, relation, second in facts:
        yield claim(ENTAILED, first, relation, second)
        yield claim(CONTRADICTED, first, OPPOSITE[relation], second)
        if scene.curtain is not None:
            for d, weight in view.kinds(PAIR).items():
                if not d.count(scene):
                    yield claim(NEUTRAL, first, relation, d, weight)
                    yield claim(NEUTRAL, d, relation, second, weight)


# Template, how often it is tried, its labels with and without a curtain.
_PROVEN_OR_OPEN = (ENTAILED, NEUTRAL), (ENTAILED, CONTRADICTED)
_REFUTED_OR_OPEN = (CONTRADICTED, NEUTRAL), (ENTAILED, CONTRADICTED)
_ALL = (ENTAILED, NEUTRAL, CONTRADICTED), (ENTAILED, CONTRADICTED)
_TEMPLATES: tuple[tuple[Template, float, tuple[str, ...], tuple[str, ...]], ...] = (
    (_there_is, 1.0, *_PROVEN_OR_OPEN),
    (_there_is_no, 1.0, *_REFUTED_OR_OPEN),
    (_at_least, 1.0, *_PROVEN_OR_OPEN),
    (_fewer_than, 1.0, *_REFUTED_OR_OPEN),
    (_every, 0.7, *_REFUTED_OR_OPEN),
    (_is, 6.0, *_ALL),
    (_is_not, 6.0, *_ALL),
    (_related, 4.0, *_ALL),
)
