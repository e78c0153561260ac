"""Official layouts: each is found in its folder, and gives the records that its documentation says."""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest

from mplug_core.data.records import (
    CaptionRecord,
    EntailmentRecord,
    PhraseRecord,
    QuestionRecord,
    StatementRecord,
    read_captions,
    read_entailments,
    read_phrases,
    read_questions,
    read_statements,
)
from mplug_core.data.records.finding import find
from mplug_core.data.records.reading import Reading, read_records
from mplug_core.errors import DataError
from tests.data.layouts import (
    entities,
    entities_xml,
    picture,
    refcoco,
    vqa_annotations,
    vqa_questions,
    write_json,
    write_lines,
)

SHARED = Path(__file__).resolve().parents[2] / "../shared/data"
needs_data = pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared/data beside the project")


def of_images(records: Any) -> dict[str, tuple[str, ...]]:
    return {record.image.name: record.captions for record in records}


def test_flickr_token_files(tmp_path: Path) -> None:
    picture(tmp_path / "Flicker8k_Dataset/a.jpg", tmp_path / "Flicker8k_Dataset/b.jpg")
    write_lines(tmp_path / "Flickr8k.token.txt", "a.jpg#0\tone , two", "b.jpg#0\tthree", "a.jpg#1\tfour")
    found = read_captions(tmp_path)
    assert found.format == "token" and of_images(found) == {"a.jpg": ("one , two", "four"), "b.jpg": ("three",)}
    write_lines(tmp_path / "Flickr_8k.trainImages.txt", "b.jpg")
    write_lines(tmp_path / "Flickr_8k.devImages.txt", "a.jpg")
    assert of_images(read_captions(tmp_path, "train")) == {"b.jpg": ("three",)}
    assert of_images(read_captions(tmp_path / "Flickr8k.token.txt", "dev")) == {"a.jpg": ("one , two", "four")}
    with pytest.raises(DataError, match="dev, train"):
        read_captions(tmp_path)


def test_flickr30k_csv(tmp_path: Path) -> None:
    picture(tmp_path / "flickr30k_images/1.jpg")
    lines = (
        "image_name| comment_number| comment",
        "1.jpg| 0| a dog , running | fast",
        "1.jpg| 1   a dog",
        "1.jpg| 0| x",
        "1.jpg| 0| x",
    )
    found = read_captions(write_lines(tmp_path / "results.csv", *lines).parent)
    assert found.format == "flickr30k" and of_images(found) == {"1.jpg": ("a dog , running | fast", "x")}
    assert ['field "caption" is missing' in found.broken[0].message, "duplicate" in found.broken[1].message] == [
        True
    ] * 2


def test_flickr30k_entities(tmp_path: Path) -> None:
    marked = "[/EN#1/people A girl] with [/EN#2/bodyparts/other brown hair] sees [/EN#0/notvisual it] ."
    write_lines(tmp_path / "sentences/10.txt", marked, "two")
    write_lines(tmp_path / "sentences/11.txt", "three")
    picture(tmp_path / "flickr30k-images/10.jpg", tmp_path / "flickr30k-images/11.jpg")
    assert len(read_captions(tmp_path)) == 2
    write_lines(tmp_path / "train.txt", "10", "12")
    write_lines(tmp_path / "tiny-dev.txt", "11")
    found = read_captions(tmp_path, "train")
    assert found.records == [
        CaptionRecord(tmp_path / "flickr30k-images/10.jpg", ("A girl with brown hair sees it .", "two"), "10")
    ]
    assert found.format == "entities" and "image 12" in found.broken[0].message


