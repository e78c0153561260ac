"""Cleaning rules, tokenizer and vocabularies, against the released behaviour where its golden files are present."""

from __future__ import annotations

import json
import pickle
import time
from pathlib import Path

import pytest

from mplug_core.data.text import SPECIAL_TOKENS, Tokenizer, build_vocabulary, clean_caption, clean_question, pad
from mplug_core.errors import CheckpointError

PARITY = Path(__file__).resolve().parents[2] / "../shared/parity"
needs_parity = pytest.mark.skipif(not PARITY.is_dir(), reason="no ../shared/parity beside the project")

WORDS = [*SPECIAL_TOKENS, "a", "man", "riding", "dog", "##s", "##e", "wave", ".", "'", "s", "it"]


@pytest.fixture
def tokenizer() -> Tokenizer:
    return Tokenizer([*WORDS, *(f"[box_{i}]" for i in range(4))])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Two dogs -- playing; in the park.", "two dogs playing in the park"),
        ("<person> and/or #1 (the 'best')~", "person and or 1 the best"),
        ("  lead\n\n inner ", "lead inner"),
        ("", ""),
        ("- -", ""),
    ],
)
def test_clean_caption(text: str, expected: str) -> None:
    assert clean_caption(text) == expected


def test_clean_caption_keeps_the_first_words() -> None:
    assert clean_caption("One two, three four", max_words=3) == "one two three"


def test_clean_question_keeps_inner_spaces() -> None:
    assert clean_question("  What's in the bag/box?  ") == "  whats in the bag box"


@needs_parity
def test_cleaning_as_released() -> None:
    for case in json.loads((PARITY / "j11_text_cleaning.json").read_text()):
        clean = {"pre_caption": clean_caption, "pre_question": clean_question}[case["fn"]]
        assert clean(case["text"], max_words=case["max_words"]) == case["out"], case


@needs_parity
def test_tokenizer_as_released() -> None:
    golden = json.loads((PARITY / "j11_tokenizer.json").read_text())
    tokenizer = Tokenizer.load(PARITY / golden["vocab_file"])
    for case in golden["cases"]:
        single = isinstance(case["texts"], str)
        texts = [case["texts"]] if single else case["texts"]
        kwargs = case["kwargs"]
        rows = [tokenizer.encode(text, kwargs.get("max_length"), end=False) for text in texts]
        ids, mask = pad(rows, tokenizer.pad_id)
        width = kwargs["max_length"] if kwargs.get("padding") == "max_length" else ids.shape[1]
        expected_ids = [case["input_ids"]] if single else case["input_ids"]
        expected_mask = [case["attention_mask"]] if single else case["attention_mask"]
        extra = width - ids.shape[1]
        assert [row + [tokenizer.pad_id] * extra for row in ids.tolist()] == expected_ids
        assert [row + [0] * extra for row in mask.tolist()] == expected_mask
    for case in golden["decode"]:
        assert tokenizer.decode(case["ids"], skip_special=False) == case["text"]


def test_encode_ends(tokenizer: Tokenizer) -> None:
    cls, sep = tokenizer.cls_id, tokenizer.sep_id
    assert tokenizer.encode("A man riding") == [cls, 5, 6, 7, sep]
    assert tokenizer.encode("A man riding", end=False) == [cls, 5, 6, 7]
    assert tokenizer.encode("a man riding dogs", max_length=4) == [cls, 5, 6, sep]
    assert tokenizer.encode("a man riding dogs", max_length=4, end=False) == [cls, 5, 6, 7]
    assert tokenizer.encode("") == tokenizer.encode(" \n\t ") == [cls, sep]
    assert tokenizer.encode("a", max_length=2) == [cls, sep]
    assert tokenizer.encode("a man[SEP]", end=False) == [cls, 5, 6, sep]
    assert tokenizer.encode("zebra") == [cls, tokenizer.unk_id, sep]
    assert tokenizer.encode("m\u00e1n") == [cls, 6, sep]
    with pytest.raises(ValueError, match="max_length 1"):
        tokenizer.encode("a", max_length=1)


