"""Finding images for texts and texts for images, against all pairs one by one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mplug_core.search.gallery import Gallery, find_images, find_texts, open_gallery
from mplug_core.tasks.ranking import encode_texts
from mplug_core.weights.folder import Loaded

TEXTS = ["a red circle", "two", "a large blue square and a cross", "a small green circle"]


@pytest.fixture
def gallery(loaded: Loaded, names: list[str], reader) -> Gallery:
    found = open_gallery(loaded, names, reader, keep=False)
    reader.opened.clear()
    return found


def match_alone(loaded: Loaded, pixels: torch.Tensor, text: str) -> float:
    ids, mask = loaded.texts.encode([text])
    with torch.no_grad():
        _, fused = loaded.model.fuse(loaded.model.encode_image(pixels[None]), loaded.model.encode_text(ids, mask), mask)
        return float(loaded.model.matching_logits(fused)[0, 1])


def test_by_contrast(loaded: Loaded, gallery: Gallery, reader) -> None:
    similarity = encode_texts(loaded, TEXTS).feature @ gallery.features.T
    for row, hits in zip(similarity, find_images(loaded, gallery, TEXTS, reader, top=4), strict=True):
        assert [hit.number for hit in hits] == row.argsort(descending=True)[:4].tolist()
        assert [hit.score for hit in hits] == pytest.approx(row.sort(descending=True).values[:4].tolist())
        assert all(hit.match is None and hit.similarity == hit.score for hit in hits)
    assert reader.opened == []
    assert len(find_images(loaded, gallery, TEXTS, reader, top=100)[0]) == 6


@pytest.mark.parametrize("how", ["itm", "itm+itc"])
def test_reranked(loaded: Loaded, gallery: Gallery, reader, how: str) -> None:
    similarity = encode_texts(loaded, TEXTS).feature @ gallery.features.T
    found = find_images(loaded, gallery, TEXTS, reader, top=2, candidates=4, rerank=how, batch_size=3)
    # each at most once, however many texts have found it
    assert len(reader.opened) == len(set(reader.opened))
    for text, row, hits in zip(TEXTS, similarity, found, strict=True):
        best = row.argsort(descending=True)[:4].tolist()
        matches = {number: match_alone(loaded, reader(gallery.names[number]), text) for number in best}
        key = {number: matches[number] + (float(row[number]) if how == "itm+itc" else 0) for number in best}
        assert [hit.number for hit in hits] == sorted(best, key=lambda number: -key[number])[:2]
        for hit in hits:
            assert hit.match == pytest.approx(matches[hit.number], abs=1e-4)
            assert hit.score == pytest.approx(key[hit.number], abs=1e-4)
            assert hit.similarity == pytest.approx(float(row[hit.number]), abs=1e-5)


def test_as_many_candidates_as_are_listed(loaded: Loaded, gallery: Gallery, reader) -> None:
    (hits,) = find_images(loaded, gallery, TEXTS[:1], reader, top=5, candidates=2)
    assert len(hits) == 5 and all(hit.match is not None for hit in hits)


def test_an_image_that_has_gone_is_left_out(loaded: Loaded, gallery: Gallery, reader) -> None:
    first = find_images(loaded, gallery, TEXTS[:1], reader, top=6, candidates=6)[0]
    Path(gallery.names[first[0].number]).unlink()
    second = find_images(loaded, gallery, TEXTS[:1], reader, top=6, candidates=6)[0]
    assert [hit.number for hit in second] == [hit.number for hit in first[1:]]
    for name in gallery.names:
        Path(name).unlink(missing_ok=True)
    assert find_images(loaded, gallery, TEXTS[:2], reader, candidates=6) == [[], []]


def test_an_empty_gallery(loaded: Loaded, reader) -> None:
    gallery = open_gallery(loaded, [], reader)
    assert find_images(loaded, gallery, TEXTS[:1], reader) == [[]]
    assert find_images(loaded, gallery, TEXTS[:1], reader, candidates=3) == [[]]


@pytest.mark.parametrize("how", ["itm", "itm+itc"])
def test_texts_for_an_image(loaded: Loaded, gallery: Gallery, names: list[str], reader, how: str) -> None:
    row = gallery.features[2] @ encode_texts(loaded, TEXTS).feature.T
    pixels = reader(names[2])
    image, texts = loaded.model.encode_image(pixels[None]), encode_texts(loaded, TEXTS)
    assert [hit.number for hit in find_texts(loaded, image, texts)[0]] == row.argsort(descending=True).tolist()
    best = row.argsort(descending=True)[:3].tolist()
    key = {t: match_alone(loaded, pixels, TEXTS[t]) + (float(row[t]) if how == "itm+itc" else 0) for t in best}
    (hits,) = find_texts(loaded, image, texts, top=2, candidates=3, rerank=how)
    assert [hit.number for hit in hits] == sorted(best, key=lambda t: -key[t])[:2]
    (hits,) = find_texts(loaded, image, texts, candidates=3, rerank=how)
    rest = [t for t in row.argsort(descending=True).tolist() if t not in best]
    assert [hit.number for hit in hits] == sorted(best, key=lambda t: -key[t]) + rest
    assert [hit.match is None for hit in hits] == [False, False, False, True]
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)


def test_texts_for_several_images(loaded: Loaded, names: list[str], reader) -> None:
    texts, pixels = encode_texts(loaded, TEXTS), torch.stack([reader(name) for name in names[:3]])
    images = loaded.model.encode_image(pixels)
    together = find_texts(loaded, images, texts, candidates=3)
    for row, hits in enumerate(together):
        (alone,) = find_texts(loaded, images[torch.tensor([row])], texts, candidates=3)
        assert [hit.number for hit in hits] == [hit.number for hit in alone]
        assert [hit.score for hit in hits] == pytest.approx([hit.score for hit in alone], abs=1e-4)


def test_equal_texts_come_in_their_order(loaded: Loaded, names: list[str], reader) -> None:
    image = loaded.model.encode_image(reader(names[0])[None])
    (hits,) = find_texts(loaded, image, encode_texts(loaded, ["two"] * 3))
    assert [hit.number for hit in hits] == [0, 1, 2]


def test_a_very_long_text(loaded: Loaded, gallery: Gallery, reader) -> None:
    """Only the first thirty words are read, in no time."""
    long = "a red circle " * 10_000
    short = " ".join(long.split()[:30])
    for candidates in (0, 6):
        first, second = find_images(loaded, gallery, [long, short], reader, candidates=candidates)
        assert [hit.number for hit in first] == [hit.number for hit in second]
    assert len(find_images(loaded, gallery, ["x" * 1_000_000], reader)[0]) == 6
