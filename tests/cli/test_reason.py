"""``mplug reason``: statements and hypotheses by arguments and JSON Lines, and which argument is what."""

from __future__ import annotations

import json

import pytest

from mplug_core.data.images import open_image, placed_transform
from mplug_core.model.mplug import MplugModel
from mplug_core.tasks.reasoning import LABELS, judge
from mplug_core.weights.folder import load_model

STATEMENT = "there are two dogs"


@pytest.fixture(autouse=True)
def _model(able_folder):
    """All of these need a model with classifiers."""


@pytest.fixture
def pair(make_photo):
    return make_photo("a.jpg"), make_photo("b.png")


def directly(folder, classifier, photos, text):
    """Probabilities by label."""
    import torch

    loaded = load_model(folder)
    transform = placed_transform(loaded.config.vision)
    images = loaded.model.encode_image(torch.stack([transform(open_image(path, target=32))[0] for path in photos]))
    found = judge(loaded, classifier, images, [tuple(range(len(photos)))], [text])[0].tolist()
    return dict(zip(LABELS[classifier], (round(value, 4) for value in found), strict=True))


def test_two_images(mplug, pair, able_folder):
    done = mplug("reason", *pair, STATEMENT)
    wanted = directly(able_folder, "statement", pair, STATEMENT)
    label = max(wanted, key=wanted.get)
    assert (done.code, done.err, done.lines) == (0, "", [f"{label} {wanted[label]:.2f}"])
    (found,) = mplug("reason", *pair, STATEMENT, "--json").objects
    assert found == {
        "images": [str(path) for path in pair], "statement": STATEMENT, "label": label, "probability": wanted[label],
        "probabilities": wanted,
    }  # fmt: skip


def test_the_order_of_images_counts(mplug, pair, able_folder):
    (found,) = mplug("reason", *pair[::-1], STATEMENT, "--json").objects
    assert found["probabilities"] == directly(able_folder, "statement", pair[::-1], STATEMENT)


def test_one_image_stands_on_both_sides_and_is_fused_once(mplug, photo, able_folder, monkeypatch):
    fused: list[int] = []
    fuse = MplugModel.fuse

    def count(self, image, text, mask):
        fused.append(len(text))
        return fuse(self, image, text, mask)

    monkeypatch.setattr(MplugModel, "fuse", count)
    (once,) = mplug("reason", photo, STATEMENT, "--json").objects
    (twice,) = mplug("reason", photo, photo, STATEMENT, "--json").objects
    assert fused == [1, 1]
    assert next(iter(once)) == "image" and once["probabilities"] == twice["probabilities"]
    assert once["probabilities"] == directly(able_folder, "statement", [photo], STATEMENT)


def test_hypothesis(mplug, photo, able_folder):
    done = mplug("reason", photo, "--hypothesis", STATEMENT)
    wanted = directly(able_folder, "entailment", [photo], STATEMENT)
    label = max(wanted, key=wanted.get)
    assert (done.code, done.lines) == (0, [f"{label} {wanted[label]:.2f}"])
    (found,) = mplug("reason", photo, "--hypothesis", STATEMENT, "--json").objects
    assert list(found) == ["image", "hypothesis", "label", "probability", "probabilities"]
    assert found["probabilities"] == wanted and list(wanted) == ["entailment", "neutral", "contradiction"]


def test_json_lines_mix_all_kinds(mplug, pair):
    first, second = map(str, pair)
    asked = [
        {"images": [first, second], "statement": STATEMENT},
        {"image": first, "hypothesis": "a dog"},
        {"image": second, "statement": STATEMENT},
        {"images": [first], "statement": "two dogs"},
    ]
    done = mplug("reason", "--batch-size", "3", stdin="".join(json.dumps(line) + "\n" for line in asked).encode())
    assert (done.code, done.err) == (0, "")
    for line, found in zip(asked, done.objects, strict=True):
        shown = {"image": first, "statement": "two dogs"} if line is asked[3] else line
        assert {name: found[name] for name in shown} == shown
        if "hypothesis" in line:
            alone = mplug("reason", line["image"], "--hypothesis", line["hypothesis"], "--json").objects
        else:
            alone = mplug("reason", *line.get("images", [line.get("image")]), line["statement"], "--json").objects
        assert found["probabilities"] == pytest.approx(alone[0]["probabilities"], abs=2e-4)


