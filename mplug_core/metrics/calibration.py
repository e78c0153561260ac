"""How far confidences are from how often answers are right, and the parameters that bring the two together.

The expected calibration error is that of Naeini et al. (2015) and Guo et al. (2017), on bins that hold equally many
answers each (Nguyen and O'Connor 2015), so that no bin is nearly empty. What is fitted is the temperature of Guo et al.
where an answer is chosen among several, and Platt's logistic map (1999) where a confidence stands alone; both minimise
the negative log-likelihood of being right.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from math import exp, log

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from mplug_core.metrics.intervals import Measure

BINS = 15
EXTREME = 100.0
"""The highest temperature that is fitted, and its inverse the lowest. Of confidences that say nothing it would be
infinite."""

_FAR = 1e4
"""As far as a score lies behind the best one, it has no share at any of these temperatures."""


def expected_calibration_error(confidences: Sequence[float], right: Sequence[float]) -> float:
    """The mean distance, 0 .. 1, of confidence and rightness over :data:`BINS` bins of equally many answers.

    ``right`` is 0 .. 1, as answers may be partly right. Fewer answers than bins have a bin each, which makes the figure
    larger than it would be with more of them. ValueError where there is none.
    """
    if not len(confidences):
        raise ValueError("no confidences to compare")
    return calibration_measures(range(len(right)), confidences, right)["ece"].value()


def calibration_measures(
    clusters: Sequence[Hashable], confidences: Sequence[float | None], right: Sequence[float | None]
) -> dict[str, Measure]:
    """``ece``, the :func:`expected_calibration_error` of answers whose truth is known (``right`` is not None), as sums
    over answers; the bins are held fixed. Empty where no truth is known, or an answer has no confidence."""
    known = [place for place, value in enumerate(right) if value is not None]
    sure = [confidences[place] for place in known]
    if not known or None in sure:
        return {}
    gaps = np.asarray(sure, np.float64) - np.asarray([right[place] for place in known], np.float64)
    statistics = np.zeros((len(known), BINS + 1))
    statistics[np.arange(len(known)), bins_of(sure)] = gaps
    statistics[:, BINS] = 1
    return {"ece": Measure([clusters[place] for place in known], statistics, _mean_gap, centred=True)}


def _mean_gap(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.abs(sums[..., :BINS]).sum(-1) / sums[..., BINS]


def bins_of(confidences: Sequence[float]) -> NDArray[np.intp]:
    """The bin of each confidence: by its rank, so that bins hold equally many as far as equal ones allow, which share a
    bin."""
    _, place, counts = np.unique(np.asarray(confidences, np.float64), return_inverse=True, return_counts=True)
    middle = counts.cumsum() - counts / 2
    return (BINS * middle / len(place)).astype(np.intp)[place]


def fit_temperature(scores: Sequence[Sequence[float]], right: Sequence[float]) -> float:
    """The temperature by which the share of each best score is how probably the choice is right.

    ``scores`` are logits or log-probabilities of at least two candidates for each answer.
    """
    most = max(map(len, scores))
    behind = torch.full((len(scores), most), -_FAR, dtype=torch.float64)
    for row, values in enumerate(scores):
        ordered = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
        behind[row, : len(values)] = (ordered - ordered[0]).clamp(min=-_FAR)
    # the best against all others together
    (temperature,) = _fit(lambda t: -(behind[:, 1:] / t).logsumexp(1), right, biased=False)
    return temperature


def fit_logistic(log_odds: Sequence[float], right: Sequence[float]) -> tuple[float, float]:
    """Temperature and bias by which ``sigmoid(log_odds / temperature + bias)`` is how probably each answer is right."""
    odds = torch.tensor(log_odds, dtype=torch.float64)
    temperature, bias = _fit(lambda t: odds / t, right, biased=True)
    return temperature, bias


def _fit(log_odds: Callable[[Tensor], Tensor], right: Sequence[float], biased: bool) -> list[float]:
    """The temperature at which ``log_odds`` fit best, and behind it the bias if there is one.

    The targets are Platt's, which lie within 0 and 1 by as much as so few answers leave open: with them a perfect order
    has no infinite parameters.
    """
    were = torch.tensor(right, dtype=torch.float64)
    high, low = (were.sum() + 1) / (were.sum() + 2), 1 / ((1 - were).sum() + 2)
    target, bound = low + were * (high - low), log(EXTREME)
    values = torch.zeros(1 + biased, dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS(
        [values], max_iter=500, tolerance_grad=1e-9, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        search.zero_grad()
        odds = log_odds(values[0].clamp(-bound, bound).exp()) + values[1:].sum()
        value = F.binary_cross_entropy_with_logits(odds, target)
        value.backward()
        return value

    with torch.enable_grad():
        search.step(loss)
    log_temperature, *rest = values.tolist()
    return [min(max(exp(log_temperature), 1 / EXTREME), EXTREME), *rest]
