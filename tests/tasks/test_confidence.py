"""Confidences with and without a calibration, and what a calibration is fitted on."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from mplug_core.errors import DataError
from mplug_core.model.config import Calibration
from mplug_core.recipe import DataSpec
from mplug_core.tasks.confidence import FEWEST, Evidence, certainty, log_odds, shares
from mplug_core.tasks.registry import TASKS
from mplug_core.tasks.task import EvaluateOptions, Ready
from tests.small import CLASSIFIERS, CNN, small_config, small_model

KINDS = ("vqa", "choices", "grounding", "statement", "entailment")


def calibrated(**kinds: tuple[float, float]) -> Any:
    return small_config(calibration={kind: {"temperature": t, "bias": b} for kind, (t, b) in kinds.items()})


@pytest.fixture(scope="module")
def ready(tokenizer) -> Ready:
    model = small_model(
        vision=CNN, vocab_size=tokenizer.vocab_size, box_bins=tokenizer.bins, classifiers=CLASSIFIERS, max_positions=64
    )
    return Ready(model, tokenizer)


def test_without_a_calibration_nothing_changes() -> None:
    plain, scores = small_config(), torch.randn(3, 4)
    assert all(torch.equal(shares(plain, kind, scores), scores.softmax(-1)) for kind in KINDS)
    assert all(certainty(plain, kind, value) == value for kind in ("vqa", "grounding") for value in (0.0, 0.3, 1.0))


def test_shares_are_of_scores_divided_by_the_temperature() -> None:
    config = calibrated(entailment=(2.0, 0.0))
    found = shares(config, "entailment", torch.tensor([[2.0, 0.0, 0.0]]))
    assert found[0].tolist() == pytest.approx([math.e / (math.e + 2), *[1 / (math.e + 2)] * 2])
    assert shares(config, "statement", torch.tensor([2.0, 0.0]))[0] == pytest.approx(1 / (1 + math.exp(-2)))


def test_a_confidence_that_stands_alone_is_mapped() -> None:
    config = calibrated(vqa=(2.0, -1.0), grounding=(0.01, 0.0))
    assert certainty(config, "vqa", 0.9) == pytest.approx(1 / (1 + math.exp(-math.log(9) / 2 + 1)))
    assert certainty(config, "vqa", 0.9, 0.3) == certainty(config, "vqa", 0.9)
    assert certainty(small_config(), "vqa", 0.9, 0.3) == 0.3
    assert certainty(config, "vqa", 0.0) < certainty(config, "vqa", 0.1) < certainty(config, "vqa", 1.0) < 1
    # no overflow, however sure
    assert certainty(config, "grounding", 0.0) == pytest.approx(0) and certainty(config, "grounding", 1.0) == 1


@pytest.mark.parametrize("bad", [{"temperature": 0}, {"temperature": math.inf}, {"temperature": 1, "bias": math.nan}])
def test_a_calibration_is_of_finite_numbers(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError):
        Calibration(**bad)


def answers(kind: str, right: list[float]) -> Evidence:
    evidence = Evidence(kind)
    for place in range(len(right)):
        confidence = 0.5 + 0.4 * ((place % 7) / 7)
        alone = kind in ("vqa", "grounding")
        scores = [log_odds(kind, confidence)] if alone else [math.log(confidence), math.log(1 - confidence)]
        evidence.add(confidence, scores)
    return evidence.judged(right)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("right", "words"),
    [
        ([], "no record has a known answer"),
        ([1.0], "1 record has a known answer, and a calibration needs"),
        ([1.0] * 30, "all 30 answers are right"),
        ([0.0] * 30, "all 30 answers are wrong"),
    ],
)
def test_answers_that_show_nothing(kind: str, right: list[float], words: str) -> None:
    with pytest.raises(DataError, match=words):
        answers(kind, right).calibration()


@pytest.mark.parametrize("kind", KINDS)
def test_few_answers_have_a_finite_calibration(kind: str) -> None:
    for right in ([1.0, 0.0] * FEWEST, [1.0] * FEWEST + [0.0], [0.0] * FEWEST + [1.0], [0.3, 0.4] * FEWEST):
        evidence = answers(kind, right)
        found = evidence.calibration()
        after = evidence.calibrated(found)
        assert 0.01 <= found.temperature <= 100 and math.isfinite(found.bias)
        assert 0 <= after.error() <= 1 and all(0 < value <= 1 for value in after.confidences)


def test_one_candidate_shows_nothing() -> None:
    evidence = Evidence("choices")
    for _ in range(FEWEST):
        evidence.add(1.0, [-1.0])
    with pytest.raises(DataError, match="one answer to choose from"):
        evidence.judged([0, 1] * (FEWEST // 2)).calibration()


@pytest.mark.parametrize("task", ["vqa", "grounding", "statements", "entailment"])
def test_evaluations_are_as_sure_as_their_calibration_says(ready: Ready, scenes, task: str) -> None:
    """What is fitted on an evaluation and stored with the model gives, evaluated again, what the fit foretold."""
    spec, options = DataSpec(path=str(scenes), split="train"), EvaluateOptions(limit=60)
    before = TASKS[task].evaluate(ready, spec, options)
    evidence = before.evidence
    assert before.metrics["ece"] == pytest.approx(evidence.error(), abs=1e-4) and len(evidence.right) == before.n > 30
    assert [p["right"] for p in before.predictions] == evidence.right
    assert [p["confidence"] for p in before.predictions] == [round(value, 6) for value in evidence.confidences]
    known = Calibration(temperature=1.7, bias=-0.4 if evidence.kind in ("vqa", "grounding") else 0)
    plain = ready.config
    ready.model.config = plain.model_copy(update={"calibration": {evidence.kind: known}})
    try:
        after = TASKS[task].evaluate(ready, spec, options)
    finally:
        ready.model.config = plain
    foretold = evidence.calibrated(known)
    assert after.evidence.confidences == pytest.approx(foretold.confidences, abs=1e-5)
    assert after.evidence.confidences != pytest.approx(evidence.confidences, abs=1e-3)
    assert after.metrics["ece"] == pytest.approx(foretold.error(), abs=1e-4)
    assert {k: v for k, v in after.metrics.items() if k != "ece"} == {
        k: v for k, v in before.metrics.items() if k != "ece"
    }


def test_choices_have_a_calibration_of_their_own(ready: Ready, scenes) -> None:
    spec = DataSpec(path=str(scenes), split="train")
    listed = EvaluateOptions(limit=30, answers=("red", "circle", "two", "yes", "no"))
    before = TASKS["vqa"].evaluate(ready, spec, listed).evidence
    assert before.kind == "choices" and all(len(scores) == 5 for scores in before.scores)
    plain = ready.config
    known = {"choices": Calibration(temperature=3.0), "vqa": Calibration(temperature=2.0, bias=1.0)}
    ready.model.config = plain.model_copy(update={"calibration": known})
    try:
        after = TASKS["vqa"].evaluate(ready, spec, listed).evidence
    finally:
        ready.model.config = plain
    assert after.confidences == pytest.approx(before.calibrated(known["choices"]).confidences, abs=1e-5)


def test_boxes_decoded_greedily_are_not_calibrated(ready: Ready, scenes) -> None:
    spec, options = DataSpec(path=str(scenes), split="train"), EvaluateOptions(limit=10, draws=0)
    before = TASKS["grounding"].evaluate(ready, spec, options).evidence.confidences
    plain = ready.config
    ready.model.config = plain.model_copy(update={"calibration": {"grounding": Calibration(temperature=3.0)}})
    try:
        assert TASKS["grounding"].evaluate(ready, spec, options).evidence.confidences == before
    finally:
        ready.model.config = plain


def test_records_without_an_answer_are_not_counted(ready: Ready, scenes, monkeypatch: pytest.MonkeyPatch) -> None:
    task = TASKS["statements"]
    monkeypatch.setattr(task, "_label", lambda record: None)
    result = task.evaluate(ready, DataSpec(path=str(scenes), split="train"), EvaluateOptions(limit=5))
    assert result.metrics == {} and not result.evidence.right and "right" not in result.predictions[0]