def test_karpathy(tmp_path: Path) -> None:
    def image(number: int, split: str) -> dict[str, Any]:
        sentences = [{"raw": f"image {number}", "tokens": ["image"]}]
        name = {"filepath": "val2014", "filename": f"{number}.jpg"}
        return {**name, "split": split, "sentences": sentences, "cocoid": number, "imgid": 0}

    splits = ("train", "restval", "val", "test")
    write_json(tmp_path / "dataset_coco.json", {"images": [image(k, split) for k, split in enumerate(splits)]})
    picture(*(tmp_path / f"val2014/{k}.jpg" for k in range(4)))
    ids = {split: [record.image_id for record in read_captions(tmp_path, split)] for split in splits}
    assert ids == {"train": ["0", "1"], "restval": ["1"], "val": ["2"], "test": ["3"]}
    with pytest.raises(DataError, match="several splits"):
        read_captions(tmp_path / "dataset_coco.json")
    with pytest.raises(DataError, match="is it train"):
        read_captions(tmp_path, "trian")


def test_nocaps(tmp_path: Path) -> None:
    data = {
        "images": [{"id": 3, "file_name": "a.jpg", "open_images_id": "a", "domain": "near-domain"}],
        "annotations": [{"id": 1, "image_id": 3, "caption": "one"}, {"id": 2, "image_id": 3, "caption": "two"}],
    }
    write_json(tmp_path / "nocaps_val_4500_captions.json", data)
    picture(tmp_path / "val/a.jpg")
    found = read_captions(tmp_path, "val")
    assert found.format == "nocaps"
    assert found.records == [CaptionRecord(tmp_path / "val/a.jpg", ("one", "two"), "3", "near-domain")]


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize(
    ("questions", "annotations", "split"),
    [
        ("v2_OpenEnded_mscoco_train2014_questions.json", "v2_mscoco_train2014_annotations.json", "train"),
        ("questions_train.json", "annotations_train.json", "train"),
        ("questions.json", "annotations.json", None),
    ],
)
@pytest.mark.parametrize("image", ["train2014/COCO_train2014_{}.jpg", "images/COCO_train2014_{}.jpg", "val2017/{}.jpg"])
def test_vqa(questions: str, annotations: str, split: str | None, zipped: bool, image: str, tmp_path: Path) -> None:
    suffix = ".gz" if zipped else ""
    write_json(tmp_path / (questions + suffix), vqa_questions(), zipped)
    write_json(tmp_path / (annotations + suffix), vqa_annotations(), zipped)
    paths = [tmp_path / image.format(f"{number:012d}") for number in (9, 25)]
    picture(*paths)
    found = read_questions(tmp_path, split)
    assert found.format == "vqa" and found.complete().records == [
        QuestionRecord(
            paths[0], "what is it?", ("net", "a net"), (0.6, 0.4), "other", "9000", ("net",) * 6 + ("a net",) * 4
        ),
        QuestionRecord(paths[1], "how many?", ("2",), (1.0,), "number", "25000", ("2",) * 10),
    ]
    assert [record.question_id for record in read_questions(tmp_path, f"{split or ''}[id%5==0]")] == ["25000"]


def test_vqa_without_answers_or_images(tmp_path: Path) -> None:
    path = write_json(tmp_path / "v2_OpenEnded_mscoco_test-dev2015_questions.json", vqa_questions("test-dev2015"))
    found = read_questions(path, text_only=True)
    assert [(r.image, r.answers, r.weights, r.annotators) for r in found] == [(None, (), (), ())] * 2
    picture(tmp_path / "photos/COCO_test2015_000000000009.jpg")
    found = read_questions(tmp_path, "test-dev2015", images=tmp_path / "photos")
    assert [record.question_id for record in found] == ["9000"]
    assert [path.name for path in found.missing] == ["COCO_test2015_000000000025.jpg"]


def test_vqa_questions_without_their_annotation(tmp_path: Path) -> None:
    annotations = vqa_annotations()
    annotations["annotations"][0]["question_id"] = 9000
    write_json(tmp_path / "annotations_val.json", annotations)
    write_json(tmp_path / "questions_val.json", vqa_questions())
    found = read_questions(tmp_path, "val", text_only=True)
    assert len(found) == 1 and len(found.broken) == 2
    assert "annotations_val.json: annotations[1]: a duplicate" in found.broken[0].message
    assert 'questions[1]: field "question_id": expected the question_id of an annotation, got 25000' in str(
        found.broken[1]
    )


