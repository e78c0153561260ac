"""``mplug retrieve``: which way it looks, what comes out, what is kept."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mplug_core.errors import DataError


@pytest.fixture(autouse=True)
def _model(model_folder, monkeypatch, tmp_path):
    """All of these need a model, and a cache of their own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def photos(make_photo) -> Path:
    for name in ("in/a.jpg", "in/b.png", "in/c.jpg", "in/.hidden.jpg"):
        folder = make_photo(name).parent
    return folder


@pytest.fixture
def captions(tmp_path) -> Path:
    file = tmp_path / "captions.txt"
    file.write_text("a red ball\ntwo dogs run\non the grass\n")
    return file


def rows(done) -> list[tuple[float, str]]:
    return [(float(score), name) for score, name in (line.split("\t") for line in done.lines)]


def test_images_for_a_text(mplug, photos):
    done = mplug("retrieve", "a red ball", photos)
    assert (done.code, done.err) == (0, "")
    assert sorted(name for _, name in rows(done)) == [str(photos / name) for name in ("a.jpg", "b.png", "c.jpg")]
    scores = [score for score, _ in rows(done)]
    assert scores == sorted(scores, reverse=True)


def test_json(mplug, photos):
    plain = rows(mplug("retrieve", "a red ball", photos))
    found = mplug("retrieve", "a red ball", photos, "--json").objects
    assert [line["rank"] for line in found] == [1, 2, 3]
    assert [(line["score"], line["image"]) for line in found] == plain
    assert all(line["query"] == "a red ball" for line in found)
    # re-ranked by matching by default: this model is not the embedded one
    assert all(line["match"] == line["score"] and -1 <= line["similarity"] <= 1 for line in found)


def test_by_contrast_alone_and_with_both(mplug, photos):
    (*alone,) = mplug("retrieve", "a red ball", photos, "--json", "--candidates", "0").objects
    assert all("match" not in line and -1 <= line["score"] <= 1 for line in alone)
    both = mplug("retrieve", "a red ball", photos, "--json", "--rerank", "itm+itc").objects
    known = {line["image"]: line["score"] for line in alone}
    for line in both:
        assert line["similarity"] == pytest.approx(known[line["image"]], abs=2e-3)
        assert line["score"] == pytest.approx(line["match"] + line["similarity"], abs=2e-4)


def test_top(mplug, photos):
    every = mplug("retrieve", "two dogs", photos).lines
    assert mplug("retrieve", "two dogs", photos, "--top", "2").lines == every[:2]
    assert mplug("retrieve", "two dogs", photos, "--top", "2", "--batch-size", "1").lines == every[:2]


def test_files_and_patterns_and_paths_on_stdin(mplug, photos, monkeypatch):
    every = mplug("retrieve", "two dogs", photos).lines
    assert mplug("retrieve", "two dogs", photos / "*.jpg", photos / "b.png").lines == every
    listed = "".join(f"{photos / name}\n" for name in ("a.jpg", "b.png", "c.jpg"))
    assert mplug("retrieve", "two dogs", stdin=listed.encode()).lines == every
    monkeypatch.chdir(photos)
    assert [name for _, name in rows(mplug("retrieve", "two dogs", "b.png"))] == ["b.png"]


def test_an_image_on_stdin_among_others(mplug, photos):
    done = mplug("retrieve", "two dogs", "-", photos / "b.png", stdin=(photos / "a.jpg").read_bytes())
    assert done.code == 0 and sorted(name for _, name in rows(done)) == ["-", str(photos / "b.png")]


def test_several_queries_give_json_lines(mplug, photos):
    done = mplug("retrieve", "--query", "a red ball", "--query", "two dogs", photos, "--top", "1")
    assert [(line["query"], line["rank"]) for line in done.objects] == [("a red ball", 1), ("two dogs", 1)]
    # one gives plain lines, as without the option
    one = mplug("retrieve", "--query", "two dogs", photos)
    assert one.lines == mplug("retrieve", "two dogs", photos).lines


