"""Data sets as people have them: other years' names, ids that start again, quotes, dots, pictures on their side."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from mplug_core.data.batches import Source
from mplug_core.data.images import picture_shape
from mplug_core.data.placement import ON_ITS_SIDE, turn_of, turned, upright
from mplug_core.data.records import read_captions, read_phrases, read_questions
from mplug_core.data.records.files import File
from mplug_core.data.records.rows import image_pairs, rows
from mplug_core.data.shards.inputs import Fault, open_inputs
from mplug_core.data.shards.pack import LEFT_OUT, PackOptions, pack
from mplug_core.data.shards.reading import Pack
from mplug_core.data.shards.remote import LocalFolder
from mplug_core.errors import DataError
from mplug_core.recipe import DataSpec, SourceSection, VisionSection
from mplug_core.tasks import grounding


def photo(path: Path, size: tuple[int, int] = (8, 6), orientation: int | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", size, (90, 20, 10))
    exif = image.getexif()
    if orientation:
        exif[0x0112] = orientation
    image.save(path, exif=exif)
    return path


def write(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return path


# -- COCO ------------------------------------------------------------------------------------------------------------

OLD, NEW = "COCO_val2014_000000006818.jpg", "000000006818.jpg"


def coco_files(folder: Path, spelled: str) -> list[Any]:
    """The readers of what each of COCO's layouts says of image 6818."""
    split = "val2014" if spelled == OLD else "val2017"
    captions = write(folder / f"annotations/captions_{split}.json", {
        "images": [{"id": 6818, "file_name": spelled}],
        "annotations": [{"id": 1, "image_id": 6818, "caption": "a room"}],
    })  # fmt: skip
    sentences = [{"raw": "a room"}]
    karpathy = write(folder / "dataset_coco.json", {
        "images": [{"filepath": split, "filename": spelled, "split": "val", "cocoid": 6818, "sentences": sentences}],
    })  # fmt: skip
    blip = write(folder / "coco_karpathy_val.json", [{"image": f"{split}/{spelled}", "caption": ["a room"]}])
    questions = {"questions": [{"image_id": 6818, "question": "what?", "question_id": 1}], "data_subtype": split}
    vqa = write(folder / f"v2_OpenEnded_mscoco_{split}_questions.json", questions)
    boxes = write(folder / f"instances_{split}.json", {
        "images": [{"id": 6818, "file_name": spelled, "width": 8, "height": 6}],
        "annotations": [{"id": 1, "image_id": 6818, "category_id": 1, "bbox": [1, 1, 3, 3]}],
        "categories": [{"id": 1, "name": "room"}],
    })  # fmt: skip
    return [
        read_captions(captions), read_captions(karpathy, "val"), read_captions(blip), read_questions(vqa),
        read_phrases(boxes),
    ]  # fmt: skip


@pytest.mark.parametrize("place", ["train2014", "val2014", "train2017", "val2017", "images", "images/val2014", "."])
@pytest.mark.parametrize("there", [OLD, NEW, OLD.replace("val", "train")])
@pytest.mark.parametrize("spelled", [OLD, NEW])
def test_images_of_coco_are_found_whatever_release_is_there(
    tmp_path: Path, place: str, there: str, spelled: str
) -> None:
    image = photo(tmp_path / place / there)
    for found in coco_files(tmp_path, spelled):
        assert [record.image.resolve() for record in found] == [image.resolve()], found.source
        assert not found.missing


def restarting(folder: Path) -> Path:
    images = [{"id": number, "file_name": f"{number}.jpg"} for number in (1, 2)]
    rows = [{"id": k, "image_id": n, "caption": f"text {k} of {n}"} for n in (1, 2) for k in range(3)]
    rows.append({"id": 9, "image_id": 2, "caption": "text 0 of 2"})
    for number in (1, 2):
        photo(folder / f"{number}.jpg")
    return write(folder / "captions.json", {"images": images, "annotations": rows})


