"""What a model computes that is not a number is an error of that input: in the API, on the command line, in evaluation.

Weights are finite and so large that image tokens overflow fp16: in fp32 the same model answers.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import mplug_core
from mplug_cli.app import main
from mplug_core.api import Mplug
from mplug_core.data.text import Tokenizer
from mplug_core.errors import SOME_INPUTS_FAILED, NotFiniteError
from mplug_core.model.mplug import MplugModel
from mplug_core.recipe import DataSpec
from mplug_core.tasks import caption
from mplug_core.tasks.answering import is_finite
from mplug_core.tasks.registry import TASKS
from mplug_core.tasks.task import EvaluateOptions, Ready
from mplug_core.weights.folder import save_model
from tests.small import CLASSIFIERS, CNN, small_model


def overflowing(tokenizer: Tokenizer, largest: float) -> MplugModel:
    """A model whose projection of image tokens has weights up to ``largest``."""
    model = small_model(
        vision=CNN, vocab_size=tokenizer.vocab_size, box_bins=tokenizer.bins, classifiers=CLASSIFIERS, max_positions=64
    )
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.startswith("visual_projection") and value.dim() == 2:
                value.mul_(largest / value.abs().max())
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    place = tmp_path_factory.mktemp("models") / "large"
    save_model(place, overflowing(tokenizer, 6e4), tokenizer, dtype=torch.float32)
    return place


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    place, generator = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for number in range(2):
        Image.fromarray(generator.integers(0, 255, (30, 40, 3), dtype=np.uint8)).save(place / f"{number}.png")
    return [str(place / f"{number}.png") for number in range(2)]


CALLS: dict[str, Callable[[Mplug, str], Any]] = {
    "caption": lambda m, p: m.caption(p),
    "greedy": lambda m, p: m.caption(p, beams=1),
    "sample": lambda m, p: m.caption(p, n=2, strategy="sample", seed=0),
    "answer": lambda m, p: m.answer(p, "what colour is the circle?"),
    "choices": lambda m, p: m.answer(p, "what colour?", choices=["red", "blue"]),
    "ground": lambda m, p: m.ground(p, "the red circle"),
    "ground greedily": lambda m, p: m.ground(p, "the red circle", draws=0),
    "statement": lambda m, p: m.reason(p, statement="there is a red circle"),
    "hypothesis": lambda m, p: m.reason(p, hypothesis="there is a red circle"),
    "match": lambda m, p: m.rank(p, ["a red circle", "a blue square"], rerank="itm", candidates=2),
}


def test_results_are_errors(folder: Path, photos: list[str]) -> None:
    half, whole = (mplug_core.load(folder, device="cpu", dtype=dtype) for dtype in ("float16", "float32"))
    for name, call in CALLS.items():
        assert is_finite(call(whole, photos[0])), name
        with pytest.raises(NotFiniteError, match=r"not a number \(try --dtype float32") as caught:
            call(half, photos[0])
        assert caught.value.exit_code == SOME_INPUTS_FAILED, name
    with pytest.raises(NotFiniteError):
        half.encode(photos[0])


COMMANDS = {
    "caption": ["caption"],
    "vqa": ["vqa", "-Q", "what colour?"],
    "vqa choices": ["vqa", "-Q", "what colour?", "--answers", "ANSWERS"],
    "ground": ["ground", "-p", "the red circle"],
}


def test_command_lines(
    folder: Path, photos: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MPLUG_MODEL", str(folder))
    answers = tmp_path / "answers.txt"
    answers.write_text("red\nblue\n")

    def run(*arguments: str) -> tuple[int, list[str], str]:
        code = main([str(answers) if a == "ANSWERS" else a for a in arguments])
        out, err = capfd.readouterr()
        return code, out.splitlines(), err

    for name, command in COMMANDS.items():
        code, lines, _ = run(*command, *photos, "--dtype", "float16")
        found = [json.loads(line)["error"] for line in lines]
        assert code == 4 and [error["code"] for error in found] == ["not_finite"] * 2, name
        assert all("--dtype float32" in error["message"] for error in found)
        code, lines, err = run(*command, photos[0], "--dtype", "float16")
        assert (code, lines) == (4, []) and err.startswith("error: the answer is not a number"), name
    code, lines, err = run("reason", photos[0], "there is a red circle", "--dtype", "float16")
    assert (code, lines) == (4, []) and "not a number" in err
    code, lines, _ = run("caption", *photos, "--dtype", "float32")
    assert code == 0 and len(lines) == 2
    code, _, err = run("caption", photos[0], "--dtype", "float12")
    assert code == 2 and "float12" in err


@pytest.mark.parametrize("task", ["caption", "vqa", "grounding", "statements", "entailment", "reasoning", "retrieval"])
def test_evaluation_of_nothing_but_what_is_no_number(tokenizer: Tokenizer, scenes: Path, task: str) -> None:
    ready = Ready(overflowing(tokenizer, 3e38), tokenizer)
    with pytest.raises(NotFiniteError, match="not a number"):
        TASKS[task].evaluate(ready, DataSpec(path=str(scenes), split="train"), EvaluateOptions(limit=3))


def test_evaluation_leaves_out_what_is_no_number(
    tokenizer: Tokenizer, scenes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready, spec = Ready(overflowing(tokenizer, 1.0), tokenizer), DataSpec(path=str(scenes), split="train")
    whole = TASKS["caption"].evaluate(ready, spec, EvaluateOptions(limit=4, batch_size=3))
    describe = caption.describe

    def spoiled(*arguments: Any) -> Any:
        found = describe(*arguments)
        found[0] = [replace(answer, score=float("nan")) for answer in found[0]]
        return found

    monkeypatch.setattr(caption, "describe", spoiled)
    result = TASKS["caption"].evaluate(ready, spec, EvaluateOptions(limit=4, batch_size=3))
    assert (result.n, result.skipped, result.not_finite) == (2, whole.skipped + 2, 2)
    assert result.predictions == [whole.predictions[1], whole.predictions[2]]
    assert any("2 of 4 records" in note and "float32" in note for note in result.notes)
