"""Every layout gives the same records; every fault is named by file, place, field and what was expected."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mplug_core.data.records import (
    EntailmentRecord,
    PhraseRecord,
    QuestionRecord,
    Records,
    StatementRecord,
    read_captions,
    read_entailments,
    read_phrases,
    read_questions,
    read_statements,
)
from mplug_core.errors import DataError

SHARED = Path(__file__).resolve().parents[2] / "../shared/data"
needs_data = pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared/data beside the project")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """images/a.jpg, b.jpg, c.jpg: records look for images and don't open them."""
    (tmp_path / "images").mkdir()
    for name in "abc":
        (tmp_path / "images" / f"{name}.jpg").write_bytes(b"x")
    return tmp_path


def lines(path: Path, *entries: Any) -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text("".join((e if isinstance(e, str) else json.dumps(e)) + "\n" for e in entries), encoding="utf-8")
    return path


def captions_of(records: Records[Any]) -> dict[str, tuple[str, ...]]:
    return {record.image.name: record.captions for record in records}


EXPECTED = {"a.jpg": ("a dog .", "a dog , running"), "b.jpg": ('the "big" cat',)}


def as_jsonl(folder: Path) -> Path:
    return lines(
        folder / "captions.jsonl",
        {"image": "images/a.jpg", "caption": ["a dog .", " a dog , running "]},
        "",
        {"image": "images/b.jpg", "caption": 'the "big" cat'},
    )


def as_json_list(folder: Path) -> Path:
    entries = [
        {"image": "images/a.jpg", "caption": "a dog ."},
        {"image": "images/b.jpg", "caption": 'the "big" cat'},
        {"image": "images/a.jpg", "caption": "a dog , running"},
    ]
    (folder / "train.json").write_text(json.dumps(entries, indent=1))
    return folder / "train.json"


def as_flickr8k(folder: Path) -> Path:
    text = '\ufeffimage,caption\r\na.jpg,a dog .\r\na.jpg,"a dog , running"\r\nb.jpg,"the ""big"" cat"\r\n'
    (folder / "captions.txt").write_text(text, encoding="utf-8", newline="")
    return folder / "captions.txt"


def as_coco(folder: Path, indent: int | None = None) -> Path:
    (folder / "images").rename(folder / "val2017")
    data = {
        "info": {},
        "images": [{"id": 7, "file_name": "a.jpg"}, {"id": 10, "file_name": "b.jpg"}, {"id": 11, "file_name": "c.jpg"}],
        "annotations": [
            {"id": 1, "image_id": 7, "caption": "a dog ."},
            {"id": 2, "image_id": 10, "caption": 'the "big" cat'},
            {"id": 3, "image_id": 7, "caption": "a dog , running\n"},
        ],
    }
    (folder / "annotations").mkdir()
    (folder / "annotations/captions_val2017.json").write_text(json.dumps(data, indent=indent))
    return folder / "annotations/captions_val2017.json"


@pytest.mark.parametrize(
    ("write", "format"), [(as_jsonl, "jsonl"), (as_json_list, "json"), (as_flickr8k, "flickr8k"), (as_coco, "coco")]
)
def test_layouts(write: Callable[[Path], Path], format: str, folder: Path) -> None:
    records = read_captions(write(folder))
    assert captions_of(records) == EXPECTED
    assert (records.format, records.missing, records.broken) == (format, [], [])
    assert all(record.image is not None and record.image.is_absolute() for record in records)
    assert records.complete() is records
    assert "2 records" in records.report()


def test_image_ids(folder: Path) -> None:
    assert [r.image_id for r in read_captions(as_jsonl(folder))] == ["images/a.jpg", "images/b.jpg"]
    assert [r.image_id for r in read_captions(as_flickr8k(folder))] == ["a", "b"]
    assert [r.image_id for r in read_captions(as_coco(folder))] == ["7", "10"]