def test_a_duplicate_is_the_same_image_and_the_same_text(tmp_path: Path) -> None:
    found = read_captions(restarting(tmp_path))
    assert [len(record.captions) for record in found] == [3, 3]
    assert len(found.broken) == 1 and "duplicate" in found.broken[0].message


def test_ids_of_boxes_and_questions_may_start_again(tmp_path: Path) -> None:
    sized = {"size": [8, 6], "phrase": "it"}
    lines = [{"image": f"{n}.jpg", "box": [1, 1, 3, 3], "phrase_id": 0, **sized} for n in (1, 2, 2)]
    asked = [{"image": f"{n}.jpg", "question": "what?", "answer": "x", "question_id": 0} for n in (1, 2, 2)]
    for number in (1, 2):
        photo(tmp_path / f"{number}.jpg")
    for name, entries, read in (("phrases", lines, read_phrases), ("questions", asked, read_questions)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
        found = read(tmp_path / f"{name}.jsonl")
        assert len(found) == 2 and len(found.broken) == 1 and "_id 0" in found.broken[0].message


# -- CSV and TSV -----------------------------------------------------------------------------------------------------


def table(text: str, separator: str = ",") -> list[Any]:
    lines = [(str(number), line.rstrip("\r")) for number, line in enumerate(text.split("\n"), 1)]
    return [row.fault or row.fields for row in rows(lines, separator)]


@pytest.mark.parametrize("separator", [",", "\t"])
def test_rows(separator: str) -> None:
    s = separator
    assert table(f'a{s}b\n"x{s}y"{s}"two\r\nlines"\n{s}""', s) == [["a", "b"], [f"x{s}y", "two\nlines"], ["", ""]]
    assert table(f'"say ""a"""{s}5" wide', s) == [['say "a"', '5" wide']]
    assert table(f"stray\rreturn{s}b", s) == [["stray\rreturn", "b"]]
    # a tab is in no text: a line that has one is a row of its own
    fault = "a quote is opened and not closed" if s == "\t" else "a quote is followed by 'x'"
    assert table(f'a{s}"open\nb{s}"x"\nc{s}d', s) == [fault, ["b", "x"], ["c", "d"]], "only its own line is lost"
    assert table(f'a{s}"open\nb{s}c', s) == ["a quote is opened and not closed", ["b", "c"]]
    assert table(f"{'x' * 300_000}{s}\"{'y' * 300_000}\"", s) == [["x" * 300_000, "y" * 300_000]]
    assert "more than 1 MB" in table(f'a{s}"{"y" * (1 << 20)}"', s)[0]


def csv_captions(folder: Path) -> Path:
    photo(folder / "cat.jpg"), photo(folder / "coffee.jpg")
    text = (
        '\ufeffimage,caption\r\ncat.jpg,"A cat, seen from close,\r\nlooks at us."\r\n'
        'coffee.jpg,"A ""plate"" of food\r\n\r\non a table"\r\ncoffee.jpg,pl\rain\r\n'
        f'coffee.jpg,"{"long " * 40_000}"\r\n'
    )
    (folder / "captions.csv").write_bytes(text.encode())
    return folder / "captions.csv"


def test_captions_in_csv_follow_rfc_4180(tmp_path: Path) -> None:
    found = read_captions(csv_captions(tmp_path))
    assert not found.broken and [len(record.captions) for record in found] == [1, 3]
    assert found.records[0].captions == ("A cat, seen from close, looks at us.",)
    assert found.records[1].captions[:2] == ('A "plate" of food on a table', "pl ain")
    items = list(open_inputs(str(tmp_path / "captions.csv")))
    captions = [caption for item in items for record in item.records["captions"] for caption in record["captions"]]
    assert captions == [caption for record in found for caption in record.captions], "a pack has what is read"


def test_tsv_follows_rfc_4180(tmp_path: Path) -> None:
    text = (
        'TEXT\tURL\na cat "quoted" here\tcat.jpg\n"quoted ""cat"" text"\tcat.jpg\n"multi\nline"\tcat.jpg\n'
        '"hello" said one\tcat.jpg\n"a cat\twith quote\tcat.jpg\n' + "w " * 70_000 + "\tcat.jpg\n"
    )
    (tmp_path / "list.tsv").write_text(text.replace("TEXT", "caption"))
    found = list(open_inputs(str(tmp_path / "list.tsv")))
    texts = [item.records["captions"][0]["captions"][0] for item in found if not isinstance(item, Fault)]
    assert texts[:4] == ['a cat "quoted" here', 'quoted "cat" text', "multi line", '"hello" said one']
    assert len(texts) == 5 and len(texts[4]) > 128_000
    faults = [item for item in found if isinstance(item, Fault)]
    assert [fault.code for fault in faults] == ["broken_entry"] and faults[0].name.endswith(":7")


def test_tsv_is_read_as_it_is_packed(tmp_path: Path) -> None:
    photo(tmp_path / "cat.jpg")
    text = 'image\tcaption\ncat.jpg\t"two\nlines"\ncat.jpg\tpl\rain\nhttp://x/y.jpg\tfar\ncat.jpg\n'
    (tmp_path / "list.tsv").write_bytes(text.encode())
    found = read_captions(tmp_path / "list.tsv")
    assert [record.captions for record in found] == [("two lines", "pl ain")]
    assert ["address" in found.broken[0].message, "two columns, got 1" in found.broken[1].message] == [True, True]
    packed = [item for item in open_inputs(str(tmp_path / "list.tsv")) if not isinstance(item, Fault)]
    assert [item.records["captions"][0]["captions"] for item in packed] == [("two lines",), ("pl ain",), ("far",)]


# -- shards of others ------------------------------------------------------------------------------------------------


def jpeg() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 6)).save(stream, "JPEG")
    return stream.getvalue()


