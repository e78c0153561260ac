"""What people's folders, lists and lines hold, in every command that takes images: one entry costs only itself."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import time
from pathlib import Path

import pytest
from PIL import Image

from mplug_cli import streams


@pytest.fixture(autouse=True)
def _model(able_folder):
    """All of these need a model, with box tokens."""


@pytest.fixture
def folder(make_photo, tmp_path) -> Path:
    """Two photos, and entries that can't be opened."""
    make_photo("in/a.jpg")
    make_photo("in/b.JFIF.png").rename(tmp_path / "in/b.jfif")
    (tmp_path / "in/loop.jpg").symlink_to("loop.jpg")
    (tmp_path / "in/gone.jpg").symlink_to("nowhere")
    os.mkfifo(tmp_path / "in/pipe.jpg")
    (tmp_path / "in/notes.txt").write_text("x")
    (tmp_path / "in/circle").symlink_to("circle")
    (tmp_path / "in/up").symlink_to("..")
    return tmp_path / "in"


@pytest.mark.parametrize(
    "command",
    [("caption",), ("vqa", "--question", "what is it?"), ("ground", "-p", "the dog"), ("retrieve", "--query", "a dog")],
    ids=lambda command: command[0],
)
@pytest.mark.parametrize("pattern", ["", "/**/*.j*"])
def test_a_folder_with_bad_entries(mplug, folder, command, pattern):
    start = time.monotonic()
    done = mplug(command[0], f"{folder}{pattern}", *command[1:], "--json")
    assert done.code == 4 and time.monotonic() - start < 20
    images = {Path(found["image"]).name: found for found in done.objects}
    assert not {"a.jpg", "b.jfif"} - {name for name, found in images.items() if "error" not in found}
    if command[0] == "retrieve":
        assert len(images) == 2 and "3 of 5 images could not be used" in done.err
    else:
        assert {name for name, found in images.items() if "error" in found} == {"loop.jpg", "gone.jpg", "pipe.jpg"}
    assert done.err.count("passed over 2 files that are not images") == (0 if pattern else 1)
    assert all(len(line) <= 300 for line in done.err.splitlines())
    assert "passed over" not in mplug(command[0], f"{folder}{pattern}", *command[1:], "--quiet").err


def test_a_folder_on_stdin_says_what_it_passed_over(mplug, folder):
    done = mplug("caption", stdin=f"{folder}\n{folder / 'a.jpg'}\n".encode())
    assert len(done.objects) == 6 and done.err.count("passed over 2 files") == 1


def test_data_inspect_of_a_folder_with_bad_entries(mplug, folder):
    (folder / "captions_train.jsonl").write_text('{"image": "a.jpg", "caption": "a cat"}\n')
    (folder / "captions_val.jsonl").symlink_to("nowhere")
    os.mkfifo(folder / "captions_val2014.json")
    (folder / "loop").symlink_to("loop")
    start = time.monotonic()
    done = mplug("data", "inspect", folder, "--json")
    assert done.code == 0 and time.monotonic() - start < 5
    (view,) = json.loads(done.out)["tasks"]
    assert [split["split"] for split in view["splits"]] == ["train"] and view["splits"][0]["usable"] == 1


