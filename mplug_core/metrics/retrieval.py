"""Recall of image-text retrieval: the share of queries that find something right among their 1, 5 or 10 best.

An image has several captions, and each of them is a right answer: what counts is the best placed one, and every caption
is a query of its own (the protocol of Flickr30k and COCO). Ties are decided against the model: an answer stands behind
every wrong one of the same score. So a model that scores all pairs alike has a recall of zero, on any machine, where an
order by index or by an unstable sort would give it something by luck.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
import torch
from torch import Tensor

from mplug_core.metrics.intervals import Array, Measure, ratio, values

CUTS = (1, 5, 10)


def first_ranks(scores: Tensor, relevant: Tensor) -> Tensor:
    """The place, from 1, of the best placed right answer of each query: int64 [Q].

    Args:
        scores: [Q, C], higher is better. A score that is not a number is worse than all others.
        relevant: bool [Q, C], which candidates are right. A query without any right one has the place C + 1.
    """
    if scores.shape != relevant.shape:
        raise ValueError(f"scores {tuple(scores.shape)} and relevant {tuple(relevant.shape)} differ in shape")
    lowest = float("-inf")
    scores = scores.masked_fill(scores.isnan(), lowest)
    if not scores.shape[1]:
        return torch.ones(len(scores), dtype=torch.long, device=scores.device)
    best = scores.masked_fill(~relevant, lowest).amax(1, keepdim=True)
    before = (~relevant & (scores >= best)).sum(1)
    return torch.where(relevant.any(1), before, scores.shape[1]) + 1


def recalls(i2t: Tensor | Sequence[int], t2i: Tensor | Sequence[int]) -> dict[str, float]:
    """``i2t_r1``, ``i2t_r5``, ``i2t_r10``, the same of ``t2i``, and ``r_mean``, their mean, from :func:`first_ranks`.

    ``i2t``: of images that look for their captions; ``t2i``: of captions that look for their images. Shares of 1.
    """
    return values(recall_measures(found_at(i2t), found_at(t2i), range(len(i2t)), range(len(t2i))))


def found_at(ranks: Tensor | Sequence[int]) -> Array:
    """Whether each query found something right among its 1, 5 and 10 best: [queries, 3], from :func:`first_ranks`."""
    return (torch.as_tensor(ranks)[:, None] <= torch.tensor(CUTS)).double().numpy()


def recall_measures(
    i2t: Array, t2i: Array, images: Sequence[Hashable], owners: Sequence[Hashable]
) -> dict[str, Measure]:
    """The metrics of :func:`recalls` as sums over queries, of :func:`found_at` or of chances [queries, 3].

    An image and the captions that it owns (``owners``: the image of each) are a cluster. The candidates stay what they
    are: an interval says what other queries would give, not another set to choose from.
    """
    clusters = [*images, *owners]
    width = len(CUTS) + 1
    rows = np.zeros((len(clusters), 2 * width))  # of both ways what is found and the queries
    for start, queries, found in ((0, slice(0, len(images)), i2t), (width, slice(len(images), None), t2i)):
        rows[queries, start : start + width - 1] = found
        rows[queries, start + width - 1] = 1
    parts = {
        f"{way}_r{k}": (start + place, start + width - 1)
        for way, start in (("i2t", 0), ("t2i", width))
        for place, k in enumerate(CUTS)
    }

    def r_mean(sums: Array) -> Array:
        return np.mean([_share(sums[..., list(part)]) for part in parts.values()], axis=0)

    found = {name: Measure(clusters, rows[:, list(part)], _share) for name, part in parts.items()}
    return found | {"r_mean": Measure(clusters, rows, r_mean)}


def _share(sums: Array) -> Array:
    """The first sum over the second, 0 where there are no queries."""
    return np.nan_to_num(ratio(sums))


def score_retrieval(i2t: Tensor, t2i: Tensor, relevant: Tensor) -> dict[str, float]:
    """The same from whole matrices: ``i2t`` [I, T], ``t2i`` [T, I] scores and ``relevant`` [I, T]."""
    return recalls(first_ranks(i2t, relevant), first_ranks(t2i, relevant.T))