def tar(folder: Path, *names: str) -> str:
    folder.mkdir(exist_ok=True)
    with tarfile.open(folder / "00000.tar", "w") as out:
        for number, name in enumerate(names):
            data = jpeg() if name.endswith("jpg") else f"text {number}".encode()
            if name.endswith("json"):
                data = json.dumps({"caption": f"text {number}"}).encode()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))
    return str(folder)


def outcome(path: str) -> list[tuple[str, str]]:
    """(name, caption) of what is packed, (name, code) of what isn't."""
    found = list(open_inputs(path))
    return [
        (item.name, item.code if isinstance(item, Fault) else item.records["captions"][0]["captions"][0])
        for item in found
    ]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["b.input.jpg", "b.output.txt"], [("00000/b", "text 1")]),
        (["h.v1.2.jpg", "h.v1.2.txt"], [("00000/h", "text 1")]),
        (["h.a.jpg", "h.a.txt", "h.b.jpg", "h.b.txt"], [("00000/h.a", "text 1"), ("00000/h.b", "text 3")]),
        (["h.a.jpg", "h.b.jpg", "h.b.txt"], [("00000/h.a", "missing_caption"), ("00000/h.b", "text 2")]),
        (["x.jpg", "x.txt", "x.jpg", "x.txt"], [("00000/x", "text 1"), ("00000/x (2)", "text 3")]),
        (["x.jpg", "x.jpg", "x.txt", "x.txt"], [("00000/x", "text 2"), ("00000/x (2)", "text 3")]),
        (["x.jpg", "x.json", "x.jpg"], [("00000/x", "text 1"), ("00000/x (2)", "missing_caption")]),
        (["x.jpg", "x.txt", "x.txt"], [("00000/x", "text 1"), ("00000/x.txt", "missing_image")]),
        (["d.webm", "e.jpg", "e.txt"], [("00000/d", "missing_image"), ("00000/e", "text 2")]),
        (["a.b/c.jpg", "a.b/c.txt"], [("00000/a.b/c", "text 1")]),
    ],
)
def test_keys_with_dots_and_keys_that_come_twice(
    tmp_path: Path, names: list[str], expected: list[tuple[str, str]]
) -> None:
    assert outcome(tar(tmp_path / "tars", *names)) == expected


