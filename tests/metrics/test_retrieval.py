"""Recall, from tables by hand and against a sort."""

from __future__ import annotations

import pytest
import torch

from mplug_core.metrics.retrieval import first_ranks, recalls, score_retrieval

NAN = float("nan")


def test_ranks_by_hand() -> None:
    scores = torch.tensor([[0.9, 0.1, 0.5], [0.2, 0.3, 0.4], [0.6, 0.7, 0.8]])
    assert first_ranks(scores, torch.eye(3, dtype=torch.bool)).tolist() == [1, 2, 1]


def test_the_best_of_several_right_answers_counts() -> None:
    scores = torch.tensor([[0.1, 0.9, 0.5, 0.7]] * 3)
    relevant = torch.tensor([[True, False, True, False], [True, False, False, True], [True, True, True, True]])
    assert first_ranks(scores, relevant).tolist() == [3, 2, 1]


def test_ties_are_decided_against_the_model() -> None:
    right = torch.tensor([[True, False, False, False]])
    assert first_ranks(torch.tensor([[1.0, 1.0, 0.0, 1.0]]), right).tolist() == [3]
    assert first_ranks(torch.zeros(1, 4), right).tolist() == [4]
    # right answers among themselves don't compete
    assert first_ranks(torch.zeros(1, 4), torch.tensor([[True, True, False, True]])).tolist() == [2]


@pytest.mark.parametrize(("scores", "rank"), [([NAN, 0.0, 1.0], 3), ([0.0, NAN, -1.0], 1), ([NAN] * 3, 3)])
def test_what_is_no_number_is_worst(scores: list[float], rank: int) -> None:
    assert first_ranks(torch.tensor([scores]), torch.tensor([[True, False, False]])).tolist() == [rank]


def test_infinite_scores() -> None:
    lowest, right = float("-inf"), torch.tensor([[True, False, False]])
    assert first_ranks(torch.tensor([[lowest, lowest, 0.0]]), right).tolist() == [3]
    assert first_ranks(torch.tensor([[-lowest, 1.0, 0.0]]), right).tolist() == [1]


def test_queries_without_a_right_answer_and_without_candidates() -> None:
    assert first_ranks(torch.rand(2, 3), torch.zeros(2, 3, dtype=torch.bool)).tolist() == [4, 4]
    assert first_ranks(torch.rand(2, 0), torch.zeros(2, 0, dtype=torch.bool)).tolist() == [1, 1]
    assert recalls([], [])["i2t_r1"] == recalls([], [])["r_mean"] == 0.0
    with pytest.raises(ValueError, match="shape"):
        first_ranks(torch.rand(2, 3), torch.zeros(3, 2, dtype=torch.bool))


def test_against_a_sort() -> None:
    """Without ties a rank is the place in a sorted list."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(50, 30, generator=generator)
    relevant = torch.rand(50, 30, generator=generator) < 0.1
    relevant[:, 3] = True
    order = scores.argsort(1, descending=True)
    expected = [next(place for place, c in enumerate(row, 1) if relevant[q, c]) for q, row in enumerate(order.tolist())]
    assert first_ranks(scores, relevant).tolist() == expected


def test_recalls() -> None:
    found = recalls([1, 2, 6, 11], torch.tensor([1, 1, 5, 10, 20]))
    assert found == {
        "i2t_r1": 0.25, "i2t_r5": 0.5, "i2t_r10": 0.75, "t2i_r1": 0.4, "t2i_r5": pytest.approx(0.6),
        "t2i_r10": pytest.approx(0.8), "r_mean": pytest.approx((0.25 + 0.5 + 0.75 + 0.4 + 0.6 + 0.8) / 6),
    }  # fmt: skip


def test_matrices_both_ways() -> None:
    # two images, three texts; texts 0 and 2 are of image 0
    relevant = torch.tensor([[True, False, True], [False, True, False]])
    i2t = torch.tensor([[0.1, 0.5, 0.9], [0.3, 0.2, 0.1]])
    t2i = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.3, 0.4]])
    found = score_retrieval(i2t, t2i, relevant)
    assert (found["i2t_r1"], found["i2t_r5"]) == (0.5, 1.0)
    assert found["t2i_r1"] == pytest.approx(2 / 3) and found["t2i_r5"] == 1.0
