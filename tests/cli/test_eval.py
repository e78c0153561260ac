"""``mplug eval``: table, JSON, predictions, results, baselines. The metrics themselves have their own tests."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mplug_cli import eval as eval_command
from mplug_core.metrics.intervals import Measure, mean


@pytest.fixture
def data(make_photo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Five captioned photos, of which one is damaged and one is not there; metrics that need no Java."""
    monkeypatch.setattr("mplug_core.tasks.caption.caption_measures", exact)
    names = [f"images/{i}.png" for i in range(5)]
    for name in names[:4]:
        make_photo(name)
    (tmp_path / names[3]).write_bytes(b"no image")
    file = tmp_path / "captions.jsonl"
    file.write_text("".join(json.dumps({"image": n, "caption": ["a ball", f"number {n}"]}) + "\n" for n in names))
    return file


def exact(predictions: dict[str, str], references: dict[str, list[str]], **more) -> dict[str, Measure]:
    return {"cider": mean(list(references), [1.0 if predictions[k] in references[k] else 0.3 for k in references])}


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
    assert rows[:4] == [
        ["caption", "model", "95", "%"], ["cider", "0.3000", "0.3000..0.3000"], ["examples", "3"], ["skipped", "2"]
    ]  # fmt: skip


def test_json_and_predictions(mplug, model_folder, data, tmp_path):
    out = tmp_path / "out.jsonl"
    done = mplug("eval", "--data", data, "--json", "--predictions", out, "--beam", "1", "--limit", "2", "-q")
    assert (done.code, done.err) == (0, "")
    (found,) = done.objects
    assert (found["task"], found["n"], found["metrics"]) == ("caption", 2, {"cider": 0.3})
    assert found["interval"] == {"cider": [0.3, 0.3]}
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
    assert found["baseline"] == {"name": "nearest", "metrics": {"cider": 1.0}, "interval": {"cider": [1.0, 1.0]}}
    rows = [line.split() for line in mplug(*options).lines]
    assert rows[0] == ["caption", "model", "95", "%", "nearest", "95", "%"]
    assert rows[1] == ["cider", "0.3000", "0.3000..0.3000", "1.0000", "1.0000..1.0000"]


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
    heads = [line.split() for line in mplug(*options).lines if line.endswith("95 %")]
    names = ["vqa", "statements", "entailment", "grounding"]
    assert heads == [[name, "model", "95", "%"] for name in names]


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
        (["--answers-from", "x", "--model", "y"], "--model is for a model that answers"),
        (["--answers-from", "x", "--beam", "2"], "--beam is for a model that answers"),
        (["--task", "retrieval", "--answers-from", "x", "--candidates", "2"], "--candidates"),
        (["--answers-from", "x", "--baseline", "nearest", "--train", "y"], "--baseline nearest needs a model"),
        (["--model", "none"], "nothing to score"),
        (["--model", "none", "--baseline", "nearest", "--train", "y"], "--baseline nearest needs a model"),
        (["--task", "vqa", "--model", "none", "--answers", "x"], "--answers is for a model"),
        (["--answers-from", "x", "--predictions", "./x"], "--predictions would write over x, which is --answers-from"),
        (["--against", "x", "--results", "x"], "--results would write over x, which is --against"),
        (["--predictions", "x", "--results", "x"], "--predictions would write over x, which is --results"),
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


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """Questions on photos that are not there, for which no model may be loaded."""
    rows = [
        {
            "image": f"images/{i // 3}.jpg",
            "question": f"what is {i}?",
            "kind": "cocoqa_color" if i % 2 else "cocoqa_number",
        }
        | {"answer": "red" if i % 3 else "blue"}
        for i in range(12)
    ]
    folder = tmp_path / "q"
    folder.mkdir()
    for name, part in (("questions_val.jsonl", rows), ("questions_train.jsonl", rows[:9])):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in part))
    return folder


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def loaded(*given, **more):
        raise AssertionError("a model was loaded, or an image opened")

    monkeypatch.setattr("mplug_core.weights.folder.load_model", loaded)
    monkeypatch.setattr("mplug_core.tasks.evaluation.open_image", loaded)


def options_of(folder: Path) -> list[str | Path]:
    return ["eval", "--task", "vqa", "--data", folder, "--split", "val"]


def majority_of(folder: Path) -> list[str | Path]:
    return ["--baseline", "majority", "--train", folder, "--train-split", "train"]


def test_a_baseline_alone(mplug, no_model, questions, tmp_path):
    out = tmp_path / "majority.jsonl"
    call = [*options_of(questions), "--model", "none", *majority_of(questions)]
    (found,) = mplug(*call, "--json", "--predictions", out).objects
    assert (found["model"], found["n"], found["skipped"]) == (None, 12, 0)
    assert found["metrics"] == found["baseline"]["metrics"] and found["interval"] == found["baseline"]["interval"]
    assert found["metrics"]["accuracy"] == found["metrics"]["accuracy_cocoqa"] == pytest.approx(8 / 12)
    assert {"accuracy_cocoqa_color", "accuracy_cocoqa_number"} < found["interval"].keys()
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert [p["answer"] for p in written] == ["red"] * 12 and written[0]["truth"] == ["blue"]
    assert mplug(*call).lines[0].split() == ["vqa", "majority", "95", "%"]


