"""Stored predictions: matched with records, scored without images, compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mplug_core.errors import DataError
from mplug_core.recipe import DataSpec
from mplug_core.tasks.registry import TASKS
from mplug_core.tasks.stored import compare, match, read_predictions, read_unopened, stored_result
from mplug_core.tasks.task import EvaluateOptions

RECORDS: dict[str, list[dict[str, Any]]] = {
    "vqa": [
        {
            "image": f"images/{i // 2}.jpg",
            "question": f"what is {i % 2}?",
            "answer": "red" if i % 3 else "blue",
            "kind": "a_b",
        }
        for i in range(8)
    ],
    "grounding": [
        {"image": f"images/{i}.jpg", "phrase": "the dog", "box": [0, 0, 10 + i, 20], "size": [40, 20]} for i in range(4)
    ],
    "statements": [
        {"image": f"images/{i}.jpg", "statement": "a dog", "label": i % 2 == 0, "identifier": f"s-{i}", "kind": "foil"}
        for i in range(4)
    ],
    "entailment": [
        {"image": f"images/{i}.jpg", "hypothesis": "a dog", "label": "neutral" if i else "entailment"} for i in range(4)
    ],
    "retrieval": [{"image": f"images/{i}.jpg", "caption": ["a dog", f"number {i}"]} for i in range(3)],
    "caption": [{"image": f"images/{i}.jpg", "caption": ["a dog", f"number {i}"], "image_id": i} for i in range(3)],
}
SAID: dict[str, dict[str, Any]] = {
    "vqa": {"answer": "red"}, "grounding": {"box": [0.0, 0.0, 10.0, 20.0]}, "statements": {"label": "true"},
    "entailment": {"label": "neutral"}, "caption": {"caption": "a dog"},
}  # fmt: skip
TASK_NAMES = tuple(RECORDS)


def write(folder: Path, task: str, entries: list[dict[str, Any]] | None = None) -> DataSpec:
    file = folder / f"{task}.jsonl"
    file.write_text("".join(json.dumps(entry) + "\n" for entry in entries or RECORDS[task]))
    return DataSpec(path=str(file))


def predictions(task: str, records: list[Any]) -> list[dict[str, Any]]:
    """One a record; of retrieval the right one is first for images, and second for captions."""
    chosen = TASKS[task]
    if task != "retrieval":
        return [chosen.identity(record) | SAID[task] | chosen.truth(record) for record in records]
    rows = [chosen.identity(record) | {"rank": 1} | chosen.truth(record) for record in records]
    return rows + [{"text": t, "rank": 2, "truth": [str(r.image)]} for r in records for t in r.captions]


def store(folder: Path, rows: list[dict[str, Any]], name: str = "stored.jsonl") -> Path:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / name


EXPECTED = {
    "vqa": {"accuracy": 5 / 8, "accuracy_a_b": 5 / 8},
    "grounding": {"accuracy_iou50": 1.0, "iou": (1 + 10 / 11 + 10 / 12 + 10 / 13) / 4},
    "statements": {"accuracy": 0.5, "accuracy_foil": 0.5},
    "entailment": {"accuracy": 0.75, "accuracy_neutral": 1.0, "accuracy_entailment": 0.0},
    "retrieval": {
        "i2t_r1": 1.0,
        "i2t_r5": 1.0,
        "i2t_r10": 1.0,
        "t2i_r1": 0.0,
        "t2i_r5": 1.0,
        "t2i_r10": 1.0,
        "r_mean": 5 / 6,
    },
}


@pytest.fixture(autouse=True)
def no_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of the images is there, and none may be asked for."""

    def opened(*given: Any, **more: Any) -> None:
        raise AssertionError("an image was opened")

    monkeypatch.setattr("mplug_core.data.images.open_image", opened)
    monkeypatch.setattr("mplug_core.tasks.evaluation.open_image", opened)


