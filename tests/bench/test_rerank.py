"""The re-ranking benchmark on a small model: what it reports, and that sharing changes nothing."""

from __future__ import annotations

import json

import pytest
import torch

from mplug_core.bench.rerank import Amounts, Contest, bench_rerank
from mplug_core.errors import MplugError
from tests.small import CNN, small_config

SMALL = Amounts(captions=6, questions=3, image_shared=4, alone=2, answer_tokens=2)


def test_report() -> None:
    turns: list[str] = []
    report = bench_rerank(small_config(), SMALL, ("hf-blip", "plain"), repeats=2, advance=turns.append)
    assert len(turns) == 6 * 2
    found = json.loads(report.json())
    assert [(entry["work"], entry["way"], entry["count"]) for entry in found["rates"]] == [
        ("match pairs", "mplug", 6), ("match pairs", "image-shared", 4), ("match pairs", "plain", 2),
        ("match pairs", "hf-blip", 2), ("questions", "mplug", 3), ("questions", "plain", 2),
    ]  # fmt: skip
    for entry in found["rates"]:
        assert len(entry["all"]) == 2 and entry["per_second"] == pytest.approx(entry["count"] / entry["median"])
    assert all(len(row) == len(report.columns) for row in report.rows)
    assert any("the same scores and answers" in note for note in found["notes"])


def test_against_one() -> None:
    names = lambda report: {entry["way"] for entry in report.figures["rates"]}  # noqa: E731
    assert names(bench_rerank(small_config(vision=CNN), SMALL, ("hf-blip",), repeats=1)) == {"mplug", "hf-blip"}
    assert names(bench_rerank(small_config(), SMALL, ("plain",), repeats=1)) == {"mplug", "image-shared", "plain"}


def test_other_scores_or_answers_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(Contest, "image_shared", lambda self, count: torch.full((count,), 9.0))
        with pytest.raises(MplugError, match="other match scores"):
            bench_rerank(small_config(), SMALL, ("plain",), repeats=1)
    monkeypatch.setattr(Contest, "answers_alone", lambda self, count: ["no"] * count)
    with pytest.raises(MplugError, match="other answers"):
        bench_rerank(small_config(), SMALL, ("plain",), repeats=1)
