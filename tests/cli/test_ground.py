"""``mplug ground``: boxes in pixels of the upright picture, lines and drawings of them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from PIL import Image

from mplug_cli.drawing import draw_boxes
from mplug_core.model.mplug import MplugModel

PHRASE = "the red ball"


@pytest.fixture(autouse=True)
def _model(able_folder):
    """All of these need a model with box tokens."""


@pytest.fixture
def boxes(monkeypatch):
    """Plants answers: ``boxes[phrase]`` as shares of the model's square, by default the middle of it."""
    planted: dict[str, tuple[float, ...]] = {}

    def find_boxes(ready, images, rows, phrases):
        assert len(rows) == len(phrases) and max(rows) < len(images)
        found = [planted.get(phrase, (0.25, 0.25, 0.75, 0.75)) for phrase in phrases]
        return torch.tensor(found), torch.full((len(phrases),), 0.5)

    monkeypatch.setattr("mplug_core.tasks.grounding.find_boxes", find_boxes)
    return planted


def test_one_phrase_is_four_numbers(mplug, photo):
    done = mplug("ground", photo, PHRASE)
    (line,) = done.lines
    x0, y0, x1, y1 = map(float, line.split())
    assert (done.code, done.err) == (0, "") and 0 <= x0 <= x1 <= 40 and 0 <= y0 <= y1 <= 30


def test_pixels(mplug, photo, boxes):
    boxes[PHRASE] = (0.1, 0.25, 0.5, 1.0)
    assert mplug("ground", photo, PHRASE).lines == ["4 7.5 20 30"]
    (found,) = mplug("ground", photo, PHRASE, "--json").objects
    assert found == {"image": str(photo), "phrase": PHRASE, "box": [4.0, 7.5, 20.0, 30.0], "confidence": 0.5}


