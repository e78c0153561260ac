"""Bad input of ``mplug caption``.

Among others: an object with the error, the others answered, code 4. A single one: one line on stderr, code 1.
"""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image


@pytest.fixture(autouse=True)
def _model(model_folder):
    """All of these need a model."""


def png_header(width: int, height: int) -> bytes:
    """A PNG that says it has this size, and has no pixels."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(b"\0" * 100)
    chunks = (struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (head, data, b"IEND"))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def truncated_photo() -> bytes:
    import io

    file = io.BytesIO()
    Image.effect_noise((200, 200), 60).save(file, "JPEG")
    return file.getvalue()[:3000]


BAD = {
    "missing.jpg": (None, "missing"),
    "empty.jpg": (b"", "empty"),
    "truncated.jpg": (truncated_photo(), "broken"),
    "page.jpg": (b"<!DOCTYPE html><html><body>404</body></html>", "not_an_image"),
    "text.png": (b"hello\n" * 100, "not_an_image"),
    "bomb.png": (png_header(30_000, 30_000), "too_large"),
    "no pixels ünï.png": (png_header(100, 100)[:40], "broken"),
}


def write_bad(folder: Path, name: str) -> Path:
    content = BAD[name][0]
    if content is not None:
        (folder / name).write_bytes(content)
    return folder / name


@pytest.mark.parametrize("name", BAD)
def test_alone_it_is_one_line_and_code_1(mplug, tmp_path, name):
    path = write_bad(tmp_path, name)
    done = mplug("caption", path)
    assert (done.code, done.out) == (1, "")
    assert name in done.error


@pytest.mark.parametrize("name", BAD)
def test_alone_with_json_it_is_an_object_and_code_1(mplug, tmp_path, name):
    path = write_bad(tmp_path, name)
    done = mplug("caption", path, "--json")
    (found,) = done.objects
    assert (done.code, done.err, found["image"], found["error"]["code"]) == (1, "", str(path), BAD[name][1])


@pytest.mark.parametrize("batch_size", [1, 16])
def test_among_others_the_run_goes_on_and_ends_with_code_4(mplug, make_photo, tmp_path, batch_size):
    good = [make_photo("good 1.jpg"), make_photo("thin.png", size=(1, 5000)), make_photo("good 2.jpg")]
    bad = [write_bad(tmp_path, name) for name in BAD]
    paths = [good[0], *bad[:3], good[1], *bad[3:], good[2]]
    done = mplug("caption", *paths, "--batch-size", batch_size)
    assert done.code == 4
    found = {line["image"]: line for line in done.objects}
    assert list(found) == [str(path) for path in paths]
    assert all(found[str(path)]["caption"] for path in good)
    for path in bad:
        error = found[str(path)]["error"]
        assert error["code"] == BAD[path.name][1] and path.name in error["message"] and "\n" not in error["message"]
    assert done.err == f"note: {len(bad)} of the images could not be read: see their error in the results\n"
    assert mplug("caption", *paths, "-q").err == ""


def test_all_bad_is_code_4(mplug, tmp_path):
    done = mplug("caption", tmp_path / "a.jpg", tmp_path / "b.jpg", "-q")
    assert (done.code, done.err, len(done.objects)) == (4, "", 2)


def test_a_thin_image_is_answered(mplug, make_photo):
    assert mplug("caption", make_photo("thin.png", size=(1, 5000))).code == 0


def test_bad_bytes_on_stdin(mplug):
    done = mplug("caption", "-", stdin=b"<html>")
    assert done.code == 1 and "the image on standard input is an HTML page" in done.error
    done = mplug("caption", "-")
    assert done.code == 1 and "standard input is empty" in done.error


def test_bad_paths_on_stdin(mplug, photo):
    done = mplug("caption", stdin=f"none.jpg\n{photo}\n".encode())
    assert done.code == 4
    assert [list(found) for found in done.objects] == [["image", "error"], ["image", "caption", "score", "confidence"]]


@pytest.mark.parametrize(("stdin", "words"), [(b"", "no images"), (b"\n \n", "no images"), (b"a\0b", "--null")])
def test_no_paths_on_stdin(mplug, stdin, words):
    done = mplug("caption", stdin=stdin)
    assert (done.code, done.out) == (2, "") and words in done.error


def test_an_image_where_paths_are_expected(mplug, photo):
    done = mplug("caption", stdin=photo.read_bytes())
    assert done.code == 2 and "mplug caption -" in done.error


def test_stdin_twice(mplug):
    assert mplug("caption", "-", "-").code == 2


def test_a_folder_without_images(mplug, make_photo, tmp_path):
    make_photo("in/deep/a.jpg")
    done = mplug("caption", tmp_path / "in")
    assert done.code == 1 and "has no images" in done.error and "**" in done.error
    done = mplug("caption", tmp_path / "in", make_photo("b.jpg"))
    assert done.code == 4
    assert [list(found)[1] for found in done.objects] == ["error", "caption"]


def test_a_pattern_without_matches(mplug, tmp_path):
    done = mplug("caption", tmp_path / "*.jpg")
    assert done.code == 1 and "no image matches" in done.error


def test_an_unreadable_file(mplug, photo):
    if os.geteuid() == 0:
        pytest.skip("root reads everything")
    photo.chmod(0)
    done = mplug("caption", photo)
    assert done.code == 1 and "permission" in done.error.lower()


def test_a_device_is_no_image(mplug):
    done = mplug("caption", "/dev/null")
    assert done.code == 1 and done.error
