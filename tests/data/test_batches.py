"""Batches: determined by (seed, step, rank), every image once an epoch, nothing bad hidden."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mplug_core.data.batches import Batch, Drawn, Source, Steps, image_groups
from mplug_core.data.records import CaptionRecord, QuestionRecord, StatementRecord
from mplug_core.errors import DataError
from mplug_core.recipe import SourceSection, VisionSection

VISION = VisionSection(image_size=8)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Twelve pictures, each of one grey."""
    folder = tmp_path_factory.mktemp("photos")
    for k in range(12):
        Image.new("RGB", (16, 16), (20 * k,) * 3).save(folder / f"{k}.png")
    return [folder / f"{k}.png" for k in range(12)]


def encode(drawn: list[Drawn], rng: random.Random) -> dict[str, torch.Tensor]:
    """The rows of each record, the number in its image's name, and a draw."""
    rows = torch.tensor([rows for rows, _ in drawn])
    names = [int(Path(str(getattr(r, "image", None) or r.images[0])).stem) for _, r in drawn]
    return {"rows": rows, "names": torch.tensor(names), "draw": torch.tensor([rng.random() for _ in drawn])}


def captions(photos: list[Path]) -> dict[str, list[Any]]:
    return {"pretrain": [CaptionRecord(p, (f"photo {p.stem}",), p.stem) for p in photos]}


def source(records: dict[str, list[Any]], **section: Any) -> Source:
    values = {"path": "x", "batch_size": 4, "augment": "crop", "tasks": dict.fromkeys(records, 1), **section}
    return Source("photos", SourceSection(**values), records, VISION, dict.fromkeys(records, encode))


def same(one: Batch, other: Batch) -> bool:
    def flat(batch: Batch) -> Iterator[torch.Tensor]:
        yield batch.image_ids
        if batch.pixels is not None:
            yield batch.pixels
        for block in batch.blocks.values():
            yield from block.values()

    return all(torch.equal(a, b) for a, b in zip(flat(one), flat(other), strict=True))


def test_determined_by_seed_step_and_rank(photos: list[Path]) -> None:
    first = source(captions(photos)).draw(3, 5, 1, 2)
    torch.manual_seed(99), random.seed(99), np.random.seed(99)
    again = source(captions(photos)).draw(3, 5, 1, 2)
    assert same(first, again)
    one = source(captions(photos))
    assert not torch.equal(one.draw(3, 5, 1, 2).image_ids, one.draw(4, 5, 1, 2).image_ids)
    assert not torch.equal(one.draw(3, 4, 1, 2).image_ids, one.draw(3, 5, 1, 2).image_ids)


def test_drawing_leaves_the_global_random_states_alone(photos: list[Path]) -> None:
    torch.manual_seed(0), random.seed(0)
    before = torch.get_rng_state(), random.getstate()
    source(captions(photos), augment="randaugment").draw(0, 0, 0, 1)
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]