def test_files_of_a_folder_follow_the_same_rule(tmp_path: Path) -> None:
    folder = tmp_path / "shards/00000"
    photo(folder / "b.input.jpg")
    (folder / "b.output.txt").write_text("hello")
    photo(folder / "c.jpg")
    assert outcome(str(tmp_path / "shards")) == [("00000/b", "hello"), ("00000/c", "missing_caption")]


def test_a_folder_whose_name_is_no_unicode(tmp_path: Path) -> None:
    try:
        folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
        photo(folder / "1.jpg")
    except OSError:
        pytest.skip("this file system has no such names")
    (folder / "captions.jsonl").write_text('{"image": "1.jpg", "caption": "a cat"}\n')
    assert len(read_captions(folder)) == 1
    assert len(pack(PackOptions(str(folder)), tmp_path / "out").index.shards) == 1


# -- boxes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", ON_ITS_SIDE)
def test_boxes_turn_as_the_picture_does(tmp_path: Path, orientation: int) -> None:
    stored = Image.new("RGB", (80, 40), "black")
    stored.paste("white", (8, 4, 24, 16))
    exif = stored.getexif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "1.png", exif=exif)
    from PIL import ImageOps

    shown = ImageOps.exif_transpose(Image.open(tmp_path / "1.png")).convert("L")
    box = turned((8 / 80, 4 / 40, 24 / 80, 16 / 40), orientation)
    assert tuple(round(v * side) for v, side in zip(box, shown.size * 2, strict=True)) == shown.getbbox()
    assert turned(box, ON_ITS_SIDE[orientation]) == pytest.approx((0.1, 0.1, 0.3, 0.4))


def boxes_of(folder: Path, layout: str, size: tuple[int, int], orientation: int | None = 6) -> Path:
    """Data in one of the layouts, with the ``size`` that they state of a file of 8 x 6 pixels on its side."""
    width, height = size
    photo(folder / "images/1.jpg", (80, 60), orientation)
    if layout == "coco_boxes":
        return write(folder / "instances_x.json", {
            "images": [{"id": 1, "file_name": "1.jpg", "width": width, "height": height}],
            "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [8, 6, 8, 12]}],
            "categories": [{"id": 1, "name": "it"}],
        })  # fmt: skip
    if layout == "entities":
        (folder / "Sentences").mkdir()
        (folder / "Sentences/1.txt").write_text("[/EN#7/other/x It] .\n")
        (folder / "Annotations").mkdir()
        (folder / "Annotations/1.xml").write_text(
            f"<a><size><width>{width}</width><height>{height}</height></size><object><name>7</name><bndbox><xmin>8"
            "</xmin><ymin>6</ymin><xmax>16</xmax><ymax>18</ymax></bndbox></object></a>"
        )
        return folder
    if layout == "refcoco":
        write(folder / "instances.json", {
            "images": [{"id": 1, "file_name": "1.jpg", "width": width, "height": height}],
            "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [8, 6, 8, 12]}],
        })  # fmt: skip
        sentence = {"sent": "it", "sent_id": 1}
        return write(
            folder / "refs(unc).json", [{"image_id": 1, "ann_id": 1, "split": "val", "sentences": [sentence]}]
        )
    line = {"image": "images/1.jpg", "phrase": "it", "box": [8, 6, 16, 18], "size": [width, height]}
    (folder / "phrases.jsonl").write_text(json.dumps(line) + "\n")
    return folder / "phrases.jsonl"


@pytest.mark.parametrize("layout", ["coco_boxes", "entities", "refcoco", "jsonl"])
def test_boxes_on_the_file_as_it_is_stored(tmp_path: Path, layout: str) -> None:
    source = boxes_of(tmp_path, layout, (80, 60))
    (record,) = read_phrases(source)
    fixed = upright(record, picture_shape(record.image))
    assert fixed.size == (60, 80)
    assert fixed.box == pytest.approx(turned((0.1, 0.1, 0.2, 0.3), 6))
    report = pack(PackOptions(str(source), tasks=("grounding",)), tmp_path / "out")
    (packed,) = Pack(LocalFolder(report.folder)).records("phrases")
    assert packed.box == pytest.approx(fixed.box) and tuple(packed.size) == (60, 80)


