"""How sure a metric is: 95 % intervals by bootstrap over images, and differences of two models on the same records.

A :class:`Measure` is a metric as the sums that it is made of: a row of statistics for each record, and a function of
their sums. A mean is the sum of the values over their number; corpus BLEU is a function of summed counts of n-grams.
The rows of one image are one cluster: they are drawn together, because answers about one photo are right or wrong
together (a cluster bootstrap; Efron and Tibshirani 1993). A resample is then a matrix product of how often each image
was drawn with the images' sums, and an interval is where the middle 95 % of the resampled metrics lie.

What depends on the whole set is held fixed: the words' weights of CIDEr, and the candidates of retrieval.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mplug_core.errors import DataError

RESAMPLES = 2000
LEVEL = 0.95
SEED = 0

_DRAWN_AT_ONCE = 1 << 22
"""Draws in memory at once."""

Array = NDArray[np.float64]
Interval = tuple[float, float]
Measures = Mapping[str, "Measure"]


def ratio(sums: Array) -> Array:
    """The first sum over the second; NaN where the second is 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(sums[..., 1] > 0, sums[..., 0] / sums[..., 1], np.nan)


@dataclass(frozen=True)
class Measure:
    """A metric as sums: ``statistics`` [rows, k], the cluster of each row, and ``score``, which makes values [...] of
    sums [..., k] and NaN where there is none.

    ``centred`` is for a metric of 0 or more that resampling makes larger, as it is one of distances: its resamples are
    moved so that their mean is its value.
    """

    clusters: Sequence[Hashable]
    statistics: Array
    score: Callable[[Array], Array] = ratio
    centred: bool = False

    def value(self) -> float:
        """The metric of all rows."""
        return float(self.score(self.statistics.sum(0)))


def mean(clusters: Sequence[Hashable], values: ArrayLike, among: ArrayLike | None = None) -> Measure:
    """The mean of the values of rows, or of those rows that ``among`` (bool) names."""
    values = np.asarray(values, np.float64)
    counted = np.ones(len(values)) if among is None else np.asarray(among, np.float64)
    return Measure(clusters, np.stack([np.where(counted > 0, values, 0.0), counted], 1))


def means_by_kind(
    name: str, clusters: Sequence[Hashable], scores: Sequence[float | None], kinds: Sequence[str]
) -> dict[str, Measure]:
    """``name``, the mean of all scores, and ``name_KIND`` of the records of each kind; None takes part in nothing.

    Kinds that begin with the same word before an underscore are also taken together: ``cocoqa_color`` and
    ``cocoqa_number`` give ``name_cocoqa``. Characters of a kind that make no word become ``_``.
    """
    known = np.array([score is not None for score in scores], bool)
    numbers = np.array([0.0 if score is None else score for score in scores], np.float64)
    members: dict[str, list[str]] = {kind: [kind] for kind in dict.fromkeys(kinds) if kind}
    families: dict[str, list[str]] = {}
    for kind in members:
        first, joint, _ = kind.partition("_")
        if joint and first:
            families.setdefault(first, []).append(kind)
    # a kind of this very name keeps its own figure
    members |= {first: some for first, some in families.items() if len(some) > 1 and first not in members}
    found = {name: mean(clusters, numbers, known)}
    for kind, some in sorted(members.items()):
        among = known & np.array([one in some for one in kinds], bool)
        found[name + "_" + re.sub(r"\W+", "_", kind)] = mean(clusters, numbers, among)
    return found


def clusters_of(images: Sequence[Hashable], groups: Sequence[str] | None = None) -> list[Hashable]:
    """The cluster of each record: records on the same image, or pair of images, and all records of a group.

    Without a group the image is its own cluster. Pairs that share one of their images count as independent.
    """
    if groups is None or not any(groups):
        return list(images)
    parents: dict[Hashable, Hashable] = {}

    def root(node: Hashable) -> Hashable:
        while (parent := parents.setdefault(node, node)) != node:
            parents[node] = parents[parent]
            node = parent
        return node

    for image, group in zip(images, groups, strict=True):
        if group:
            parents[root(("image", image))] = root(("group", group))
    return [root(("image", image)) for image in images]


