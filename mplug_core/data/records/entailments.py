"""Hypotheses on an image: does it entail them, contradict them, or neither."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from mplug_core.data.records.finding import read
from mplug_core.data.records.reading import Entry, Item, Layout, own_entries, own_folder, places
from mplug_core.data.records.types import ENTAILMENT_LABELS, EntailmentRecord, Format, Records
from mplug_core.errors import DataError

_FLICKR30K_FOLDERS = (
    "images", "flickr30k_images", "flickr30k-images", "flickr30k_images/flickr30k_images", "Flickr30K/images",
    "flickr30k/images",
)  # fmt: skip


def read_entailments(
    path: str | Path,
    split: str | None = None,
    format: Format | None = None,
    images: str | Path | None = None,
) -> Records[EntailmentRecord]:
    """Entailments, in the order of the file; arguments as of :func:`read_captions`.

    Own format: {"image", "hypothesis", "label": "entailment", "neutral", "contradiction", or null where hidden}.

    SNLI-VE: a pair on which its annotators did not agree ("gold_label": "-") is among the broken ones, with the reason.

    Raises DataError where there is no such file or split, or nothing usable in it.
    """
    return read("entailments", path, split, format, images)


def _own(entry: Entry) -> Iterable[Item]:
    hidden = "label" in entry.values and entry.values["label"] is None
    label = None if hidden else _label(entry, "label")
    # ALBEF's lists call it a sentence
    name = "sentence" if "sentence" in entry.values and "hypothesis" not in entry.values else "hypothesis"
    pair_id = entry.identity("pair_id", default="")
    record = EntailmentRecord(entry.path("image"), entry.text(name), label, pair_id, entry.word("premise"))  # type: ignore[arg-type]
    return [Item(entry.image_id(), record, f"pair_id {pair_id}" if pair_id else record)]


def _label(entry: Entry, name: str) -> str:
    label = entry.values.get(name)
    if not isinstance(label, str) or label not in ENTAILMENT_LABELS:
        raise entry.fault(name, f"one of {', '.join(ENTAILMENT_LABELS)}")
    return label


def _snli_ve_item(entry: Entry) -> Iterable[Item]:
    image_id = entry.identity("Flickr30K_ID").removesuffix(".jpg")
    if "\0" in image_id:
        raise entry.fault("Flickr30K_ID", "the name of an image")
    if entry.values.get("gold_label") == "-":
        raise DataError(f'{entry.where}: field "gold_label": the annotators did not agree, so there is no label')
    label = None if entry.values.get("gold_label") is None else _label(entry, "gold_label")
    image = entry.reading.image(f"{image_id}.jpg")
    pair_id = entry.identity("pairID", default="")
    record = EntailmentRecord(image, entry.text("sentence2"), label, pair_id, entry.word("sentence1"))  # type: ignore[arg-type]
    return [Item(image_id, record, f"pairID {pair_id}" if pair_id else record)]


LAYOUTS = (
    Layout(
        "snli_ve", lambda file: file.shape == "lines" and "Flickr30K_ID" in file.sample, own_entries, _snli_ve_item,
        places(*_FLICKR30K_FOLDERS), (r"snli_ve(_(?P<split>\w+))?\.jsonl?", r".*_pairs\.jsonl"), common=True,
    ),
    Layout(
        "json", lambda file: file.shape == "list", own_entries, _own, own_folder, (r"ve_(?P<split>\w+)\.json",),
    ),
    Layout("jsonl", lambda file: file.shape == "lines", own_entries, _own, own_folder),
)  # fmt: skip