def test_faulty_lines(mplug, pair):
    first, second = map(str, pair)
    bad = [
        {"images": [first, "none.jpg"], "statement": STATEMENT},
        {"images": [first, second, first], "statement": STATEMENT},
        {"images": [], "statement": STATEMENT},
        {"images": [first, 3], "statement": STATEMENT},
        {"image": first},
        {"image": first, "statement": STATEMENT, "hypothesis": "a dog"},
        {"image": first, "statement": "..."},
        {"images": [first, second], "hypothesis": "a dog"},
    ]
    lines = [*bad, {"image": first, "statement": STATEMENT}]
    done = mplug("reason", stdin="".join(json.dumps(line) + "\n" for line in lines).encode())
    assert done.code == 4 and done.err.startswith("note: 8 of the statements")
    assert ["error" in found for found in done.objects] == [True] * 8 + [False]
    assert done.objects[0]["error"]["code"] == "missing" and done.objects[0]["images"] == [first, "none.jpg"]
    assert [found.get("line") for found in done.objects] == [None, *range(2, 9), None]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["a.jpg"], "no statement is given"),
        (["a.jpg", "b.png"], "no statement is given: the last argument, b.png, is an image"),
        (["a.jpg", "b.png", "a.jpg", STATEMENT], "3 are given"),
        ([STATEMENT], "no image is given"),
        (["--hypothesis", "a dog"], "no image is given"),
        (["a.jpg", "b.png", "--hypothesis", "a dog"], "2 are given"),
        (["a.jpg", ""], "empty"),
        (["a.jpg", "--hypothesis", ""], "empty"),
        (["a.jpg", "!"], "no word"),
        (["-", "-", STATEMENT], "twice"),
        ([".", STATEMENT], "2 images"),
        ([], "nothing is asked"),
    ],
)
def test_usage_errors(mplug, pair, monkeypatch, arguments, words):
    monkeypatch.chdir(pair[0].parent)
    done = mplug("reason", *arguments)
    assert (done.code, done.out) == (2, "") and words in done.error


def test_an_image_on_stdin(mplug, pair):
    done = mplug("reason", pair[0], "-", STATEMENT, stdin=pair[1].read_bytes())
    assert (done.code, done.out) == (0, mplug("reason", *pair, STATEMENT).out)


def test_a_broken_image(mplug, photo, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"\x89PNG")
    done = mplug("reason", photo, tmp_path / "bad.png", STATEMENT)
    assert (done.code, done.out) == (1, "") and "bad.png" in done.error


def test_a_long_statement_is_cut(mplug, photo):
    assert mplug("reason", photo, "two dogs run on the grass " * 2000).code == 0


@pytest.mark.parametrize(("options", "lacks"), [([STATEMENT], "statement"), (["--hypothesis", "a"], "entailment")])
def test_a_model_without_the_head(mplug, photo, model_folder, options, lacks):
    done = mplug("reason", photo, *options, "--model", model_folder)
    assert (done.code, done.out) == (5, "") and f"no classifier {lacks}" in done.error


def test_lines_that_the_model_has_no_head_for(mplug, photo, tmp_path):
    from tests.cli.conftest import save_random

    labels = {"statement": {"images": 2, "labels": ["false", "true"]}}
    folder = save_random(tmp_path / "m", classifiers=labels)
    lines = [{"image": str(photo), "hypothesis": "a dog"}, {"image": str(photo), "statement": "a dog"}]
    done = mplug("reason", "--model", folder, "-q", stdin="".join(json.dumps(x) + "\n" for x in lines).encode())
    first, second = done.objects
    assert (done.code, first["error"]["code"]) == (4, "checkpoint") and "label" in second
