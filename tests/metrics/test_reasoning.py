"""Accuracy, consistency and the format of NLVR2's evaluation."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from mplug_core.errors import DataError
from mplug_core.metrics.reasoning import score_labels, submission
from tests.conftest import SHARED

NLVR2 = SHARED / "data" / "golden" / "nlvr2" / "dev.json"


@pytest.fixture(scope="module")
def dev() -> list[dict]:
    """NLVR2's development split."""
    if not NLVR2.is_file():
        pytest.skip(f"no {NLVR2}")
    return [json.loads(line) for line in NLVR2.read_text().splitlines()]


def group(identifier: str) -> str:
    """The sentence: split, set and sentence, without the pair."""
    split, images, _, sentence = identifier.split("-")
    return f"{split}-{images}-{sentence}"


def test_nlvr2_always_true(dev: list[dict]) -> None:
    labels = [entry["label"].lower() for entry in dev]
    scores = score_labels(["true"] * len(dev), labels, [group(entry["identifier"]) for entry in dev])
    assert {name: round(value, 6) for name, value in scores.items()} == {"accuracy": 0.508594, "consistency": 0.038652}


def test_nlvr2_all_right(dev: list[dict]) -> None:
    labels = [entry["label"] for entry in dev]
    scores = score_labels(labels, labels, [group(entry["identifier"]) for entry in dev])
    assert scores == {"accuracy": 1.0, "consistency": 1.0}


def test_consistency_by_hand() -> None:
    predicted, labels = ["true"] * 6, ["true", "true", "true", "false", "false", "true"]
    scores = score_labels(predicted, labels, ["a", "a", "b", "b", "c", ""])
    # the last belongs to no group
    assert scores == {"accuracy": pytest.approx(4 / 6), "consistency": pytest.approx(1 / 3)}


@pytest.mark.parametrize("groups", [None, ["", ""]])
def test_without_groups_there_is_no_consistency(groups: list[str] | None) -> None:
    assert score_labels(["true", "true"], ["true", "false"], groups) == {"accuracy": 0.5}


def test_hidden_labels_are_not_scored() -> None:
    scores = score_labels(["true"] * 4, ["true", None, "false", None], ["a", "a", "b", "c"])
    assert scores == {"accuracy": 0.5, "consistency": 0.5}
    assert score_labels(["true"], [None], ["a"], per_label=True) == {}
    assert score_labels([], []) == {}


def test_per_label() -> None:
    labels = ["entailment", "neutral", "neutral", "contradiction"]
    scores = score_labels(["entailment", "neutral", "entailment", "neutral"], labels, per_label=True)
    assert scores == {
        "accuracy": 0.5, "accuracy_entailment": 1.0, "accuracy_neutral": 0.5, "accuracy_contradiction": 0.0
    }  # fmt: skip


def test_as_many_predictions_as_labels() -> None:
    with pytest.raises(ValueError):
        score_labels(["true"], ["true", "false"])


def test_submission() -> None:
    predictions = [
        {"identifier": "dev-850-0-0", "label": "true", "probability": 0.9},
        {"identifier": "dev-850-1-0", "label": "false"},
    ]
    assert list(submission(predictions)) == ["dev-850-0-0,True", "dev-850-1-0,False"]
    with pytest.raises(DataError, match="no identifier"):
        list(submission([{"label": "true"}]))


def test_submission_names_the_official_identifiers(dev: list[dict], tmp_path: Path) -> None:
    """Scored as the official evaluation does: by identifier, against the label's words."""
    lines = submission({"identifier": e["identifier"], "label": e["label"].lower()} for e in dev)
    said = dict(line.split(",") for line in lines)
    assert all(re.fullmatch(r"True|False", label) for label in said.values())
    assert all(said[entry["identifier"]] == entry["label"] for entry in dev) and len(said) == len(dev)
