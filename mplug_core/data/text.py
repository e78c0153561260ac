"""Texts in and out: the cleaning rules of captions and questions, and a WordPiece tokenizer on BERT vocabularies.

Runs on the ``tokenizers`` package alone (loaded in hundredths of a second). Box tokens ``[box_0]`` ... for grounding
are ordinary lines at the end of a vocabulary file. A literal ``[SEP]`` in a text becomes that token, as released
models expect.
"""

from __future__ import annotations

import os
import re
import string
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mplug_core.bounded import Unreadable, read_bytes
from mplug_core.errors import CheckpointError

# Encoding is one text at a time, and data workers fork: without this the package warns about its thread pool.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import tokenizers

if TYPE_CHECKING:
    import torch

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")

_DELETED = str.maketrans({**dict.fromkeys(",.'!?\"()*#:;~"), "-": " ", "/": " "})
MAX_VOCABULARY = 32 << 20
"""Bytes of a vocabulary."""
_BOX = re.compile(r"\[box_(\d+)\]")
# No token is made of more characters than this on average, in any text that is one; what is behind the cut need not be
# looked at.
_CHARACTERS_A_TOKEN = 256


def clean_caption(text: str, max_words: int = 30) -> str:
    """The caption as models see it: lower case, no punctuation, single spaces, the first ``max_words`` words."""
    text = text.lower().translate(_DELETED).replace("<person>", "person")
    text = re.sub(r"\s{2,}", " ", text).rstrip("\n").strip(" ")
    return " ".join(text.split(" ")[:max_words])


def clean_question(text: str, max_words: int | None = None) -> str:
    """The question as models see it: lower case, no punctuation, no spaces at the end; inner spaces are kept."""
    text = text.lower().translate(_DELETED).rstrip(" ")
    return text if max_words is None else " ".join(text.split(" ")[:max_words])


class Tokenizer:
    """Text to ids and back over a fixed list of word pieces, lower-cased and without accents."""

    def __init__(self, pieces: Sequence[str], origin: str = "the vocabulary") -> None:
        """``pieces``: piece of id 0, 1, ...; raises CheckpointError where a special token is missing."""
        self.pieces: tuple[str, ...] = tuple(pieces)
        self._ids = {piece: index for index, piece in enumerate(self.pieces)}
        missing = [token for token in SPECIAL_TOKENS if token not in self._ids]
        if missing:
            raise CheckpointError(f"{origin} lacks {', '.join(missing)}", "give a BERT vocabulary, one piece a line")
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = (self._ids[t] for t in SPECIAL_TOKENS)

        boxes = {int(m[1]): self._ids[m[0]] for m in (_BOX.fullmatch(piece) for piece in self.pieces) if m}
        if sorted(boxes) != list(range(len(boxes))):
            raise CheckpointError(f"{origin} has gaps among its box tokens", "they must be [box_0], [box_1], ...")
        self._box_ids = tuple(boxes[index] for index in range(len(boxes)))
        self._box_bins = {token: index for index, token in enumerate(self._box_ids)}
        self.special_ids = frozenset((self.pad_id, self.cls_id, self.sep_id, self.mask_id, *self._box_ids))

        model = tokenizers.models.WordPiece(self._ids, unk_token="[UNK]", max_input_chars_per_word=100)
        self._backend = tokenizers.Tokenizer(model)
        self._backend.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
        self._backend.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
        self._backend.add_special_tokens([*SPECIAL_TOKENS, *(self.pieces[index] for index in self._box_ids)])

    @classmethod
    def load(cls, vocab_file: str | Path) -> Tokenizer:
        """Read a vocabulary file: one piece a line, the line's number is its id."""
        try:
            text = read_bytes(vocab_file, MAX_VOCABULARY).decode("utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"vocabulary {vocab_file} is not UTF-8", "give the folder's vocab.txt") from error
        except Unreadable as error:
            gone = isinstance(error.__cause__, FileNotFoundError)
            reason = "does not exist" if gone else f"can't be read: {error}"
            raise CheckpointError(f"vocabulary {vocab_file} {reason}", "give the folder's vocab.txt") from error
        # Not splitlines(): BERT's pieces include exotic line separators.
        lines = text.replace("\r\n", "\n").split("\n")
        while lines and not lines[-1]:
            lines.pop()
        return cls(lines, f"vocabulary {vocab_file}")

    def save(self, path: str | Path) -> None:
        """Write the vocabulary file that ``load`` reads."""
        Path(path).write_bytes("".join(piece + "\n" for piece in self.pieces).encode("utf-8"))

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[tuple[str, ...]]]:
        return Tokenizer, (self.pieces,)

    @property
    def vocab_size(self) -> int:
        return len(self.pieces)

    @property
    def bins(self) -> int:
        """How many box tokens there are; 0 where the model has no grounding."""
        return len(self._box_ids)

    def encode(self, text: str, max_length: int | None = None, end: bool = True) -> list[int]:
        """``[CLS] text [SEP]`` as ids; ``end=False`` leaves the [SEP] off, as the released models were trained.

        ``max_length`` counts every id. The text is cut, never the [CLS] or the added [SEP].
        """
        room = None if max_length is None else max_length - (2 if end else 1)
        if room is not None:
            if room < 0:
                raise ValueError(f"max_length {max_length} has no room for the special tokens")
            text = text[: (room + 1) * _CHARACTERS_A_TOKEN]
        try:
            ids = self._backend.encode(text, add_special_tokens=False).ids
        except (TypeError, UnicodeEncodeError):  # lone surrogates, which JSON can carry, are no text
            text = text.encode("utf-8", "replace").decode("utf-8")
            ids = self._backend.encode(text, add_special_tokens=False).ids
        return [self.cls_id, *ids[:room], self.sep_id] if end else [self.cls_id, *ids[:room]]

    def unknown_share(self, text: str) -> float:
        """The share of a text's pieces that the vocabulary doesn't know, 0 .. 1; 1 for a text without a piece."""
        ids = self.encode(text, end=False)[1:]
        return ids.count(self.unk_id) / len(ids) if ids else 1.0

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Ids (a tensor row will do) as text: pieces joined, punctuation attached, numbers like 3.5 and 10:30 whole.

        [PAD], [CLS], [SEP], [MASK] and box tokens are left out unless ``skip_special`` is false.
        """
        words: list[str] = []
        for index in (int(i) for i in ids):
            if skip_special and index in self.special_ids:
                continue
            piece = self.pieces[index]
            if piece.startswith("##") and len(piece) > 2 and words:
                words[-1] += piece[2:]
            else:
                words.append(piece)
        text = re.sub(r"(?<=\d) ([.:]) (?=\d)", r"\1", " ".join(words))
        return re.sub(r" ([.,!?])(?= |$)", r"\1", text).replace(" ' ", "'")

    def box_id(self, bin: int) -> int:
        """The id of ``[box_<bin>]``; ValueError outside 0..bins-1."""
        if not 0 <= bin < self.bins:
            raise ValueError(f"box bin {bin} is outside 0..{self.bins - 1}")
        return self._box_ids[bin]

    def box_bin(self, id: int) -> int | None:
        """The bin of a box token's id, None for any other id."""
        return self._box_bins.get(int(id))


