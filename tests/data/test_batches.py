"""Batches: determined by (seed, step, rank), every image once an epoch, nothing bad hidden."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mplug_core.data.batches import Batch, Drawn, HeldFeatures, Lots, Source, image_groups
from mplug_core.data.placement import WHOLE, Placement, adapt
from mplug_core.data.records import CaptionRecord, PhraseRecord, QuestionRecord, StatementRecord
from mplug_core.errors import DataError
from mplug_core.recipe import DataSpec, SourceSection, VisionSection
from mplug_core.tasks.patches import PatchTask
from tests.small import CNN, small_config

VISION = VisionSection(image_size=8)
WHOLE_ROW = list(astuple(WHOLE))


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
    first = source(captions(photos)).draw(3, 2 * 5 + 1)
    torch.manual_seed(99), random.seed(99), np.random.seed(99)
    again = source(captions(photos)).draw(3, 2 * 5 + 1)
    assert same(first, again)
    one = source(captions(photos))
    assert not torch.equal(one.draw(3, 2 * 5 + 1).image_ids, one.draw(4, 2 * 5 + 1).image_ids)
    assert not torch.equal(one.draw(3, 2 * 4 + 1).image_ids, one.draw(3, 2 * 5 + 1).image_ids)


def test_drawing_leaves_the_global_random_states_alone(photos: list[Path]) -> None:
    torch.manual_seed(0), random.seed(0)
    before = torch.get_rng_state(), random.getstate()
    source(captions(photos), augment="randaugment").draw(0, 0)
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]


@pytest.mark.parametrize("world", [1, 3])
def test_an_epoch_has_every_image_once_and_ranks_share_none(photos: list[Path], world: int) -> None:
    one = source(captions(photos))
    assert one.steps_per_epoch(world) == 3 // world
    for epoch in range(2):
        seen = [
            i for step in range(3 // world) for rank in range(world)
            for i in one.draw(0, (epoch * (3 // world) + step) * world + rank).image_ids.tolist()
        ]  # fmt: skip
        assert sorted(seen) == list(range(12))


def test_epochs_are_shuffled_anew(photos: list[Path]) -> None:
    one = source(captions(photos))
    orders = [[one.draw(0, 3 * epoch + s).image_ids.tolist() for s in range(3)] for epoch in range(2)]
    assert orders[0] != orders[1]


def test_any_number_of_processes_draws_the_same_global_batch(photos: list[Path]) -> None:
    whole = source(captions(photos), batch_size=6).draw(0, 1).image_ids.tolist()
    parts = [source(captions(photos), batch_size=2).draw(0, 3 + rank).image_ids.tolist() for rank in range(3)]
    assert [i for part in parts for i in part] == whole


def test_blocks_point_at_their_images(photos: list[Path]) -> None:
    one = source(captions(photos), augment="none")
    batch = one.draw(0, 0)
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
        batch = one.draw(0, step)
        assert len(batch.image_ids) == 4
        left, right = batch.image_ids[batch.blocks["statements"]["rows"]].T
        assert torch.equal(right, left + 1) and len(left) == 2


def test_groups() -> None:
    assert image_groups(5, [(0,), (1, 3), (3, 4)]) == [[0], [1, 3, 4], [2]]


def test_several_records_of_an_image(photos: list[Path]) -> None:
    questions = [QuestionRecord(p, f"q{k}", ("a",), (1.0,), "") for p in photos for k in range(5)]
    records = {**captions(photos), "vqa": questions}
    batch = source(records, tasks={"pretrain": 2, "vqa": 3}).draw(0, 0)
    assert len(batch.blocks["pretrain"]["rows"]) == 4 * 2 and len(batch.blocks["vqa"]["rows"]) == 4 * 3
    few = source({"vqa": questions}, tasks={"vqa": 99}).draw(0, 0)
    assert len(few.blocks["vqa"]["rows"]) == 4 * 5


def test_images_without_records_of_a_task(photos: list[Path]) -> None:
    records = {**captions(photos), "vqa": [QuestionRecord(photos[0], "q", ("a",), (1.0,), "")]}
    one = source(records)
    found = [("vqa" in batch.blocks, 0 in batch.image_ids) for batch in (one.draw(0, s) for s in range(3))]
    assert all(has == there for has, there in found) and sum(has for has, _ in found) == 1


def test_limit(photos: list[Path]) -> None:
    assert len(source(captions(photos), limit=5).images) == 5


def test_batch_larger_than_the_data(photos: list[Path]) -> None:
    batch = source(captions(photos[:3]), batch_size=8).draw(0, 0)
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
        source(captions([tmp_path / f"{k}.png" for k in range(4)])).draw(0, 0)


@pytest.mark.parametrize("workers", [0, 1])
def test_what_ends_a_loader_is_said_as_without_workers(tmp_path: Path, workers: int) -> None:
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    records = {"caption": [CaptionRecord(tmp_path / "bad.jpg", ("a",), "0")]}
    with pytest.raises(DataError, match="^source photos: no image of a batch can be read") as caught:
        next(Lots([source(records)], 0).loader(0, 3, workers))
    assert caught.value.hint == "repair the images" and caught.value.exit_code == 3


def test_batches_of_images_that_belong_together_can_t_always_be_cut(photos: list[Path]) -> None:
    pairs = {"statements": [StatementRecord((photos[0], photos[1]), "s", True, "0")]}
    assert source(pairs, batch_size=4).can_be_cut(2)  # of 8: 4 pairs, 2 and 2
    assert not source(pairs, batch_size=1).can_be_cut(4)  # of 4: 2 pairs, not 1 for each of 4


def test_a_batch_of_which_nothing_is_true_is_drawn_anew(photos: list[Path]) -> None:
    """A pair of which an image is mirrored, and its statement, which names a side."""
    pairs = [(photos[2 * k], photos[2 * k + 1]) for k in range(6)]
    section = SourceSection(path="x", batch_size=2, augment="flip", tasks={"statements": 1})
    texts = ["a dog is left of a cat"] + ["there are two dogs"] * 5
    records = {"statements": [StatementRecord(pair, text, True) for pair, text in zip(pairs, texts, strict=True)]}
    one = Source("s", section, records, VISION, {"statements": encode})
    drawn = [one.draw(0, step) for step in range(12)]
    assert all(batch.blocks["statements"]["rows"].tolist() == [[0, 1]] and not batch.bad for batch in drawn)


def test_no_records() -> None:
    with pytest.raises(DataError, match="no records"):
        source({"pretrain": []})


@pytest.mark.parametrize("augment", ["none", "flip", "crop", "randaugment"])
def test_augmentations(photos: list[Path], augment: str) -> None:
    one = source(captions(photos), augment=augment)
    image, placement = one.load(3, random.Random(0))
    again, same_placement = one.load(3, random.Random(0))
    assert image.shape == (3, 8, 8) and torch.equal(image, again) and placement == same_placement
    plain, whole = one.load(3, None)
    assert whole == WHOLE and torch.equal(plain, source(captions(photos), augment="none").load(3, random.Random(1))[0])


def test_flip_turns_half_of_the_images(tmp_path: Path) -> None:
    image = Image.new("L", (8, 8))
    image.putdata([255 if x < 4 else 0 for _ in range(8) for x in range(8)])
    image.save(tmp_path / "1.png")
    one = source(captions([tmp_path / "1.png"]), augment="flip")
    seen = [one.load(0, random.Random(k)) for k in range(200)]
    left = [bool(pixels[0, 0, 0] > 0) for pixels, _ in seen]
    assert 70 < sum(left) < 130
    assert [placement.flipped for _, placement in seen] == [not value for value in left]


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_resumes_and_workers_change_nothing(photos: list[Path], workers: int) -> None:
    lots = Lots([source(captions(photos)), source(captions(photos[:6]))], seed=7, rank=1, world=2)
    want = [lots[s] for s in range(3, 6)]
    torch.manual_seed(0)
    before = torch.get_rng_state()
    got = list(lots.loader(3, 6, workers))
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
    batch = one.draw(0, 0)
    assert batch.pixels is None and batch.features is None
    assert batch.stand_in.shape == (4, 2) and torch.equal(batch.stand_in[:, 0].long(), batch.image_ids)
    assert batch.blocks["caption"]["rows"].flatten().tolist() == [0, 1, 2, 3]


def test_cached_features(photos: list[Path]) -> None:
    one = source(captions(photos))
    one.features = HeldFeatures(np.arange(2 * 12, dtype=np.float16).reshape(2, 12, 1, 1))
    one.placements = np.array([[WHOLE_ROW] * 12] * 2)
    batch = one.draw(0, 0)
    assert batch.pixels is None and batch.features.shape == (4, 1, 1)
    assert torch.equal(batch.features.flatten().long() % 12, batch.image_ids)
    one.cached = False
    batch = one.draw(0, 0)
    assert batch.features is None and batch.pixels.shape == (4, 3, VISION.image_size, VISION.image_size)


def test_to_moves_and_casts_floats_alone(photos: list[Path]) -> None:
    batch = source(captions(photos)).draw(0, 0).to(torch.device("cpu"), torch.bfloat16)
    assert batch.pixels.dtype == torch.bfloat16 and batch.image_ids.dtype == torch.int64
    assert batch.blocks["pretrain"]["rows"].dtype == torch.int64 and batch.source == "photos"


@pytest.mark.parametrize("images", [1, 4, 5, 100])
def test_a_part_is_as_if_there_were_no_others(photos: list[Path], images: int) -> None:
    """Images that records join stay together, and batches stay as large."""
    pairs = [StatementRecord((photos[k], photos[k + 1]), "s", True) for k in range(0, 8, 2)]
    records = {"statements": pairs, "caption": captions(photos)["pretrain"]}
    one, whole = source(records), source(records)
    one.keep_part(images, seed=3)
    assert min(images, 12) <= len(one.images) <= min(images + 1, 12)
    assert one.groups_per_batch() == whole.groups_per_batch()
    assert sorted(image for group in one.groups for image in group) == list(range(len(one.images)))
    for image, path in enumerate(one.images):
        for task, found in one.by_image[image].items():
            for rows, record in found:
                named = record.images if task == "statements" else (record.image,)
                assert tuple(one.images[row] for row in rows) == named and path in named
    count = sum(len(found) for tasks in one.by_image for found in tasks.values())
    assert (count == 16) == (images == 100) and one.draw(0, 5).blocks


# -- what a moved picture means for its records --------------------------------------------------------------------


class Kept:
    """An encoder that keeps what it was given."""

    def __init__(self) -> None:
        self.drawn: list[Drawn] = []

    def __call__(self, drawn: list[Drawn], rng: random.Random) -> dict[str, torch.Tensor]:
        self.drawn += drawn
        return {"rows": torch.tensor([rows for rows, _ in drawn])}


SPOT = (0.5, 0.25, 0.75, 0.5)
"""Where the white square of the picture lies."""


@pytest.fixture(scope="module")
def spotted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A black picture of 80 x 40 pixels with a white rectangle at SPOT."""
    image = Image.new("RGB", (80, 40))
    image.paste((255, 255, 255), tuple(int(v * n) for v, n in zip(SPOT, (80, 40) * 2, strict=True)))
    file = tmp_path_factory.mktemp("spot") / "1.png"
    image.save(file)
    return file


