"""CIDEr for training: pycocoevalcap's numbers, by document frequencies that were counted before."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pycocoevalcap.cider.cider import Cider as TheirCider

from mplug_core.data.text import clean_caption
from mplug_core.metrics.caption import ptb_tokenize
from mplug_core.metrics.cider import Cider, caption_tokens

GOLDEN = Path(__file__).resolve().parents[2] / "../shared/data/golden"

REFERENCES = {
    "a": ["a dog is running on the beach", "a brown dog runs over wet sand near the sea", "dog"],
    "b": ["two kids ride one bike down the street", "two children are sitting on a red bicycle"],
    "c": ["a train waits at the station", "the train stands in a station at night"],
    "d": ["a dog on a train a dog on a train"],
}
PREDICTIONS = {
    "a": "a brown dog runs on a beach on a beach",
    "b": "two children on a red train",
    "c": "",
    "d": "a dog on a train",
}


def counted(references: dict[str, list[str]]) -> Cider:
    cider = Cider()
    cider.count([text.split() for text in texts] for texts in references.values())
    return cider


def test_equals_the_package() -> None:
    _, expected = TheirCider().compute_score(REFERENCES, {key: [text] for key, text in PREDICTIONS.items()})
    cider = counted(REFERENCES)
    found = [cider.score(PREDICTIONS[key].split(), [text.split() for text in REFERENCES[key]]) for key in REFERENCES]
    assert found == pytest.approx(list(expected), abs=1e-9)
    assert max(found) > 1 and found[2] == 0


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="no ../shared/data/golden beside the project")
def test_equals_the_package_on_126_images() -> None:
    golden = json.loads((GOLDEN / "coco126.json").read_text())
    cider = counted(golden["gts_tok"])
    found = [
        cider.score(golden["res_tok"][key][0].split(), [text.split() for text in texts])
        for key, texts in golden["gts_tok"].items()
    ]
    assert sum(found) / len(found) == pytest.approx(golden["scores"]["Cider"], abs=1e-9)
    _, expected = TheirCider().compute_score(golden["gts_tok"], golden["res_tok"])
    assert found == pytest.approx(list(expected), abs=1e-9)


def test_words_are_weighed_by_what_was_counted() -> None:
    """The same caption against the same reference scores more where its right word is rare in the corpus."""
    rare = counted({"a": ["a dog"], "b": ["a cat"], "c": ["a cat"]})
    common = counted({"a": ["a dog"], "b": ["a dog"], "c": ["a cat"]})
    candidate, references = ["my", "dog"], [["a", "dog"]]
    assert rare.score(candidate, references) > common.score(candidate, references) > 0
    assert rare.weight(("a",)) == 0 and rare.weight(("dog",)) == rare.weight(("never", "seen")) > rare.weight(("cat",))


def test_counting_goes_on() -> None:
    once, twice = counted(REFERENCES), Cider()
    for references in REFERENCES.values():
        twice.count([[text.split() for text in references]])
    assert once.images == twice.images == 4
    ngrams = [("a",), ("dog",), ("a", "dog"), ("on", "a", "train"), ("two", "kids", "ride", "one")]
    assert [once.weight(n) for n in ngrams] == [twice.weight(n) for n in ngrams]


def test_limits() -> None:
    cider = counted(REFERENCES)
    exact = ["two", "kids", "ride", "one", "bike"]
    assert cider.score(exact, [exact]) == pytest.approx(10)
    assert cider.score([], [["a"]]) == cider.score(["x"], [[]]) == 0
    assert Cider().score(["a"], [["a"]]) == 0  # nothing was counted, so no word says anything
    with pytest.raises(ValueError, match="reference"):
        cider.score(["a"], [])


def test_tokens_are_those_of_the_treebank() -> None:
    texts = [
        "You cannot see the dog's well-known 5% off sign, at night!",
        "He's gonna give me $5 (or 10)",
        "a M&Ms t-shirt; an A&W root beer",
        "  wanna gotta\tgimme lemme  ",
        "",
    ]
    assert [" ".join(caption_tokens(text)) for text in texts] == ptb_tokenize([clean_caption(text) for text in texts])
    assert caption_tokens("cannot") == ("can", "not")
    assert len(caption_tokens("long " * 50)) == 50
