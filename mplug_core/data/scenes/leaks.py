"""How much of a label can be guessed without looking closely: the score that a model must beat.

:func:`text_only_accuracy` sees the text alone. :func:`shortcut_accuracy` also sees the picture, one thing at a time:
the curtain, how many objects there are, how many are red, how many are circles; never how many are red circles.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence

import numpy as np

from .words import FULL, NUMBERS
from .world import WORLD, Scene, World

Example = tuple[Sequence[Scene], str, Hashable]  # the scene or the couple of scenes, the text, its label
Tree = int | tuple[int, float, "Tree", "Tree"]  # a label, or a column, a threshold, and what is below and above it


def template_of(text: str, world: World = WORLD) -> str:
    """The text with names of colours, shapes, sizes and numbers blanked out."""
    blanks = {w: "COLOR" for w in world.colors} | {w: "SIZE" for w in world.sizes} | {w: "NUMBER" for w in NUMBERS}
    for shape in world.shapes:
        blanks |= {shape: "SHAPE", shape + "s": "SHAPE", shape + "es": "SHAPE"}
    return " ".join(blanks.get(word, word) for word in text.split())


def text_only_accuracy(
    texts: Sequence[str], labels: Sequence[Hashable], world: World = WORLD, groups: int = 2
) -> dict[str, float]:
    """Accuracy of guesses that never see the image; near chance if nothing leaks.

    ``majority``: the most frequent label overall; ``template``: of each template; ``words``: naive Bayes over the
    template and the words. All but the first are fitted on other records than they are scored on (``groups``-fold,
    neighbours together).
    """
    template_hits = word_hits = 0
    templates = [template_of(t, world) for t in texts]
    fold = [i * groups // len(texts) for i in range(len(texts))]
    for held in range(groups):
        by_template: dict[str, Counter] = defaultdict(Counter)
        features: dict[Hashable, Counter] = defaultdict(Counter)
        prior: Counter = Counter()
        for text, template, label, f in zip(texts, templates, labels, fold, strict=True):
            if f == held:
                continue
            by_template[template][label] += 1
            features[label].update({*text.split(), template})
            prior[label] += 1
        for text, template, label, f in zip(texts, templates, labels, fold, strict=True):
            if f != held:
                continue
            guess = (by_template.get(template) or prior).most_common(1)[0][0]
            template_hits += guess == label
            # Presence of words, add-one smoothing.
            best = max(
                prior,
                key=lambda y: (
                    math.log(prior[y])
                    + sum(math.log((features[y][w] + 1) / (prior[y] + 2)) for w in {*text.split(), template})
                ),
            )
            word_hits += best == label
    total = len(texts)
    return {
        "majority": Counter(labels).most_common(1)[0][1] / total,
        "template": template_hits / total,
        "words": word_hits / total,
    }


def shortcut_accuracy(
    fitted: Sequence[Example], measured: Sequence[Example], world: World = WORLD, depth: int = 8, least: int = 30
) -> dict[str, float]:
    """Accuracy on ``measured`` of rules fitted on ``fitted`` that see texts and single things in pictures.

    ``table``: the most frequent label of each template with and without a curtain. ``texts``, ``pictures``, ``named``:
    decision trees on templates and words; on single things in the pictures; on how often what the text names is to be
    seen. ``all``: a tree on all of these. Trees have at most ``depth`` levels and at least ``least`` examples a leaf.
    """
    templates = sorted({template_of(text, world) for _, text, _ in fitted})
    words = sorted({word for _, text, _ in fitted for word in text.split()})
    labels = sorted({label for _, _, label in fitted}, key=str)

    def row(scenes: Sequence[Scene], text: str) -> dict[str, list[int]]:
        template = template_of(text, world)
        own = [template == known for known in templates]
        curtain = scenes[0].curtain is not None
        return {
            "table": [t and c for t in own for c in (curtain, not curtain)],
            "texts": [*own, *(word in text.split() for word in words)],
            "pictures": [n for scene in scenes for n in _single_things(scene, world)],
            "named": [n for scene in scenes for n in _named_things(scene, text, world)],
        }

    rows = [[row(scenes, text) for scenes, text, _ in examples] for examples in (fitted, measured)]
    truth = np.array([labels.index(label) for _, _, label in fitted])
    scores = {}
    for name in ("table", "texts", "pictures", "named", "all"):
        learned, asked = (
            np.array([[n for part in (r if name == "all" else (name,)) for n in r[part]] for r in part_rows], np.int16)
            for part_rows in rows
        )
        tree = _grow(learned, truth, len(labels), 2 * len(templates) if name == "table" else depth, least)
        hits = [labels[_follow(tree, a)] == label for a, (_, _, label) in zip(asked, measured, strict=True)]
        scores[name] = sum(hits) / len(hits)
    return scores


def _single_things(scene: Scene, world: World) -> list[int]:
    """Whether there is a curtain, at which edges, how many objects there are, and how many of each attribute."""
    x0, y0, x1, y1 = scene.curtain or (1, 1, 0, 0)
    values = [getattr(o, field) for o in scene.objects for field in FULL]
    names = (*world.sizes, *world.colors, *world.shapes)
    return [
        scene.curtain is not None,
        x0 == 0,
        y0 == 0,
        x1 == 1,
        y1 == 1,
        len(scene.objects),
        *map(values.count, names),
    ]


def _named_things(scene: Scene, text: str, world: World) -> list[int]:
    """How often each attribute that the text names is to be seen: over all of them, and for each field."""
    found = []
    everything: list[int] = []
    for field, names in zip(FULL, (world.sizes, world.colors, world.shapes), strict=True):
        plurals = {name: name for name in names} | {f"{name}{end}": name for name in names for end in ("s", "es")}
        named = [plurals[word] for word in text.split() if word in plurals]
        counts = [sum(getattr(o, field) == name for o in scene.objects) for name in named]
        found += [len(counts), sum(counts), min(counts, default=-1), max(counts, default=-1)]
        everything += counts
    return [*found, sum(everything), min(everything, default=-1), sum(n == 0 for n in everything)]


def _grow(columns: np.ndarray, truth: np.ndarray, labels: int, depth: int, least: int) -> Tree:
    """A decision tree: greedy splits that leave the least Gini impurity."""
    counts = np.bincount(truth, minlength=labels)
    if depth == 0 or len(truth) < 2 * least or counts.max() == len(truth):
        return int(counts.argmax())
    hot = np.eye(labels)[truth]
    best = (len(truth) - (counts**2).sum() / len(truth) - 1e-9, -1, 0.0)
    for column in range(columns.shape[1]):
        values = columns[:, column]
        for threshold in np.unique(values)[:-1] + 0.5:
            below = hot[values < threshold].sum(0)
            above = counts - below
            sizes = below.sum(), above.sum()
            if min(sizes) >= least:
                impurity = len(truth) - (below**2).sum() / sizes[0] - (above**2).sum() / sizes[1]
                best = min(best, (impurity, column, float(threshold)))
    _, column, threshold = best
    if column < 0:
        return int(counts.argmax())
    low = columns[:, column] < threshold
    below, above = (_grow(columns[rows], truth[rows], labels, depth - 1, least) for rows in (low, ~low))
    return column, threshold, below, above


def _follow(tree: Tree, row: np.ndarray) -> int:
    while not isinstance(tree, int):
        column, threshold, below, above = tree
        tree = below if row[column] < threshold else above
    return tree