@pytest.mark.parametrize("task", EXPECTED)
def test_scores_of_what_is_there(tmp_path: Path, task: str) -> None:
    spec = write(tmp_path, task)
    records = read_unopened(task, spec).records
    rows = predictions(task, records)
    # in another order, from another folder, among others' answers
    rows = [json.loads(json.dumps(row).replace(str(tmp_path), "/elsewhere")) for row in reversed(rows)]
    result = stored_result(task, spec, store(tmp_path, rows))
    assert result.metrics == pytest.approx(EXPECTED[task]) and result.metrics.keys() == EXPECTED[task].keys()
    assert (result.n, result.skipped, result.notes) == (len(records), 0, [])
    assert result.intervals().keys() <= result.metrics.keys() and "truth" in result.predictions[0]


def test_captions_are_matched_by_their_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = write(tmp_path, "caption")
    rows = [{"image_id": i, "caption": f"number {i}"} for i in (2, 0, 1)]
    seen: list[Any] = []
    monkeypatch.setattr(type(TASKS["caption"]), "score", lambda self, *given: (seen.append(given), ({}, []))[1])
    stored_result("caption", spec, store(tmp_path, rows))
    ((records, found, source),) = seen
    assert [r.image_id for r in records] == ["0", "1", "2"] and source == Path(spec.path)
    assert [p["caption"] for p in found] == ["number 0", "number 1", "number 2"]


@pytest.mark.parametrize("task", ["vqa", "grounding", "statements", "entailment"])
def test_records_without_an_answer_are_counted(tmp_path: Path, task: str) -> None:
    spec = write(tmp_path, task)
    rows = predictions(task, read_unopened(task, spec).records)
    other = json.loads(json.dumps(rows[0]).replace("images/0", "images/77").replace("s-0", "s-77"))
    file = store(tmp_path, [*rows[1:], other])
    result = stored_result(task, spec, file)
    assert (result.n, result.skipped) == (len(rows) - 1, 1)
    assert result.notes == [
        f"1 of {len(rows)} records have no answer in {file}", f"1 answers in {file} are of no record of {spec.path}"
    ]  # fmt: skip
    first = stored_result(task, spec, file, EvaluateOptions(limit=2))
    assert (first.n, first.skipped, len(first.notes)) == (1, 1, 1)


def test_questions_that_are_alike_are_matched_in_order(tmp_path: Path) -> None:
    entries = [{"image": "a.jpg", "question": "what?", "answer": a, "question_id": i} for i, a in enumerate("xyz", 1)]
    records = read_unopened("vqa", write(tmp_path, "vqa", entries)).records
    named = [{"question_id": str(i), "image": "a.jpg", "question": "what?", "answer": str(i)} for i in (3, 1, 2)]
    assert [p["answer"] for p in match("vqa", records, named).predictions] == ["1", "2", "3"]
    plain = [{key: value for key, value in row.items() if key != "question_id"} for row in named]
    assert [p["answer"] for p in match("vqa", records, plain).predictions] == ["3", "1", "2"]


def test_reasoning_on_both(tmp_path: Path) -> None:
    for task in ("statements", "entailment"):
        write(tmp_path, task)
    (tmp_path / "entailment.jsonl").rename(tmp_path / "entailments.jsonl")
    spec = DataSpec(path=str(tmp_path))
    records = read_unopened("reasoning", spec).records
    rows = [
        TASKS["reasoning"].identity(r) | {"label": "true" if hasattr(r, "statement") else "neutral"} for r in records
    ]
    result = stored_result("reasoning", spec, store(tmp_path, rows))
    assert result.n == 8
    assert result.metrics["statements_accuracy_foil"] == 0.5 and result.metrics["entailment_accuracy"] == 0.75
    with pytest.raises(DataError, match="neither"):
        read_unopened("reasoning", write(tmp_path, "vqa"))