def test_answers_from_a_file(mplug, no_model, questions, tmp_path):
    rows = [json.loads(line) for line in (questions / "questions_val.jsonl").read_text().splitlines()]
    stored = tmp_path / "stored.jsonl"
    stored.write_text("".join(json.dumps(row | {"answer": "red"}) + "\n" for row in rows[:10]))
    again = tmp_path / "again.jsonl"
    call = [*options_of(questions), "--answers-from", stored]
    done = mplug(*call, "--json", "--predictions", again, *majority_of(questions))
    (found,) = done.objects
    assert (done.code, found["model"], found["answers_from"]) == (0, None, str(stored))
    assert (found["n"], found["skipped"]) == (10, 2) and "2 of 12 records have no answer" in done.err
    # the baseline is scored on what was answered
    assert found["metrics"] == found["baseline"]["metrics"] and found["metrics"]["accuracy"] == pytest.approx(6 / 10)
    low, high = found["interval"]["accuracy"]
    assert low < 0.6 < high
    assert "NaN" not in done.out
    assert mplug(*options_of(questions), "--answers-from", again, "--json").objects[0]["metrics"] == found["metrics"]
    rows = [line.split() for line in mplug(*call).lines]
    assert rows[0] == ["vqa", "answers", "95", "%"] and rows[1] == ["accuracy", "0.6000", f"{low:.4f}..{high:.4f}"]


def test_against_another_model(mplug, no_model, questions, tmp_path):
    rows = [json.loads(line) for line in (questions / "questions_val.jsonl").read_text().splitlines()]
    right, red = tmp_path / "right.jsonl", tmp_path / "red.jsonl"
    right.write_text("".join(json.dumps(row) + "\n" for row in rows))
    red.write_text("".join(json.dumps(row | {"answer": "red"}) + "\n" for row in rows[1:]))
    call = [*options_of(questions), "--answers-from", right, "--against", red]
    done = mplug(*call, "--json")
    against = done.objects[0]["against"]
    assert (against["file"], against["n"]) == (str(red), 11) and "1 of 12 records have no answer" in done.err
    assert against["metrics"]["accuracy"] == pytest.approx(8 / 11)
    difference, low, high = against["difference"]["accuracy"]
    assert difference == pytest.approx(3 / 11) and 0 <= low < difference < high
    rows = [line.split() for line in mplug(*call).lines]
    assert rows[0] == ["vqa", "answers", "95", "%", "red.jsonl", "difference", "95", "%"]
    # all right: no interval can be seen, but one of the difference
    assert rows[1][:4] == ["accuracy", "1.0000", "1.0000..1.0000", "0.7273"] and rows[1][4] == "+0.2727"


def test_the_model_against_a_baseline(mplug, scene_model, scenes, tmp_path):
    stored = tmp_path / "m.jsonl"
    call = ["eval", "--task", "grounding", "--data", scenes, "--split", "train", "--limit", "8", "--json"]
    baseline = ["--baseline", "constant_box", "--train", scenes, "--train-split", "train"]
    assert mplug(*call, "--model", "none", *baseline, "--predictions", stored).code == 0
    (found,) = mplug(*call, "--model", scene_model, "--against", stored, *baseline).objects
    assert found["against"]["metrics"] == pytest.approx(found["baseline"]["metrics"])
    assert found["against"]["difference"]["iou"][0] == pytest.approx(
        found["metrics"]["iou"] - found["baseline"]["metrics"]["iou"]
    )


@pytest.mark.parametrize("flag", ["--against", "--answers-from"])
def test_stored_files_that_hold_nothing(mplug, no_model, questions, tmp_path, flag):
    (tmp_path / "x.jsonl").write_text('{"image": "a", "caption": "x"}\n')
    for file, words in ((tmp_path / "x.jsonl", '"answer", a text'), (tmp_path / "none", "can't be read")):
        done = mplug(*options_of(questions), "--model", "none", *majority_of(questions), "--against", file)
        if flag == "--answers-from":
            done = mplug(*options_of(questions), flag, file)
        assert (done.code, done.out) == (3, "") and words in done.error


@pytest.mark.parametrize("flag", ["--predictions", "--results"])
def test_records_are_not_written_over(mplug, no_model, questions, flag):
    call = [*options_of(questions), "--model", "none", *majority_of(questions)]
    for name in ("questions_val.jsonl", "questions_train.jsonl"):
        before = (questions / name).read_text()
        done = mplug(*call, flag, questions / name)
        assert done.code == 2 and "would write over" in done.error and (questions / name).read_text() == before
    # nor is what else lies with the data, but predictions of before are
    (questions / "annotations.json").write_text('{"annotations": []}')
    (questions / "0.jpg").write_bytes(b"\xff\xd8")
    (questions / "scenes.jsonl").write_text("{}")
    for name in ("annotations.json", "0.jpg", "scenes.jsonl"):
        assert mplug(*call, "--predictions", questions / name).code == 2
    for name in ("stored.jsonl", "stored.txt"):
        assert [mplug(*call, "--predictions", questions / name).code for _ in range(2)] == [0, 0]
    (questions / "link.jsonl").symlink_to(questions / "questions_val.jsonl")
    assert mplug(*call, flag, questions / "link.jsonl").code == 2


