"""Whatever is in a file, a reader gives records or one DataError; nothing in a pickle is run."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mplug_core.data.records import (
    FORMATS,
    Records,
    read_captions,
    read_entailments,
    read_phrases,
    read_questions,
    read_statements,
)
from mplug_core.data.records.inspection import inspect
from mplug_core.errors import DataError
from tests.data.layouts import picture, refcoco, vqa_annotations, vqa_questions, write_json, write_lines

READERS: dict[str, Callable[..., Records[Any]]] = {
    "caption": read_captions,
    "vqa": read_questions,
    "grounding": read_phrases,
    "statements": read_statements,
    "entailment": read_entailments,
}
ODD = [
    None, True, -1, 10**400, 1.5, float("nan"), float("inf"), "", "x", "\0", "\ud800", "a" * 70_000, [], [1], ["a"],
    [["a"]], [None], {}, {"a": 1}, "1-2-3-4", "5-6", "a.jpg", "../..", [0, 0, 1, 1], ["a.jpg", "a.jpg"], "true",
]  # fmt: skip
OWN = {
    "image": "a.jpg", "caption": "x", "question": "q", "answer": ["a"], "annotators": ["a"], "phrase": "p",
    "box": [0, 0, 1, 1], "size": [2, 2], "images": ["a.jpg", "a.jpg"], "statement": "s", "label": True,
    "hypothesis": "h", "image_id": 3, "kind": "k", "question_id": 1, "identifier": "z", "sentence": "s",
}  # fmt: skip
LINES = [
    OWN,
    {"identifier": "dev-850-0-0", "sentence": "s", "label": "True", "directory": 3},
    {"identifier": "15-0", "sentence": "s", "label": "true", "directory": "2"},
    {"Flickr30K_ID": "a", "gold_label": "neutral", "sentence1": "x", "sentence2": "y", "pairID": "p"},
]
COCO = {
    "images": [{"id": 7, "file_name": "a.jpg", "domain": "d", "width": 9, "height": 9, "sentences": [{"raw": "x"}]}],
    "annotations": [{"id": 1, "image_id": 7, "caption": "x", "bbox": [1, 1, 2, 2], "category_id": 1}],
    "categories": [{"id": 1, "name": "n"}],
}
GQA = {"1": {"question": "q", "imageId": "a", "answer": "x", "types": {"structural": "query"}}}


def mutated(rng: random.Random, value: Any) -> Any:
    """A value with some parts replaced by odd ones, or left out."""
    if rng.random() < 0.06:
        return rng.choice(ODD)
    if isinstance(value, dict):
        return {key: mutated(rng, part) for key, part in value.items() if rng.random() > 0.03}
    return [mutated(rng, part) for part in value if rng.random() > 0.03] if isinstance(value, list) else value


def write_odd(rng: random.Random, folder: Path) -> Path:
    """A file that is nearly right in some format, or cut, or wrongly encoded."""
    folder.mkdir()
    what = rng.randrange(5)
    if what == 0:
        entry = rng.choice(LINES)
        path = write_lines(folder / "x.jsonl", *(mutated(rng, entry) for _ in range(3)))
    elif what == 1:
        path = write_json(folder / "x.json", mutated(rng, rng.choice([COCO, GQA, [OWN], vqa_questions()])))
    elif what == 2:
        path = write_json(folder / "questions.json", mutated(rng, vqa_questions()))
        write_json(folder / "annotations.json", mutated(rng, vqa_annotations()))
    elif what == 3:
        refcoco(folder)
        path = folder / "refs(unc).p"
        path.write_bytes(pickle.dumps(mutated(rng, pickle.loads(path.read_bytes())), protocol=2))
    else:
        header = rng.choice(["image,caption", "question,answer,image_id", "image_name| n| c", "a.jpg#0\tx"])
        noise = "".join(rng.choice('a,"|#0\t\n\0é') for _ in range(60))
        path = folder / "x.csv"
        path.write_bytes(f"{header}\n{noise}".encode(rng.choice(["utf-8", "latin1", "utf-16"])))
    data = path.read_bytes()
    if rng.random() < 0.2:
        data = gzip.compress(data)
    path.write_bytes(data[: rng.randrange(len(data))] if rng.random() < 0.2 else data)
    return path


@pytest.mark.parametrize("seed", range(40))
def test_odd_files_never_crash_a_reader(seed: int, tmp_path: Path) -> None:
    path = write_odd(random.Random(seed), tmp_path / "d")
    picture(tmp_path / "d/a.jpg")
    for task, read in READERS.items():
        for place, format in ((path, None), (path.parent, None), *((path, name) for name in FORMATS[task])):
            try:
                read(place, format=format).report()
            except DataError as error:
                assert str(error) and "\n" not in str(error)
    try:
        json.dumps(inspect(path).as_object())
    except DataError as error:
        assert error.exit_code == 3


@pytest.mark.parametrize("path", ["a\0b", "x" * 5000, "/dev/null", "\ud800", ""])
def test_paths_that_no_file_can_have(path: str) -> None:
    for call in (*READERS.values(), inspect):
        for options in ({}, {"images": path}, {"split": "x"}):
            with pytest.raises(DataError):
                call(path, **options)


class Marker:
    """A pickle of it would make a folder when it is loaded."""

    def __init__(self, place: Path) -> None:
        self.place = str(place)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.place,)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_nothing_in_a_pickle_is_run(protocol: int, tmp_path: Path) -> None:
    folder = refcoco(tmp_path / "refs")
    (folder / "refs(unc).p").write_bytes(pickle.dumps([Marker(tmp_path / "ran")], protocol=protocol))
    with pytest.raises(DataError, match="only plain values are read") as caught:
        read_phrases(folder, "train")
    assert not (tmp_path / "ran").exists() and caught.value.exit_code == 3


@pytest.mark.parametrize(
    "data", [b"\x80", b"\x80\x02", b"(lp0\n.garbage", b"not a pickle", pickle.dumps({"a": {1, 2}})]
)
def test_damaged_pickles(data: bytes, tmp_path: Path) -> None:
    folder = refcoco(tmp_path / "refs")
    (folder / "refs(unc).p").write_bytes(data)
    with pytest.raises(DataError):
        read_phrases(folder / "refs(unc).p")


def test_a_cut_gzip_keeps_the_lines_before(tmp_path: Path) -> None:
    picture(tmp_path / "a.jpg")
    rng = random.Random(0)
    texts = ["".join(rng.choices("abcdefgh", k=200)) for _ in range(400)]
    lines = "".join(json.dumps({"image": "a.jpg", "caption": text}) + "\n" for text in texts)
    path = tmp_path / "captions.jsonl.gz"
    path.write_bytes(gzip.compress(lines.encode()))
    assert read_captions(tmp_path).complete().records[0].captions == tuple(texts)
    path.write_bytes(path.read_bytes()[:-2000])
    found = read_captions(tmp_path)
    assert 0 < len(found.records[0].captions) < 400 and "damaged" in found.broken[-1].message


def test_duplicates_are_broken_and_the_first_is_kept(tmp_path: Path) -> None:
    picture(tmp_path / "a.jpg")
    caption = {"image": "a.jpg", "caption": "one"}
    found = read_captions(write_lines(tmp_path / "captions.jsonl", caption, {**caption, "caption": "two"}, caption))
    assert found.records[0].captions == ("one", "two")
    assert [error.message.partition(": ")[0].rpartition(":")[2] for error in found.broken] == ["3"]
    assert "duplicate" in found.broken[0].message
    question = {"image": "a.jpg", "question": "q", "answer": "a"}
    lines = ({**question, "question_id": 7}, {**question, "question_id": 7, "answer": "b"}, question, question)
    questions = read_questions(write_lines(tmp_path / "questions.jsonl", *lines))
    assert [record.answers for record in questions] == [("a",), ("a",)]
    assert "question_id 7" in questions.broken[0].message and "all fields are equal" in questions.broken[1].message
    texts = [{"image": f"{k}.jpg", "question": "q", "answer": "a"} for k in range(2)]
    assert len(read_questions(write_lines(tmp_path / "t.jsonl", *texts), text_only=True).complete()) == 2


def test_long_texts_are_kept(tmp_path: Path) -> None:
    picture(tmp_path / "a.jpg")
    text = " ".join(["word"] * 100_000)
    assert read_captions(write_lines(tmp_path / "a.jsonl", {"image": "a.jpg", "caption": text})).records[
        0
    ].captions == (text,)
    assert read_captions(write_lines(tmp_path / "a.csv", "image,caption", f'a.jpg,"{text[:100_000]}"')).records


def test_boxes_outside_of_the_image(tmp_path: Path) -> None:
    picture(tmp_path / "a.jpg")
    good = {"image": "a.jpg", "phrase": "p", "size": [100, 50], "box": [-1, 0, 101, 52]}
    boxes = ([100, 0, 102, 50], [-2, -2, 0, 0], [0, 0, 103, 50], [200, 0, 300, 10], [0, 0, 10**400, 5], [5, 5, 5, 9])
    found = read_phrases(write_lines(tmp_path / "p.jsonl", good, *({**good, "box": list(box)} for box in boxes)))
    assert [record.box for record in found] == [(0.0, 0.0, 1.0, 1.0)] and len(found.broken) == len(boxes)


def test_answers_that_are_hidden_or_forgotten(tmp_path: Path) -> None:
    picture(tmp_path / "a.jpg")
    entry = {"image": "a.jpg", "question": "q"}
    assert read_questions(write_lines(tmp_path / "hidden.jsonl", entry)).records[0].answers == ()
    lines = ({**entry, "answer": "x"}, entry, {**entry, "answer": None}, {**entry, "annotators": ["a", "b", "a"]})
    found = read_questions(write_lines(tmp_path / "q.jsonl", *lines))
    assert [record.answers for record in found] == [("x",), (), ("a", "b")]
    assert found.records[2].annotators == ("a", "b", "a")
    assert 'q.jsonl:2: field "answer" is missing' in found.broken[0].message


def test_formats_are_checked(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "captions.jsonl", {"image": "a.jpg", "caption": "x"})
    with pytest.raises(DataError, match="captions have no format vqa"):
        read_captions(path, format="vqa")
    with pytest.raises(DataError, match="expected a list, as in COCO captions|expected JSON"):
        read_captions(path, format="coco")


def test_records_need_no_torch() -> None:
    code = "import sys, mplug_core.data.records, mplug_core.data.records.inspection; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
