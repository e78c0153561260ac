"""``mplug data inspect`` shows what the readers understand, for every task that a path can serve."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mplug_cli.app import main
from mplug_core.data.records import FORMATS
from mplug_core.data.records.inspection import TASKS, inspect
from mplug_core.data.records.types import KIND_FORMATS
from mplug_core.errors import DataError
from tests.data.layouts import entities, picture, refcoco, write_json, write_lines


@pytest.fixture
def captions(tmp_path: Path) -> Path:
    picture(tmp_path / "a.jpg", tmp_path / "b.jpg")
    lines = [{"image": f"{name}.jpg", "caption": ["one two", "three"]} for name in "abc"]
    write_lines(tmp_path / "captions_train.jsonl", *lines, {"image": "a.jpg", "caption": ""})
    write_lines(tmp_path / "captions_val.jsonl", lines[0])
    return tmp_path


def test_all_splits_and_what_is_wrong(captions: Path) -> None:
    (view,) = inspect(captions).tasks
    assert (view.task, view.kind, view.words) == ("caption", "captions", {"shortest": 1, "mean": 1.5, "longest": 2})
    train, val = view.splits
    counts = (train.split, train.format, train.records, train.usable, train.images, train.missing, train.broken)
    assert counts == ("train", "jsonl", 3, 2, 2, 1, 1)
    assert (val.split, val.records, val.usable) == ("val", 1, 1)
    assert train.first_missing == [str(captions / "c.jpg")] and ":4: field" in train.first_broken[0]
    assert len(view.examples) == 3 and view.examples[0]["captions"] == ["one two", "three"]
    (view,) = inspect(captions, split="val").tasks
    assert [split.split for split in view.splits] == ["val"]


def test_every_task_of_scenes(scenes: Path) -> None:
    found = inspect(scenes)
    assert tuple(view.task for view in found.tasks) == TASKS
    assert all([split.split for split in view.splits] == ["held_out", "train", "val"] for view in found.tasks)
    assert {view.task: set(view.histogram) for view in found.tasks if view.task == "statements"} == {
        "statements": {"true", "false"}
    }
    assert [view.task for view in inspect(scenes, task="retrieval").tasks] == ["retrieval"]


def test_tasks_are_told_apart(tmp_path: Path) -> None:
    write_lines(tmp_path / "x.jsonl", {"image": "a.jpg", "hypothesis": "h", "label": "neutral"})
    assert [view.task for view in inspect(tmp_path / "x.jsonl").tasks] == ["entailment"]
    write_json(tmp_path / "y.json", [{"images": ["a.jpg", "b.jpg"], "sentence": "s", "label": "True"}])
    assert [view.task for view in inspect(tmp_path / "y.json").tasks] == ["statements"]
    (view,) = inspect(refcoco(tmp_path / "refcoco")).tasks
    assert [(split.split, split.records) for split in view.splits] == [("train", 2), ("testA", 1)]


def test_captions_and_phrases_of_entities(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    found = inspect(entities(tmp_path))
    assert [(view.task, [(s.split, s.format, s.usable) for s in view.splits]) for view in found.tasks] == [
        ("caption", [("test", "entities", 1), ("train", "entities", 1)]),
        ("grounding", [("test", "entities", 1), ("train", "entities", 3)]),
    ]
    assert (
        main(["data", "inspect", str(tmp_path), "--task", "grounding", "--format", "entities", "--split", "train"]) == 0
    )
    shown = capfd.readouterr().out
    assert "entities" in shown and "red hats" in shown


def test_a_hidden_split_is_shown_as_hidden(tmp_path: Path) -> None:
    write_lines(tmp_path / "hidden/hidden.json", {"sentence": "two boxes", "identifier": "15-0"})
    picture(*(tmp_path / f"hidden/images/0/hidden-15-0-{k}.png" for k in range(6)))
    (view,) = inspect(tmp_path).tasks
    assert (view.task, view.histogram, view.splits[0].usable) == ("statements", {"hidden": 6}, 6)


def test_nothing_to_understand(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("words")
    for path in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(DataError, match="nothing in .* is understood"):
            inspect(path)
    with pytest.raises(DataError, match="no data at"):
        inspect(tmp_path / "gone")
    with pytest.raises(DataError, match="no captions in"):
        inspect(tmp_path, task="caption")
    broken = write_lines(tmp_path / "x.jsonl", {"image": "a.jpg", "caption": 3})
    with pytest.raises(DataError, match=r'x\.jsonl:1: field "caption"'):
        inspect(broken)


def test_command(captions: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "inspect", str(captions)]) == 0
    shown = capfd.readouterr().out
    assert "task caption" in shown and "captions_train.jsonl" in shown and "missing" in shown and "broken" in shown
    header = next(line for line in shown.splitlines() if "split" in line)
    row = next(line for line in shown.splitlines() if line.split()[:1] == ["train"])
    assert header.index("records") + len("records") == row.index("3") + 1, "columns are aligned"
    assert main(["data", "inspect", str(captions), "--json", "--split", "val", "--task", "retrieval"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["tasks"][0]["splits"][0]["records"] == 1


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--task", "captoin"], 2, "did you mean 'caption'"),
        (["--format", "csv"], 2, "no format 'csv'"),
        (["--task", "vqa"], 3, "no questions in"),
        (["--split", "test"], 3, "no captions of split test"),
        (["--format", "vqa", "--task", "caption"], 3, "captions have no format vqa"),
    ],
)
def test_command_errors(
    options: list[str], code: int, words: str, captions: Path, capfd: pytest.CaptureFixture
) -> None:
    assert main(["data", "inspect", str(captions), *options]) == code
    error = capfd.readouterr().err
    assert words in error and error.count("\n") == 1


def test_formats_are_those_of_the_readers() -> None:
    from mplug_core.data.records.finding import layouts

    assert set(FORMATS) >= set(TASKS)
    for kind, names in KIND_FORMATS.items():
        assert {layout.name for layout in layouts(kind)} == set(names)
