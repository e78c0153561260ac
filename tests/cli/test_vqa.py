"""``mplug vqa``: questions by arguments, options and JSON Lines; what comes out, and how often an image is encoded."""

from __future__ import annotations

import json
import os
import sys
import threading

import pytest
import torch

from mplug_cli.app import main
from mplug_cli.vqa import with_questions
from mplug_core.data.images import open_image, placed_transform
from mplug_core.model.mplug import MplugModel
from mplug_core.tasks.vqa import VqaTask, answer_questions, rank_answers
from mplug_core.weights.folder import load_model

QUESTION = "what colour is the ball?"


@pytest.fixture(autouse=True)
def _model(model_folder):
    """All of these need a model."""


@pytest.fixture
def encoded(monkeypatch):
    """How many images each call of the visual encoder got."""
    counts: list[int] = []
    encode = MplugModel.encode_image

    def count(self, pixels):
        counts.append(len(pixels))
        return encode(self, pixels)

    monkeypatch.setattr(MplugModel, "encode_image", count)
    return counts


def directly(model_folder, photo, question):
    """(model, encoding, rows, questions) of one question on one photo."""
    loaded = load_model(model_folder)
    pixels, _ = placed_transform(loaded.config.vision)(open_image(photo, target=32))
    return loaded, loaded.model.encode_image(pixels[None]), [0], [question]


def as_lines(*objects: dict) -> bytes:
    return "".join(json.dumps(values) + "\n" for values in objects).encode()


def test_one_question_on_one_image_gives_the_plain_answer_of_the_model(mplug, photo, model_folder):
    done = mplug("vqa", photo, QUESTION)
    ((answer,),) = answer_questions(*directly(model_folder, photo, QUESTION), VqaTask.decoding)
    assert (done.code, done.err, done.lines) == (0, "", [answer.text])


def test_json(mplug, photo, model_folder):
    (found,) = mplug("vqa", photo, QUESTION, "--json").objects
    assert list(found) == ["image", "question", "answer", "confidence"]
    ((answer,),) = answer_questions(*directly(model_folder, photo, QUESTION), VqaTask.decoding)
    assert (found["image"], found["question"]) == (str(photo), QUESTION)
    assert (found["answer"], found["confidence"]) == (answer.text, round(answer.confidence, 4))


def test_several_questions_encode_the_image_once(mplug, photo, encoded):
    questions = [f"what is number {i}?" for i in range(5)]
    options = [word for question in questions for word in ("-Q", question)]
    done = mplug("vqa", photo, *options, "--batch-size", "2")
    assert done.code == 0 and [found["question"] for found in done.objects] == questions
    assert encoded == [1]
    alone = [mplug("vqa", photo, question).out.strip() for question in questions]
    assert [found["answer"] for found in done.objects] == alone


def test_several_images_and_questions_in_order(mplug, make_photo):
    photos = [make_photo(f"{i}.png") for i in (3, 1, 2)]
    done = mplug("vqa", *photos, "-Q", "what?", "-Q", "who?")
    asked = [(found["image"], found["question"]) for found in done.objects]
    assert asked == [(str(path), question) for path in photos for question in ("what?", "who?")]
    done = mplug("vqa", *photos, "what?")
    assert [found["image"] for found in done.objects] == [str(path) for path in photos]


def test_json_lines_on_stdin(mplug, make_photo, encoded):
    first, second = make_photo("a.png"), make_photo("b.png")
    asked = [{"image": str(path), "question": f"what is {i}"} for i, path in enumerate([first] * 7 + [second] * 2)]
    done = mplug("vqa", "--batch-size", "4", stdin=as_lines(*asked))
    assert (done.code, done.err) == (0, "")
    assert [{name: found[name] for name in ("image", "question")} for found in done.objects] == asked
    assert sum(encoded) == 2
    assert [f["answer"] for f in done.objects][2] == mplug("vqa", first, "what is 2").out.strip()


def test_faulty_lines_are_error_lines_and_the_rest_is_answered(mplug, photo):
    good = json.dumps({"image": str(photo), "question": "what?"}).encode()
    bad = [
        b'{"image": "none.jpg", "question": "what?"}', b"{not json}", b"[1]", b'{"image": 3, "question": "what?"}',
        b'{"image": "x.jpg", "question": " "}', b'{"question": "what?"}', b"[" * 100_000,
    ]  # fmt: skip
    done = mplug("vqa", stdin=b"\n".join([good, b"", *bad[:6], good, bad[6][:5000]]))
    assert done.code == 4 and done.err.startswith("note: 7 of the questions")
    found = done.objects
    assert [list(line)[-1] for line in found] == ["confidence", *["error"] * 6, "confidence", "error"]
    assert found[1]["image"] == "none.jpg" and found[1]["error"]["code"] == "missing"
    assert [line.get("line") for line in found] == [None, None, 4, 5, 6, 7, 8, None, 10]
    assert all("\n" not in line["error"]["message"] for line in found if "error" in line)


