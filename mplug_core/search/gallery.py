"""A gallery: images with their contrastive features, and what is found in it.

Features come from the store of each image's folder where they are known, else from the pixels. Search is exact: all
features are compared, which for a hundred thousand photos takes hundredths of a second. Re-ranking by matching looks at
the pixels of the best ones again: tokens of all images would fill the disk.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mplug_core.data.ahead import batches_ahead
from mplug_core.data.text import clean_caption
from mplug_core.errors import MplugError, NotFiniteError
from mplug_core.model.mplug import ImageEncoding
from mplug_core.search.store import Stamp, fingerprint, read_store, stamp_of, write_store
from mplug_core.tasks.ranking import EncodedTexts, Rerank, encode_texts, match, order_by_match, to_cpu
from mplug_core.tasks.task import Ready
from mplug_core.weights.folder import Loaded

Read = Callable[[str], Tensor]
"""Pixels [3, S, S] of an image by its name, as the model wants them; raises MplugError if it can't be read."""

SAVE_EVERY = 2000
"""New features after which stores are written, so that an interrupted first search has not been for nothing."""


@dataclass(frozen=True)
class Hit:
    """Something found: its number in what was searched, the score it is ranked by, the cosine similarity, and the logit
    "match" if it was re-ranked."""

    number: int
    score: float
    similarity: float
    match: float | None = None


@dataclass
class Gallery:
    """``names`` of the images that could be read, and their ``features`` [n, E] float32 on the CPU.

    ``failed``: (name, error) of the others. ``computed``: how many features were not in a store. ``notes``: a line for
    each store that could not be read or written.
    """

    names: list[str]
    features: Tensor
    failed: list[tuple[str, MplugError]] = field(default_factory=list)
    computed: int = 0
    notes: list[str] = field(default_factory=list)


def open_gallery(
    loaded: Loaded,
    names: Sequence[str],
    read: Read,
    *,
    keep: bool = True,
    rebuild: bool = False,
    batch_size: int = 32,
    advance: Callable[[int], None] = lambda done: None,
) -> Gallery:
    """The gallery of ``names``, each once, in their order.

    ``keep``: use the stores of the folders of those that are files, and add to them; ``rebuild``: add, but don't use.
    ``advance`` is called with the number of images done since.
    """
    names = list(dict.fromkeys(names))
    dim = loaded.config.embed_dim
    found: dict[str, Tensor] = {}
    stamps: dict[str, Stamp] = {}
    gallery = Gallery([], torch.empty(0, dim))
    key = fingerprint(loaded) if keep else ""
    if keep:
        stamps = {name: stamp for name in names if (stamp := stamp_of(name)) is not None}
        if not rebuild:
            found = _known(stamps, key, dim, gallery.notes)
    advance(len(found))
    missing = [name for name in names if name not in found]
    fresh: dict[str, Tensor] = {}  # not yet in a store
    try:
        for batch in batches_ahead(missing, read, batch_size):
            good = [(name, pixels) for name, pixels in batch if isinstance(pixels, Tensor)]
            gallery.failed += [(name, error) for name, error in batch if isinstance(error, MplugError)]
            if good:
                encoded = _encode(loaded, [pixels for _, pixels in good], keep_tokens=False)
                for (name, _), feature in zip(good, encoded.feature.unbind(), strict=True):
                    if feature.isfinite().all():
                        fresh[name] = feature
                    else:
                        gallery.failed.append((name, NotFiniteError.of(f"the feature of {name}")))
            advance(len(batch))
            if len(fresh) >= SAVE_EVERY:
                found.update(fresh)
                gallery.computed += len(fresh)
                _keep(fresh, stamps, key, dim, gallery.notes)
                fresh = {}
    finally:  # also when interrupted
        if fresh:
            _keep(fresh, stamps, key, dim, gallery.notes)
    found.update(fresh)
    gallery.computed += len(fresh)
    gallery.names = [name for name in names if name in found]
    if gallery.names:
        gallery.features = torch.stack([found[name] for name in gallery.names])
    return gallery


def _by_folder(names: Sequence[str]) -> dict[str, list[str]]:
    folders: dict[str, list[str]] = {}
    for name in names:
        folders.setdefault(os.path.dirname(name) or ".", []).append(name)
    return folders


def _known(stamps: dict[str, Stamp], key: str, dim: int, notes: list[str]) -> dict[str, Tensor]:
    found = {}
    for folder, names in _by_folder(list(stamps)).items():
        store = read_store(folder, key, dim)
        if store.note:
            notes.append(store.note)
        for name in names:
            feature = store.feature(os.path.basename(name), stamps[name])
            if feature is not None:
                found[name] = feature
    return found


def _keep(fresh: dict[str, Tensor], stamps: dict[str, Stamp], key: str, dim: int, notes: list[str]) -> None:
    kept = [name for name in fresh if name in stamps]
    for folder, names in _by_folder(kept).items():
        note = write_store(folder, key, dim, {(os.path.basename(name), stamps[name]): fresh[name] for name in names})
        if note and note not in notes:
            notes.append(note)


@torch.inference_mode()
def _encode(loaded: Loaded, pixels: list[Tensor], keep_tokens: bool = True) -> ImageEncoding:
    return to_cpu(loaded.model.encode_image(torch.stack(pixels).to(loaded.device, loaded.dtype)), keep_tokens)


