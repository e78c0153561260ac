"""CIDEr of single captions against a corpus that was counted before: the reward of self-critical training.

The same numbers as pycocoevalcap's scorer (Vedantam et al., CVPR 2015, in the variant D with clipped counts and a
length penalty, times 10), which can't be used here: it weighs words by the very references that it scores, so that a
batch of a few images would have weights of its own. Tokens are split in Python, as the Penn Treebank tokenizer splits
cleaned captions, because Java has no place in a training step.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence

from mplug_core.data.text import clean_caption

Tokens = Sequence[str]
Ngram = tuple[str, ...]

_SYMBOL = re.compile(r"([$%&=])")
_TWO_WORDS = {
    "cannot": ("can", "not"), "gonna": ("gon", "na"), "gotta": ("got", "ta"), "wanna": ("wan", "na"),
    "gimme": ("gim", "me"), "lemme": ("lem", "me"),
}  # fmt: skip


def caption_tokens(text: str) -> tuple[str, ...]:
    """Tokens of a caption as the model learns it (:func:`clean_caption`): those of the Penn Treebank tokenizer.

    Of 64,677 captions of COCO and Flickr8k two are split otherwise (a stray bracket, a number sign inside a word).
    """
    words = _SYMBOL.sub(r" \1 ", clean_caption(text, max_words=10_000)).split()
    return tuple(token for word in words for token in _TWO_WORDS.get(word, (word,)))


class Cider:
    """CIDEr by document frequencies of :meth:`count`'s images. Any hashable tokens will do."""

    def __init__(self, order: int = 4, sigma: float = 6.0) -> None:
        """``order``: longest n-gram; ``sigma``: deviation, in tokens, of the penalty on another length."""
        self.order, self.sigma = order, sigma
        self.images = 0
        self._frequency: Counter[Ngram] = Counter()

    def count(self, images: Iterable[Sequence[Tokens]]) -> None:
        """Add images, each with all of its references, to the corpus."""
        for references in images:
            self.images += 1
            self._frequency.update({ngram for tokens in references for ngram in self._ngrams(tokens)})

    def score(self, candidate: Tokens, references: Sequence[Tokens]) -> float:
        """CIDEr of one caption, 0 .. 10. ValueError without references."""
        return self.scores([candidate], references)[0]

    def scores(self, candidates: Sequence[Tokens], references: Sequence[Tokens]) -> list[float]:
        """CIDEr of each of several captions of one image, 0 .. 10. ValueError without references."""
        if not references:
            raise ValueError("CIDEr needs at least one reference")
        known = [_Vector(self, tokens) for tokens in references]
        found = []
        for tokens in candidates:
            vector = _Vector(self, tokens)
            found.append(10 * sum(vector.similarity(reference) for reference in known) / len(known))
        return found

    def weight(self, ngram: Ngram) -> float:
        """Inverse document frequency; an n-gram that was never counted weighs as one of a single image."""
        return math.log(max(self.images, 1)) - math.log(max(self._frequency.get(ngram, 0), 1))

    def _ngrams(self, tokens: Tokens) -> Iterable[Ngram]:
        for n in range(1, self.order + 1):
            for place in range(len(tokens) - n + 1):
                yield tuple(tokens[place : place + n])


class _Vector:
    """A caption's n-grams, weighed, by their length."""

    def __init__(self, cider: Cider, tokens: Tokens) -> None:
        self.cider = cider
        self.parts: list[dict[Ngram, float]] = [{} for _ in range(cider.order)]
        for ngram, count in Counter(cider._ngrams(tokens)).items():
            self.parts[len(ngram) - 1][ngram] = count * cider.weight(ngram)
        self.norms = [math.sqrt(sum(value * value for value in part.values())) for part in self.parts]
        # the package counts pairs of tokens as the length
        self.length = max(len(tokens) - 1, 0)

    def similarity(self, reference: _Vector) -> float:
        """Mean over n of the cosine with clipped counts, less for another length."""
        total = 0.0
        for part, theirs, norm in zip(
            self.parts, reference.parts, (a * b for a, b in zip(self.norms, reference.norms, strict=True)), strict=True
        ):
            if norm:
                total += sum(min(value, theirs[k]) * theirs[k] for k, value in part.items() if k in theirs) / norm
        return total / len(self.parts) * math.exp(-((self.length - reference.length) ** 2) / (2 * self.cider.sigma**2))
