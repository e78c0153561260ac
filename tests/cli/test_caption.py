"""``mplug caption``: what comes in, what comes out."""

from __future__ import annotations

import os
import sys
import threading

import pytest
import torch

from mplug_cli import caption
from mplug_cli.app import main


@pytest.fixture(autouse=True)
def _model(model_folder):
    """All of these need a model."""


def test_defaults_are_those_of_the_task():
    from mplug_core.tasks.caption import CaptionTask

    default = CaptionTask.decoding
    assert (default.beams, default.min_tokens, default.max_tokens) == (
        caption.BEAMS,
        caption.MIN_TOKENS,
        caption.MAX_TOKENS,
    )


def test_one_image_gives_a_plain_line(mplug, photo):
    done = mplug("caption", photo)
    assert (done.code, done.err, len(done.lines)) == (0, "", 1)
    assert done.out.strip() and not done.out.startswith("{")


def test_one_image_with_n_gives_plain_lines(mplug, photo):
    done = mplug("caption", photo, "--n", "3")
    assert (done.code, len(set(done.lines))) == (0, 3)
    assert done.lines[0] == mplug("caption", photo).lines[0]


def test_json_has_score_and_confidence(mplug, photo):
    (found,) = mplug("caption", photo, "--json").objects
    assert list(found) == ["image", "caption", "score", "confidence"]
    assert found["image"] == str(photo) and found["score"] < 0 < found["confidence"] < 1


def test_json_with_n_has_all_captions_best_first(mplug, photo):
    (found,) = mplug("caption", photo, "--json", "--n", "2").objects
    first, second = found["captions"]
    assert first == {key: found[key] for key in ("caption", "score", "confidence")}
    assert first["score"] >= second["score"] and first["caption"] != second["caption"]


def test_many_images_give_json_lines_in_order(mplug, make_photo):
    photos = [make_photo(f"{i % 7}-{i}.png") for i in range(20)]
    done = mplug("caption", *photos, "--batch-size", "3")
    assert (done.code, done.err) == (0, "")
    assert [found["image"] for found in done.objects] == [str(path) for path in photos]


def test_captions_do_not_depend_on_the_batch(mplug, make_photo):
    photos = [make_photo(f"{i}.png") for i in range(5)]
    alone = mplug("caption", *photos, "--batch-size", "1").objects
    assert [f["caption"] for f in mplug("caption", *photos).objects] == [f["caption"] for f in alone]
    assert mplug("caption", photos[3]).lines == [alone[3]["caption"]]


def test_an_image_named_twice_is_answered_twice(mplug, photo):
    first, second = mplug("caption", photo, photo).objects
    assert first == second


def test_folder(mplug, make_photo, tmp_path):
    for name in ("in/b.JPG", "in/a.png", "in/.hidden.jpg", "in/deep/c.jpg"):
        make_photo(name)
    (tmp_path / "in" / "notes.txt").write_text("x")
    done = mplug("caption", tmp_path / "in")
    assert done.code == 0
    assert [found["image"] for found in done.objects] == [str(tmp_path / "in" / name) for name in ("a.png", "b.JPG")]


def test_a_folder_of_one_image_is_json_too(mplug, make_photo, tmp_path):
    make_photo("in/a.png")
    assert len(mplug("caption", tmp_path / "in").objects) == 1


def test_patterns_that_the_shell_left_alone(mplug, make_photo, tmp_path):
    for name in ("in/b.jpg", "in/a.jpg", "in/c.png", "in/deep/d.jpg"):
        make_photo(name)
    assert [f["image"][-5:] for f in mplug("caption", tmp_path / "in" / "*.jpg").objects] == ["a.jpg", "b.jpg"]
    assert len(mplug("caption", tmp_path / "in" / "**" / "*.jpg").objects) == 3


def test_a_name_with_brackets_is_no_pattern(mplug, make_photo):
    assert mplug("caption", make_photo("photo [1].jpg")).code == 0


@pytest.mark.parametrize("name", ["with space.jpg", "ünï-图片-🙂.jpg", "-dash.jpg", "quo'te\".jpg", "new\nline.jpg"])
def test_unusual_names(mplug, make_photo, monkeypatch, tmp_path, name):
    make_photo(name)
    monkeypatch.chdir(tmp_path)
    (found,) = mplug("caption", "--json", "--", name).objects
    assert found["image"] == name


def test_a_name_that_is_no_unicode_comes_back_as_it_is(mplug, photo):
    name = os.fsencode(photo.parent) + b"/\xff\xfe.jpg"
    os.rename(photo, name)
    (found,) = mplug("caption", "--json", os.fsdecode(name)).objects
    assert os.fsencode(found["image"]) == name


def test_bytes_on_stdin(mplug, photo):
    done = mplug("caption", "-", stdin=photo.read_bytes())
    assert (done.code, done.out) == (0, mplug("caption", photo).out)
    (found,) = mplug("caption", "-", "--json", stdin=photo.read_bytes()).objects
    assert found["image"] == "-"