def test_visual_genome_questions(tmp_path: Path) -> None:
    qas = [
        {"qa_id": 1, "image_id": 4, "question": "What?", "answer": "Sailboats."},
        {"qa_id": 1, "image_id": 4, "question": "What?", "answer": "x"},
        {"qa_id": 2, "image_id": 4, "question": "What?", "answer": "."},
    ]
    write_json(tmp_path / "question_answers.json", [{"id": 4, "qas": qas}, {"id": 5}])
    picture(tmp_path / "VG_100K_2/4.jpg")
    found = read_questions(tmp_path)
    image = tmp_path / "VG_100K_2/4.jpg"
    assert found.records == [QuestionRecord(image, "What?", ("Sailboats",), (1.0,), "", "1")]
    assert found.format == "vgqa" and len(found.broken) == 3


def test_gqa(tmp_path: Path) -> None:
    def part(*ids: str) -> dict[str, Any]:
        types = {"structural": "query", "semantic": "rel"}
        return {i: {"question": f"q{i}?", "imageId": "n5", "answer": "yes", "types": types} for i in ids}

    picture(tmp_path / "images/n5.jpg")
    write_json(tmp_path / "val_balanced_questions.json", part("1"))
    write_json(tmp_path / "train_all_questions/train_all_questions_0.json", part("2"))
    write_json(tmp_path / "train_all_questions/train_all_questions_10.json", part("4"))
    write_json(tmp_path / "train_all_questions/train_all_questions_9.json", part("3", "2"))
    found = read_questions(tmp_path, "val")
    assert found.records == [QuestionRecord(tmp_path / "images/n5.jpg", "q1?", ("yes",), (1.0,), "query", "1")]
    for parts in (read_questions(tmp_path, "train_all"), read_questions(tmp_path / "train_all_questions")):
        assert [record.question_id for record in parts] == ["2", "3", "4"]
        assert parts.format == "gqa" and "duplicate" in parts.broken[0].message


def test_daquar(tmp_path: Path) -> None:
    rows = ("question,answer,image_id", 'what is there,"book, desk_lamp",image3', "how many,2,image10", "how many,2")
    picture(tmp_path / "images/image3.png", tmp_path / "images/image10.jpg")
    found = read_questions(write_lines(tmp_path / "qa_train.csv", *rows).parent, "train")
    assert found.records == [
        QuestionRecord(
            tmp_path / "images/image3.png", "what is there", ("book", "desk lamp"), (0.5, 0.5), "", together=True
        ),
        QuestionRecord(tmp_path / "images/image10.jpg", "how many", ("2",), (1.0,), ""),
    ]
    assert found.format == "daquar" and 'field "image_id" is missing' in found.broken[0].message
    assert [r.question for r in read_questions(tmp_path, "train[id%5==0]")] == ["how many"]
    write_lines(tmp_path / "qa.37.raw.test.txt", "what is on the desk in the image3 ?", "book, lamp")
    assert [(r.question, r.answers) for r in read_questions(tmp_path, "test")] == [
        ("what is on the desk", ("book", "lamp"))
    ]


@pytest.mark.parametrize("protocol", [0, 2])
def test_refcoco(protocol: int, tmp_path: Path) -> None:
    folder = refcoco(tmp_path / "refcoco", protocol)
    image = tmp_path / "images/mscoco/images/train2014/COCO_train2014_000000000007.jpg"
    found = read_phrases(folder, "train")
    box = (0.1, 0.1, 0.3, 0.9)
    assert found.format == "refcoco"
    assert found.complete().records == [
        PhraseRecord(image, "the left dog", box, "0"), PhraseRecord(image, "caf\u00e9 dog", box, "1")
    ]  # fmt: skip
    assert found.records[0].size == (100, 50)
    test = read_phrases(folder / "refs(unc).p", "testA")
    assert test.records == [PhraseRecord(image, "right one", (0.5, 0.0, 1.0, 1.0), "2")]
    with pytest.raises(DataError, match="testA, train"):
        read_phrases(folder)
    (folder / "instances.json").unlink()
    with pytest.raises(DataError, match=r"no instances\.json"):
        read_phrases(folder, "train")


