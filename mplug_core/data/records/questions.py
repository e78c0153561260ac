"""Questions on images, with their answers where the file has them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mplug_core.data.records.captions import csv_rows
from mplug_core.data.records.files import File
from mplug_core.data.records.finding import read
from mplug_core.data.records.reading import (
    Entry,
    Item,
    Layout,
    Reading,
    is_id,
    is_unicode,
    lines,
    objects,
    own_entries,
    own_folder,
    places,
    repeats,
    table,
    table_entries,
)
from mplug_core.data.records.rows import one_line
from mplug_core.data.records.types import Format, QuestionRecord, Records
from mplug_core.errors import DataError

_COCO_SUBTYPES = ("train2014", "val2014", "test2015", "train2017", "val2017", "test2017")


def read_questions(
    path: str | Path,
    split: str | None = None,
    format: Format | None = None,
    images: str | Path | None = None,
    text_only: bool = False,
) -> Records[QuestionRecord]:
    """Questions, in the order of the file; arguments as of :func:`read_captions`.

    Own format: {"image", "question", "answer": STR or [STR], "kind"}. Repeated answers of a list are counted:
    ``weights`` are relative frequencies. A file without any answers, or an answer null, gives records without.

    VQA v2 is read from its questions; the annotations are found beside them, and without them there are no answers.
    Of DAQUAR's several answers each is a part of the one right answer: ``answers`` has them all, and ``annotators``
    is empty.

    Raises DataError where there is no such file or split, or nothing usable in it.
    """
    return read("questions", path, split, format, images, text_only)


def _weighted(answers: Sequence[str]) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """Distinct answers in the order of their first use, and their shares."""
    counts = Counter(answers)
    total = sum(counts.values())
    return tuple(counts), tuple(n / total for n in counts.values())


def _own(entry: Entry) -> Iterable[Item]:
    annotators = tuple(entry.texts("annotators")) if "annotators" in entry.values else ()
    given = entry.values.get("answer")
    if given is None and ("answer" in entry.values or annotators or b'"answer"' not in entry.reading.file.head):
        answers = list(annotators)
    else:
        answers = entry.texts("answer")
    if not annotators and entry.values.get("dataset") == "vqa" and isinstance(given, list):
        annotators = tuple(answers)  # ALBEF's lists: VQA v2's have the ten answers, Visual Genome's one
    question_id = entry.identity("question_id", default="")
    distinct, weights = _weighted(answers)
    together = entry.values.get("together", False)
    if not isinstance(together, bool):
        raise entry.fault("together", "true or false")
    record = QuestionRecord(
        entry.path("image"), entry.text("question"), distinct, weights, entry.word("kind"), question_id, annotators,
        together and len(distinct) > 1,
    )  # fmt: skip
    return [Item(entry.image_id(), record, _key(entry, record))]


def _key(entry: Entry, record: QuestionRecord) -> Any:
    """What must not come twice: the question's id, else everything."""
    if record.question_id:
        return repeats(f"question_id {record.question_id}", str(entry.values.get("image")), record.question)
    return (record, str(entry.values.get("image")))  # of texts alone the image is None


def _vqa(reading: Reading) -> Iterator[Entry]:
    """VQA v2: questions, joined with the annotations beside them."""
    value = reading.file.value
    subtype = value.get("data_subtype") if isinstance(value, dict) else None
    annotations = _vqa_annotations(reading)
    for entry in table_entries(reading, "questions", "VQA v2"):
        question_id = entry.values.get("question_id")
        if annotations is not None and is_id(question_id):
            if question_id not in annotations:
                reading.broken.append(entry.fault("question_id", "the question_id of an annotation"))
                continue
            entry.values = {**entry.values, "annotation": annotations[question_id]}
        entry.values.setdefault("data_subtype", subtype or reading.split or reading.file.stem)
        yield entry


def _vqa_annotations(reading: Reading) -> dict[int | str, Any] | None:
    """question_id -> (place, annotation), or None if there is no such file."""
    path = _beside_questions(reading.path)
    if path is None:
        return None
    found: dict[int | str, Any] = {}
    for index, annotation in enumerate(table(reading, "annotations", "VQA v2", File(path).value, path)):
        question_id = annotation.get("question_id") if isinstance(annotation, dict) else None
        if not is_id(question_id):
            reading.broken.append(DataError(f'{path}: annotations[{index}]: field "question_id": expected a number'))
        elif question_id in found:
            what = f"a duplicate of an entry before, the first is kept: question_id {question_id}"
            reading.broken.append(DataError(f"{path}: annotations[{index}]: {what}"))
        else:
            found[question_id] = (f"{path}: annotations[{index}]", annotation)
    return found