def test_paths_on_stdin(mplug, make_photo):
    photos = [make_photo("a b.jpg"), make_photo("é.jpg")]
    done = mplug("caption", stdin=f"{photos[0]}\n\n{photos[1]}\r\n".encode())
    assert [found["image"] for found in done.objects] == [str(path) for path in photos]
    # the last line without its end; one path is JSON as well
    assert len(mplug("caption", stdin=str(photos[0]).encode()).objects) == 1


def test_paths_on_stdin_that_end_in_nul(mplug, make_photo):
    photos = [make_photo("a\nb.jpg"), make_photo("c.jpg")]
    done = mplug("caption", "-0", stdin=b"".join(os.fsencode(path) + b"\0" for path in photos))
    assert [found["image"] for found in done.objects] == [str(path) for path in photos]


def test_answers_come_while_paths_still_come(photo, monkeypatch):
    """A slow list of paths: each answer is there before the next path is."""
    paths_out, paths_in = os.pipe()
    answers_out, answers_in = os.pipe()
    answers = []

    def user() -> None:
        with open(paths_in, "w") as paths, open(answers_out) as lines:
            for _ in range(2):
                print(photo, file=paths, flush=True)
                answers.append(lines.readline())

    thread = threading.Thread(target=user, daemon=True)
    thread.start()
    with open(paths_out) as stdin, open(answers_in, "w") as stdout, monkeypatch.context() as patch:
        patch.setattr(sys, "stdin", stdin)
        patch.setattr(sys, "stdout", stdout)
        assert main(["caption"]) == 0
    thread.join(10)
    assert [str(photo) in answer for answer in answers] == [True, True]


def test_greedy_is_one_beam(mplug, photo):
    done = mplug("caption", photo, "--beam", "1")
    assert (done.code, len(done.lines)) == (0, 1)


def test_samples_repeat_with_their_seed(mplug, photo):
    draw = ["caption", photo, "--sample", "--top-p", "0.95", "--n", "3"]
    first = mplug(*draw, "--seed", "1")
    assert (first.code, len(first.lines)) == (0, 3)
    assert mplug(*draw, "--seed", "1").out == first.out != mplug(*draw, "--seed", "2").out


def test_lengths(mplug, photo):
    short = mplug("caption", photo, "--max-tokens", "2").out.split()
    assert 0 < len(short) <= 2
    assert mplug("caption", photo, "--min-tokens", "20", "--max-tokens", "20").code == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--seed", "1"], "--sample"),
        (["--top-p", "0.5"], "--sample"),
        (["--sample", "--beam", "3"], "exclude"),
        (["--n", "3", "--beam", "2"], "--beam 3"),
        (["--min-tokens", "9", "--max-tokens", "3"], "--max-tokens"),
        (["--sample", "--top-p", "0"], "--top-p"),
        (["--device", "gpu"], "'gpu'"),
        (["--null"], "--null"),
        (["--dtype", "float12"], "float12"),
        (["--min-tokens", "600", "--max-tokens", "5000"], "at most"),
        (["--max-tokens", "1000"], "at most"),
        (["--beam", "100000"], "128"),
        (["--n", "100000", "--sample"], "256"),
    ],
)
def test_options_that_contradict_each_other(mplug, photo, options, words):
    done = mplug("caption", photo, *options)
    assert (done.code, done.out) == (2, "") and words in done.error


def test_a_device_that_is_not_here(mplug, photo):
    done = mplug("caption", photo, "--device", "cuda:63")
    assert done.code == 1 and "cuda:63" in done.error


def test_a_model_that_is_not_there(mplug, photo, tmp_path):
    done = mplug("caption", photo, "--model", tmp_path / "none")
    assert done.code == 5 and "none" in done.error


def test_the_embedded_model_says_what_it_is(mplug, photo, model_folder, monkeypatch):
    monkeypatch.setattr("mplug_core.weights.folder.EMBEDDED", model_folder)
    done = mplug("caption", photo, photo, photo)
    assert done.code == 0 and done.err.count("demonstration model") == done.err.count("\n") == 1
    assert mplug("caption", photo).err == mplug("caption", photo, "-q").err == ""


def test_a_closed_pipe_is_quiet(mplug, photo, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", open(writer, "w"))  # noqa: SIM115
        done = mplug("caption", *[photo] * 5, "--batch-size", "1")
        sys.stdout.close()
    assert (done.code, done.err) == (0, "")


def test_a_full_disk_is_an_error(mplug, photo, monkeypatch):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", open("/dev/full", "w"))  # noqa: SIM115
        done = mplug("caption", photo)
        # what is still buffered can't be written either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.stdout.close()
    assert done.code == 1 and "can't be written" in done.error


def test_threads_are_those_that_are_asked_for(mplug, photo, model_folder, monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setenv("MPLUG_THREADS", "1")
    try:
        for asked, threads in ((("--threads", "3"), 3), ((), 1)):
            assert mplug("caption", photo, *asked).code == 0
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["MPLUG_THREADS", "MPLUG_DTYPE"])
def test_variables_without_sense_are_usage_errors(mplug, photo, model_folder, monkeypatch, name):
    monkeypatch.setenv(name, "much")
    done = mplug("caption", photo)
    assert done.code == 2 and f"{name}=much" in done.error
