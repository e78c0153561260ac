"""``mplug eval``: table, JSON, predictions, baseline. The metrics themselves have their own tests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mplug_cli import eval as eval_command


@pytest.fixture
def data(make_photo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Five captioned photos, of which one is damaged and one is not there; metrics that need no Java."""
    monkeypatch.setattr("mplug_core.tasks.caption.score_captions", lambda found, truth: {"cider": len(found) / 10})
    monkeypatch.setattr("mplug_core.tasks.nearest.score_captions", exact)
    names = [f"images/{i}.png" for i in range(5)]
    for name in names[:4]:
        make_photo(name)
    (tmp_path / names[3]).write_bytes(b"no image")
    file = tmp_path / "captions.jsonl"
    file.write_text("".join(json.dumps({"image": n, "caption": ["a ball", f"number {n}"]}) + "\n" for n in names))
    return file


def exact(found: dict[str, str], truth: dict[str, list[str]]) -> dict[str, float]:
    assert list(found) == list(truth)
    return {"cider": sum(found[key] in truth[key] for key in truth) / len(truth)}


def test_task_names_are_those_of_the_registry():
    from mplug_core.tasks.registry import EVALUATED

    assert eval_command.TASKS == EVALUATED


def test_plain_columns(mplug, model_folder, data):
    done = mplug("eval", "--task", "caption", "--data", data)
    assert done.code == 0 and done.err.startswith("note: 2 records")
    rows = [line.split() for line in done.lines]
    assert rows[:4] == [["caption", "model"], ["cider", "0.3000"], ["examples", "3"], ["skipped", "2"]]


def test_json_and_predictions(mplug, model_folder, data, tmp_path):
    out = tmp_path / "out.jsonl"
    done = mplug("eval", "--data", data, "--json", "--predictions", out, "--beam", "1", "--limit", "2", "-q")
    assert (done.code, done.err) == (0, "")
    (found,) = done.objects
    assert (found["task"], found["n"], found["metrics"]) == ("caption", 2, {"cider": 0.2})
    assert found["seconds_per_example"] > 0 and found["model"] == model_folder.name
    predictions = [json.loads(line) for line in out.read_text().splitlines()]
    assert [Path(p["image"]).name for p in predictions] == ["0.png", "1.png"]
    assert all(isinstance(p["caption"], str) for p in predictions)


def test_baseline_of_the_nearest_photo(mplug, model_folder, data, tmp_path):
    # the nearest of a photo's copy is the photo, whose captions are its own
    copies = tmp_path / "copies"
    (copies / "images").mkdir(parents=True)
    for number in range(3):
        (copies / "images" / f"{number}.png").write_bytes((tmp_path / "images" / f"{number}.png").read_bytes())
    (copies / "captions.jsonl").write_text(
        "".join(json.dumps({"image": f"images/{n}.png", "caption": f"number images/{n}.png"}) + "\n" for n in range(3))
    )
    options = ["eval", "--data", data, "--baseline", "nearest", "--train", copies / "captions.jsonl"]
    (found,) = mplug(*options, "--json").objects
    assert found["baseline"] == {"name": "nearest", "metrics": {"cider": 1.0}}
    rows = [line.split() for line in mplug(*options).lines]
    assert rows[:2] == [["caption", "model", "nearest"], ["cider", "0.3000", "1.0000"]]


def test_the_baseline_does_not_find_the_photo_itself(mplug, model_folder, data):
    (found,) = mplug("eval", "--data", data, "--baseline", "nearest", "--train", data, "--json").objects
    assert found["baseline"]["metrics"]["cider"] == 1.0  # "a ball" of another photo


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--task", "capton"], "'caption'"),
        (["--format", "cocoo"], "'coco'"),
        (["--task", "grounding", "--beam", "3"], "--beam"),
        (["--candidates", "3"], "--candidates"),
        (["--baseline", "nearest"], "--train"),
        (["--train", "x"], "--baseline"),
        (["--baseline", "best", "--train", "x"], "'best'"),
    ],
)
def test_options_that_contradict_each_other(mplug, data, options, words):
    done = mplug("eval", "--data", data, *options)
    assert (done.code, done.out) == (2, "") and words in done.error


def test_data_that_is_not_there(mplug, model_folder, tmp_path):
    done = mplug("eval", "--data", tmp_path / "none.jsonl")
    assert done.code == 3 and "none.jsonl" in done.error


def test_predictions_with_nowhere_to_go_stop_before_the_work(mplug, model_folder, data, tmp_path):
    done = mplug("eval", "--data", data, "--predictions", tmp_path / "none" / "out.jsonl")
    assert done.code == 1 and "can't be written" in done.error