@pytest.mark.parametrize("layout", ["coco_boxes", "entities", "refcoco", "jsonl"])
def test_boxes_of_another_picture_are_counted_and_named(tmp_path: Path, layout: str) -> None:
    source = boxes_of(tmp_path, layout, (200, 60))
    (record,) = read_phrases(source)
    with pytest.raises(DataError, match="on a picture of 200 x 60 pixels, and the picture has 60 x 80"):
        upright(record, picture_shape(record.image))
    with pytest.raises(DataError, match="other_picture"):
        pack(PackOptions(str(source), tasks=("grounding",)), tmp_path / "out")
    assert "200 x 60" in (tmp_path / "out" / LEFT_OUT).read_text()


def test_sizes_that_are_the_pictures() -> None:
    assert turn_of((60, 80), ((60, 80), 6)) == 1, "drawn on the picture as it is shown"
    assert turn_of((120, 160), ((60, 80), 1)) == 1 and turn_of((500, 375), ((640, 481), 1)) == 1, "scaled"
    assert turn_of((80, 60), ((60, 80), 8)) == 8
    assert turn_of(None, ((60, 80), 8)) == 1 and turn_of((1, 2), None) == 1
    with pytest.raises(DataError):
        turn_of((80, 60), ((60, 80), 1))


def on_its_side(folder: Path, orientation: int | None) -> None:
    """Two phrases on one photo of 80 x 60 pixels: as its file is stored, and of another picture."""
    photo(folder / "1.jpg", (80, 60), orientation)
    sizes = [[80, 60], [200, 60]]
    lines = [{"image": "1.jpg", "phrase": f"thing {k}", "box": [8, 6, 16, 18], "size": s} for k, s in enumerate(sizes)]
    (folder / "phrases.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize("orientation", [6, 8])
def test_training_turns_boxes_and_counts_those_of_others(tmp_path: Path, orientation: int) -> None:
    on_its_side(tmp_path, orientation)
    drawn: list[Any] = []

    def encode(records: list[Any], rng: random.Random) -> dict[str, torch.Tensor]:
        drawn.extend(record for _, record in records)
        return {"image": torch.tensor([rows[0] for rows, _ in records])}

    section = SourceSection(path="x", tasks={"grounding": 2}, batch_size=1, augment="none")
    records = {"grounding": read_phrases(tmp_path / "phrases.jsonl").records}
    source = Source("boxes", section, records, VisionSection(image_size=32), {"grounding": encode})
    assert len(source.targets(0)) == 1
    batch = source.draw(0, 0)
    assert [record.phrase for record in drawn] == ["thing 0"]
    assert drawn[0].box == pytest.approx(turned((0.1, 0.1, 0.2, 0.3), orientation))
    assert len(batch.bad) == 1 and "other_picture: thing 1" in batch.bad[0]
    assert source.draw(0, 1).bad == [], "what is left out is told once"


@pytest.mark.parametrize("orientation", [6, 8])
def test_evaluation_turns_boxes_and_counts_those_of_others(
    tmp_path: Path, orientation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_its_side(tmp_path, orientation)
    found = read_phrases(tmp_path / "phrases.jsonl")
    shown = turned(found.records[0].box, orientation)
    ready = SimpleNamespace(
        config=SimpleNamespace(vision=VisionSection(image_size=32)), device="cpu", dtype=torch.float32,
        model=SimpleNamespace(encode_image=lambda pixels: pixels), unknown_share=lambda text: 0.0,
    )  # fmt: skip

    def find(ready: Any, images: Any, rows: Any, phrases: list[str], draws: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tensor([shown for _ in phrases]), torch.ones(len(phrases))

    monkeypatch.setattr(grounding, "find_boxes", find)
    result = grounding.GroundingTask().evaluate(ready, DataSpec(path=str(tmp_path / "phrases.jsonl")))
    assert (result.n, result.skipped) == (1, 1) and result.metrics["accuracy_iou50"] == 1
    assert result.predictions[0]["box"] == result.predictions[0]["truth"] == [8, 6, 16, 18], "as the file has them"
    assert "1 box is of another picture" in result.notes[-1] and "200 x 60" in result.notes[-1]


# -- files that take no end --------------------------------------------------------------------------------------------


def test_standard_input_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photo(tmp_path / "1.jpg")
    monkeypatch.chdir(tmp_path)
    lines = b'{"image": "1.jpg", "caption": "a cat"}\n{"image": 3}\n'
    for data in (lines, gzip.compress(lines)):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
        found = read_captions("-")
        assert [record.captions for record in found] == [("a cat",)] and "-:2" in found.broken[0].message
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(DataError, match="nothing is sent"):
        read_captions("-")


def test_zipped_lines_that_grow_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mplug_core.data.records.files.SMALL", 1 << 20)
    line = b'{"image": "1.jpg", "caption": "a cat"}\n'
    with gzip.open(tmp_path / "captions.jsonl.gz", "wb") as out:
        out.write(line + b"\n" * (3 << 20))
    photo(tmp_path / "1.jpg")
    found = read_captions(tmp_path / "captions.jsonl.gz")
    assert len(found) == 1 and "100 times its size" in found.broken[0].message
    with gzip.open(tmp_path / "list.json.gz", "wb") as out:
        out.write(b"[" + b" " * (3 << 20) + b"]")
    with pytest.raises(DataError, match="to be read at once"):
        read_captions(tmp_path / "list.json.gz")


def test_a_line_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mplug_core.data.records.files.MAX_LINE", 1 << 10)
    photo(tmp_path / "1.jpg")
    (tmp_path / "captions.jsonl").write_bytes(b'{"image": "1.jpg", "caption": "a"}\n' + b"x" * 5000)
    found = read_captions(tmp_path / "captions.jsonl")
    assert len(found) == 1 and "a line of more than" in found.broken[0].message


def test_a_pipe_is_no_data(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "captions.jsonl")
    with pytest.raises(DataError):
        read_captions(tmp_path / "captions.jsonl")
    with pytest.raises(DataError):
        _ = File(tmp_path / "captions.jsonl").head


def test_marks_without_an_end_are_read_at_once() -> None:
    from mplug_core.data.records.entities import phrases, plain

    line = "[/EN#1" + "/a" * 20_000
    assert phrases(line) == [] and plain(line) == line
    assert phrases("[/EN#1/people/x A man] on [/EN#0/notvisual it]") == [("1", "A man")]


@pytest.mark.parametrize("named", ["annotations", "images"])
def test_a_document_may_be_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str) -> None:
    """As COCO's files are, of up to hundreds of megabytes; what begins with their long tables, too."""
    monkeypatch.setattr("mplug_core.data.records.files.MAX_LINE", 1 << 10)
    images = [{"id": k, "file_name": f"{k:012d}.jpg"} for k in range(3000)]
    captions = [{"id": k, "image_id": k, "caption": f"photo {k}"} for k in range(3000)]
    tables = {"images": images, "annotations": captions}
    file = tmp_path / "captions_val2017.json"
    file.write_text(json.dumps({named: tables.pop(named)} | tables))
    assert file.stat().st_size > 1 << 17 and "\n" not in file.read_text()
    for image in images:
        (tmp_path / image["file_name"]).touch()
    found = read_captions(file)
    assert len(found) == 3000 and not found.broken


def test_quotes_of_those_who_are_quoted_in_a_tsv() -> None:
    """A quote that no line of its own closes takes no other line with it."""
    rows = ['a.jpg\t"Best day ever', "b.jpg\ta cat", "c.jpg\ta dog", 'd.jpg\tmonitor of 24"']
    pairs = list(image_pairs((str(k), line) for k, line in enumerate(rows)))
    assert [(pair.image, pair.caption) for pair in pairs] == [tuple(row.split("\t")) for row in rows]