@pytest.mark.parametrize("world", [1, 3])
def test_an_epoch_has_every_image_once_and_ranks_share_none(photos: list[Path], world: int) -> None:
    one = source(captions(photos))
    assert one.steps_per_epoch(world) == 3 // world
    for epoch in range(2):
        seen = [
            i for step in range(3 // world) for rank in range(world)
            for i in one.draw(0, epoch * (3 // world) + step, rank, world).image_ids.tolist()
        ]  # fmt: skip
        assert sorted(seen) == list(range(12))


def test_epochs_are_shuffled_anew(photos: list[Path]) -> None:
    one = source(captions(photos))
    orders = [[one.draw(0, 3 * epoch + s, 0, 1).image_ids.tolist() for s in range(3)] for epoch in range(2)]
    assert orders[0] != orders[1]


def test_any_number_of_processes_draws_the_same_global_batch(photos: list[Path]) -> None:
    whole = source(captions(photos), batch_size=6).draw(0, 1, 0, 1).image_ids.tolist()
    parts = [source(captions(photos), batch_size=2).draw(0, 1, rank, 3).image_ids.tolist() for rank in range(3)]
    assert [i for part in parts for i in part] == whole


def test_blocks_point_at_their_images(photos: list[Path]) -> None:
    one = source(captions(photos), augment="none")
    batch = one.draw(0, 0, 0, 1)
    block = batch.blocks["pretrain"]
    for row, name in zip(block["rows"][:, 0], block["names"], strict=True):
        assert batch.image_ids[row] == name  # photos are numbered in the order of the records
        grey = (20 * int(name) / 255 - VISION.mean[0]) / VISION.std[0]
        assert torch.allclose(batch.pixels[row, 0], torch.tensor(grey), atol=1e-3)


def test_pairs_are_drawn_together(photos: list[Path]) -> None:
    pairs = [(photos[k], photos[k + 1]) for k in range(0, 12, 2)]
    records = {**captions(photos), "statements": [StatementRecord(pair, "true", True) for pair in pairs]}
    one = source(records)
    assert one.per_group == 2 and one.groups_per_batch() == 2
    for step in range(3):
        batch = one.draw(0, step, 0, 1)
        assert len(batch.image_ids) == 4
        left, right = batch.image_ids[batch.blocks["statements"]["rows"]].T
        assert torch.equal(right, left + 1) and len(left) == 2


def test_groups() -> None:
    assert image_groups(5, [(0,), (1, 3), (3, 4)]) == [[0], [1, 3, 4], [2]]


def test_several_records_of_an_image(photos: list[Path]) -> None:
    questions = [QuestionRecord(p, f"q{k}", ("a",), (1.0,), "") for p in photos for k in range(5)]
    records = {**captions(photos), "vqa": questions}
    batch = source(records, tasks={"pretrain": 2, "vqa": 3}).draw(0, 0, 0, 1)
    assert len(batch.blocks["pretrain"]["rows"]) == 4 * 2 and len(batch.blocks["vqa"]["rows"]) == 4 * 3
    few = source({"vqa": questions}, tasks={"vqa": 99}).draw(0, 0, 0, 1)
    assert len(few.blocks["vqa"]["rows"]) == 4 * 5


def test_images_without_records_of_a_task(photos: list[Path]) -> None:
    records = {**captions(photos), "vqa": [QuestionRecord(photos[0], "q", ("a",), (1.0,), "")]}
    one = source(records)
    found = [("vqa" in batch.blocks, 0 in batch.image_ids) for batch in (one.draw(0, s, 0, 1) for s in range(3))]
    assert all(has == there for has, there in found) and sum(has for has, _ in found) == 1


def test_limit(photos: list[Path]) -> None:
    assert len(source(captions(photos), limit=5).images) == 5


def test_batch_larger_than_the_data(photos: list[Path]) -> None:
    batch = source(captions(photos[:3]), batch_size=8).draw(0, 0, 0, 1)
    assert len(batch.image_ids) == 8 and len(batch.blocks["pretrain"]["rows"]) == 8


def test_bad_images_are_counted_and_left_out(photos: list[Path], tmp_path: Path) -> None:
    broken, missing = tmp_path / "100.png", tmp_path / "101.png"
    broken.write_bytes(photos[5].read_bytes()[:40])
    chosen = [photos[0], broken, photos[1], missing]
    pairs = [StatementRecord((photos[0], photos[1]), "", True), StatementRecord((photos[0], broken), "", True)]
    batch = source({**captions(chosen), "statements": pairs}).batch([0, 1, 2, 3], random.Random(0))
    assert sorted(batch.bad) == [f"{broken}: broken", f"{missing}: missing"]
    assert sorted(batch.image_ids.tolist()) == [0, 2] and len(batch.pixels) == 2
    assert sorted(batch.blocks["pretrain"]["names"].tolist()) == [0, 1]
    # a pair with a bad image is no pair
    assert batch.blocks["statements"]["rows"].shape == (1, 2)


def test_batch_without_any_readable_image(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no image of a batch can be read, first: .*missing"):
        source(captions([tmp_path / f"{k}.png" for k in range(4)])).draw(0, 0, 0, 1)


def test_no_records() -> None:
    with pytest.raises(DataError, match="no records"):
        source({"pretrain": []})


@pytest.mark.parametrize("augment", ["none", "flip", "crop", "randaugment"])
def test_augmentations(photos: list[Path], augment: str) -> None:
    one = source(captions(photos), augment=augment)
    image = one.load(photos[3], random.Random(0))
    assert image.shape == (3, 8, 8) and torch.equal(image, one.load(photos[3], random.Random(0)))
    assert torch.equal(
        one.load(photos[3], None), source(captions(photos), augment="none").load(photos[3], random.Random(1))
    )


def test_flip_turns_half_of_the_images(tmp_path: Path) -> None:
    image = Image.new("L", (8, 8))
    image.putdata([255 if x < 4 else 0 for _ in range(8) for x in range(8)])
    image.save(tmp_path / "1.png")
    one = source(captions([tmp_path / "1.png"]), augment="flip")
    left = [bool(one.load(tmp_path / "1.png", random.Random(k))[0, 0, 0] > 0) for k in range(200)]
    assert 70 < sum(left) < 130


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_resumes_and_workers_change_nothing(photos: list[Path], workers: int) -> None:
    steps = Steps([source(captions(photos)), source(captions(photos[:6]))], seed=7, rank=1, world=2)
    want = [steps[s] for s in range(3, 6)]
    torch.manual_seed(0)
    before = torch.get_rng_state()
    got = list(steps.loader(3, 6, workers))
    assert torch.equal(torch.get_rng_state(), before), "the loader draws from the state that dropout uses"
    assert len(got) == 3
    for one, other in zip(got, want, strict=True):
        assert len(one) == 2 and all(same(a, b) for a, b in zip(one, other, strict=True))


def test_text_only_source() -> None:
    records = {"caption": [CaptionRecord(None, (f"text {k}",), str(k)) for k in range(6)]}
    encode_texts = {"caption": lambda drawn, rng: {"rows": torch.tensor([rows for rows, _ in drawn])}}
    section = SourceSection(path="x", batch_size=4, text_only=True, tasks={"caption": 1})
    one = Source("texts", section, records, VISION, encode_texts)
    one.aligned = np.arange(6, dtype=np.float32)[None, :, None].repeat(2, -1)
    batch = one.draw(0, 0, 0, 1)
    assert batch.pixels is None and batch.features is None
    assert batch.stand_in.shape == (4, 2) and torch.equal(batch.stand_in[:, 0].long(), batch.image_ids)
    assert batch.blocks["caption"]["rows"].flatten().tolist() == [0, 1, 2, 3]


def test_cached_features(photos: list[Path]) -> None:
    one = source(captions(photos))
    one.features = np.arange(2 * 12, dtype=np.float16).reshape(2, 12, 1, 1)
    batch = one.draw(0, 0, 0, 1)
    assert batch.pixels is None and batch.features.shape == (4, 1, 1)
    assert torch.equal(batch.features.flatten().long() % 12, batch.image_ids)


def test_to_moves_and_casts_floats_alone(photos: list[Path]) -> None:
    batch = source(captions(photos)).draw(0, 0, 0, 1).to(torch.device("cpu"), torch.bfloat16)
    assert batch.pixels.dtype == torch.bfloat16 and batch.image_ids.dtype == torch.int64
    assert batch.blocks["pretrain"]["rows"].dtype == torch.int64 and batch.source == "photos"
