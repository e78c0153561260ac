"""How sure an answer is: what the model computes, and where it was calibrated the probability that the answer is right.

A model's ``calibration`` (:class:`~mplug_core.model.config.Calibration`) has an entry for each kind of answer, of one
of two schemes:

- ``choices``, ``statement``, ``entailment``: an answer is chosen among several, and its confidence is its share of the
  softmax of their scores divided by the temperature (Guo et al. 2017);
- ``vqa``, ``grounding``: an answer stands alone, and its confidence is sigmoid(logit(p) / temperature + bias) (Platt
  1999) of the probability p that the model gives it: of the whole text, or the share of the drawn boxes that overlap.

Without an entry a confidence is what the model computes; of a text the geometric mean of its tokens' probabilities. All
of them pass through :func:`shares` and :func:`certainty`. Captions are neither right nor wrong, and not calibrated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import exp, log

from torch import Tensor

from mplug_core.errors import DataError
from mplug_core.metrics.calibration import expected_calibration_error, fit_logistic, fit_temperature
from mplug_core.model.config import Calibration, MplugConfig

NEAREST = {"vqa": 1e-6, "grounding": 1 / 64}
"""How near to 0 and 1 a probability counts, as certainty has no odds; for boxes half of one draw in 32."""

FEWEST = 20
"""Answers that a calibration needs."""

DIGITS = 4
"""Decimal places of what is stored with a model."""

SHOWN = 6
"""Decimal places in predictions: rounded further, different confidences would share a bin."""


def shares(config: MplugConfig, kind: str, scores: Tensor) -> Tensor:
    """The probabilities [..., K] of candidates with ``scores`` (logits or log-likelihoods)."""
    known = config.calibration.get(kind)
    return (scores if known is None else scores / known.temperature).softmax(-1)


def certainty(config: MplugConfig, kind: str, probability: float, uncalibrated: float | None = None) -> float:
    """How sure an answer is that stands alone, from the ``probability`` that the model gives it.

    Without a calibration it is ``uncalibrated``, by default the probability itself.
    """
    known = config.calibration.get(kind)
    if known is None:
        return probability if uncalibrated is None else uncalibrated
    return _mapped(known, log_odds(kind, probability))


def log_odds(kind: str, probability: float) -> float:
    """log(p / (1 - p)), of what is certain as of what is nearly so."""
    inside = min(max(probability, NEAREST[kind]), 1 - NEAREST[kind])
    return log(inside / (1 - inside))


def _mapped(known: Calibration, odds: float) -> float:
    odds = odds / known.temperature + known.bias
    # of a large number there is no exponential
    return 1 / (1 + exp(-odds)) if odds > 0 else exp(odds) / (1 + exp(odds))


@dataclass
class Evidence:
    """The answers of an evaluation: how sure each is, and once they are judged how right, 0 .. 1.

    ``kind`` is the calibration's entry. ``scores`` are what a confidence is computed from: those of all candidates, or
    the :func:`log_odds` of an answer that stands alone.
    """

    kind: str
    confidences: list[float] = field(default_factory=list)
    scores: list[list[float]] = field(default_factory=list)
    right: list[float] = field(default_factory=list)

    def add(self, confidence: float, scores: Sequence[float]) -> None:
        self.confidences.append(confidence)
        self.scores.append(list(scores))

    def judged(self, right: Sequence[float | None]) -> Evidence:
        """The answers whose truth is known, by how right each one is (None: not known)."""
        rows = zip(self.confidences, self.scores, right, strict=True)
        known = [(sure, scores, float(value)) for sure, scores, value in rows if value is not None]
        return Evidence(self.kind, *map(list, zip(*known, strict=True))) if known else Evidence(self.kind)

    def error(self) -> float:
        """The expected calibration error."""
        return expected_calibration_error(self.confidences, self.right)

    def calibration(self) -> Calibration:
        """What to calibrate a model by that gave these answers without one.

        DataError for answers that show nothing: too few of them, all right, all wrong, or chosen from one candidate.
        """
        count = len(self.right)
        if count < FEWEST:
            have = "no record has" if not count else f"{count} record{' has' if count == 1 else 's have'}"
            raise DataError(f"{have} a known answer, and a calibration needs {FEWEST}", "give more with answers")
        if min(self.right) == max(self.right) and self.right[0] in (0, 1):
            what = "right" if self.right[0] else "wrong"
            raise DataError(f"all {count} answers are {what}: nothing shows how sure to be", "give more records")
        if self.kind in NEAREST:
            temperature, bias = fit_logistic([odds for (odds,) in self.scores], self.right)
            return Calibration(temperature=round(temperature, DIGITS), bias=round(bias, DIGITS))
        if min(map(len, self.scores)) < 2:
            raise DataError("one answer to choose from is always sure", "give several")
        return Calibration(temperature=round(fit_temperature(self.scores, self.right), DIGITS))

    def calibrated(self, calibration: Calibration) -> Evidence:
        """The same answers, as sure as the model says with ``calibration``."""
        if self.kind in NEAREST:
            confidences = [_mapped(calibration, odds) for (odds,) in self.scores]
        else:
            confidences = [
                1 / sum(exp((score - max(scores)) / calibration.temperature) for score in scores)
                for scores in self.scores
            ]
        return Evidence(self.kind, confidences, self.scores, self.right)