def on_spot(image: Path, phrase: str = "the white spot", augment: str = "crop", fit: str = "squash") -> Any:
    """A source of one phrase on the picture, and the encoder that keeps its records."""
    kept = Kept()
    section = SourceSection(path="x", batch_size=1, augment=augment, tasks={"grounding": 1}, crop_scale=(0.3, 1.0))
    vision = VisionSection(image_size=64, fit=fit)
    return Source("s", section, {"grounding": [PhraseRecord(image, phrase, SPOT)]}, vision, {"grounding": kept}), kept


def white(pixels: torch.Tensor) -> list[float]:
    """The box around the bright pixels [S, S], in shares."""
    rows, columns = (pixels > 0).nonzero().T
    size = len(pixels)
    return [columns.min() / size, rows.min() / size, (columns.max() + 1) / size, (rows.max() + 1) / size]


@pytest.mark.parametrize("fit", ["squash", "pad"])
@pytest.mark.parametrize("augment", ["none", "flip", "crop", "randaugment"])
def test_the_box_is_where_the_thing_is(spotted: Path, augment: str, fit: str) -> None:
    one, kept = on_spot(spotted, augment=augment, fit=fit)
    for step in range(30):
        batch = one.draw(0, step)
        (_, record), seen = kept.drawn[-1], batch.pixels[0].mean(0)
        seen[seen == 0] = seen.min()  # padding is as black as the picture
        # RandAugment changes brightness: what is brighter than the middle between black and white
        seen = seen - (seen.max() + seen.min()) / 2
        # equalising and sharpening widen the rim that resizing has blurred
        tolerance = (2.5 if augment == "randaugment" else 1.6) / 64
        assert white(seen) == pytest.approx(record.box, abs=tolerance), (augment, fit, step)
    assert len(kept.drawn) == 30, "the crop is made around the target, so that no record is lost"
    assert (len({record.box for _, record in kept.drawn}) > 1) == (augment != "none")