def _beside_questions(path: Path) -> Path | None:
    """``questions_SPLIT.json`` and ``v2_OpenEnded_mscoco_SPLIT_questions.json`` to the annotations of them."""
    name = path.name.removesuffix(".gz")
    name = re.sub(r"(OpenEnded|MultipleChoice)_", "", name).replace("questions", "annotations")
    folders = (path.parent, path.parent.parent / "annotations", path.parent.parent / "Annotations", path.parent.parent)
    if name == path.name.removesuffix(".gz"):
        return None
    places = (folder / f"{name}{suffix}" for folder in folders for suffix in ("", ".gz"))
    return next((place for place in places if place.is_file()), None)


def _vqa_item(entry: Entry) -> Iterable[Item]:
    question_id = entry.identity("question_id", "a number")
    image_id = entry.identity("image_id", "a number")
    answers, kind = _vqa_answers(entry)
    image = entry.reading.image(*coco_names(image_id, str(entry.values.get("data_subtype"))))
    distinct, weights = _weighted([answer.strip() for answer in answers if answer.strip()])
    annotators = tuple(answers) if len(answers) > 1 else ()
    record = QuestionRecord(image, entry.text("question"), distinct, weights, kind, question_id, annotators)
    return [Item(image_id, record, f"question_id {question_id}")]


def _vqa_answers(entry: Entry) -> tuple[list[str], str]:
    """Each annotator's answer, and the type; [] where there is no annotation."""
    if "annotation" not in entry.values:
        return [], ""
    where, values = entry.values["annotation"]
    annotation = Entry(entry.reading, "", values)
    annotation.where = where
    kind = annotation.word("answer_type")
    if "answers" not in values and "multiple_choice_answer" in values:
        return [annotation.text("multiple_choice_answer")], kind
    answers = values.get("answers")
    found = [a.get("answer") if isinstance(a, dict) else a for a in answers] if isinstance(answers, list) else []
    if not found or not all(isinstance(answer, str) and is_unicode(answer) for answer in found):
        raise annotation.fault("answers", 'a list of objects with "answer"')
    return found, kind


def coco_names(image_id: str, subtype: str) -> tuple[str, ...]:
    """What COCO may have called an image: the year's form, then the later one, each also in its folder.

    ``subtype`` is "train2014" or something that tells the split, such as "train".
    """
    year = re.search(r"(train|val|test)(?:-dev|id)?(20\d\d)", subtype)
    part = re.search(r"train|val|test", subtype)
    if year:
        subtypes: tuple[str, ...] = (year[1] + year[2],)
    else:
        subtypes = tuple(s for s in _COCO_SUBTYPES if part is None or s.startswith(part[0]))
    number = image_id.zfill(12)
    # A split of one's own may draw from any of COCO's.
    old = subtypes + tuple(s for s in _COCO_SUBTYPES if s not in subtypes)
    files = [f"COCO_{s}_{number}.jpg" for s in old[:4] if "2017" not in s] + [f"{number}.jpg"]
    folders = [f"{s}/{name}" for s in old for name in (f"COCO_{s}_{number}.jpg", f"{number}.jpg")]
    return (*files, *folders)


def _vgqa(reading: Reading) -> Iterator[Entry]:
    """Visual Genome: a list of images, each with its ``qas``."""
    for image in own_entries(reading):
        qas = image.values.get("qas")
        if not isinstance(qas, list):
            reading.broken.append(image.fault("qas", "a list of questions"))
            continue
        where = image.where.removeprefix(str(reading.path))
        for entry in objects(reading, ((f"{where}: qas[{index}]", qa) for index, qa in enumerate(qas))):
            entry.values = {"image_id": image.values.get("id", image.values.get("image_id")), **entry.values}
            yield entry


def _vgqa_item(entry: Entry) -> Iterable[Item]:
    image_id = entry.identity("image_id", "a number")
    question_id = entry.identity("qa_id", default="")
    answer = entry.text("answer").removesuffix(".").strip()
    if not answer:
        raise entry.fault("answer", "a text")
    image = entry.reading.image(f"{image_id}.jpg")
    record = QuestionRecord(image, entry.text("question"), (answer,), (1.0,), "", question_id)
    return [Item(image_id, record, _key(entry, record))]


def _gqa(reading: Reading) -> Iterator[Entry]:
    """GQA: {id: {"question", "imageId", "answer", "types"}}, in one file or a folder of parts."""
    files = _gqa_parts(reading.path) if reading.file.shape == "folder" else [reading.file]
    for file in files:
        if not isinstance(file.value, dict):
            raise DataError(f"{file.path}: expected an object of questions by id, as in GQA", "correct it")
        where = f"/{file.path.name}" if file is not reading.file else ""
        for entry in objects(reading, ((f"{where}: {key}", value) for key, value in file.value.items())):
            entry.values = {**entry.values, "question_id": entry.where.rpartition(": ")[2]}
            yield entry


def _gqa_parts(folder: Path) -> list[File]:
    files = [file for pattern in ("*.json", "*.json.gz") for file in folder.glob(pattern)]
    # part 10 behind part 9
    return [File(file) for file in sorted(files, key=lambda f: [int(n) for n in re.findall(r"\d+", f.name)] or [0])]