def test_pixels_are_those_of_the_upright_picture_in_its_full_size(mplug, tmp_path, boxes):
    """A camera's photo: stored on its side, and so large that it is decoded at a quarter."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.effect_noise((1001, 600), 60).convert("RGB").save(tmp_path / "turned.jpg", exif=exif)
    boxes[PHRASE] = (0.5, 0.5, 1.0, 1.0)
    assert mplug("ground", tmp_path / "turned.jpg", PHRASE).lines == ["300 500.5 600 1001"]


def test_pixels_of_a_padded_picture(mplug, make_photo, tmp_path, boxes):
    """A model that pads: the wide picture takes the middle half of the square."""
    from mplug_core.recipe import CLASSES
    from tests.cli.conftest import save_random

    classifiers = {name: {"images": images, "labels": labels} for name, (images, labels) in CLASSES.items()}
    folder = save_random(tmp_path / "m", box_bins=16, classifiers=classifiers)
    config = json.loads((folder / "config.json").read_text())
    config["vision"]["fit"] = "pad"
    (folder / "config.json").write_text(json.dumps(config))
    boxes[PHRASE] = (0.0, 0.25, 0.5, 0.5)
    assert mplug("ground", make_photo("wide.png", (64, 32)), PHRASE, "--model", folder).lines == ["0 0 32 16"]


def test_several_phrases_are_a_line_each_on_one_encoding(mplug, photo, boxes, monkeypatch):
    counts: list[int] = []
    encode = MplugModel.encode_image
    monkeypatch.setattr(MplugModel, "encode_image", lambda self, x: counts.append(len(x)) or encode(self, x))
    boxes |= {"a": (0, 0, 0.5, 0.5), "two dogs": (0, 0, 1, 1)}
    assert mplug("ground", photo, "a", "two dogs", "--batch-size", "1").lines == ["0 0 20 15 a", "0 0 40 30 two dogs"]
    assert counts == [1]


def test_several_images(mplug, make_photo, tmp_path):
    photos = [make_photo("in/b.png"), make_photo("in/a.jpg")]
    done = mplug("ground", *photos, "-p", "a dog", "-p", "the table")
    assert done.code == 0
    assert [(f["image"], f["phrase"]) for f in done.objects] == [
        (str(path), phrase) for path in photos for phrase in ("a dog", "the table")
    ]
    assert all(list(f) == ["image", "phrase", "box", "confidence"] for f in done.objects)
    assert [Path(f["image"]).name for f in mplug("ground", tmp_path / "in", "a dog").objects] == ["a.jpg", "b.png"]


def test_json_lines_and_paths_on_stdin(mplug, make_photo):
    photos = [make_photo("b.png"), make_photo("a.jpg")]
    lines = "".join(json.dumps({"image": str(path), "phrase": "a dog"}) + "\n" for path in [*photos, "none.png"])
    done = mplug("ground", stdin=lines.encode())
    assert done.code == 4 and [list(f)[2] for f in done.objects] == ["box", "box", "error"]
    paths = "".join(f"{path}\n" for path in photos).encode()
    assert mplug("ground", "-p", "a dog", stdin=paths).objects == done.objects[:2]


def test_a_broken_image(mplug, photo, tmp_path):
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(photo.read_bytes()[:200])
    done = mplug("ground", bad, "a dog", "the table")
    assert (done.code, done.out) == (1, "") and "bad.jpg" in done.error
    done = mplug("ground", bad, photo, "-p", "a dog", "-q")
    assert done.code == 4 and [list(f)[2] for f in done.objects] == ["error", "box"] and done.err == ""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["photo.jpg"], "no phrase"),
        (["a dog"], "no image"),
        (["photo.jpg", "photo.jpg", "a dog"], "-p PHRASE"),
        (["photo.jpg", ""], "empty"),
        (["photo.jpg", "a dog", "?!"], "no word"),
        ([], "nothing is asked"),
        (["-p", "a dog"], "no images"),
        (["photo.jpg", "photo.jpg", "-p", "a dog", "--draw", "x.png"], "one image"),
        (["photo.jpg", "a dog", "--draw", "photo.jpg"], "the image itself"),
        (["photo.jpg", "a dog", "--draw", "link.jpg"], "the image itself"),
        (["photo.jpg", "a dog", "--draw", "x"], "image format"),
        (["photo.jpg", "a dog", "--draw", "x.txt"], "image format"),
    ],
)
def test_usage_errors(mplug, photo, monkeypatch, arguments, words):
    monkeypatch.chdir(photo.parent)
    os.symlink(photo, "link.jpg")
    before = photo.read_bytes()
    done = mplug("ground", *arguments)
    assert (done.code, done.out) == (2, "") and words in done.error
    assert photo.read_bytes() == before


@pytest.mark.parametrize("place", ["no/such/folder/out.png", "photo.jpg/out.png", "folder.png"])
def test_a_drawing_that_can_not_be_written_is_one_error_before_anything_is_computed(mplug, photo, monkeypatch, place):
    monkeypatch.chdir(photo.parent)
    Path("folder.png").mkdir()
    monkeypatch.setattr("mplug_cli.ground.load", lambda *args: pytest.fail("a model was read"))
    done = mplug("ground", photo, PHRASE, "--draw", place)
    assert (done.code, done.out) == (1, "") and place in done.error and "can't be written" in done.error


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".JPEG", ".webp", ".gif"])
def test_drawing(mplug, tmp_path, boxes, suffix):
    photo = tmp_path / "photo.png"
    Image.new("RGB", (400, 300), "white").save(photo)
    out = tmp_path / f"out{suffix}"
    out.write_bytes(b"old")
    done = mplug("ground", photo, PHRASE, "--draw", out)
    assert (done.code, done.err, done.lines) == (0, "", ["100 75 300 225"])
    drawn = Image.open(out).convert("RGB")
    assert drawn.size == (400, 300)
    assert drawn.getpixel((200, 150)) == drawn.getpixel((399, 299)) == (255, 255, 255)
    # all four sides of the box
    for place in ((100, 150), (300, 150), (200, 75), (200, 225)):
        assert min(drawn.getpixel(place)) < 128, place
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["photo.png", out.name])


def test_a_drawing_is_of_the_upright_picture(mplug, tmp_path, boxes):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.effect_noise((1000, 600), 60).convert("RGB").save(tmp_path / "turned.jpg", exif=exif)
    assert mplug("ground", tmp_path / "turned.jpg", PHRASE, "--draw", tmp_path / "out.png").code == 0
    assert Image.open(tmp_path / "out.png").size == (600, 1000)


def test_no_drawing_of_a_broken_image(mplug, tmp_path):
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    done = mplug("ground", tmp_path / "bad.jpg", PHRASE, "--draw", tmp_path / "out.png")
    assert done.code == 1 and [path.name for path in tmp_path.iterdir()] == ["bad.jpg"]


@pytest.mark.parametrize("size", [(1, 1), (3, 400), (5000, 20), (640, 480)])
@pytest.mark.parametrize("label", ["a", "the long one " * 1000, "图片 \u202e \x1b[31m\n"])
def test_any_picture_and_label_can_be_drawn(size, label):
    width, height = size
    picture = Image.new("RGB", size, "white")
    whole = [0.0, 0.0, float(width), float(height)]
    drawn = draw_boxes(picture, [(whole, label), ([width, height, width, height], label), ([0.0] * 4, label)])
    assert drawn.size == size and picture.getpixel((0, 0)) == (255, 255, 255) != drawn.getpixel((0, 0))


def test_lines_grow_with_the_picture():
    def dark(side: int) -> int:
        middle = [side / 4, side / 4, side * 3 / 4, side * 3 / 4]
        drawn = draw_boxes(Image.new("RGB", (side, side), "white"), [(middle, "a")])
        return sum(min(drawn.getpixel((x, side // 2))) < 128 for x in range(side // 2))

    assert dark(100) == 2 and dark(2000) == 8


def test_a_long_phrase_is_cut(mplug, photo):
    done = mplug("ground", photo, "the red ball " * 3500, "--draw", photo.parent / "out.png")
    assert (done.code, done.err, len(done.lines)) == (0, "", 1)


@pytest.mark.parametrize(("fields", "lacks"), [({}, "box tokens"), ({"decoder_layers": 0}, "decoder")])
def test_a_model_without_the_part(mplug, photo, tmp_path, fields, lacks):
    from tests.cli.conftest import save_random

    done = mplug("ground", photo, PHRASE, "--model", save_random(tmp_path / "m", **fields))
    assert done.code == 5 and f"no {lacks}" in done.error
