"""Recall of image-text retrieval: the share of queries that find something right among their 1, 5 or 10 best.

An image has several captions, and each of them is a right answer: what counts is the best placed one, and every caption
is a query of its own (the protocol of Flickr30k and COCO). Ties are decided against the model: an answer stands behind
every wrong one of the same score. So a model that scores all pairs alike has a recall of zero, on any machine, where an
order by index or by an unstable sort would give it something by luck.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

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


def recall(ranks: Tensor | Sequence[int], k: int) -> float:
    """The share of queries whose first right answer is among their ``k`` best."""
    ranks = torch.as_tensor(ranks)
    return (ranks <= k).double().mean().item() if len(ranks) else 0.0


def recalls(i2t: Tensor | Sequence[int], t2i: Tensor | Sequence[int]) -> dict[str, float]:
    """``i2t_r1``, ``i2t_r5``, ``i2t_r10``, the same of ``t2i``, and ``r_mean``, their mean, from :func:`first_ranks`.

    ``i2t``: of images that look for their captions; ``t2i``: of captions that look for their images. Shares of 1.
    """
    values = {f"{way}_r{k}": recall(ranks, k) for way, ranks in (("i2t", i2t), ("t2i", t2i)) for k in CUTS}
    return values | {"r_mean": sum(values.values()) / len(values)}


def score_retrieval(i2t: Tensor, t2i: Tensor, relevant: Tensor) -> dict[str, float]:
    """The same from whole matrices: ``i2t`` [I, T], ``t2i`` [T, I] scores and ``relevant`` [I, T]."""
    return recalls(first_ranks(i2t, relevant), first_ranks(t2i, relevant.T))
