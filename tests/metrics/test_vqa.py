"""VQA accuracies: the official numbers on the official answers, and values worked out by hand."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mplug_core.data.records import QuestionRecord
from mplug_core.metrics.vqa import accuracy, consensus, named, normalise, score_answers
from tests.conftest import SHARED

ANSWERERS: dict[str, Callable[[dict[str, Any]], str]] = {
    "annotator1": lambda annotation: annotation["answers"][0]["answer"],
    "mc": lambda annotation: annotation["multiple_choice_answer"],
    "yes": lambda annotation: "yes",
    "messy": lambda annotation: f"The {annotation['multiple_choice_answer'].upper()}.",
}


@pytest.fixture(scope="module")
def annotations() -> list[dict[str, Any]]:
    path = SHARED / "data" / "vqa2" / "annotations_valid.json.gz"
    if not path.is_file():
        pytest.skip(f"no VQA v2 annotations: {path}")
    return json.loads(gzip.decompress(path.read_bytes()))["annotations"]


def record(*answers: str, weights: tuple[float, ...] = (), kind: str = "", annotators: Any = ()) -> QuestionRecord:
    weights = weights or (1 / max(len(answers), 1),) * len(answers)
    return QuestionRecord(Path("a.jpg"), "q", answers, weights, kind, annotators=tuple(annotators))


def panel(*answers: str, kind: str = "") -> QuestionRecord:
    """A record with one annotator an answer."""
    return record(*dict.fromkeys(answers), kind=kind, annotators=answers)


@pytest.mark.parametrize("answerer", ANSWERERS)
def test_official_numbers(annotations: list[dict[str, Any]], answerer: str) -> None:
    """To the last digit that the official evaluation gave for these answers."""
    overall, by_type = json.loads((SHARED / "data" / "golden" / "vqa_scores.json").read_text())[
        f"valid/{answerer}/official"
    ]
    records = [panel(*(a["answer"] for a in item["answers"]), kind=item["answer_type"]) for item in annotations]
    scores = score_answers([ANSWERERS[answerer](item) for item in annotations], records)
    wanted = {"accuracy": overall, **{f"accuracy_{k.replace('/', '_')}": value for k, value in by_type.items()}}
    assert {name: round(100 * value, 4) for name, value in scores.items()} == wanted


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("The red bus.", "red bus"),
        ("a, an, the", ""),
        ("Two dogs", "2 dogs"),
        ("None", "0"),
        ("eleven", "eleven"),
        ("t-shirt", "t shirt"),
        ("black and white-striped", "black and white striped"),
        ("red , blue", "red blue"),
        ("3,000 m-p-h", "3000 mph"),  # a comma between digits: all punctuation vanishes
        ("yes - no", "yes no"),  # loose: vanishes
        ("half-way - no", "halfway no"),  # loose in one place: vanishes everywhere
        ("2.5", "2.5"),
        ("2.", "2"),
        ("U.S.A.", "usa"),
        ("dont", "don't"),
        ("don't", "don't"),
        ("couldntve", "couldntve"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("yall'd've", "y'all'd've"),
        ("somebody'd", "somebodyd"),
        ("Im", "im"),  # the table's entry is in capitals and never applies
        ("what\\is[it]", "what is it"),
        ("5:30", "5:30"),
        ("$5", "$5"),
        ("." * 32 + "x.y", "x.y"),  # 32 periods at most are removed
        ("." * 31 + "x.y", "xy"),
    ],
)
def test_normal_form(text: str, form: str) -> None:
    assert normalise(text) == form


class TestConsensus:
    @pytest.mark.parametrize(
        ("agree", "score"),
        # of those who agree each sees one match less: 3 agree -> (3 * 2/3 + 7 * 1) / 10
        [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (9, 1.0), (10, 1.0)],
    )
    def test_by_hand(self, agree: int, score: float) -> None:
        given = ["red"] * agree + ["blue"] * (10 - agree)
        assert consensus("red", given) == pytest.approx(score)

    def test_normalised_only_where_annotators_disagree(self) -> None:
        assert consensus("The red.", ["red"] * 10) == 0.0
        assert consensus("The red.", ["red"] * 9 + ["blue"]) == 1.0
        assert consensus("red", ["a red"] * 10) == 0.0
        assert consensus("red", ["a red"] * 9 + ["red"]) == 1.0

    def test_line_breaks_and_tabs_are_spaces(self) -> None:
        assert consensus(" light\nblue\t", ["light\tblue"] * 10) == 1.0


class TestAccuracy:
    @pytest.mark.parametrize(
        ("said", "score"), [("red", 1.0), ("The Red.", 1.0), ("blue", 0.0), ("red, blue", 0.0), ("", 0.0)]
    )
    def test_single_answer(self, said: str, score: float) -> None:
        assert accuracy(said, record("red")) == score

    @pytest.mark.parametrize(
        ("said", "score"), [("red", 1.0), ("dark red", 1.0), ("pink", 2 / 3), ("rose", 1 / 3), ("blue", 0.0)]
    )
    def test_shares_of_annotators(self, said: str, score: float) -> None:
        """Three of ten make an answer right, however many there were."""
        shares = record("red", "dark red", "pink", "rose", weights=(0.4, 0.3, 0.2, 0.1))
        assert accuracy(said, shares) == pytest.approx(score)

    def test_answers_of_equal_form_are_one(self) -> None:
        assert accuracy("red", record("Red.", "red", "blue", weights=(0.1, 0.1, 0.8))) == pytest.approx(2 / 3)

    def test_three_annotators(self) -> None:
        few = record("red", "blue", weights=(2 / 3, 1 / 3), annotators=("red", "red", "blue"))
        assert (accuracy("blue", few), accuracy("green", few)) == (1.0, 0.0)

    @pytest.mark.parametrize(
        ("said", "score"),
        [
            ("chair, table", 1.0),
            ("The table,  Chair.", 1.0),
            ("table, chair, chair", 1.0),
            ("table", 0.0),
            ("table chair", 0.0),
            ("table, chair, lamp", 0.0),
            ("", 0.0),
        ],
    )
    def test_set(self, said: str, score: float) -> None:
        assert accuracy(said, replace(record("table", "chair"), together=True)) == score

    def test_alternatives_are_no_set(self) -> None:
        assert accuracy("2", record("2", "two")) == accuracy("two", record("2", "two")) == 1.0

    def test_unknown(self) -> None:
        assert accuracy("red", record()) is None

    def test_named_parts(self) -> None:
        assert named("Two chairs, the table,, a") == {"2 chairs", "table"}


class TestScores:
    def test_kinds(self) -> None:
        records = [record("yes", kind="yes/no"), record("no", kind="yes/no"), record("red", kind="color"), record("x")]
        assert score_answers(["yes", "yes", "red", "y"], records) == {
            "accuracy": 0.5, "accuracy_color": 1.0, "accuracy_yes_no": 0.5
        }  # fmt: skip

    def test_any_of_a_set(self) -> None:
        records = [replace(record("table", "chair"), together=True), record("lamp"), record("desk")]
        scores = score_answers(["chair, bed", "lamp", "bed"], records)
        assert scores == {"accuracy": pytest.approx(1 / 3), "accuracy_any": pytest.approx(2 / 3)}

    def test_without_known_answers_there_are_none(self) -> None:
        assert score_answers(["red", "blue"], [record(), record()]) == {}

    def test_unknown_answers_do_not_count(self) -> None:
        assert score_answers(["red", "blue"], [record(), record("blue")]) == {"accuracy": 1.0}

    def test_each_record_needs_an_answer(self) -> None:
        with pytest.raises(ValueError):
            score_answers(["red"], [record("red"), record("blue")])