def test_encode_survives_broken_unicode(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("a \ud800 man")[-2:] == [6, tokenizer.sep_id]


def test_long_text_is_cut_quickly(tokenizer: Tokenizer) -> None:
    text = "a man riding dogs " * 3_000_000
    start = time.perf_counter()
    assert len(tokenizer.encode(text, max_length=25)) == 25
    assert time.perf_counter() - start < 0.5
    assert len(tokenizer.encode("a " * 10_000)) == 10_002


def test_decode(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("it's a man riding dogs.")
    assert tokenizer.decode([*ids, tokenizer.pad_id, tokenizer.box_id(2)]) == "it's a man riding dogs."
    assert tokenizer.decode([]) == ""
    numbers = Tokenizer([*SPECIAL_TOKENS, "10", "30", "5", ":", ".", ",", "at"])
    assert numbers.decode(numbers.encode("at 10:30, 5.30. at 5")) == "at 10:30, 5.30. at 5"


def test_box_tokens(tokenizer: Tokenizer) -> None:
    assert tokenizer.bins == 4
    assert [tokenizer.box_bin(tokenizer.box_id(i)) for i in range(4)] == [0, 1, 2, 3]
    assert tokenizer.box_bin(tokenizer.sep_id) is None
    with pytest.raises(ValueError, match=r"outside 0\.\.3"):
        tokenizer.box_id(4)
    assert Tokenizer(WORDS).bins == 0


def test_save_load_pickle(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "vocab.txt")
    for other in (Tokenizer.load(tmp_path / "vocab.txt"), pickle.loads(pickle.dumps(tokenizer))):
        assert other.pieces == tokenizer.pieces
        assert other.vocab_size == len(tokenizer.pieces)


def test_vocabulary_faults(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        Tokenizer.load(tmp_path / "vocab.txt")
    with pytest.raises(CheckpointError, match=r"lacks .*\[MASK\]"):
        Tokenizer(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    with pytest.raises(CheckpointError, match="gaps"):
        Tokenizer([*SPECIAL_TOKENS, "[box_1]"])
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError, match="UTF-8"):
        Tokenizer.load(tmp_path / "binary.txt")


def test_build_vocabulary_of_words() -> None:
    pieces = build_vocabulary(["a red circle", "a red square"], box_bins=2)
    assert pieces[:5] == list(SPECIAL_TOKENS)
    assert pieces[-5:] == ["red", "circle", "square", "[box_0]", "[box_1]"]
    assert len(set(pieces)) == len(pieces)
    tokenizer = Tokenizer(pieces)
    assert len(tokenizer.encode("a red circle")) == 5
    assert tokenizer.unk_id not in tokenizer.encode("any other words, too: 42!")
    assert tokenizer.decode(tokenizer.encode("green")) == "green"


def test_build_vocabulary_cuts_as_its_base() -> None:
    letters = [*"abcdeginorstuv", *("##" + c for c in "abcdeginorstuv")]
    base = ["[unused0]", *SPECIAL_TOKENS, *letters, "dog", "unused", "rid", "##ing", "##s"]
    texts = ["Dogs riding", "dog"]
    pieces = build_vocabulary(texts, base)
    assert "unused" not in pieces and "[unused0]" not in pieces and "z" not in pieces
    large, small = Tokenizer(base), Tokenizer(pieces)
    for text in texts:
        cut = [large.pieces[i] for i in large.encode(text)]
        assert [small.pieces[i] for i in small.encode(text)] == cut
    assert cut == ["[CLS]", "dog", "[SEP]"]
    rare = build_vocabulary(texts, base, min_count=2)
    assert "dog" in rare and "##ing" not in rare


def test_pad() -> None:
    ids, mask = pad([[2, 7], [2, 7, 8, 3], []], 0)
    assert ids.tolist() == [[2, 7, 0, 0], [2, 7, 8, 3], [0, 0, 0, 0]]
    assert mask.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]]
    assert pad([], 0)[0].shape == (0, 0)