def test_of_several_refs_the_split_that_results_are_reported_on(tmp_path: Path) -> None:
    """RefCOCO is published with refs(google).p beside refs(unc).p, RefCOCOg beside refs(umd).p."""
    folder = refcoco(tmp_path / "refcoco")
    unc = folder / "refs(unc).p"
    (folder / "refs(google).p").write_bytes(unc.read_bytes())
    assert read_phrases(folder, "train").source == unc
    unc.rename(folder / "refs(umd).p")
    assert read_phrases(folder, "train").source.name == "refs(umd).p"
    (folder / "refs(umd).p").unlink()
    assert read_phrases(folder, "train").source.name == "refs(google).p"


def test_vqa_v2_comes_before_the_first_edition(tmp_path: Path) -> None:
    for edition in ("", "v2_"):
        write_json(tmp_path / f"{edition}OpenEnded_mscoco_val2014_questions.json", vqa_questions("val2014"))
    picture(tmp_path / "val2014/COCO_val2014_000000000009.jpg")
    found = read_questions(tmp_path, "val2014")
    assert found.source.name == "v2_OpenEnded_mscoco_val2014_questions.json"


def test_coco_boxes(tmp_path: Path) -> None:
    def row(key: int, category: int, **more: Any) -> dict[str, Any]:
        return {"id": key, "image_id": 7, "category_id": category, "bbox": [10, 10, 50, 20], **more}

    data = {
        "images": [{"id": 7, "file_name": "a.jpg", "width": 100, "height": 50}],
        "annotations": [row(1, 1), row(2, 2), row(3, 2), row(4, 3, iscrowd=1), row(5, 9), row(6, 4, bbox=[0, 0, 0, 9])],
        "categories": [{"id": k, "name": name} for k, name in enumerate(("", "dog", "cat", "tree", "car"))],
    }
    write_json(tmp_path / "annotations/instances_val2017.json", data)
    picture(tmp_path / "val2017/a.jpg")
    found = read_phrases(tmp_path, "val")
    assert found.records == [PhraseRecord(tmp_path / "val2017/a.jpg", "dog", (0.1, 0.2, 0.6, 0.6), "1")]
    assert found.format == "coco_boxes" and ["category_id" in found.broken[0].message, len(found.broken)] == [True, 2]


@pytest.mark.parametrize("names", [("Sentences", "Annotations"), ("sentences", "annotations")])
def test_phrases_of_flickr30k_entities(names: tuple[str, str], tmp_path: Path) -> None:
    """Several boxes are one around all; what is the scene or not to be seen is left out and is no fault."""
    found = read_phrases(entities(tmp_path, *names), "train")
    girls, hats = (0.1, 0.1, 0.6, 0.9), (0.12, 0.1, 0.2, 0.2)
    image = tmp_path / "flickr30k-images/10.jpg"
    assert found.records == [
        PhraseRecord(image, "Two girls", girls, "10/1/1"),
        PhraseRecord(image, "red hats", hats, "10/3/1"),
        PhraseRecord(image, "Girls", girls, "10/1/2"),
    ]
    assert found.records[0].size == (100, 50)
    assert (found.format, found.broken, found.missing) == ("entities", [], [])
    assert [record.phrase for record in read_phrases(tmp_path, "test")] == ["A dog"]
    assert read_phrases(tmp_path, "test", format="entities").records == read_phrases(tmp_path, "test").records
    assert len(read_phrases(tmp_path / names[0], "train")) == 3  # the folder of sentences names the whole
    with pytest.raises(DataError, match="several splits"):
        read_phrases(tmp_path)
    for split in ("train", "test"):
        (tmp_path / f"{split}.txt").unlink()
    assert len(read_phrases(tmp_path)) == 4
    assert len(read_phrases(tmp_path, "[id%11==0]")) == 1