class TestCompare:
    @pytest.mark.parametrize("task", EXPECTED)
    def test_with_itself_nothing_differs(self, tmp_path: Path, task: str) -> None:
        spec = write(tmp_path, task)
        file = store(tmp_path, predictions(task, read_unopened(task, spec).records))
        result = stored_result(task, spec, file)
        found = compare(task, result, read_predictions(file, task), file)
        assert found.metrics == result.metrics and found.notes == []
        assert found.difference.keys() <= result.metrics.keys()
        assert set(found.difference.values()) == {(0.0, 0.0, 0.0)}

    def test_difference(self, tmp_path: Path) -> None:
        spec = write(tmp_path, "vqa")
        rows = predictions("vqa", read_unopened("vqa", spec).records)
        result = stored_result("vqa", spec, store(tmp_path, rows))
        others = [row | {"answer": row["truth"][0]} for row in rows]
        found = compare("vqa", result, others, "x.jsonl")
        difference, low, high = found.difference["accuracy"]
        assert found.metrics["accuracy"] == 1 and difference == pytest.approx(-3 / 8) and low < difference < high <= 0

    @pytest.mark.parametrize("task", ["vqa", "grounding", "statements"])
    def test_records_that_only_one_has(self, tmp_path: Path, task: str) -> None:
        spec = write(tmp_path, task)
        rows = predictions(task, read_unopened(task, spec).records)
        result = stored_result(task, spec, store(tmp_path, rows[1:]))
        found = compare(task, result, rows[:-1], "x.jsonl")
        assert found.n == len(rows) - 2
        assert found.notes == [
            f"1 of {len(rows) - 1} records have no answer in x.jsonl: not compared",
            "1 answers in x.jsonl are of records that were not answered here: not compared",
        ]
        assert all(value == 0 for value, *_ in found.difference.values())
        with pytest.raises(DataError, match=f"x.jsonl answers none of the {len(rows) - 1} records"):
            compare(task, result, rows[:1], "x.jsonl")

    def test_ranks_are_among_all(self, tmp_path: Path) -> None:
        spec = write(tmp_path, "retrieval")
        rows = predictions("retrieval", read_unopened("retrieval", spec).records)
        result = stored_result("retrieval", spec, store(tmp_path, rows))
        with pytest.raises(DataError, match="retrieval can't be compared: 1 of 3 records have no answer in x"):
            compare("retrieval", result, rows[1:], "x")


@pytest.mark.parametrize(
    ("task", "text", "words"),
    [
        ("vqa", "", "has no predictions of vqa"),
        ("vqa", "{", "no JSON Lines"),
        ("vqa", "[1]", ":1: expected a JSON object"),
        ("vqa", '{"task": "caption", "caption": "x", "image_id": 1}', "has no predictions of vqa"),
        ("vqa", '\n{"image": "a.jpg", "caption": "x"}', ':2: expected "answer", a text'),
        ("vqa", '{"answer": "x"}', "nothing says which record"),
        ("caption", '{"caption": 3, "image_id": 1}', 'expected "caption"'),
        ("statements", '{"label": true, "identifier": "x"}', 'expected "label", a text'),
        ("grounding", '{"image": "a.jpg", "phrase": "x", "box": [0, 0, 0.5, 1]}', 'the "size" of its picture'),
        ("grounding", '{"image": "a.jpg", "phrase": "x", "box": [0, 0, NaN, 1], "size": [1, 1]}', '"box" in pixels'),
        ("retrieval", '{"image": "a.jpg", "rank": "first", "truth": []}', 'expected "rank"'),
    ],
)
def test_files_that_hold_something_else(tmp_path: Path, task: str, text: str, words: str) -> None:
    (tmp_path / "x.jsonl").write_text(text)
    with pytest.raises(DataError) as caught:
        read_predictions(tmp_path / "x.jsonl", task)
    assert words in caught.value.message


def test_a_file_that_can_not_be_read(tmp_path: Path) -> None:
    for place in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(DataError, match="can't be read"):
            read_predictions(place, "vqa")
    (tmp_path / "x").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="no JSON Lines"):
        read_predictions(tmp_path / "x", "vqa")


def test_predictions_of_other_data(tmp_path: Path) -> None:
    spec = write(tmp_path, "vqa")
    file = store(tmp_path, [{"image": "z.jpg", "question": "who?", "answer": "x"}])
    with pytest.raises(DataError, match="answers none of the 8 records"):
        stored_result("vqa", spec, file)
