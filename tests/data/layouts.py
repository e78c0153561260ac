"""Small data sets in the official layouts, and images that are only there to be found."""

from __future__ import annotations

import gzip
import json
import pickle
from pathlib import Path
from typing import Any


def picture(*places: Path) -> None:
    """Files where images are expected: readers look for them and don't open them."""
    for place in places:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(b"x")


def write_json(path: Path, value: Any, zipped: bool = False) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = json.dumps(value).encode()
    path.write_bytes(gzip.compress(data) if zipped else data)
    return path


def write_lines(path: Path, *entries: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((e if isinstance(e, str) else json.dumps(e)) + "\n" for e in entries), encoding="utf-8")
    return path


def vqa_questions(subtype: str | None = None) -> dict[str, Any]:
    """Two questions on images 9 and 25."""
    questions = [
        {"image_id": 9, "question": "what is it?", "question_id": 9000},
        {"image_id": 25, "question": "how many?", "question_id": 25000},
    ]
    return {"questions": questions, **({"data_subtype": subtype} if subtype else {})}


def vqa_annotations() -> dict[str, Any]:
    def ten(*answers: str) -> list[dict[str, Any]]:
        return [{"answer": answer, "answer_id": k + 1} for k, answer in enumerate(answers)]

    first = {"question_id": 9000, "answer_type": "other", "answers": ten(*["net"] * 6, *["a net"] * 4)}
    return {"annotations": [{"question_id": 25000, "answer_type": "number", "answers": ten(*["2"] * 10)}, first]}


def refcoco(folder: Path, protocol: int = 0) -> Path:
    """refs(unc).p with two refs on one image of 100 x 50 pixels, and instances.json."""
    refs = [
        {
            "ref_id": 1, "ann_id": 5, "image_id": 7, "category_id": 1, "split": "train",
            "file_name": "COCO_train2014_000000000007_5.jpg",
            "sentences": [
                {"sent_id": 0, "sent": "the left dog", "raw": "The left dog", "tokens": ["the", "left", "dog"]},
                {"sent_id": 1, "sent": "caf\u00c3\u00a9 dog", "raw": "", "tokens": []},
            ],
        },
        {
            "ref_id": 2, "ann_id": 6, "image_id": 7, "category_id": 1, "split": "testA",
            "file_name": "COCO_train2014_000000000007_6.jpg",
            "sentences": [{"sent_id": 2, "raw": "right one", "sent": ""}],
        },
    ]  # fmt: skip
    instances = {
        "images": [{"id": 7, "file_name": "COCO_train2014_000000000007.jpg", "width": 100, "height": 50}],
        "annotations": [
            {"id": 5, "image_id": 7, "category_id": 1, "bbox": [10, 5, 20, 40]},
            {"id": 6, "image_id": 7, "category_id": 1, "bbox": [50, 0, 50, 50]},
        ],
        "categories": [{"id": 1, "name": "dog"}],
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol=protocol))
    write_json(folder / "instances.json", instances)
    picture(folder.parent / "images/mscoco/images/train2014/COCO_train2014_000000000007.jpg")
    return folder


def entities_xml(*objects: tuple[str, list[list[int]]], size: tuple[int, int] = (100, 50)) -> str:
    """An annotation file of Flickr30k Entities: (entity, its boxes) an object; one without boxes is not to be seen."""
    boxes = "<bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox>"
    found = ""
    for entity, places in objects:
        for place in places or [None]:
            inside = boxes.format(*place) if place else "<scene>1</scene><nobndbox>0</nobndbox>"
            found += f"<object><name>{entity}</name>{inside}</object>"
    shape = f"<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>"
    return f"<annotation><filename>x.jpg</filename>{shape}{found}</annotation>"


def entities(folder: Path, sentences: str = "Sentences", annotations: str = "Annotations") -> Path:
    """Flickr30k Entities with two images of 100 x 50 pixels and the splits train and test."""
    write_lines(
        folder / f"{sentences}/10.txt",
        "[/EN#1/people Two girls] in [/EN#2/scene a park] , [/EN#3/clothing/other red hats] see [/EN#0/notvisual it] .",
        "[/EN#1/people Girls] play .",
    )
    write_lines(folder / f"{sentences}/11.txt", "[/EN#7/animals A dog] runs .")
    boxes = [("1", [[10, 5, 30, 45], [40, 10, 60, 40]]), ("2", []), ("3", [[12, 5, 20, 10]])]
    write_lines(folder / f"{annotations}/10.xml", entities_xml(*boxes))
    write_lines(folder / f"{annotations}/11.xml", entities_xml(("7", [[0, 0, 100, 50]])))
    write_lines(folder / "train.txt", "10")
    write_lines(folder / "test.txt", "11")
    picture(folder / "flickr30k-images/10.jpg", folder / "flickr30k-images/11.jpg")
    return folder
