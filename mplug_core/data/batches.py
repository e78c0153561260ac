"""Records to batches. A batch has every image once, and beside it the texts of each task with the rows they belong to.

A step's global batch consists of lots, one for each process and accumulated part, which are numbered through the run.
A lot is determined by (seed, number) alone: a run resumes at any step by asking for its lots, with any number of loader
workers, and any split of the global batch over processes draws the same images and the same random choices.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mplug_core.data.images import open_image, placed_transform, train_transform
from mplug_core.data.placement import WHOLE, Box, Placement, adapt, names_direction
from mplug_core.errors import DataError, ImageError
from mplug_core.recipe import SourceSection, VisionSection

Block = dict[str, Tensor]
Drawn = tuple[tuple[int, ...], Any]
"""A record and the rows of its images in the batch. In training the record is true of the images as they are shown:
boxes are shares of the model's square, and on a mirrored picture left is right (:func:`adapt`)."""

ATTEMPTS = 8
"""Batches that are tried in the place of one whose images can't be read."""

Encode = Callable[[list[Drawn], random.Random], Block]


@dataclass
class Batch:
    """The part of a step that comes from one source.

    One of ``pixels`` [B, 3, S, S], ``features`` [B, N, C] (of the frozen backbone, computed before) and ``stand_in``
    [B, E] (text features that stand in for images) is there; ``aligned`` [B, E] are contrastive features known before.
    ``image_ids`` [B] are equal only for the same image. ``blocks``: what each task's encoder made; ``bad``: images
    that could not be read. Blocks named in ``weightless`` are not of these images: another process has records of the
    task here, and what they teach nobody is computed so that all processes run the same modules.
    """

    source: str
    image_ids: Tensor
    pixels: Tensor | None = None
    features: Tensor | None = None
    stand_in: Tensor | None = None
    aligned: Tensor | None = None
    blocks: dict[str, Block] = field(default_factory=dict)
    bad: list[str] = field(default_factory=list)
    weightless: frozenset[str] = frozenset()

    def add_weightless(self, task: str, block: Block, order: Sequence[str]) -> None:
        """Take a block of other images in the place of one that there is not; ``order``: of the tasks."""
        # rows of images that are here, whichever: the loss has no weight
        self.blocks[task] = {**block, "image": block["image"] % len(self.image_ids)}
        self.blocks = {name: self.blocks[name] for name in order if name in self.blocks}
        self.weightless |= {task}

    def to(self, device: torch.device, dtype: torch.dtype) -> Batch:
        """On a device; pixels and features as ``dtype``."""

        def move(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.to(device, dtype if value.is_floating_point() else None, non_blocking=True)
            return {key: move(item) for key, item in value.items()} if isinstance(value, dict) else value

        return Batch(**{name: move(value) for name, value in vars(self).items()})


def image_groups(count: int, links: Sequence[tuple[int, ...]]) -> list[list[int]]:
    """Images that records join (pairs) in one group each: what is always drawn together."""
    owner = list(range(count))

    def root(i: int) -> int:
        while owner[i] != i:
            owner[i] = owner[owner[i]]
            i = owner[i]
        return i

    for first, *others in links:
        for other in others:
            owner[root(other)] = root(first)
    groups: dict[int, list[int]] = {}
    for i in range(count):
        groups.setdefault(root(i), []).append(i)
    return list(groups.values())


class NothingReadable(DataError):
    """No image of a batch can be read; ``bad`` has a line for each."""

    def __init__(self, source: str, bad: list[str]) -> None:
        super().__init__(f"source {source}: no image of a batch can be read, first: {bad[0]}", "repair the images")
        self.bad = bad


class Source:
    """One data set of the mix: images, and the records of each task on them."""

    def __init__(
        self,
        name: str,
        section: SourceSection,
        records: Mapping[str, Sequence[Any]],
        vision: VisionSection,
        encoders: Mapping[str, Encode],
    ) -> None:
        """``records``: of each task in ``section.tasks``, with ``image`` or ``images``; captions alone have neither."""
        self.name, self.section, self.vision = name, section, vision
        self.encoders = encoders
        self.features: np.ndarray | None = None  # [views, images, N, C], where they are computed before
        self.placements: np.ndarray | None = None  # [views, images, 4], beside the features: of a Placement
        self.aligned: np.ndarray | None = None  # [views, images, E] contrastive features, of texts for captions alone
        numbers: dict[Any, int] = {}
        self.by_image: list[dict[str, list[tuple[tuple[int, ...], Any]]]] = []
        links = []
        for task, items in records.items():
            for record in items[: section.limit]:
                rows = tuple(numbers.setdefault(key, len(numbers)) for key in image_keys(record))
                while len(self.by_image) < len(numbers):
                    self.by_image.append({})
                self.by_image[rows[0]].setdefault(task, []).append((rows, record))
                links.append(rows)
        self.images: list[Path | None] = [None if section.text_only else Path(key) for key in numbers]
        self.groups = image_groups(len(numbers), links)
        if not self.groups:
            raise DataError(f"source {name}: no records")
        self.per_group = max(len(group) for group in self.groups)

    def can_be_cut(self, pieces: int) -> bool:
        """Whether ``pieces`` batches of the section's size are as much as one of ``pieces`` times that size."""
        whole = max(1, pieces * self.section.batch_size // self.per_group)
        return self.groups_per_batch() * pieces == whole

    def groups_per_batch(self) -> int:
        """How many groups make ``batch_size`` images."""
        return max(1, self.section.batch_size // self.per_group)

    def steps_per_epoch(self, world: int) -> int:
        """Steps in which every image is drawn once."""
        return max(1, len(self.groups) // (self.groups_per_batch() * world))

    def draw(self, seed: int, lot: int) -> Batch:
        """The batch of one lot."""
        size = self.groups_per_batch()
        start = lot * size
        rng = random.Random(f"{seed}/{self.name}/{lot}")
        chosen = [image for place in range(start, start + size) for image in self._group_at(seed, place)]
        bad: list[str] = []
        for _ in range(ATTEMPTS):
            batch = None
            try:
                batch = self.batch(chosen, rng)
            except NothingReadable as error:
                bad += error.bad
            else:
                bad += batch.bad
                if batch.blocks:
                    break
            # of these images nothing can be learned, as they can't be read or no record is true of them as they are
            # shown: others take their place, and what can't be read is counted
            chosen = [image for _ in range(size) for image in rng.choice(self.groups)]
        if batch is None or (bad and not batch.blocks):
            raise NothingReadable(self.name, bad)
        batch.bad = bad
        return batch

    def _group_at(self, seed: int, place: int) -> list[int]:
        """The group at a place of the endless sequence of shuffled epochs."""
        epoch, offset = divmod(place, len(self.groups))
        if getattr(self, "_order_key", None) != (seed, epoch):
            self._order_key = (seed, epoch)
            self._order = np.random.default_rng([seed & 0x7FFFFFFF, epoch]).permutation(len(self.groups))
        return self.groups[self._order[offset]]

    def batch(self, images: Sequence[int], rng: random.Random) -> Batch:
        """The batch of these images with records drawn by ``rng``. DataError if none of the images can be read."""
        batch = Batch(self.name, torch.zeros(0))
        kept = list(images)
        if self.section.text_only:
            batch.stand_in = torch.from_numpy(self.aligned[0, kept])
            placements = [WHOLE] * len(kept)
        elif self.features is not None:
            views = [rng.randrange(len(self.features)) for _ in kept]
            batch.features = torch.from_numpy(np.stack([self.features[v, i] for v, i in zip(views, kept, strict=True)]))
            placements = self._placements_of(views, kept)
            if self.aligned is not None:
                batch.aligned = self._mixed_views(kept, rng)
        else:
            views, kept, batch.bad = self._read(kept, rng)
            batch.pixels = torch.stack([pixels for pixels, _ in views])
            placements = [placement for _, placement in views]
        batch.image_ids = torch.tensor(kept)
        rows = {image: row for row, image in enumerate(kept)}
        for task, per_image in self.section.tasks.items():
            counts = spread(per_image, len(kept), rng)
            drawn = []
            for image, count in zip(kept, counts, strict=True):
                known = self._true_of(image, task, rows, placements)
                picked = known if len(known) <= count else rng.sample(known, count)
                if task in ("pretrain", "caption", "retrieval") and known:
                    picked = [known[0]] * count  # a caption record holds all captions: the encoder draws one
                drawn += picked
            if drawn:
                batch.blocks[task] = self.encoders[task](drawn, rng)
        return batch

    def _true_of(self, image: int, task: str, rows: Mapping[int, int], placements: Sequence[Placement]) -> list[Drawn]:
        """The records of a task on an image as they are true of the batch's images, which lie as ``placements`` say."""
        found = []
        for images, record in self.by_image[image].get(task, ()):
            if all(i in rows for i in images):
                here = tuple(rows[i] for i in images)
                adapted = adapt(record, [placements[row] for row in here])
                if adapted is not None:
                    found.append((here, adapted))
        return found

    def _placements_of(self, views: Sequence[int], images: Sequence[int]) -> list[Placement]:
        """Where the pictures lie in these cached views."""
        return [Placement(*self.placements[v, i].tolist()) for v, i in zip(views, images, strict=True)]

    def _mixed_views(self, images: Sequence[int], rng: random.Random) -> Tensor:
        """Half the mean over an image's views, half a random mixture of two of them, of unit length [B, E]."""
        views = self.aligned[:, images]
        first, second = (np.stack([views[rng.randrange(len(views)), i] for i in range(len(images))]) for _ in "ab")
        share = np.array([[rng.random()] for _ in images], np.float32)
        mixed = views.mean(0) + share * first + (1 - share) * second
        return torch.from_numpy(mixed / np.linalg.norm(mixed, axis=-1, keepdims=True))

    def _read(
        self, images: Sequence[int], rng: random.Random
    ) -> tuple[list[tuple[Tensor, Placement]], list[int], list[str]]:
        """Views of the images that can be read, which ones those are, and a line for each of the others."""
        views, kept, bad = [], [], []
        for image in images:
            try:
                views.append(self.load(image, rng))
                kept.append(image)
            except ImageError as error:
                bad.append(f"{self.shown(image)}: {error.code}")
        if not kept:
            raise NothingReadable(self.name, bad)
        return views, kept, bad

    def shown(self, image: int) -> str:
        """What an image is called in messages."""
        return str(self.images[image])

    def load(self, image: int, rng: random.Random | None) -> tuple[Tensor, Placement]:
        """Normalised pixels [3, S, S] of an image and where its picture lies in them.

        Augmented as the source says with the random state ``rng``, plain without.
        """
        size, section = self.vision.image_size, self.section
        plain = rng is None or section.augment == "none"
        picture = open_image(self.images[image], target=size if plain else 2 * size)
        if plain:
            return placed_transform(self.vision)(picture)
        transform = train_transform(
            self.vision,
            scale=None if section.augment == "flip" else section.crop_scale,
            randaugment=(2, 7) if section.augment == "randaugment" else None,
            boxes=not _KNOW_PLACES.isdisjoint(section.tasks),
        )
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(rng.getrandbits(62))  # torch.manual_seed is the GPU's, too
            return transform(picture, self.targets(image) if "grounding" in section.tasks else None)

    def targets(self, image: int) -> list[Box]:
        """Boxes of an image that a crop may be made around: their phrases name no direction."""
        phrases = [record for _, record in self.by_image[image].get("grounding", ())]
        return [phrase.box for phrase in phrases if not names_direction(phrase.phrase)]


_KNOW_PLACES = {"grounding", "patches"}
"""Tasks whose targets are places in the picture."""


def spread(per_image: float, images: int, rng: random.Random) -> list[int]:
    """How many records each image gives, ``per_image`` on average; at least one in all."""
    whole, more = int(per_image), math.ceil((per_image - int(per_image)) * images)
    chosen = set(rng.sample(range(images), more))
    return [whole + (i in chosen) for i in range(images)]


def image_keys(record: Any) -> tuple[Any, ...]:
    """What tells the images of a record apart."""
    if hasattr(record, "images"):
        return tuple(record.images)
    return (record.image if record.image is not None else record.image_id,)


class Lots(Dataset):
    """Item m is the list of batches, one of each source, of this process's lot of micro-step m."""

    def __init__(self, sources: Sequence[Source], seed: int, rank: int = 0, world: int = 1) -> None:
        self.sources, self.seed, self.rank, self.world = list(sources), seed, rank, world

    def __getitem__(self, micro_step: int) -> list[Batch] | DataError:
        try:
            return [source.draw(self.seed, micro_step * self.world + self.rank) for source in self.sources]
        except DataError as error:
            # torch would raise what a worker raised with its traceback for a message
            return DataError(error.message, error.hint, error.code)

    def loader(self, first: int, last: int, workers: int = 0, timeout: float = 0) -> Iterator[list[Batch]]:
        """The micro-steps ``first`` .. ``last - 1`` in order.

        DataError when a worker has died, or gave nothing for ``timeout`` seconds (0: however long it takes).
        """
        # a generator of its own: the global one, which dropout draws from, must not know whether a run was resumed
        batches = DataLoader(
            self,
            batch_size=None,
            sampler=range(first, last),
            num_workers=workers,
            timeout=timeout if workers else 0,
            generator=torch.Generator().manual_seed(first),
            # sources hold closures and memory maps, which can't be sent to a fresh process
            multiprocessing_context="fork" if workers else None,
        )
        try:
            for drawn in batches:
                if isinstance(drawn, DataError):
                    raise drawn
                yield drawn
        except RuntimeError as error:
            if lost := lost_worker(error):
                raise DataError(lost, "free memory or lower data.workers, and run it again to go on") from error
            raise


def lost_worker(error: RuntimeError) -> str | None:
    """What to say of a loader that has lost a worker, if that is what an error of torch is about.

    torch notices a worker's death by a signal, so that its error may come from anywhere in the main thread.
    """
    text = str(error)
    if "exited unexpectedly" in text or "is killed by signal" in text:
        return "a worker of the data loader has died"
    if "DataLoader timed out" in text:
        return f"the data loader gave nothing for {text.rsplit('after ', 1)[-1].split(' ')[0]} seconds"
    return None