def find_images(
    loaded: Loaded,
    gallery: Gallery,
    queries: Sequence[str],
    read: Read,
    *,
    top: int = 10,
    candidates: int = 0,
    rerank: Rerank = "itm",
    batch_size: int = 32,
) -> list[list[Hit]]:
    """The ``top`` images of the gallery for each text, best first.

    With ``candidates`` the best by ITC, so many and at least ``top``, are read again and re-ranked by ITM. One that
    can't be read any more is left out. NotFiniteError for a text whose feature, or a pair whose match, is not a number.
    """
    texts = encode_texts(loaded, [clean_caption(query) for query in queries], keep_tokens=candidates > 0)
    for query, feature in zip(queries, texts.feature, strict=True):
        if not feature.isfinite().all():
            raise NotFiniteError.of(f"the feature of {query!r}")
    similarity = texts.feature @ gallery.features.T
    count = min(max(top, candidates), len(gallery.names))
    best = _best(similarity, count)
    if not candidates or not count:
        return [_hits(row[:top], values) for row, values in zip(best, similarity, strict=True)]
    # an image that several texts have found is encoded once
    wanted, rows = best.unique(return_inverse=True)
    encoded, readable = _encode_again(loaded, [gallery.names[number] for number in wanted.tolist()], read, batch_size)
    if encoded is None:
        return [[] for _ in queries]
    left = readable[rows] >= 0
    pairs = torch.stack([readable[rows], torch.arange(len(queries))[:, None].expand_as(rows)], -1)[left]
    logits = match(loaded, encoded, texts, pairs)
    if not logits.isfinite().all():
        raise NotFiniteError.of("the match of an image and a text")
    matches = logits.split(left.sum(1).tolist())
    return [
        _ranked(numbers[kept], values[numbers[kept]], found, rerank)[:top]
        for numbers, kept, values, found in zip(best, left, similarity, matches, strict=True)
    ]


@torch.inference_mode()
def find_texts(
    ready: Ready,
    images: ImageEncoding,
    texts: EncodedTexts,
    *,
    top: int | None = None,
    candidates: int = 0,
    rerank: Rerank = "itm",
) -> list[list[Hit]]:
    """The ``top`` texts (None: all) for each of the images, best first; as :func:`find_images` the other way.

    With ``candidates`` the best by ITC, so many and at least ``top``, are re-ranked by ITM; behind them are the others
    by ITC.
    """
    images = to_cpu(images, keep_tokens=candidates > 0)
    similarity = images.feature @ texts.feature.T
    if not candidates:
        best = _best(similarity, len(texts))[:, :top]
        return [_hits(numbers, values) for numbers, values in zip(best, similarity, strict=True)]
    best = _best(similarity, min(max(top or 0, candidates), len(texts)))
    pairs = torch.stack([torch.arange(len(best))[:, None].expand_as(best), best], -1).flatten(0, 1)
    matches = match(ready, images, texts, pairs).view_as(best)
    scores = order_by_match(similarity, best, matches, rerank)
    found = []
    for numbers, logits, values, ranks in zip(best.tolist(), matches.tolist(), similarity, scores, strict=True):
        known = dict(zip(numbers, logits, strict=True))
        order = _best(ranks, len(texts))[:top].tolist()
        found.append([Hit(n, float(ranks[n]), float(values[n]), known.get(n)) for n in order])
    return found


def _encode_again(loaded: Loaded, names: list[str], read: Read, batch_size: int) -> tuple[ImageEncoding | None, Tensor]:
    """The encoding of images, and the row of each in it, -1 of those that can't be read."""
    rows, parts = torch.full((len(names),), -1), []
    number = 0
    places = range(len(names))
    for batch in batches_ahead(places, lambda place: read(names[place]), batch_size):
        good = [(place, pixels) for place, pixels in batch if isinstance(pixels, Tensor)]
        for place, _ in good:
            rows[place] = number
            number += 1
        if good:
            parts.append(_encode(loaded, [pixels for _, pixels in good]))
    return (ImageEncoding.join(parts) if parts else None), rows


def _ranked(numbers: Tensor, similarity: Tensor, matches: Tensor, how: Rerank) -> list[Hit]:
    """Hits of one query, best first: all [k], what they are, their similarities, and their match logits."""
    if not len(numbers):
        return []
    scores = order_by_match(similarity[None], torch.arange(len(numbers))[None], matches[None], how)[0]
    order = scores.argsort(descending=True, stable=True).tolist()
    return [Hit(int(numbers[i]), float(scores[i]), float(similarity[i]), float(matches[i])) for i in order]


def _best(similarity: Tensor, count: int) -> Tensor:
    """Places of the ``count`` largest along the last dimension; of equal ones the first come first."""
    return similarity.argsort(dim=-1, descending=True, stable=True)[..., :count]


def _hits(numbers: Tensor, similarity: Tensor) -> list[Hit]:
    """Hits of one query whose similarities to everything are ``similarity`` [n]."""
    return [
        Hit(number, value, value) for number, value in zip(numbers.tolist(), similarity[numbers].tolist(), strict=True)
    ]