def values(measures: Measures) -> dict[str, float]:
    """The metrics, without those that no record takes part in."""
    found = {name: measure.value() for name, measure in measures.items()}
    return {name: value for name, value in found.items() if np.isfinite(value)}


def intervals(measures: Measures, resamples: int = RESAMPLES, seed: int = SEED) -> dict[str, Interval]:
    """The 95 % interval of each metric. A metric of a single image has none."""
    return {name: _middle(drawn) for name, drawn in _resampled(measures, resamples, seed).items() if drawn is not None}


def differences(
    measures: Measures, others: Measures, resamples: int = RESAMPLES, seed: int = SEED
) -> dict[str, tuple[float, float, float]]:
    """Of each metric that both have: how much greater the first is, and the 95 % interval of that. Both are measured on
    the same resamples, so that what is hard for both takes no part.

    DataError where the two are not of the same images.
    """
    shared = [name for name in measures if name in others]
    both = {("", name): measures[name] for name in shared} | {("other", name): others[name] for name in shared}
    for name in shared:
        if set(measures[name].clusters) != set(others[name].clusters):
            raise DataError(f"{name} can't be compared: the two are of different images", "compare the same records")
    drawn = _resampled(both, resamples, seed)
    found = {}
    for name in shared:
        difference = measures[name].value() - others[name].value()
        one, other = drawn["", name], drawn["other", name]
        if np.isfinite(difference) and one is not None and other is not None:
            found[name] = (difference, *_middle(one - other))
    return found


def _resampled(measures: Mapping[Hashable, Measure], resamples: int, seed: int) -> dict[Hashable, Array | None]:
    """Of each measure its values in all resamples, None where it is of fewer than two clusters."""
    if not measures:
        return {}
    places: dict[Hashable, int] = {}
    rows_of: dict[int, Array] = {}  # measures mostly share their list of clusters
    for measure in measures.values():
        if id(measure.clusters) not in rows_of:
            rows = [places.setdefault(cluster, len(places)) for cluster in measure.clusters]
            rows_of[id(measure.clusters)] = np.asarray(rows, np.int64)
    columns = []
    for measure in measures.values():
        summed = np.zeros((len(places), measure.statistics.shape[1]))
        np.add.at(summed, rows_of[id(measure.clusters)], measure.statistics)
        columns.append(summed)
    table = np.concatenate(columns, 1)
    sums = np.concatenate([drawn @ table for drawn in _draws(len(places), resamples, seed)])
    found: dict[Hashable, Array | None] = {}
    start = 0
    for (name, measure), summed in zip(measures.items(), columns, strict=True):
        part = sums[:, start : start + summed.shape[1]]
        start += summed.shape[1]
        found[name] = measure.score(part) if (summed != 0).any(1).sum() > 1 else None
        if found[name] is not None and measure.centred:
            found[name] = np.maximum(found[name] - np.nanmean(found[name]) + measure.value(), 0)
    return found


def _draws(clusters: int, resamples: int, seed: int):
    """How often each cluster is drawn in each resample: [some, clusters] until there are ``resamples``."""
    generator = np.random.default_rng(seed)
    at_once = max(1, _DRAWN_AT_ONCE // max(clusters, 1))
    for start in range(0, resamples, at_once):
        count = min(at_once, resamples - start)
        drawn = generator.integers(clusters, size=(count, clusters)) + np.arange(count)[:, None] * clusters
        yield np.bincount(drawn.ravel(), minlength=count * clusters).reshape(count, clusters).astype(np.float64)


def _middle(drawn: Array) -> Interval:
    """Where the middle 95 % of the values lie; resamples without a value take no part."""
    drawn = drawn[np.isfinite(drawn)]
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