def test_pack_of_folders_with_bad_entries(mplug, folder, tmp_path):
    lines = [{"image": name, "caption": name} for name in ("a.jpg", "loop.jpg", "gone.jpg", "pipe.jpg", "b.jfif")]
    (folder / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = mplug("data", "pack", folder, tmp_path / "pack", "--max-bad", "1", "--json", "-q")
    assert done.code == 0 and json.loads(done.out)["samples"] == 2
    (folder / "pairs.tsv").write_text("".join(f"{line['image']}\t{line['caption']}\n" for line in lines))
    done = mplug("data", "pack", folder / "pairs.tsv", tmp_path / "pack2", "--max-bad", "1", "--json", "-q")
    assert done.code == 0 and json.loads(done.out)["samples"] == 2
    shard = tmp_path / "tars/00000"
    shard.mkdir(parents=True)
    for name in ("a.jpg", "b.jfif", "loop.jpg", "pipe.jpg"):
        shutil.copy(folder / name, shard / name, follow_symlinks=False) if name != "pipe.jpg" else os.mkfifo(
            shard / name
        )
        (shard / name).with_suffix(".txt").write_text(name)
    os.mkfifo(shard / "a.json")
    done = mplug("data", "pack", tmp_path / "tars", tmp_path / "pack3", "--max-bad", "1", "--json", "-q")
    assert done.code == 0 and json.loads(done.out)["samples"] == 2


@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
def test_a_byte_order_mark_in_a_list(mplug, photo, newline):
    done = mplug("caption", stdin=b"\xef\xbb\xbf" + newline.join([os.fsencode(photo)] * 2) + newline)
    assert done.code == 0 and [found["image"] for found in done.objects] == [str(photo)] * 2
    wide = mplug("caption", stdin=str(photo).encode("utf-16"))
    assert wide.code == 2 and "UTF-16" in wide.error


def test_long_lines_cost_only_themselves(mplug, photo, monkeypatch):
    monkeypatch.setattr(streams, "MAX_PATH_BYTES", 1000)
    monkeypatch.setattr(streams, "MAX_LINE_BYTES", 2000)
    done = mplug("caption", stdin=b"x" * 3000 + b"\n" + os.fsencode(photo) + b"\n")
    assert done.code == 4 and ["error" in found for found in done.objects] == [True, False]
    asked = json.dumps({"image": str(photo), "question": "what is it?"})
    done = mplug("vqa", stdin=(asked + '\n{"image": "' + "x" * 3000 + '"}\n' + asked + "\n").encode())
    assert done.code == 4 and ["error" in found for found in done.objects] == [False, True, False]


def test_very_long_lines_are_read_in_no_time():
    start = time.perf_counter()
    chunks = [b"x" * (1 << 16)] * 960  # 60 MB
    (found,) = streams._listed(chunks, b"\n", True)
    assert found.fault is not None and len(str(found.fault)) < 300
    ((line, whole),) = streams._split(chunks, b"\n", streams.MAX_LINE_BYTES)
    assert whole and len(line) == 960 << 16
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize("first", [b"/dev/zero", b"/dev/null"])
def test_devices_are_one_line(mplug, photo, first):
    start = time.monotonic()
    for arguments in (
        ("caption", first.decode()),
        ("retrieve", photo, first.decode()),
        ("retrieve", "a dog", first.decode()),
    ):
        done = mplug(*arguments, "-q")
        assert done.code in (1, 3, 4) and "device" in done.err
    assert mplug("vqa", photo, "what?", "--answers", first.decode()).code == 3
    assert time.monotonic() - start < 20


def test_a_data_url_in_a_line(mplug, photo):
    url = "data:image/jpeg;base64," + base64.b64encode(photo.read_bytes()).decode()
    done = mplug("vqa", stdin=json.dumps({"image": url, "question": "what is it?"}).encode())
    assert done.code == 0 and done.objects[0]["image"].startswith("data:image/jpeg;base64 (")
    assert mplug("caption", url).out == mplug("caption", photo).out
    done = mplug("caption", "data:image/png;base64,!!!")
    assert done.code == 1 and "damaged base64" in done.error


def test_malformed_addresses_are_one_line(mplug):
    for address in ("HTTP://[::1", "http://u:se/cret@h/x.jpg"):
        done = mplug("caption", address)
        assert done.code == 1 and "cret" not in done.error
        done = mplug("eval", "--task", "caption", "--data", address)
        assert done.code == 2 and "cret" not in done.error
        done = mplug("data", "inspect", address)
        assert done.code == 2 and "cret" not in done.error
        done = mplug("model", "pull", address)
        assert done.code == 5 and "cret" not in done.error


@pytest.mark.parametrize("name", ["BMW.jpg", "RIFFS.jpg", "BM/one.jpg"])
def test_paths_that_begin_like_images(mplug, photo, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Path(name).parent.mkdir(exist_ok=True)
    shutil.copy(photo, name)
    done = mplug("caption", stdin=f"{name}\n".encode())
    assert done.code == 0 and [found["image"] for found in done.objects] == [name]


@pytest.mark.parametrize("kind", ["BMP", "WEBP", "GIF", "TIFF", "PNG", "JPEG"])
def test_an_image_where_paths_are_expected(mplug, kind):
    stream = io.BytesIO()
    Image.new("RGB", (90, 90), "red").save(stream, kind)
    done = mplug("caption", stdin=stream.getvalue())
    assert done.code == 2 and "holds an image" in done.error