def test_half_of_the_pictures_are_cropped_and_directions_never(spotted: Path) -> None:
    def cropped(phrase: str) -> float:
        one, _ = on_spot(spotted, phrase)
        return sum(one.load(0, random.Random(k))[1].crops for k in range(200)) / 200

    assert 0.35 < cropped("the white spot") < 0.6
    assert cropped("the spot on the left") == 0


def test_texts_follow_the_flip(photos: list[Path]) -> None:
    kept = Kept()
    records = {
        "pretrain": [CaptionRecord(p, ("a dog left of a cat",), p.stem) for p in photos],
        "vqa": [QuestionRecord(p, "what is on the right", ("left",), (1.0,), "") for p in photos],
    }
    section = SourceSection(path="x", batch_size=12, augment="flip", tasks={"pretrain": 1, "vqa": 1})
    one = Source("s", section, records, VISION, dict.fromkeys(records, kept))
    one.features = HeldFeatures(np.zeros((1, 12, 1, 1), np.float16))
    mirrored = [k % 3 == 0 for k in range(12)]
    one.placements = np.array([[[-1.0, 1, 1, 0] if m else WHOLE_ROW for m in mirrored]])
    ids = one.draw(0, 0).image_ids
    assert len(kept.drawn) == 24
    for (row,), record in kept.drawn:
        flipped = mirrored[int(ids[row])]
        if isinstance(record, CaptionRecord):
            assert record.captions == ("a dog right of a cat" if flipped else "a dog left of a cat",)
        else:
            side = ("what is on the left", ("right",)) if flipped else ("what is on the right", ("left",))
            assert (record.question, record.answers) == side