def test_entities_without_boxes_are_captions_alone(tmp_path: Path) -> None:
    folder = entities(tmp_path)
    for file in (folder / "Annotations").iterdir():
        file.unlink()
    found = read_captions(folder, "train")
    with pytest.raises(DataError, match=r"10\.xml: No such file"):
        read_phrases(folder, "train")
    (folder / "Annotations").rmdir()
    assert read_captions(folder, "train").records == found.records
    with pytest.raises(DataError, match="no phrases"):
        read_phrases(folder, "train")


@pytest.mark.parametrize(
    ("xml", "message"),
    [
        ("<annotation>", "expected XML: no element found"),
        ("", "expected XML"),
        ("<!DOCTYPE x [<!ENTITY a 'b'>]><annotation/>", "without declarations"),
        ("<annotation/>", 'field "width"'),
        (entities_xml(("7", [[1, 1, 20, 20]]), size=(0, 50)), "positive width"),
        (entities_xml(("7", [[1, 1, 20, 20]])).replace("<xmax>20", "<xmax>wide"), 'object 1: field "xmax"'),
        (entities_xml(("7", [[1, 1, 20, 20], [5, 5, 9, 9]])).replace("<ymin>5", "<ymin>nan"), 'object 2: field "ymin"'),
        (entities_xml(("7", [[1, 1, 1, 20]])), "x0 < x1"),
        (entities_xml(("7", [[1, 1, 300, 20]])), "inside the image"),
    ],
)
def test_faults_of_entities_are_named(xml: str, message: str, tmp_path: Path) -> None:
    folder = entities(tmp_path)
    (folder / "Annotations/11.xml").write_text(xml)
    write_lines(folder / "all.txt", "10", "11", "12")
    found = read_phrases(folder, "all")
    assert len(found) == 3 and len(found.broken) == 2
    assert message in found.broken[0].message and "11." in found.broken[0].message
    assert "sentences of image 12" in found.broken[1].message


@pytest.mark.parametrize("place", ["images/", "dev/", "images/dev/", "images/train/31/"])
def test_nlvr2(place: str, tmp_path: Path) -> None:
    entry = {"identifier": "dev-850-2-1", "sentence": "both", "label": "True", "directory": 31}
    hidden = {"identifier": "dev-850-3-1", "sentence": "both", "directory": "31"}
    write_lines(tmp_path / "data/dev.json", entry, hidden, {**entry, "identifier": "dev-850"}, entry)
    images = tuple(tmp_path / f"{place}dev-850-2-img{side}.png" for side in (0, 1))
    picture(*images, *(tmp_path / f"{place}dev-850-3-img{side}.png" for side in (0, 1)))
    found = read_statements(tmp_path, "dev")
    assert found.format == "nlvr2"
    assert found.records[0] == StatementRecord(images, "both", True, "dev-850-2-1", "dev-850-1")
    assert [(r.label, r.group) for r in found] == [(True, "dev-850-1"), (None, "dev-850-1")]
    assert len(found.broken) == 2 and not found.missing
    assert len(read_statements(tmp_path / "data/dev.json", "[id%5==0]")) == 2