def texts_of(record: Any) -> Iterator[str]:
    """The cleaned texts of a record of any task, whole, as a vocabulary is built from them."""
    values = vars(record)
    for text in values.get("captions", ()) or values.get("answers", ()):
        yield clean_caption(text, 1000)
    for key in ("question", "phrase", "statement", "hypothesis"):
        if key in values:
            yield clean_question(values[key])


def build_vocabulary(
    texts: Iterable[str], base: Sequence[str] | None = None, box_bins: int = 0, min_count: int = 1
) -> list[str]:
    """A small vocabulary for ``texts``: special tokens, single characters, the pieces in use, box tokens.

    With ``base`` (the pieces of a large vocabulary, e.g. BERT's) the pieces are those that it cuts the texts into, in
    its order: the texts come out cut the same way, and pre-trained embeddings can be picked by piece. Without, they are
    the texts' whole words, the frequent ones first. Pieces seen less than ``min_count`` times are spelled in
    characters: those of the texts, and all printable ASCII so that no English word is unknown.
    """
    # One backend for both ways: it lower-cases and splits words as the tokenizer will.
    cutter = Tokenizer([*SPECIAL_TOKENS, *(p for p in base if p not in SPECIAL_TOKENS)]) if base is not None else None
    splitter = tokenizers.pre_tokenizers.BertPreTokenizer()
    normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    words: Counter[str] = Counter()
    for text in texts:
        words.update(word for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text)))

    characters = {c for c in string.printable.lower() if not c.isspace()}
    counts: Counter[str] = Counter()
    for word, count in words.items():
        characters.update(word)
        if cutter is None:
            counts[word] += count
        else:
            for index in cutter.encode(word, end=False)[1:]:
                counts[cutter.pieces[index]] += count
    kept = [piece for piece, count in counts.items() if count >= min_count]
    if base is None:
        kept.sort(key=lambda piece: (-counts[piece], piece))
    else:
        order = {piece: index for index, piece in enumerate(base)}
        kept.sort(key=order.__getitem__)
        characters = {c for c in characters if c in order or "##" + c in order}  # the rest is unknown to it anyway

    ordered = sorted(characters)
    boxes = [f"[box_{index}]" for index in range(box_bins)]
    # dict.fromkeys: each piece once, where it is first named.
    return list(dict.fromkeys([*SPECIAL_TOKENS, *ordered, *("##" + c for c in ordered), *kept, *boxes]))


def pad(sequences: Sequence[Sequence[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids of several lengths as (ids [B, T], mask [B, T]) of int64; the mask is 1 on ids and 0 on padding."""
    import torch

    length = max((len(s) for s in sequences), default=0)
    ids = torch.full((len(sequences), length), pad_id, dtype=torch.int64)
    mask = torch.zeros((len(sequences), length), dtype=torch.int64)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(list(sequence), dtype=torch.int64)
        mask[row, : len(sequence)] = 1
    return ids, mask