def test_an_evaluation_that_fails_leaves_what_was_there(mplug, model_folder, data, tmp_path, monkeypatch):
    out = tmp_path / "out.jsonl"
    out.write_text("before")
    (tmp_path / "stored.jsonl").write_text('{"image_id": "none", "caption": "x"}\n')
    done = mplug("eval", "--data", data, "--against", tmp_path / "stored.jsonl", "--predictions", out)
    assert done.code == 3 and out.read_text() == "before"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".out")]


def test_what_can_not_be_compared_is_said_before_the_work(mplug, no_model, questions, tmp_path):
    (tmp_path / "x.jsonl").write_text('{"image": "z.jpg", "question": "who?", "answer": "x"}\n')
    done = mplug(*options_of(questions), "--against", tmp_path / "x.jsonl")
    assert done.code == 3 and "answers none of the 12 records" in done.error


def test_a_terminal_gets_a_table(mplug, no_model, questions, monkeypatch):
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda self: True)
    monkeypatch.setenv("COLUMNS", "120")
    done = mplug(*options_of(questions), "--model", "none", *majority_of(questions))
    assert "accuracy_cocoqa_color" in done.out and "95 %" in done.out


def test_data_on_standard_input(mplug, model_folder, data, monkeypatch):
    """As from a file in this folder; nothing but the path differs."""
    file = data if data.is_file() else next(data.glob("*.jsonl"))
    monkeypatch.chdir(file.parent)
    options = ("eval", "--model", model_folder, "--json", "--task", "caption")
    done = mplug(*options, "--data", "-", stdin=file.read_bytes())
    there = mplug(*options, "--data", file)
    assert done.code == there.code == 0, done.err
    assert done.objects[0]["data"] == "-" and done.objects[0]["metrics"] == there.objects[0]["metrics"]
    assert mplug(*options, "--data", "-").code == 3


def test_images_reach_the_records_that_the_baseline_repeats(mplug, model_folder, data, tmp_path):
    """The captions are in a folder, their photos in another; a photo's nearest other one is looked for."""
    records = tmp_path / "records"
    records.mkdir()
    file = data.rename(records / "captions.jsonl")
    call = ["eval", "--data", file, "--baseline", "nearest", "--train", file, "--json"]
    (found,) = mplug(*call, "--images", tmp_path).objects
    assert (found["n"], found["baseline"]["metrics"]["cider"]) == (3, 1.0)
    (same,) = mplug(*call, "--images", tmp_path, "--train-images", tmp_path).objects
    assert same["baseline"] == found["baseline"]
    assert mplug(*call, "--images", tmp_path, "--train-images", records).code == 3  # no photo of train is there


def majority(mplug, folder, *options):
    call = ["eval", "--task", "vqa", "--data", folder, "--split", "val", "--model", "none", "--baseline", "majority"]
    return mplug(*call, "--train", folder, "--train-split", "train", *options, "--json")


def test_format_and_images_are_those_of_train_too(mplug, tmp_path, monkeypatch):
    specs = []

    def baseline(name, task, repeated, spec, *rest):
        specs.append((spec, repeated))
        raise KeyboardInterrupt

    monkeypatch.setattr("mplug_core.tasks.baselines.baseline", baseline)
    majority(mplug, tmp_path, "--format", "jsonl", "--images", "here")
    majority(mplug, tmp_path, "--format", "jsonl", "--train-format", "vqa", "--train-images", "there")
    shown = [(a.format, a.images, b.format, b.images) for a, b in specs]
    assert shown == [("jsonl", "here", "jsonl", "here"), ("jsonl", None, "vqa", "there")]


@pytest.mark.parametrize("flag", ["--train-split", "--train-format", "--train-images"])
def test_options_of_train_need_it(mplug, flag):
    done = mplug("eval", "--task", "vqa", "--data", "x", flag, "vqa")
    assert done.code == 2 and f"{flag} is for --train" in done.error


def test_records_that_are_evaluated_are_counted(mplug, model_folder, data, monkeypatch):
    """What a bar would be told: up to all records, the damaged ones among them."""
    from contextlib import contextmanager

    from mplug_cli import show
    from mplug_core.tasks.evaluation import reported

    told = []

    @contextmanager
    def evaluations(what, quiet):
        with reported(lambda done, total: told.append((what, done, total, quiet))):
            yield

    monkeypatch.setattr(show, "evaluations", evaluations)
    assert mplug("eval", "--data", data, "--batch-size", "1", "-q").code == 0
    assert told[0] == ("caption", 0, 4, True) and told[-1] == ("caption", 4, 4, True)
    assert [done for _, done, _, _ in told] == sorted(done for _, done, _, _ in told)
