"""Accuracy of answers to questions on images, as the VQA v2 challenge counts it (Antol et al. 2015; Goyal et al. 2017).

Three rules, by what is known of the right answer:

- Ten or more annotators (VQA v2 and sets made like it): :func:`consensus`. Each annotator is left out in turn, an
  answer is worth min(1, matches / 3) against the other nine, and the ten values are averaged. Answers are normalised
  only where the annotators disagree, as the official evaluation does.
- Several answers that are one set (``together``, DAQUAR): 1 if the answer, split at its commas, is the same set in any
  order, else 0; ``accuracy_any`` counts such a question as right if one of the set is named. WUPS, DAQUAR's other
  measure, needs WordNet and is not computed.
- All others: min(1, share / 0.3), where share is the part of the known answers that the normalised answer equals. So a
  single answer (VG-QA, GQA, scenes) is worth 1 or 0, and three of ten are enough, as above.

A question without any known answer has no score.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache

from mplug_core.data.records import QuestionRecord
from mplug_core.metrics.intervals import Measure, clusters_of, means_by_kind, values

PANEL = 10
"""Annotators that a question needs for the rule of the challenge."""

_ARTICLES = frozenset(("a", "an", "the"))
_NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6",
    "seven": "7", "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
_PUNCTUATION = '-;/\\[]{}()"<>`@=+_,?!'
_PERIOD = re.compile(r"\.(?!\d)")
_GROUPED_DIGITS = re.compile(r"\d,\d")
# The official program hands a flag of the re module to the place of ``count``, so it removes at most 32 periods.
_MOST_PERIODS = 32

# The forms that the official table restores where one of their apostrophes is missing. It has more entries, in
# capitals, which never apply, as words are in lower case when they are looked up.
_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'd've y'all'll you'd you'd've you'll you're you've
"""
_RESTORED = {
    form[:place] + form[place + 1 :]: form
    for form in _CONTRACTIONS.split()
    for place, character in enumerate(form)
    if character == "'"
} | {"somebody'd": "somebodyd"}  # this one loses its apostrophe


@lru_cache(maxsize=1 << 16)
def normalise(text: str) -> str:
    """An answer in the challenge's normal form: punctuation, number words, articles and contractions.

    A punctuation mark vanishes where it touches a space somewhere in the text, or if there is a comma between digits;
    otherwise each becomes a space. Periods vanish unless a digit follows.
    """
    joined = _GROUPED_DIGITS.search(text) is not None
    plain = text
    for mark in _PUNCTUATION:
        loose = joined or f"{mark} " in text or f" {mark}" in text
        plain = plain.replace(mark, "" if loose else " ")
    plain = _PERIOD.sub("", plain, count=_MOST_PERIODS)
    words = (_NUMBERS.get(word, word) for word in plain.lower().split())
    return " ".join(_RESTORED.get(word, word) for word in words if word not in _ARTICLES)


def consensus(answer: str, annotators: Sequence[str]) -> float:
    """The challenge's accuracy, 0..1, of an answer given what each annotator said."""
    answer, given = _one_line(answer), [_one_line(text) for text in annotators]
    if len(set(given)) > 1:
        answer, given = normalise(answer), [normalise(text) for text in given]
    # only two values occur: an annotator who agrees is one match less among the others
    matches, others = given.count(answer), len(given) - given.count(answer)
    return (matches * min(1.0, (matches - 1) / 3) + others * min(1.0, matches / 3)) / len(given)


def named(answer: str) -> set[str]:
    """The normalised parts of an answer between its commas."""
    return {part for text in answer.split(",") if (part := normalise(text))}


def accuracy(answer: str, record: QuestionRecord) -> float | None:
    """0..1 by the rule that suits the record; None where the right answer is not known."""
    if len(record.annotators) >= PANEL:
        return consensus(answer, record.annotators)
    if record.together:
        return float(named(answer) == {normalise(text) for text in record.answers})
    if not record.answers:
        return None
    said = normalise(answer)
    share = sum(w for text, w in zip(record.answers, record.weights, strict=True) if normalise(text) == said)
    return min(1.0, share * PANEL / 3)


def score_answers(answers: Iterable[str], records: Iterable[QuestionRecord]) -> dict[str, float]:
    """Mean accuracies, 0..1, of one answer a record: ``accuracy``, and ``accuracy_KIND`` for each kind of question.

    Characters of a kind that make no word become ``_`` (``accuracy_yes_no``). Kinds that begin with the same word are
    also taken together (:func:`~mplug_core.metrics.intervals.means_by_kind`). ``accuracy_any``, on all questions, is
    there where some answers are sets. Empty where no record has a known answer.
    """
    return values(answer_measures(answers, records))


def answer_measures(answers: Iterable[str], records: Iterable[QuestionRecord]) -> dict[str, Measure]:
    """The accuracies of :func:`score_answers` as sums over records, those of one image a cluster."""
    pairs = list(zip(answers, records, strict=True))
    clusters = clusters_of([record.image for _, record in pairs])
    scores = [accuracy(answer, record) for answer, record in pairs]
    found = means_by_kind("accuracy", clusters, scores, [record.kind for _, record in pairs])
    if any(record.together for _, record in pairs):
        any_named = [
            score if score is None or not record.together else float(_names_one(answer, record))
            for (answer, record), score in zip(pairs, scores, strict=True)
        ]
        found |= means_by_kind("accuracy_any", clusters, any_named, [""] * len(pairs))
    return dict(sorted(found.items()))


def _names_one(answer: str, record: QuestionRecord) -> bool:
    """Whether an answer names one of a set."""
    return not named(answer).isdisjoint(normalise(text) for text in record.answers)


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()