def test_nlvr(tmp_path: Path) -> None:
    entry = {"sentence": "two boxes", "label": "true", "identifier": "15-0", "directory": "2", "structured_rep": []}
    write_lines(tmp_path / "dev/dev.json", entry, {**entry, "identifier": "x"})
    images = [tmp_path / f"dev/images/2/dev-15-0-{k}.png" for k in range(6)]
    picture(*images[:5])
    for found in (read_statements(tmp_path, "dev"), read_statements(tmp_path / "dev"), read_statements(tmp_path)):
        assert found.format == "nlvr" and found.missing == images[5:] and len(found.broken) == 1
        assert found.records[1] == StatementRecord((images[1],), "two boxes", True, "dev-15-0-1", "dev-15-0")
        assert len(found) == 5


@pytest.mark.parametrize("name", ["hidden.json", "hidden_final.json", "hidden2.json", "hidden.jsonl"])
@pytest.mark.parametrize("label", [None, "false"])
def test_the_hidden_split_of_nlvr(name: str, label: str | None, tmp_path: Path) -> None:
    """It does not say in which numbered folder an image is, and it may have no labels."""
    entry = {"sentence": "two boxes", "identifier": "15-0", "structured_rep": []} | ({"label": label} if label else {})
    write_lines(tmp_path / "hidden" / name, entry, {**entry, "identifier": "16-3"})
    images = [tmp_path / f"hidden/images/{k % 2}/hidden-15-0-{k}.png" for k in range(6)]
    images += [tmp_path / f"hidden/images/11/hidden-16-3-{k}.png" for k in range(6)]
    picture(*images)
    places = [(tmp_path / "hidden" / name, None), (tmp_path / "hidden", None), (tmp_path / "hidden", "hidden")]
    places += [] if name.endswith("l") else [(tmp_path, "hidden")]
    for path, split in places:
        found = read_statements(path, split).complete()
        assert found.format == "nlvr" and [record.images for record in found] == [(image,) for image in images]
        assert {record.label for record in found} == {False if label else None}
        assert (found.records[7].identifier, found.records[7].group) == ("hidden-16-3-1", "hidden-16-3")


def test_splits_of_nlvr_stand_side_by_side(tmp_path: Path) -> None:
    entry = {"sentence": "two boxes", "identifier": "15-0", "structured_rep": []}
    write_lines(tmp_path / "dev/dev.json", {**entry, "label": "true", "directory": "2"})
    write_lines(tmp_path / "hidden/hidden.json", entry)
    write_lines(tmp_path / "hidden/hidden2.json", {**entry, "sentence": "an older file"})
    picture(tmp_path / "dev/images/2/dev-15-0-0.png", tmp_path / "hidden/images/0/hidden-15-0-0.png")
    assert [record.label for record in read_statements(tmp_path, "dev")] == [True]
    assert [(record.label, record.statement) for record in read_statements(tmp_path, "hidden")] == [(None, "two boxes")]
    with pytest.raises(DataError, match="several splits"):
        read_statements(tmp_path)


def test_statements_on_one_image_and_hidden_labels(tmp_path: Path) -> None:
    picture(tmp_path / "a.jpg")
    lines = [{"image": "a.jpg", "statement": "s", "label": None, "group": "g", "identifier": 4}]
    lines += [{"image": "a.jpg", "statement": "s"}, {"image": "a.jpg", "sentence": "albef", "label": "True"}]
    found = read_statements(write_lines(tmp_path / "statements.jsonl", *lines))
    assert found.records == [
        StatementRecord((tmp_path / "a.jpg",), "s", None, "4", "g"),
        StatementRecord((tmp_path / "a.jpg",), "albef", True),
    ]
    assert 'field "label" is missing' in found.broken[0].message


def test_snli_ve(tmp_path: Path) -> None:
    pair = {"Flickr30K_ID": "12", "gold_label": "neutral", "sentence1": "p", "sentence2": "h", "pairID": "12.jpg#1r"}
    lines = (pair, {**pair, "gold_label": "-", "pairID": "b"}, {**pair, "gold_label": "no", "pairID": "c"}, pair)
    write_lines(tmp_path / "snli_ve_dev.jsonl", *lines)
    picture(tmp_path / "flickr30k_images/12.jpg")
    found = read_entailments(tmp_path, "dev")
    image = tmp_path / "flickr30k_images/12.jpg"
    assert found.records == [EntailmentRecord(image, "h", "neutral", "12.jpg#1r", "p")] and found.format == "snli_ve"
    assert [
        word in e.message for word, e in zip(("did not agree", "one of", "duplicate"), found.broken, strict=True)
    ] == [True] * 3
    assert len(read_entailments(tmp_path / "snli_ve_dev.jsonl", format="snli_ve")) == 1


