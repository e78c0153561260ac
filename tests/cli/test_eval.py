"""``mplug eval``: table, JSON, predictions, results, baselines. The metrics themselves have their own tests."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mplug_cli import eval as eval_command


@pytest.fixture
def data(make_photo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Five captioned photos, of which one is damaged and one is not there; metrics that need no Java."""
    monkeypatch.setattr("mplug_core.tasks.caption.score_captions", lambda found, *a, **k: {"cider": len(found) / 10})
    monkeypatch.setattr("mplug_core.tasks.nearest.compare_captions", exact)
    names = [f"images/{i}.png" for i in range(5)]
    for name in names[:4]:
        make_photo(name)
    (tmp_path / names[3]).write_bytes(b"no image")
    file = tmp_path / "captions.jsonl"
    file.write_text("".join(json.dumps({"image": n, "caption": ["a ball", f"number {n}"]}) + "\n" for n in names))
    return file


def exact(predictions: list[tuple]) -> tuple[dict[str, float], list[str]]:
    right = [text in record.captions for record, text in predictions]
    return {"cider": sum(right) / len(right)}, []


@pytest.fixture(scope="module")
def scene_model(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of every part, with the words of the scenes."""
    from mplug_core.weights.folder import save_model
    from tests.small import CLASSIFIERS, CNN, scene_tokenizer, small_model

    tokenizer = scene_tokenizer(scenes)
    fields = {"vocab_size": tokenizer.vocab_size, "box_bins": tokenizer.bins, "max_positions": 64}
    folder = tmp_path_factory.mktemp("models") / "scenes"
    save_model(folder, small_model(vision=CNN, classifiers=CLASSIFIERS, **fields), tokenizer)
    return folder


def test_what_is_written_down_is_what_the_tasks_say():
    from mplug_core.tasks.baselines import BASELINES
    from mplug_core.tasks.registry import EVALUATED, TASKS

    assert tuple(eval_command.OPTIONS) == EVALUATED
    assert {name: TASKS[name].options for name in EVALUATED} == eval_command.OPTIONS
    assert {task: tuple(names) for task, names in BASELINES.items()} == eval_command.BASELINES
    assert tuple(name for name in EVALUATED if hasattr(TASKS[name], "submission")) == eval_command.SUBMITTED


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


def test_several_tasks(mplug, scene_model, scenes, tmp_path):
    tasks = ["--task", "vqa", "--task", "statements", "--task", "entailment", "--task", "grounding"]
    out = tmp_path / "out.jsonl"
    options = ["eval", *tasks, "--data", scenes, "--split", "train", "--model", scene_model, "--limit", "6"]
    done = mplug(*options, "--json", "--predictions", out)
    assert done.code == 0, done.err
    assert [found["task"] for found in done.objects] == ["vqa", "statements", "entailment", "grounding"]
    assert all({"task", "n", "skipped", "metrics"} <= found.keys() and found["n"] == 6 for found in done.objects)
    written = [json.loads(line)["task"] for line in out.read_text().splitlines()]
    assert written == ["vqa"] * 6 + ["statements"] * 6 + ["entailment"] * 6 + ["grounding"] * 6
    heads = [line.split() for line in mplug(*options).lines if line.endswith("model")]
    assert heads == [["vqa", "model"], ["statements", "model"], ["entailment", "model"], ["grounding", "model"]]


def test_options_reach_the_tasks_that_have_them(mplug, scene_model, scenes, tmp_path):
    answers = tmp_path / "answers.txt"
    answers.write_text("purple\n\n purple \n")
    out = tmp_path / "out.jsonl"
    options = ["--data", scenes, "--split", "train", "--model", scene_model, "--limit", "4", "--json"]
    done = mplug("eval", "--task", "vqa", "--task", "grounding", *options, "--answers", answers, "--predictions", out)
    assert done.code == 0, done.err
    assert {line.get("answer") for line in map(json.loads, out.read_text().splitlines())} == {"purple", None}
    by_feature = mplug("eval", "--task", "retrieval", *options, "--candidates", "0").objects[0]["metrics"]
    by_match = mplug("eval", "--task", "retrieval", *options, "--candidates", "4").objects[0]["metrics"]
    assert by_feature.keys() == by_match.keys() and by_feature["i2t_r10"] == 1.0


@pytest.mark.parametrize(
    ("task", "name", "metric"),
    [
        ("vqa", "majority", "accuracy"),
        ("vqa", "prior", "accuracy"),
        ("statements", "majority", "accuracy"),
        ("entailment", "majority", "accuracy"),
        ("grounding", "constant_box", "accuracy_iou50"),
        ("retrieval", "random", "i2t_r1"),
    ],
)
def test_baselines(mplug, scene_model, scenes, task, name, metric):
    train = [] if name == "random" else ["--train", scenes, "--train-split", "train"]
    options = ["--data", scenes, "--split", "train", "--model", scene_model, "--limit", "8", "--json"]
    done = mplug("eval", "--task", task, *options, "--baseline", name, *train)
    assert done.code == 0, done.err
    found = done.objects[0]["baseline"]
    assert found["name"] == name and 0 <= found["metrics"][metric] <= 1
    assert found["metrics"].keys() <= done.objects[0]["metrics"].keys()


def test_results_for_servers(mplug, model_folder, data, scene_model, scenes, tmp_path):
    file = tmp_path / "results.json"
    assert mplug("eval", "--data", data, "--results", file, "--json", "-q").code == 0
    rows = json.loads(file.read_text())
    assert len(rows) == 3 and all(row.keys() == {"image_id", "caption"} for row in rows)
    questions = tmp_path / "questions.jsonl"
    entry = {"image": "images/0.png", "question": "what?", "answer": "a ball", "question_id": "17"}
    questions.write_text(json.dumps(entry) + "\n")
    assert mplug("eval", "--task", "vqa", "--data", questions, "--results", file, "--model", scene_model).code == 0
    assert [row["question_id"] for row in json.loads(file.read_text())] == [17]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--task", "capton"], "'caption'"),
        (["--task", "vqa", "--task", "groundin"], "'grounding'"),
        (["--format", "cocoo"], "'coco'"),
        (["--task", "vqa", "--format", "coco"], "no format 'coco' of vqa"),
        (["--task", "grounding", "--beam", "3"], "--beam"),
        (["--candidates", "3"], "--candidates"),
        (["--rerank", "itm"], "--rerank"),
        (["--task", "retrieval", "--rerank", "itc"], "'itm'"),
        (["--answers", "x"], "--answers"),
        (["--task", "vqa", "--answers", "x", "--beam", "2"], "--answers"),
        (["--baseline", "nearest"], "--train"),
        (["--train", "x"], "--baseline"),
        (["--baseline", "best", "--train", "x"], "'best'"),
        (["--task", "vqa", "--baseline", "nearest", "--train", "x"], "vqa has no baseline"),
        (["--task", "retrieval", "--baseline", "random", "--train", "x"], "--train"),
        (["--task", "vqa", "--task", "caption", "--results", "x"], "--results"),
        (["--task", "grounding", "--results", "x"], "--results"),
    ],
)
def test_options_that_contradict_each_other(mplug, data, options, words):
    done = mplug("eval", "--data", data, *options)
    assert (done.code, done.out) == (2, "") and words in done.error


def test_a_wrong_option_is_answered_without_torch():
    code = (
        "import sys\nfrom mplug_cli.app import main\n"
        "code = main(['eval', '--data', 'x', '--task', 'vqa', '--candidates', '3'])\n"
        "print(code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.stdout == "2 False\n", done.stderr


def test_answers_that_are_none(mplug, tmp_path):
    (tmp_path / "empty.txt").write_text("\n\n")
    for name, words in (("empty.txt", "has no answers"), ("none.txt", "can't be read")):
        done = mplug("eval", "--task", "vqa", "--data", "x", "--answers", tmp_path / name)
        assert done.code == 3 and words in done.error


def test_data_that_is_not_there(mplug, model_folder, tmp_path):
    done = mplug("eval", "--data", tmp_path / "none.jsonl")
    assert done.code == 3 and "none.jsonl" in done.error


def test_predictions_with_nowhere_to_go_stop_before_the_work(mplug, model_folder, data, tmp_path):
    done = mplug("eval", "--data", data, "--predictions", tmp_path / "none" / "out.jsonl")
    assert done.code == 1 and "can't be written" in done.error