def test_relative_paths_become_absolute(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    as_jsonl(folder)
    monkeypatch.chdir(folder)
    assert read_captions("captions.jsonl").records[0].image == folder / "images/a.jpg"
    assert captions_of(read_captions(".")) == EXPECTED


def test_indented_coco_and_splits(folder: Path) -> None:
    as_coco(folder, indent=0)
    for split in (None, "val", "val2017"):
        assert captions_of(read_captions(folder, split)) == EXPECTED


def test_scenes_folder(folder: Path) -> None:
    for split in ("train", "held_out"):
        (folder / split / "images").mkdir(parents=True)
        (folder / split / "images/0.png").write_bytes(b"x")
        lines(folder / split / "captions.jsonl", {"image": "images/0.png", "caption": [split]})
    assert read_captions(folder, "held_out").records[0].captions == ("held_out",)
    with pytest.raises(DataError, match="held_out, train"):
        read_captions(folder)
    with pytest.raises(DataError, match=r"no captions of split heldout: is it held_out\?"):
        read_captions(folder, "heldout")


def test_splits_by_name(folder: Path) -> None:
    lines(folder / "captions_train.txt", "image,caption", "a.jpg,train")
    lines(folder / "captions_val.jsonl", {"image": "images/b.jpg", "caption": "val"})
    assert captions_of(read_captions(folder, "train")) == {"a.jpg": ("train",)}
    assert captions_of(read_captions(folder, "val")) == {"b.jpg": ("val",)}


def test_images_elsewhere_and_text_only(folder: Path) -> None:
    path = lines(folder / "notes" / "captions.csv", "image,caption", "a.jpg,one", "gone.jpg,two")
    elsewhere = read_captions(path, images=folder / "images")
    assert captions_of(elsewhere) == {"a.jpg": ("one",)}
    assert elsewhere.missing == [folder / "images/gone.jpg"]
    texts = read_captions(path, text_only=True)
    assert [(r.image, r.captions, r.image_id) for r in texts] == [(None, ("one",), "a"), (None, ("two",), "gone")]
    assert len(read_captions(lines(folder / "t.jsonl", {"caption": "one"}, {"caption": "two"}), text_only=True)) == 2
    with pytest.raises(DataError, match="none of the 2 images"):
        read_captions(path)


def test_missing_images_are_counted(folder: Path) -> None:
    path = lines(
        folder / "captions.jsonl",
        {"image": "images/a.jpg", "caption": "here"},
        {"image": "images/gone.jpg", "caption": "gone"},
        {"image": "images/gone.jpg", "caption": "gone again"},
    )
    records = read_captions(path)
    assert len(records) == 1 and records.missing == [folder / "images/gone.jpg"]
    assert "1 missing image (first: " in records.report()
    with pytest.raises(DataError, match="not complete"):
        records.complete()


def test_broken_lines_are_named(folder: Path) -> None:
    path = lines(
        folder / "captions.jsonl",
        '{"image": "images/a.jpg", "caption": ',
        {"image": "images/a.jpg", "caption": "good"},
        {"image": "images/a.jpg", "caption": 3},
        {"image": "", "caption": "x"},
        {"caption": "x"},
        {"image": "images/a.jpg", "caption": [" "]},
        ["images/a.jpg", "x"],
        {"image": "images/a.jpg", "caption": "x", "image_id": [1]},
        {"image": "images/\0.jpg", "caption": "x"},
    )
    with open(path, "ab") as file:
        file.write(b'{"image": "images/b.jpg", "caption": "caf\xe9"}\n')
    records = read_captions(path)
    assert captions_of(records) == {"a.jpg": ("good",)}
    expected = [
        (1, "expected a JSON object on the line"),
        (3, 'field "caption": expected a text or a list of texts, got 3'),
        (4, 'field "image": expected the path of an image, got ""'),
        (5, 'field "image" is missing, expected the path of an image'),
        (6, 'field "caption": expected at least one text'),
        (7, "expected a JSON object {...}, got ["),
        (8, 'field "image_id": expected a number or a text'),
        (9, 'field "image": expected the path of an image'),
        (10, "expected UTF-8 text, got the byte 0xe9"),
    ]
    named = {int(error.message.removeprefix(f"{path}:").split(":")[0]): error.message for error in records.broken}
    assert sorted(named) == [number for number, _ in expected]
    for number, words in expected:
        assert words in named[number]
    assert "9 broken entries (first: " in records.report()


def test_broken_csv(folder: Path) -> None:
    path = lines(folder / "captions.csv", "image,caption", 'a.jpg,"open', "b.jpg,", "c.jpg", "a.jpg,one, two")
    records = read_captions(path)
    assert captions_of(records) == {"a.jpg": ("one, two",)}
    assert [error.message.removeprefix(f"{path}:")[:16] for error in records.broken] == [
        '2: field "captio', '3: field "captio', '4: field "captio'
    ]  # fmt: skip


def test_broken_coco(folder: Path) -> None:
    path = as_coco(folder)
    data = json.loads(path.read_text())
    data["images"].append({"file_name": "x.jpg"})
    data["annotations"] += [{"image_id": 99, "caption": "x"}, {"image_id": 7, "caption": None}, 5]
    path.write_text(json.dumps(data))
    records = read_captions(path)
    assert captions_of(records) == EXPECTED
    assert [e.message.removeprefix(f"{path}: ") for e in records.broken] == [
        'images[3]: field "id": expected a number',
        'annotations[3]: field "image_id": expected the id of an entry of "images", got 99',
        'annotations[4]: field "caption": expected a text or a list of texts, got null',
        'annotations[5]: field "image_id" is missing, expected the id of an entry of "images"',
    ]
    path.write_text('{"annotations": []}')
    with pytest.raises(DataError, match='field "images": expected a list'):
        read_captions(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"\xff\xd8\xff\xe0", "no known format"),
        (b"name,text\na,b\n", "no known format"),
        (b'{"image": 1, "caption": "x"}\n{"image": 2, "caption": "y"}\n', "captions.jsonl:1: .*and 1 more"),
        (b'{\n "images": [', "captions.jsonl:2: expected JSON"),
        (b"[1, 2", "expected JSON"),
        (b"[]", "no records"),
        (b"image,caption\n", "no records"),
        (b"[" * 100_000, "nested too deeply|expected JSON"),
    ],
)
def test_unusable_files(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "captions.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=words) as caught:
        read_captions(tmp_path / "captions.jsonl")
    assert caught.value.exit_code == 3


def test_unusable_paths(folder: Path) -> None:
    with pytest.raises(DataError, match="no data at"):
        read_captions(folder / "none.jsonl")
    with pytest.raises(DataError, match="no captions in the folder"):
        read_captions(folder)
    with pytest.raises(DataError, match="one file"):
        read_captions(as_jsonl(folder), split="val")
    with pytest.raises(DataError, match="captions, not questions"):
        read_questions(as_flickr8k(folder))


def test_questions(folder: Path) -> None:
    lines(
        folder / "val" / "questions.jsonl",
        {"image": "../images/a.jpg", "question": "what color?", "answer": "red", "kind": "color"},
        {"image": "../images/a.jpg", "question": "how many?", "answer": ["2", "two", "2", "2"]},
        {"image": "../images/a.jpg", "question": "how many?", "answer": []},
        {"image": "../images/a.jpg", "answer": "2"},
        {"image": "../images/a.jpg", "question": "x", "answer": "2", "kind": 3},
        {"image": "../images/gone.jpg", "question": "x", "answer": "2"},
    )
    data = read_questions(folder, "val")
    image = folder / "val/../images/a.jpg"
    assert data.records == [
        QuestionRecord(image, "what color?", ("red",), (1.0,), "color"),
        QuestionRecord(image, "how many?", ("2", "two"), (0.75, 0.25), ""),
    ]
    assert len(data.broken) == 3 and len(data.missing) == 1


def test_phrases(folder: Path) -> None:
    good = {"image": "images/a.jpg", "phrase": "the red circle", "box": [10, 20, 51, 40], "size": [50, 80]}
    bad = [{"box": [10, 20, 5, 40]}, {"box": [10, 20, 60, 40]}, {"box": [1, 2, 3]}, {"size": [0, 5]}, {"size": None}]
    bad += [{"box": [10, 20, float("nan"), 40]}, {"box": [10, 20, "30", 40]}, {"phrase": ""}]
    data = read_phrases(lines(folder / "phrases.jsonl", good, *({**good, **b} for b in bad)))
    assert data.records == [PhraseRecord(folder / "images/a.jpg", "the red circle", (0.2, 0.25, 1.0, 0.5))]
    assert [next(iter(b)) in e.message for b, e in zip(bad, data.broken, strict=True)] == [True] * len(bad)


def test_statements(folder: Path) -> None:
    pair = ["images/a.jpg", "images/b.jpg"]
    data = read_statements(
        lines(
            folder / "statements.jsonl",
            {"images": pair, "statement": "both are red", "label": True},
            {"images": pair, "statement": "both are blue", "label": "False"},
            {"images": pair, "statement": "x", "label": 1},
            {"images": pair[:1], "statement": "x", "label": True},
            {"images": ["images/x.jpg", "images/y.jpg"], "statement": "x", "label": True},
        )
    )
    images = (folder / pair[0], folder / pair[1])
    assert data.records == [
        StatementRecord(images, "both are red", True),
        StatementRecord(images, "both are blue", False),
    ]
    assert "true or false, got 1" in data.broken[0].message and "two images" in data.broken[1].message
    assert len(data.missing) == 2


def test_entailments(folder: Path) -> None:
    data = read_entailments(
        lines(
            folder / "entailments.jsonl",
            {"image": "images/a.jpg", "hypothesis": "it is red", "label": "neutral"},
            {"image": "images/a.jpg", "hypothesis": "it is red", "label": "maybe"},
        )
    )
    assert data.records == [EntailmentRecord(folder / "images/a.jpg", "it is red", "neutral")]
    assert "one of entailment, neutral, contradiction" in data.broken[0].message


@needs_data
@pytest.mark.parametrize(
    ("place", "split", "text_only", "images", "captions"),
    [
        ("flickr8k", "val", False, 92, 460),
        ("flickr8k", "train", False, 773, 3865),
        ("photos/flickr8k", "train", False, 6390, 31941),
        ("photos/flickr8k", "text_only", True, 23692, 118457),
        ("coco", "val2017", False, 205, 1025),
        ("coco", "train", False, 80, 400),
        ("photos/coco", "text_only", True, 34446, 80198),
    ],
)
def test_real_data(place: str, split: str, text_only: bool, images: int, captions: int) -> None:
    data = read_captions(SHARED / place, split, text_only=text_only).complete()
    assert len(data) == images
    assert sum(len(record.captions) for record in data) == captions