def test_paths_on_stdin(mplug, make_photo):
    photos = [make_photo("a b.jpg"), make_photo("é.jpg")]
    stdin = "".join(f"{path}\n" for path in photos).encode()
    for arguments in (["-Q", "what?"], ["what is it?"]):
        assert [found["image"] for found in mplug("vqa", *arguments, stdin=stdin).objects] == [str(p) for p in photos]


def test_an_image_on_stdin(mplug, photo):
    assert mplug("vqa", "-", QUESTION, stdin=photo.read_bytes()).out == mplug("vqa", photo, QUESTION).out


def test_answers_come_while_questions_still_come(photo, monkeypatch):
    """A slow program that asks: each answer is there before the next question is."""
    asked_out, asked_in = os.pipe()
    answers_out, answers_in = os.pipe()
    answers = []

    def user() -> None:
        with open(asked_in, "w") as asked, open(answers_out) as lines:
            for question in ("what?", "who?"):
                print(json.dumps({"image": str(photo), "question": question}), file=asked, flush=True)
                answers.append(lines.readline())

    thread = threading.Thread(target=user, daemon=True)
    thread.start()
    with open(asked_out) as stdin, open(answers_in, "w") as stdout, monkeypatch.context() as patch:
        patch.setattr(sys, "stdin", stdin)
        patch.setattr(sys, "stdout", stdout)
        assert main(["vqa"]) == 0
    thread.join(10)
    assert [json.loads(line)["question"] for line in answers] == ["what?", "who?"]


def test_n_answers_best_first(mplug, photo):
    (found,) = mplug("vqa", photo, QUESTION, "--json", "--n", "3").objects
    assert len({answer["answer"] for answer in found["answers"]}) == 3
    assert found["answers"][0] == {name: found[name] for name in ("answer", "confidence")}
    assert mplug("vqa", photo, QUESTION, "--n", "3").lines == [answer["answer"] for answer in found["answers"]]


def test_one_beam_is_greedy(mplug, photo, model_folder):
    greedy = VqaTask.decoding.model_copy(update={"strategy": "greedy"})
    ((answer,),) = answer_questions(*directly(model_folder, photo, QUESTION), greedy)
    assert mplug("vqa", photo, QUESTION, "--beam", "1").lines == [answer.text]


def test_answers_of_a_list(mplug, photo, model_folder, tmp_path):
    file = tmp_path / "answers.txt"
    listed = ["red", "green", "two dogs", "a table"]
    file.write_text("\ufeff" + "\n\n".join([*listed, "red"]) + "\n", encoding="utf-8")
    done = mplug("vqa", photo, QUESTION, "--answers", file, "--n", "9", "--json")
    (wanted,) = rank_answers(*directly(model_folder, photo, QUESTION), listed)
    (found,) = done.objects
    shown = [(answer["answer"], pytest.approx(answer["confidence"], abs=1e-3)) for answer in found["answers"]]
    assert shown == [(answer.text, answer.confidence) for answer in wanted] and len(shown) == 4
    assert sum(answer["confidence"] for answer in found["answers"]) == pytest.approx(1, abs=1e-3)
    assert mplug("vqa", photo, QUESTION, "--answers", file).lines == [wanted[0].text]


@pytest.mark.parametrize(("content", "words"), [(b"\n \n", "no answers"), (b"\xff", "UTF-8"), (None, "No such file")])
def test_a_list_of_answers_that_is_none(mplug, photo, tmp_path, content, words):
    if content is not None:
        (tmp_path / "answers").write_bytes(content)
    done = mplug("vqa", photo, QUESTION, "--answers", tmp_path / "answers")
    assert (done.code, done.out) == (3, "") and words in done.error


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["photo.jpg"], "no question"),
        (["photo.jpg", "photo.jpg"], "no question"),
        (["photo.jpg", "missing.png"], "no question"),
        (["photo.jpg", "-"], "no question"),
        (["photo.jpg", ""], "empty"),
        (["photo.jpg", " \t"], "empty"),
        (["photo.jpg", "???"], "no word"),
        (["photo.jpg", "-Q", " "], "empty"),
        (["what is it?"], "no images"),
        (["-Q", "what is it?"], "no images"),
        ([], "nothing is asked"),
        (["photo.jpg", "what?", "--n", "3", "--beam", "2"], "--beam 3"),
        (["photo.jpg", "what?", "--beam", "2", "--answers", "x"], "--answers"),
        (["photo.jpg", "what?", "--device", "gpu"], "'gpu'"),
    ],
)
def test_usage_errors(mplug, photo, monkeypatch, arguments, words):
    monkeypatch.chdir(photo.parent)
    done = mplug("vqa", *arguments)
    assert (done.code, done.out) == (2, "") and words in done.error