def _gqa_item(entry: Entry) -> Iterable[Item]:
    image_id = entry.identity("imageId")
    types = entry.values.get("types")
    types = types if isinstance(types, dict) else {}
    kind = next((t for t in (types.get("structural"), types.get("semantic")) if isinstance(t, str)), "")
    answers = (entry.text("answer"),) if entry.values.get("answer") is not None else ()
    image = entry.reading.image(f"{image_id}.jpg")
    question_id = str(entry.values["question_id"])
    record = QuestionRecord(image, entry.text("question"), answers, (1.0,) * len(answers), kind, question_id)
    return [Item(image_id, record, f"question_id {question_id}")]


def _daquar(reading: Reading) -> Iterator[Entry]:
    """CSV ``question,answer,image_id``; or the original's pairs of lines: question with its image, answer."""
    if not _is_daquar_csv(reading.file):
        yield from _daquar_pairs(reading, lines(reading))
        return
    for row in csv_rows(reading, "question"):
        values = dict(zip(("question", "answer", "image_id"), map(one_line, row.fields), strict=False))
        if len(row.fields) > 3:
            reading.fault(row.where, f"expected question,answer,image_id, got {len(row.fields)} fields")
        else:
            yield Entry(reading, row.where, values)


def _daquar_pairs(reading: Reading, numbered: Iterator[tuple[str, str]]) -> Iterator[Entry]:
    for where, line in numbered:
        question = one_line(line)
        _, answer = next(numbered, ("", ""))
        image = re.search(r"\bimage\d+\b", question)
        values = {"question": re.sub(r"\s*\b(in|of|on)?\s*(the )?image\d+\b\s*\??", "", question), "answer": answer}
        if image:
            values["image_id"] = image[0]
        yield Entry(reading, where, values)


def _daquar_item(entry: Entry) -> Iterable[Item]:
    image_id = entry.name("image_id")
    # compound names are written with underscores there: tape_dispenser
    parts = (" ".join(part.replace("_", " ").split()) for part in entry.text("answer").split(","))
    answers = tuple(dict.fromkeys(filter(None, parts)))
    if not answers:
        raise entry.fault("answer", "a text")
    image = entry.reading.image(f"{image_id}.png", f"{image_id}.jpg")
    weights = (1 / len(answers),) * len(answers)
    record = QuestionRecord(image, entry.text("question"), answers, weights, "", together=len(answers) > 1)
    # Without a key: what two people asked and answered alike is in the data twice, and counts twice.
    return [Item(image_id, record)]


def _is_daquar_csv(file: File) -> bool:
    return file.shape == "text" and file.line.replace(" ", "").lower() == "question,answer,image_id"


def _is_daquar(file: File) -> bool:
    return _is_daquar_csv(file) or (file.shape == "text" and re.search(r"\bimage\d+ ?\?", file.line) is not None)


def _is_vqa(file: File) -> bool:
    return file.shape == "object" and isinstance(file.value, dict) and "questions" in file.value


def _is_gqa(file: File) -> bool:
    if file.shape == "folder":
        parts = _gqa_parts(file.path)
        return bool(parts) and b'"imageId"' in parts[0].head
    first = next(iter(file.value.values()), None) if file.shape == "object" and isinstance(file.value, dict) else None
    return isinstance(first, dict) and "imageId" in first


LAYOUTS = (
    Layout(
        "vqa", _is_vqa, _vqa, _vqa_item,
        places("images", *_COCO_SUBTYPES),
        (
            r"v2_OpenEnded_(mscoco_)?(?P<split>[\w-]+)_questions\.json",
            r"(v2_)?(OpenEnded|MultipleChoice)_(mscoco_)?(?P<split>[\w-]+)_questions\.json",
        ),
    ),
    Layout(
        "vgqa", lambda file: file.shape == "list" and "qas" in file.sample, _vgqa, _vgqa_item,
        places("images", "VG_100K", "VG_100K_2", "images/VG_100K", "images/VG_100K_2"), (r"question_answers\.json",),
    ),
    Layout(
        "gqa", _is_gqa, _gqa, _gqa_item,
        places("images", "allImages/images"), (r"(?P<split>\w+)_questions(\.json)?",),
    ),
    Layout(
        "daquar", _is_daquar, _daquar, _daquar_item,
        places("images", "nyu_depth_images"), (r"qa_(?P<split>\w+)\.csv", r"qa\.\d+\.raw\.(?P<split>\w+)\.txt"),
    ),
    Layout(
        "json", lambda file: file.shape == "list", own_entries, _own, own_folder,
        (r"vqa_(?P<split>\w+)\.json", r"(?P<split>vg)_qa\.json"),
    ),
    Layout("jsonl", lambda file: file.shape == "lines", own_entries, _own, own_folder),
)  # fmt: skip