def test_albef_lists(tmp_path: Path) -> None:
    picture(tmp_path / "a.jpg")
    question = {"question_id": 1, "image": "a.jpg", "question": "q", "dataset": "vqa"}
    write_json(tmp_path / "vqa_train.json", [{**question, "answer": ["x", "x", "y", "x"]}])
    write_json(tmp_path / "vqa_test.json", [question])
    (record,) = read_questions(tmp_path, "train")
    assert (record.answers, record.weights, record.annotators) == (("x", "y"), (0.75, 0.25), ("x", "x", "y", "x"))
    assert read_questions(tmp_path, "test").records[0].answers == ()
    write_json(tmp_path / "ve_train.json", [{"image": "a.jpg", "sentence": "h", "label": "neutral"}])
    assert read_entailments(tmp_path, "train").records == [EntailmentRecord(tmp_path / "a.jpg", "h", "neutral")]


@needs_data
def test_real_questions() -> None:
    for split, count in (("train", 6795), ("val", 2912)):
        assert len(read_questions(SHARED / "daquar", split).complete()) == count
    found = read_questions(SHARED / "vqa2", "valid", text_only=True).complete()
    assert len(found) == 8977 and {len(record.annotators) for record in found} == {10}
    assert Counter(record.kind for record in found) == {"other": 3082, "number": 2948, "yes/no": 2947}
    assert all(abs(sum(record.weights) - 1) < 1e-9 for record in found)
    samples = SHARED / "samples"
    for name, count in (("vqav2", 3), ("vgqa", 8), ("gqa", 1), ("gqa/question_dir", 2)):
        images = samples / "images" / name.partition("/")[0]
        assert len(read_questions(samples / name, images=images).complete()) == count


@needs_data
def test_real_statements_and_entailments() -> None:
    for split, count in (("dev", 5934), ("test", 5940)):
        found = read_statements(SHARED / "nlvr", split).complete()
        assert len(found) == count and len({record.group for record in found}) == count // 6
    samples = SHARED / "samples"
    assert len(read_statements(samples / "nlvr2", images=samples / "images/nlvr2").complete()) == 8
    assert len(read_entailments(SHARED / "flickr8k/snli_ve_like.jsonl").complete()) == 284
    folder = "visual_entailment"
    assert len(read_entailments(samples / folder, images=samples / "images" / folder).complete()) == 16


@needs_data
def test_groups_of_real_nlvr2_have_the_known_consistency() -> None:
    source = find("statements", SHARED / "golden/nlvr2", "dev")
    found = read_records(Reading(source), lambda image_id: True, keep=True)  # the photos are not there
    groups = defaultdict(list)
    for record in found:
        groups[record.group].append(record.label)
    assert sum(bool(record.label) for record in found) / len(found) == pytest.approx(0.508594, abs=1e-6)
    assert sum(map(all, groups.values())) / len(groups) == pytest.approx(0.038652, abs=1e-6)


@needs_data
def test_real_phrases_and_captions() -> None:
    assert len(read_phrases(SHARED / "coco", "train2017").complete()) == 171
    assert len(read_phrases(SHARED / "coco", "val").complete()) == 113
    images = SHARED / "samples/images/flickr30k"
    assert len(read_captions(SHARED / "samples/flickr30k", "tiny-dev", images=images).complete()) == 3
    assert "[/EN" not in str(read_captions(SHARED / "samples/flickr30k", "test", images=images).records)