@pytest.mark.parametrize("stdin", [b"photo.jpg\n", b"\xff\xd8\xff\xe0", b"\n \n"])
def test_stdin_that_is_no_json_lines(mplug, stdin):
    done = mplug("vqa", stdin=stdin)
    assert done.code == 2 and '{"image": PATH, "question": TEXT}' in done.error


def test_a_broken_image(mplug, photo, tmp_path):
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(photo.read_bytes()[:200])
    done = mplug("vqa", bad, QUESTION)
    assert (done.code, done.out) == (1, "") and "bad.jpg" in done.error
    done = mplug("vqa", bad, photo, "-Q", "what?", "-Q", "who?")
    assert done.code == 4 and [list(found)[2] for found in done.objects] == ["error", "error", "answer", "answer"]
    assert done.objects[1] == {**done.objects[0], "question": "who?"}


def test_a_long_question_is_cut(mplug, photo):
    done = mplug("vqa", photo, "what is the red ball " * 2500)
    assert (done.code, done.err, len(done.lines)) == (0, "", 1)
    assert mplug("vqa", photo, "-Q", "x" * 100_000).code == 0


def test_a_question_that_is_no_unicode(mplug, photo):
    done = mplug("vqa", "--json", photo, os.fsdecode(b"what \xff is it?"))
    assert done.code == 0 and done.objects[0]["question"] == os.fsdecode(b"what \xff is it?")


def test_a_closed_pipe_is_quiet(mplug, photo, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", open(writer, "w"))  # noqa: SIM115
        done = mplug("vqa", *[photo] * 4, "what?", "--batch-size", "1")
        sys.stdout.close()
    assert (done.code, done.err) == (0, "")


def test_the_embedded_model_says_what_it_is(mplug, photo, model_folder, monkeypatch):
    monkeypatch.setattr("mplug_core.weights.folder.EMBEDDED", model_folder)
    assert mplug("vqa", photo, QUESTION).err.count("demonstration model") == 1
    assert mplug("vqa", photo, QUESTION, "--quiet").err == ""


def test_a_model_without_decoder(mplug, photo, tmp_path):
    from tests.cli.conftest import save_random

    done = mplug("vqa", photo, QUESTION, "--model", save_random(tmp_path / "m", decoder_layers=0))
    assert done.code == 5 and "no decoder" in done.error


def test_gpu_memory_is_an_error_with_a_hint(mplug, photo, monkeypatch):
    def full(*args):
        raise torch.cuda.OutOfMemoryError

    monkeypatch.setattr("mplug_core.tasks.vqa.answer_questions", full)
    done = mplug("vqa", photo, QUESTION)
    assert done.code == 1 and "--batch-size is 16" in done.error


@pytest.mark.parametrize(
    ("given", "meant", "old"),
    [
        (["a.jpg", "-q", "what?"], ["a.jpg", "-Q", "what?"], True),
        (["a.jpg", "-q", "what is it?", "-q", "who?"], ["a.jpg", "-Q", "what is it?", "-Q", "who?"], True),
        (["-q", "what is left/right?", "a.jpg"], ["-Q", "what is left/right?", "a.jpg"], True),
        (["a.jpg", "-qwhat?"], ["a.jpg", "-Q", "what?"], True),
        (["-q", "a.jpg", "what?"], ["-q", "a.jpg", "what?"], False),
        (["-q", "photos/*", "what?"], ["-q", "photos/*", "what?"], False),
        (["-q", "https://x.org/a", "what?"], ["-q", "https://x.org/a", "what?"], False),
        (["-q", "-", "what?"], ["-q", "-", "what?"], False),
        (["-q", ".", "what?"], ["-q", ".", "what?"], False),
        (["a.jpg", "what?", "-q"], ["a.jpg", "what?", "-q"], False),
        (["a.jpg", "-q", "--json", "what?"], ["a.jpg", "-q", "--json", "what?"], False),
        (["a.jpg", "-qQ", "what?"], ["a.jpg", "-qQ", "what?"], False),
        (["a.jpg", "--", "-q", "what?"], ["a.jpg", "--", "-q", "what?"], False),
    ],
)
def test_q_before_a_question_is_a_question_for_one_version(given, meant, old):
    assert with_questions(given) == (meant, old)


def test_q_is_quiet_and_before_a_question_a_note_says_what_to_write(mplug, able_folder, photo):
    new = mplug("vqa", photo, "-Q", "what is it?", "-q")
    assert (new.code, new.err) == (0, "")
    assert mplug("vqa", "-q", photo, "what is it?").out == new.out
    old = mplug("vqa", photo, "-q", "what is it?")
    assert (old.code, old.out) == (0, new.out)
    assert old.err == "note: -q before a question will mean --quiet in the next version: write -Q or --question\n"
    assert mplug("vqa", photo, "-q", "what is it?", "--quiet").err == ""
