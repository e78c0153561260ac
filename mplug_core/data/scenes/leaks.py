"""How much of a label the text alone gives away: the score that a model must beat by looking."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence

from .words import NUMBERS
from .world import WORLD, World


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
