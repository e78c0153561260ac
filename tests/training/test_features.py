"""Cached features: each view of each image is computed once, whoever asks, and goes on where it broke off."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mplug_core.data.batches import Source
from mplug_core.data.records import CaptionRecord, PhraseRecord, QuestionRecord
from mplug_core.errors import CheckpointError, DataError
from mplug_core.model.vision import VisualEncoder
from mplug_core.recipe import SourceSection
from mplug_core.training import features
from mplug_core.training.distributed import World
from mplug_core.training.feature_store import FeatureStore, quantise
from mplug_core.training.features import FeatureCache
from mplug_core.training.trainer import Trainer
from tests.small import CNN, VIT, small_config
from tests.training.photos import photo_recipe, write_photos

BACKBONES = {"cnn": CNN, "vit": VIT}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos") / "data")


def encoder(kind: str = "cnn") -> VisualEncoder:
    torch.manual_seed(0)
    return VisualEncoder(small_config(vision=BACKBONES[kind])).eval()


def source(
    photos: Path, name: str = "a", first: int = 0, last: int = 20, task: str = "caption", **fields: Any
) -> Source:
    """A source of some of the photos, with records of one task."""
    images = [photos / "images" / f"{k}.png" for k in range(first, last)]
    records = {
        "caption": [CaptionRecord(image, ("a wall",), image.stem) for image in images],
        "vqa": [QuestionRecord(image, "which colour", ("red",), (1.0,), "", image.stem) for image in images],
        "grounding": [PhraseRecord(image, "the wall", (0.1, 0.1, 0.2 + first / 100, 0.9)) for image in images],
    }[task]
    section = SourceSection(**{"path": "x", "cached_views": 1, "tasks": {task: 1}, **fields})
    return Source(name, section, {task: records}, small_config(vision=CNN).vision, {})


class Counting:
    """Counts what an encoder sees, and fails when told to."""

    def __init__(self, visual: VisualEncoder, fail_at: int | None = None) -> None:
        self.seen, self.fail_at = 0, fail_at
        visual.register_forward_pre_hook(self)

    def __call__(self, module: Any, given: tuple[Tensor]) -> None:
        if self.fail_at is not None and self.seen >= self.fail_at:
            raise KeyboardInterrupt
        self.seen += len(given[0])


def computed(folder: Path, *sources: Source, visual: VisualEncoder | None = None, world: World | None = None) -> int:
    """How many views had to be computed for these sources."""
    visual = visual or encoder()
    counting = Counting(visual)
    cache = FeatureCache(visual, sources, folder)
    cache.compute(world=world or World(0, 1, 0))
    cache.give()
    return counting.seen


@pytest.mark.parametrize("kind", BACKBONES)
@pytest.mark.parametrize("augment", ["none", "flip", "crop", "randaugment"])
def test_features_are_those_of_the_view(photos: Path, tmp_path: Path, kind: str, augment: str) -> None:
    one, visual = source(photos, cached_views=3, augment=augment), encoder(kind)
    assert computed(tmp_path, one, visual=visual) == 20 * (1 if augment == "none" else 3)
    cache = FeatureCache(visual, [one], tmp_path)
    assert len(one.features) == 3 and one.placements.shape == (3, 20, 4)
    for store, views in cache.views().items():
        for view in views:
            pixels, placement = view.load()
            with torch.no_grad():
                want = visual(pixels[None])[0]
            assert tuple(one.placements[view.view, view.image]) == pytest.approx(list(vars(placement).values()))
            got = one.features.read([view.view], [view.image])[0]
            # half a step, and what fp16 loses of the lowest value
            allowed = 0.6 / 255 * (want.amax(0) - want.amin(0)) + 6e-4 * want.abs().amax(0)
            assert ((got - want).abs() <= allowed + 1e-5).all(), store.folder
    with torch.no_grad():
        plain = visual(one.load(3, None)[0][None])[0]
    assert (
        torch.allclose(one.features.read([0], [3])[0], plain, atol=0.05) and (one.placements[0] == [1, 1, 0, 0]).all()
    )
    assert (one.placements[1:] == [1, 1, 0, 0]).all() == (augment == "none")


def test_sources_share_their_photos(photos: Path, tmp_path: Path) -> None:
    """The plain view is the same for all; augmented ones where the augmentation is, and not where boxes matter."""
    captions = source(photos, "captions", cached_views=2)
    assert computed(tmp_path, captions) == 40
    questions = source(photos, "questions", 5, 20, "vqa", augment="none")
    assert computed(tmp_path, captions, questions) == 0
    assert torch.equal(questions.features.read([0], [2]), captions.features.read([0], [7]))
    more = source(photos, "more", 0, 10, "vqa", cached_views=3)
    assert computed(tmp_path, more) == 10, "the third view alone"
    assert torch.equal(more.features.read([1], [2]), captions.features.read([1], [2]))
    assert computed(tmp_path, source(photos, "other", crop_scale=(0.5, 1.0), cached_views=2)) == 20
    phrases = source(photos, "phrases", task="grounding", cached_views=2)
    assert computed(tmp_path, phrases) == 20, "crops around boxes are others"
    assert computed(tmp_path, source(photos, "phrases", 3, 20, "grounding", cached_views=2)) == 17, "so are other boxes"


def test_a_recipe_shares_them(photos: Path, tmp_path: Path) -> None:
    notes: list[str] = []

    def watch(kind: str, figures: dict[str, Any]) -> None:
        notes.append(figures.get("text", ""))

    recipe = photo_recipe(photos, tmp_path / "run")
    sources = Trainer(recipe, watch).sources
    assert "features of 40 views of images are computed" in notes
    assert sources["texts"].features is None and len(sources["photos"].features) == 2
    notes.clear()
    Trainer(recipe, watch)
    assert not any("features" in note for note in notes)


@pytest.mark.parametrize("fail_at", [4, 8, 15])
def test_goes_on_where_it_broke_off(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fail_at: int
) -> None:
    monkeypatch.setattr(features, "BATCH", 4)
    monkeypatch.setattr(features, "CHUNK", 8)
    one, visual = source(photos, cached_views=2), encoder()
    counting = Counting(visual, fail_at)
    with pytest.raises(KeyboardInterrupt):
        FeatureCache(visual, [one], tmp_path / "broken").compute()
    kept = counting.seen // 8 * 8
    assert computed(tmp_path / "broken", one) == 40 - kept
    other = source(photos, cached_views=2)
    assert computed(tmp_path / "whole", other) == 40
    for view in range(2):
        assert torch.equal(one.features.read([view] * 20, range(20)), other.features.read([view] * 20, range(20)))
    assert (one.placements == other.placements).all()


def test_features_are_of_these_pictures_and_this_encoder(photos: Path, tmp_path: Path) -> None:
    """Another picture under the same name and other statistics of batch norms are other features; the same picture
    elsewhere, or written again, is not."""
    shutil.copytree(photos, tmp_path / "photos")
    one = source(tmp_path / "photos")
    assert computed(tmp_path / "features", one) == 20
    os.utime(one.images[4], ns=(1, 1))
    assert computed(tmp_path / "features", one) == 0
    shutil.copytree(tmp_path / "photos", tmp_path / "moved")
    assert computed(tmp_path / "features", source(tmp_path / "moved")) == 0
    Image.new("RGB", (30, 20), "red").save(one.images[4])
    assert computed(tmp_path / "features", one) == 1
    visual = encoder()
    visual.register_buffer("running_mean", torch.ones(1))
    assert computed(tmp_path / "features", one, visual=visual) == 20


@pytest.mark.parametrize("size", [2, 3])
def test_processes_share_the_work(photos: Path, tmp_path: Path, size: int) -> None:
    one = source(photos, cached_views=2)
    seen = []
    for rank in range(size):
        visual = encoder()
        counting = Counting(visual)
        FeatureCache(visual, [one], tmp_path).compute(world=World(rank, size, 0))
        seen.append(counting.seen)
    assert sum(seen) == 40 and max(seen) - min(seen) <= 2 * 2
    assert computed(tmp_path, one) == 0


def test_a_damaged_chunk_is_computed_again(photos: Path, tmp_path: Path) -> None:
    one = source(photos)
    computed(tmp_path, one)
    want = one.features.read([0], [7])
    for file in tmp_path.rglob("*.npy"):
        file.write_bytes(file.read_bytes()[:200])
    assert computed(tmp_path, one) == 20
    assert torch.equal(one.features.read([0], [7]), want)


def test_an_image_that_cannot_be_read(photos: Path, tmp_path: Path) -> None:
    shutil.copytree(photos, tmp_path / "photos")
    (tmp_path / "photos" / "images" / "13.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match="source a: .*13.png"):
        computed(tmp_path / "features", source(tmp_path / "photos"))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e6])
def test_features_that_are_not_finite(tmp_path: Path, bad: float) -> None:
    values = torch.zeros(2, 4, 3)
    values[1, 2, 0] = bad
    with pytest.raises(CheckpointError, match="not finite"):
        quantise(values, FeatureStore(tmp_path, 4, 3).layout)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 100.0, 6e4])
def test_quantised_to_half_a_step(tmp_path: Path, scale: float) -> None:
    store = FeatureStore(tmp_path, 50, 6)
    values = scale * torch.randn(3, 50, 6, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    values[..., 0], values[..., 1] = 0.0, scale
    keys = [random.Random(k).randbytes(16) for k in range(3)]
    store.add(keys, quantise(values, store.layout), np.zeros((3, 4)))
    row = FeatureStore(tmp_path, 50, 6)[keys[1]]
    got = row["cells"].astype(np.float32) * row["step"].astype(np.float32) + row["low"].astype(np.float32)
    span = 2 * scale
    # half a step, what fp16 loses of the lowest value, and the smallest number of fp16
    assert np.abs(got - values[1].numpy()).max() <= span / 255 * 0.65 + scale * 5e-4 + 1e-7 * 255
    assert (got[:, 0] == 0).all()


def test_progress_is_told(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "BATCH", 4)
    monkeypatch.setattr(features, "TELL_SECONDS", 0)
    told: list[dict[str, Any]] = []
    cache = FeatureCache(encoder(), [source(photos)], tmp_path)
    cache.compute(lambda kind, figures: told.append(figures) if kind == "features" else None)
    assert [figures["done"] for figures in told] == [4, 8, 12, 16, 20, 20]
    assert all(figures["total"] == 20 and figures["eta_seconds"] >= 0 for figures in told)
    assert told[-1]["eta_seconds"] == 0 and told[0]["images_per_second"] > 0