def test_a_text_that_is_also_a_file(mplug, photos, monkeypatch):
    """The file is meant, unless --query says text."""
    monkeypatch.chdir(photos)
    os.rename("a.jpg", "dogs")
    done = mplug("retrieve", "dogs", "b.png")
    assert done.code == 3 and "b.png is not UTF-8 text" in done.error
    assert mplug("retrieve", "--query", "dogs", "b.png").code == 0


def test_captions_for_an_image(mplug, photos, captions):
    done = mplug("retrieve", photos / "a.jpg", captions)
    assert (done.code, done.err) == (0, "")
    assert sorted(text for _, text in rows(done)) == ["a red ball", "on the grass", "two dogs run"]
    found = mplug("retrieve", photos / "a.jpg", captions, "--json", "--top", "2").objects
    assert [(line["score"], line["text"]) for line in found] == rows(done)[:2]
    assert [line["line"] for line in found] == [
        captions.read_text().splitlines().index(line["text"]) + 1 for line in found
    ]
    assert found[0]["query"] == str(photos / "a.jpg")


def test_captions_on_stdin_and_image_on_stdin(mplug, photos, captions):
    expected = mplug("retrieve", photos / "a.jpg", captions).lines
    assert mplug("retrieve", photos / "a.jpg", "-", stdin=captions.read_bytes()).lines == expected
    assert mplug("retrieve", "-", captions, stdin=(photos / "a.jpg").read_bytes()).lines == expected


def test_line_ends_blanks_and_marks(mplug, photos, captions):
    captions.write_bytes("\ufeffa red ball\r\n\r\n  two dogs run \r!!!\non the\x0cgrass".encode())
    found = mplug("retrieve", photos / "a.jpg", captions, "--json").objects
    assert sorted((line["line"], line["text"]) for line in found) == [
        (1, "a red ball"), (3, "two dogs run"), (5, "on the\x0cgrass"),
    ]  # fmt: skip


def test_a_caption_of_ten_thousand_words(mplug, photos, captions):
    captions.write_text("a red ball " * 10_000 + "\ntwo dogs")
    done = mplug("retrieve", photos / "a.jpg", captions)
    assert (done.code, len(done.lines)) == (0, 2)
    assert mplug("retrieve", "a red ball " * 10_000, photos, "--candidates", "0").code == 0


@pytest.mark.parametrize(
    ("data", "words"),
    [(b"", "no captions"), (b" \r\n\t\n", "no captions"), (b"...\n!", "no captions"), (b"\xff\xfe\x00", "UTF-8")],
)
def test_captions_that_are_none(mplug, photos, captions, data, words):
    captions.write_bytes(data)
    for done in (
        mplug("retrieve", photos / "a.jpg", captions),
        mplug("retrieve", photos / "a.jpg", "-", stdin=data),
    ):
        assert (done.code, done.out) == (DataError.exit_code, "") and words in done.error


def test_features_are_kept(mplug, photos, monkeypatch):
    from mplug_cli import streams

    opened = []
    real = streams.open_input
    monkeypatch.setattr(
        "mplug_cli.answering.open_input", lambda item, *rest: opened.append(item.name) or real(item, *rest)
    )
    contrast = ("retrieve", "two dogs", photos, "--candidates", "0")
    first = mplug(*contrast).lines
    assert len(opened) == 3 and len(list((photos / ".mplug").iterdir())) == 1
    assert mplug(*contrast).lines == first and len(opened) == 3
    assert mplug(*contrast, "--no-cache").lines == first and len(opened) == 6
    assert mplug(*contrast, "--rebuild").lines == first and len(opened) == 9
    # the store is no image, and no image is looked for in it
    assert len(mplug("retrieve", "dogs", photos / "**" / "*", "--candidates", "0").lines) == 3


def test_nothing_is_kept_without_cache(mplug, photos, tmp_path):
    assert mplug("retrieve", "two dogs", photos, "--no-cache").code == 0
    assert not (photos / ".mplug").exists() and not (tmp_path / "cache").exists()


def test_a_damaged_store_is_noted(mplug, photos):
    first = mplug("retrieve", "two dogs", photos).lines
    (store,) = (photos / ".mplug").rglob("*.safetensors")
    store.write_bytes(b"x" * 100)
    done = mplug("retrieve", "two dogs", photos)
    assert (done.code, done.lines) == (0, first) and done.err.startswith("note: ") and "damaged" in done.err
    assert mplug("retrieve", "two dogs", photos).err == ""