def test_cached_views_move_boxes(photos: list[Path]) -> None:
    """View 0 is plain; view 1 is the right half of the picture, in which the one box lies and not the other."""
    kept = Kept()
    records = {
        "grounding": [
            record
            for p in photos
            for record in (
                PhraseRecord(p, "the one", (0.5, 0.0, 0.75, 1.0)),
                PhraseRecord(p, "the other", (0.0, 0.0, 0.25, 1.0)),
                PhraseRecord(p, "the right one", (0.5, 0.0, 0.75, 1.0)),
            )
        ]
    }
    section = SourceSection(path="x", batch_size=12, augment="crop", tasks={"grounding": 3})
    one = Source("s", section, records, VISION, {"grounding": kept})
    one.features = HeldFeatures(np.repeat(np.arange(2, dtype=np.float16), 12).reshape(2, 12, 1, 1))
    half = list(astuple(Placement.of_region((0.5, 0.0, 1.0, 1.0), False)))
    one.placements = np.array([[WHOLE_ROW] * 12, [half] * 12])
    batch = one.draw(0, 0)
    shown: dict[int, dict[str, Any]] = {}
    for (row,), record in kept.drawn:
        shown.setdefault(int(row), {})[record.phrase] = record.box
    cropped = batch.features[:, 0, 0] == 1
    assert 0 < cropped.sum() < 12
    for row in range(12):
        if cropped[row]:
            assert shown[row] == {"the one": (0.0, 0.0, 0.5, 1.0)}
        else:
            assert shown[row]["the other"] == (0.0, 0.0, 0.25, 1.0) and len(shown[row]) == 3


def test_dense_labels_follow_the_flip(scenes: Path) -> None:
    """The mirrored labels are the labels of the mirrored picture, and a cropped scene has none."""
    task = PatchTask(small_config(vision={**CNN, "image_size": 32}), 4)
    record = task.read(DataSpec(path=str(scenes), split="train")).records[0]
    mirror = Placement.of_region((0, 0, 1, 1), flipped=True)
    plain, mirrored = (task.encode([((0,), adapt(record, [p]))], random.Random(0), None) for p in (WHOLE, mirror))
    for name in ("shape", "color", "size"):
        assert torch.equal(mirrored[name], plain[name].flip(-1)) and plain[name].any()
    x0, y0, x1, y1 = plain["box"].flip(2).unbind(-1)
    inside = plain["shape"].flip(-1) > 0
    assert torch.allclose(mirrored["box"][inside], torch.stack([1 - x1, y0, 1 - x0, y1], -1)[inside], atol=1e-6)
    assert adapt(record, [Placement.of_region((0, 0, 0.5, 1), False)]) is None


def test_boxes_without_a_meaning_are_left_out(photos: list[Path]) -> None:
    kept = Kept()
    bad = [(0.5, 0.5, 0.5, 0.9), (float("nan"), 0, 1, 1), (2.0, 2.0, 3.0, 3.0), (0.6, 0.1, 0.4, 0.9)]
    records = {
        "grounding": [PhraseRecord(photos[0], f"bad {box}", box) for box in bad],
        "pretrain": captions(photos[:1])["pretrain"],
    }
    section = SourceSection(path="x", batch_size=1, augment="crop", tasks={"grounding": 9, "pretrain": 1})
    one = Source("s", section, records, VISION, {"grounding": kept, "pretrain": encode})
    batch = one.draw(0, 0)
    assert set(batch.blocks) == {"pretrain"} and not kept.drawn
