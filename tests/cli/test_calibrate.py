"""``mplug calibrate``: what is fitted is stored with the model, and every command's confidence is then that."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from mplug_cli import calibrate
from mplug_core.weights.folder import EMBEDDED


@pytest.fixture
def model(scenes: Path, tmp_path: Path) -> Path:
    """A random model of every part, with the words of the scenes."""
    from mplug_core.weights.folder import save_model
    from tests.small import CLASSIFIERS, CNN, scene_tokenizer, small_model

    tokenizer = scene_tokenizer(scenes)
    fields = {"vocab_size": tokenizer.vocab_size, "box_bins": tokenizer.bins, "max_positions": 64}
    save_model(tmp_path / "model", small_model(vision=CNN, classifiers=CLASSIFIERS, **fields), tokenizer)
    return tmp_path / "model"


@pytest.fixture
def answers(tmp_path: Path) -> Path:
    (tmp_path / "answers.txt").write_text("red\nblue\ncircle\nyes\nno\none\ntwo\n")
    return tmp_path / "answers.txt"


def calibration(folder: Path) -> dict[str, dict[str, float]]:
    return json.loads((folder / "config.json").read_text())["calibration"]


def test_what_is_written_down_is_what_the_tasks_say():
    from mplug_core.tasks.registry import EVALUATED

    assert set(calibrate.TASKS) < set(EVALUATED)


def test_several_tasks_in_place(mplug, model, scenes):
    options = ["--data", scenes, "--split", "train", "--model", model]
    done = mplug("calibrate", "--task", "statements", "--task", "entailment", *options, "--json", "-q")
    assert (done.code, done.err) == (0, "")
    statements, entailment = done.objects
    assert (statements["task"], statements["kind"], entailment["kind"]) == ("statements", "statement", "entailment")
    stored = calibration(model)
    assert stored.keys() == {"statement", "entailment"}
    for found in done.objects:
        assert stored[found["kind"]] == {"temperature": found["temperature"], "bias": 0.0}
        assert found["folder"] == str(model) and found["n"] >= 20
    # evaluated again, the error is what was foretold
    evaluated = mplug("eval", "--task", "statements", *options, "--json").objects[0]["metrics"]
    assert evaluated["ece"] == pytest.approx(statements["ece"]["after"], abs=1e-3)
    assert statements["ece"]["after"] < statements["ece"]["before"]


def test_one_call_after_the_other_adds_and_the_table_is_aligned(mplug, model, scenes, answers, tmp_path):
    options = ["--data", scenes, "--split", "train", "--model", model]
    assert mplug("calibrate", "--task", "statements", *options).code == 0
    copy = tmp_path / "copy"
    done = mplug("calibrate", copy, "--task", "vqa", *options, "--answers", answers)
    assert done.code == 0, done.err
    head, row = (line.split() for line in done.lines)
    assert head == ["task", "answers", "temperature", "bias", "ece", "before", "after"]
    assert row[0] == "vqa" and all(math.isfinite(float(cell)) for cell in row[1:])
    assert f"note: {copy}: calibrated for vqa" in done.err
    assert calibration(copy).keys() == {"statement", "choices"} and calibration(model).keys() == {"statement"}


def test_confidences_of_commands_are_calibrated(mplug, model, scenes):
    image = min((scenes / "train" / "images").iterdir())
    calls = {
        "vqa": ["vqa", image, "what color is the circle?"],
        "grounding": ["ground", image, "the circle"],
        "statement": ["reason", image, "there is a circle"],
        "entailment": ["reason", image, "--hypothesis", "there is a circle"],
    }
    before = {kind: mplug(*call, "--json", "--quiet", "--model", model).objects[0] for kind, call in calls.items()}
    config = json.loads((model / "config.json").read_text())
    config["calibration"] = {kind: {"temperature": 1e5} for kind in calls}
    (model / "config.json").write_text(json.dumps(config))
    after = {kind: mplug(*call, "--json", "--quiet", "--model", model).objects[0] for kind, call in calls.items()}
    for kind, even in (("vqa", 0.5), ("grounding", 0.5), ("statement", 0.5), ("entailment", 1 / 3)):
        name = "confidence" if kind in ("vqa", "grounding") else "probability"
        assert after[kind].pop(name) == pytest.approx(even, abs=0.01) != before[kind].pop(name)
    assert after["statement"]["label"] == before["statement"]["label"]
    assert after["grounding"] == before["grounding"] and after["vqa"] == before["vqa"]


def test_the_error_of_stored_answers_and_its_difference(mplug, model, scenes, tmp_path):
    options = ["--task", "statements", "--data", scenes, "--split", "train"]
    before, after = tmp_path / "before.jsonl", tmp_path / "after.jsonl"
    (plain,) = mplug("eval", *options, "--model", model, "--json", "--predictions", before).objects
    assert mplug("calibrate", *options, "--model", model, "-q").code == 0
    (found,) = mplug("eval", *options, "--model", model, "--json", "--predictions", after, "--against", before).objects
    assert found["metrics"]["ece"] < plain["metrics"]["ece"]
    low, high = found["interval"]["ece"]
    assert 0 <= low <= found["metrics"]["ece"] <= high
    gap, *_ = found["against"]["difference"]["ece"]
    assert gap == pytest.approx(found["metrics"]["ece"] - plain["metrics"]["ece"])
    (again,) = mplug("eval", *options, "--answers-from", after, "--json").objects
    assert again["metrics"] == found["metrics"] and again["interval"] == found["interval"]
    # what older versions wrote has no confidence, and then no error
    rows = [json.loads(line) for line in after.read_text().splitlines()]
    assert all(row["right"] is (row["label"] == row["truth"]) for row in rows)
    for row in rows:
        del row["confidence"]
    after.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (old,) = mplug("eval", *options, "--answers-from", after, "--json").objects
    assert "ece" not in old["metrics"] and old["metrics"]["accuracy"] == found["metrics"]["accuracy"]
    after.write_text("".join(json.dumps(row | {"confidence": "high"}) + "\n" for row in rows))
    wrong = mplug("eval", *options, "--answers-from", after)
    assert wrong.code == 3 and '"confidence" between 0 and 1' in wrong.error


def test_model_info_says_it(mplug, model, scenes):
    mplug("calibrate", "--task", "statements", "--data", scenes, "--split", "train", "--model", model)
    assert any(line.split()[:2] == ["calibrated", "statement"] for line in mplug("model", "info", model).lines)
    assert mplug("model", "info", model, "--json").objects[0]["calibration"] == calibration(model)


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--task", "caption"], 2, "no task 'caption'"),
        (["--task", "statement"], 2, "'statements'"),
        (["--task", "grounding", "--answers", "x"], 2, "--answers is for vqa"),
        (["--task", "grounding", "--force"], 2, "--force is for a copy"),
        (["--task", "statements", "--limit", "1"], 3, "1 record has a known answer"),
        (["--task", "grounding"], 3, "answers are wrong"),
        (["--task", "statements", "--split", "nowhere"], 3, "nowhere"),
    ],
)
def test_one_line_says_what_is_wrong(mplug, model, scenes, options, code, words):
    before = (model / "config.json").read_bytes()
    split = [] if "--split" in options else ["--split", "train"]
    done = mplug("calibrate", "--data", scenes, *split, "--model", model, *options, "-q")
    assert (done.code, done.out) == (code, "") and words in done.error
    assert (model / "config.json").read_bytes() == before


def test_labels_that_are_hidden(mplug, model, scenes, tmp_path):
    image = str(min((scenes / "train" / "images").iterdir()))
    lines = [{"image": image, "statement": f"there are {n} circles", "label": None} for n in range(30)]
    (tmp_path / "hidden.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = mplug("calibrate", "--task", "statements", "--data", tmp_path / "hidden.jsonl", "--model", model)
    assert done.code == 3 and "no record has a known answer" in done.error


def test_the_embedded_model_is_refused_before_the_work(mplug, scenes):
    before = (EMBEDDED / "config.json").read_bytes()
    done = mplug("calibrate", "--task", "vqa", "--data", scenes)
    assert done.code == 2 and "part of the package" in done.error
    assert (EMBEDDED / "config.json").read_bytes() == before