def test_bad_images_are_counted(mplug, photos):
    (photos / "bad.jpg").write_bytes(b"\xff\xd8\xff nothing")
    (photos / "empty.png").write_bytes(b"")
    for _ in range(2):
        done = mplug("retrieve", "two dogs", photos)
        assert (done.code, len(done.lines), done.err.count("\n")) == (4, 3, 1)
        assert "note: 2 of 5 images" in done.err and "bad.jpg" in done.err
    assert mplug("retrieve", "two dogs", photos, "-q").err == ""


def test_no_image_at_all(mplug, photos, tmp_path):
    (tmp_path / "none").mkdir()
    done = mplug("retrieve", "two dogs", tmp_path / "none")
    assert (done.code, done.out) == (1, "") and "has no images" in done.error
    done = mplug("retrieve", "two dogs", tmp_path / "gone", tmp_path / "lost")
    assert done.code == 1 and "none of the 2 images" in done.error
    done = mplug("retrieve", photos / "gone.jpg", tmp_path / "captions.txt")
    assert done.code == 3


def test_an_image_that_cannot_be_read(mplug, photos, captions):
    done = mplug("retrieve", photos / "gone.jpg", captions)
    assert (done.code, done.out) == (1, "") and "does not exist" in done.error
    (photos / "a.jpg").write_bytes(b"x")
    assert "is not an image" in mplug("retrieve", photos / "a.jpg", captions).error


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["nothing to look for"]),
        (["", "x.jpg"], ["empty"]),
        (["  ", "x.jpg"], ["empty"]),
        (["!?", "x.jpg"], ["no word"]),
        (["."], ["is a folder"]),
        (["photo.jpg"], ["one file of captions", "--query"]),
        (["photo.jpg", "a.txt", "b.txt"], ["one file of captions"]),
        (["-", "-"], ["twice"]),
        (["dogs", "x.jpg", "--rerank", "itc"], ["'itc'", "itm"]),
        (["dogs", "x.jpg", "--no-cache", "--rebuild"], ["--no-cache"]),
        (["dogs", "x.jpg", "--top", "0"], ["--top"]),
        (["dogs", "x.jpg", "--candidates", "-1"], ["--candidates"]),
        (["dogs", "x.jpg", "--device", "gpu"], ["'gpu'"]),
        (["--query", "dogs"], ["no images are given"]),
        (["dogs"], ["no images are given"]),
    ],
)
def test_usage_errors(mplug, arguments, words):
    done = mplug("retrieve", *arguments)
    assert (done.code, done.out) == (2, "")
    assert all(word in done.error for word in words), done.error


def test_help_and_usage_errors_do_without_torch(tmp_path):
    lines = [
        ["retrieve", "--help"], ["retrieve"], ["retrieve", "", "x.jpg"], ["retrieve", "x.jpg"],
        ["retrieve", "dog", "x.jpg", "--rerank", "x"], ["retrieve", "x.jpg", str(tmp_path / "none.txt")],
        ["retrieve", "x.jpg", os.devnull],
    ]  # fmt: skip
    code = (
        "import sys; from mplug_cli.app import main\n"
        f"for line in {lines!r}: main(line)\n"
        "heavy = {'torch', 'timm', 'transformers', 'numpy', 'PIL'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_dual_encoder_has_nothing_to_rerank_by(mplug, photos, tmp_path, monkeypatch, model_folder):
    import torch

    from mplug_core.model.config import MplugConfig
    from mplug_core.model.mplug import MplugModel
    from mplug_core.weights.folder import load_model, save_model

    known = load_model(str(model_folder))
    config = MplugConfig(**{**known.config.model_dump(), "fusion": "none"})
    torch.manual_seed(0)
    save_model(tmp_path / "dual", MplugModel(config), known.tokenizer)
    done = mplug("retrieve", "two dogs", photos, "--model", tmp_path / "dual", "--json")
    assert done.code == 0 and "match" not in done.objects[0]
    done = mplug("retrieve", "two dogs", photos, "--model", tmp_path / "dual", "--candidates", "4")
    assert done.code == 2 and "matching head" in done.error
