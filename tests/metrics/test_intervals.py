"""Intervals against what theory says, clusters, kinds, and pairwise differences."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mplug_core.data.records import QuestionRecord
from mplug_core.errors import DataError
from mplug_core.metrics import intervals as module
from mplug_core.metrics.caption import caption_measures, meteor_score
from mplug_core.metrics.grounding import box_measures
from mplug_core.metrics.intervals import Measure, clusters_of, differences, intervals, mean, means_by_kind, values
from mplug_core.metrics.reasoning import label_measures
from mplug_core.metrics.retrieval import found_at, recall_measures, recalls
from mplug_core.metrics.vqa import answer_measures

Z = 1.96


@pytest.mark.parametrize(("right", "count"), [(30, 100), (200, 400), (950, 1000)])
def test_of_a_share_it_is_the_binomial_one(right: int, count: int) -> None:
    share = right / count
    found = intervals({"accuracy": mean(range(count), [1.0] * right + [0.0] * (count - right))})["accuracy"]
    half = Z * math.sqrt(share * (1 - share) / count)
    assert found == pytest.approx((share - half, share + half), abs=0.15 * half + 1 / count)


def test_of_a_mean_it_is_the_normal_one() -> None:
    scores = np.random.default_rng(3).gamma(2.0, size=2000)
    found = intervals({"cider": mean(range(2000), scores)})["cider"]
    half = Z * scores.std() / math.sqrt(2000)
    assert found == pytest.approx((scores.mean() - half, scores.mean() + half), abs=0.1 * half)


def test_records_of_one_image_are_drawn_together() -> None:
    """Ten equal records on each of 100 images say what 100 records say, and not what 1,000 say."""
    right = np.repeat([1.0] * 30 + [0.0] * 70, 10)
    together = intervals({"a": mean([i // 10 for i in range(1000)], right)})["a"]
    assert together == intervals({"a": mean(range(100), right[::10])})["a"]
    apart = intervals({"a": mean(range(1000), right)})["a"]
    assert together[1] - together[0] == pytest.approx(math.sqrt(10) * (apart[1] - apart[0]), rel=0.15)


def test_the_same_every_time_and_in_any_number_of_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    measures = {"a": mean(range(50), np.arange(50.0))}
    first = intervals(measures)
    assert first == intervals(measures)
    monkeypatch.setattr(module, "_DRAWN_AT_ONCE", 50 * 7)
    assert intervals(measures) == first


@pytest.mark.parametrize("measures", [{}, {"a": mean([1, 1, 1], [0.0, 1.0, 1.0])}, {"a": mean([], [])}])
def test_without_several_images_there_is_none(measures: dict[str, Measure]) -> None:
    assert intervals(measures) == {}


def test_a_kind_that_few_records_have() -> None:
    """Resamples without any of them take no part, and nothing is NaN."""
    measures = means_by_kind("accuracy", range(40), [1.0, 0.0] * 20, ["rare", "rare"] + [""] * 38)
    assert values(measures) == {"accuracy": 0.5, "accuracy_rare": 0.5}
    assert intervals(measures)["accuracy_rare"] == (0.0, 1.0)
    assert values(means_by_kind("accuracy", [1], [None], ["x"])) == {}


def test_kinds_and_their_families() -> None:
    kinds = ["cocoqa_color", "cocoqa_number", "vqa2_yes/no", "yes/no", "vsr", "cocoqa_color", "a_b", "a", "a_c"]
    found = values(means_by_kind("accuracy", range(9), [1, 0, 1, 0, 1, 1, 0, 1, 0], kinds))
    assert found == {
        "accuracy": pytest.approx(5 / 9), "accuracy_cocoqa": pytest.approx(2 / 3), "accuracy_cocoqa_color": 1,
        "accuracy_cocoqa_number": 0, "accuracy_vqa2_yes_no": 1, "accuracy_yes_no": 0, "accuracy_vsr": 1,
        "accuracy_a": 1, "accuracy_a_b": 0, "accuracy_a_c": 0,
    }  # fmt: skip


def test_groups_join_images() -> None:
    assert clusters_of(["a", "b", "a"]) == ["a", "b", "a"]
    first, second, third, fourth, fifth = clusters_of(["a", "b", "c", "a", "d"], ["x", "x", "", "y", "y"])
    assert first == second == fourth == fifth != third


def test_differences_are_of_pairs() -> None:
    """Two models that are right on the same hard and easy records differ more surely than two of as many right ones."""
    easy = np.random.default_rng(0).random(500) < 0.5
    better = easy.copy()
    better[:25] = True
    one, other = {"a": mean(range(500), better)}, {"a": mean(range(500), easy), "b": mean(range(500), easy)}
    found = differences(one, other)
    assert found.keys() == {"a"}
    difference, low, high = found["a"]
    assert difference == pytest.approx(better.mean() - easy.mean()) and 0 < low < difference < high
    share = difference
    half = Z * math.sqrt(share * (1 - share) / 500)
    assert (low, high) == pytest.approx((difference - half, difference + half), abs=0.2 * half)
    alone = intervals(one)["a"]
    assert high - low < 0.5 * (alone[1] - alone[0])
    assert differences(one, one)["a"] == (0.0, 0.0, 0.0)
    back = differences(other, one)["a"]
    assert back == pytest.approx((-difference, -high, -low))


def test_differences_of_other_images_are_an_error() -> None:
    with pytest.raises(DataError, match="different images"):
        differences({"a": mean([1, 2], [0, 1])}, {"a": mean([1, 3], [0, 1])})


def test_captions() -> None:
    """Means over images, and BLEU of the summed counts of what was drawn."""
    said = {str(i): "a dog runs on grass" if i % 2 else "a cat sits on a red mat" for i in range(30)}
    known = {key: ["a dog runs on the grass", "the dog runs"] for key in said}
    measures = caption_measures(said, known, ("bleu", "rouge_l", "cider"))
    found, sure = values(measures), intervals(measures)
    assert found.keys() == sure.keys() == {"bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider"}
    assert all(low < found[name] < high for name, (low, high) in sure.items() if name != "cider")
    right = {key: text for key, text in said.items() if int(key) % 2}
    part = values(caption_measures(right, {key: known[key] for key in right}, ("bleu",)))
    assert sure["bleu_1"][1] < part["bleu_1"]
    counts = measures["bleu_1"].statistics
    assert measures["bleu_4"].score(counts[1::2].sum(0)) == pytest.approx(part["bleu_4"])


def test_meteor_of_the_programs_statistics() -> None:
    """Lines that METEOR 1.5 wrote, and the scores that it made of them, alone and summed."""
    lines = [
        "6 9 1 2 3 3 1 1 0 0 0 0 1 1 0 0 0 0 0 0 3 5 5", "9 12 5 5 0 0 2 2 0 0 0 0 1 2 1 0 1 1 0 0 5 5 5",
        "8 11 4 6 2 2 3 3 0 0 0 0 0 0 0 0 0 0 0 0 2 5 5", "12 8 7 4 0 0 2 2 0 0 0 0 0 0 0 0 0 1 1 1 3 3 4",
    ]  # fmt: skip
    rows = np.array([[float(number) for number in line.split()] for line in lines])
    known = [0.2588869904888879, 0.13633018173583197, 0.22243025580394496, 0.09591798744025551]
    assert meteor_score(rows) == pytest.approx(known, abs=1e-12)
    assert min(known) < meteor_score(rows.sum(0)) < max(known)
    assert meteor_score(np.zeros(23)) == 0.0


def test_questions_labels_boxes_and_ranks_have_an_interval_for_every_metric() -> None:
    records = [QuestionRecord(f"{i // 2}.jpg", "q", ("yes",), (1.0,), f"k_{i % 2}") for i in range(20)]  # type: ignore[arg-type]
    answers = answer_measures(["yes", "no", "yes", "yes"] * 5, records)
    labels = label_measures(["true", "false"] * 10, ["true"] * 20, range(20), ["g", "g", "", "h"] * 5, kinds=["x"] * 20)
    boxes = box_measures(torch.tensor([[0, 0, 1, 1.0]] * 6), torch.rand(6, 4).cumsum(1) / 4, range(6), ["a", "b"] * 3)
    ranks = [1, 1, 7, 2, 30, 1]
    recall = recall_measures(found_at(ranks), found_at(ranks + ranks), range(6), [*range(6), *range(6)])
    for measures in (answers, labels, boxes, recall):
        sure = intervals(measures)
        assert sure.keys() == measures.keys()
        assert all(low <= values(measures)[name] <= high for name, (low, high) in sure.items())
    assert {"accuracy", "accuracy_k", "accuracy_k_0", "accuracy_k_1"} == answers.keys()
    assert values(recall) == recalls(ranks, ranks + ranks)
