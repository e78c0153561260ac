"""Records to batches. A batch has every image once, and beside it the texts of each task with the rows they belong to.

A step's global batch consists of lots, one for each process and accumulated part, which are numbered through the run.
A lot is determined by (seed, number) alone: a run resumes at any step by asking for its lots, with any number of loader
workers, and any split of the global batch over processes draws the same images and the same random choices.
"""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mplug_core.data.images import open_image, picture_shape, placed_transform, train_transform
from mplug_core.data.placement import WHOLE, Box, Placement, adapt, names_direction, upright
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

    ``weight`` is that of the batch's images in the mean over sources; ``grid_dropout`` [B] the chance of each to be
    shown by its summary tokens alone; a batch that is ``alone`` is not merged with others, and of one that was merged
    ``drawn`` says how many images each task was drawn from.
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
    weight: float = 1.0
    grid_dropout: Tensor | None = None
    alone: bool = False
    drawn: dict[str, int] = field(default_factory=dict)

    def images_of(self, task: str) -> int:
        """How many images records of a task were drawn from."""
        return self.drawn.get(task, len(self.image_ids))

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


class Features(Protocol):
    """Visual features of a source's images, computed before: a few views of each, as many as its length."""

    def __len__(self) -> int: ...

    def read(self, views: Sequence[int], images: Sequence[int]) -> Tensor:
        """[B, N, C] of these images in these views."""


@dataclass(frozen=True)
class HeldFeatures:
    """Features that are in memory: [views, images, N, C]."""

    array: np.ndarray

    def __len__(self) -> int:
        return len(self.array)

    def read(self, views: Sequence[int], images: Sequence[int]) -> Tensor:
        return torch.from_numpy(np.stack([self.array[v, i] for v, i in zip(views, images, strict=True)]))


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
        self.features: Features | None = None  # where they are computed before
        self.cached = True  # whether batches have features, as far as there are any: not where the encoder learns
        self._settled: set[int] = set()  # images whose boxes are known to be the picture's
        self._strange: list[str] = []  # lines on boxes of other pictures, not yet told
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

    def keep_part(self, images: int, seed: int) -> None:
        """Leave about ``images`` images, chosen by the seed, as if there were no others. Batches stay as large."""
        order = np.random.default_rng(seed & 0x7FFFFFFF).permutation(len(self.groups))
        ends = np.cumsum([len(self.groups[k]) for k in order])
        kept = [self.groups[k] for k in sorted(order[: int(np.searchsorted(ends, images)) + 1])]
        number = {image: place for place, image in enumerate(image for group in kept for image in group)}
        self.images = [self.images[image] for image in number]
        self.by_image = [
            {task: [(tuple(number[i] for i in rows), record) for rows, record in records]
             for task, records in self.by_image[image].items()}
            for image in number
        ]  # fmt: skip
        self.groups = [[number[image] for image in group] for group in kept]

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
        batch = Batch(self.name, torch.zeros(0), weight=self.section.weight)
        kept = list(images)
        self._settle(kept)
        if self.section.text_only:
            batch.stand_in = torch.from_numpy(self.aligned[0, kept])
            placements = [WHOLE] * len(kept)
        elif self.features is not None and self.cached:
            views = [rng.randrange(len(self.features)) for _ in kept]
            batch.features = self.features.read(views, kept)
            placements = self._placements_of(views, kept)
            if self.aligned is not None:
                batch.aligned = self._mixed_views(kept, rng)
        else:
            views, kept, batch.bad = self._read(kept, rng)
            batch.pixels = torch.stack([pixels for pixels, _ in views])
            placements = [placement for _, placement in views]
        batch.bad, self._strange = batch.bad + self._strange, []
        batch.image_ids = torch.tensor(kept)
        if self.section.grid_dropout and not self.section.text_only:
            batch.grid_dropout = torch.full((len(kept),), self.section.grid_dropout)
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

    def _settle(self, images: Iterable[int]) -> None:
        """Turn boxes that were drawn on the file as it is stored; leave those out that are of another picture."""
        if "grounding" not in self.section.tasks or self.section.text_only:
            return
        for image in images:
            found = [] if image in self._settled else self.by_image[image].get("grounding", [])
            self._settled.add(image)
            if not any(getattr(record, "size", None) for _, record in found):
                continue
            shape, kept = picture_shape(self.images[image]), []
            for rows, record in found:
                try:
                    kept.append((rows, upright(record, shape)))
                except DataError as error:
                    self._strange.append(f"{self.shown(image)}: {error.code}: {record.phrase[:60]}: {error.message}")
            self.by_image[image]["grounding"] = kept

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
        seed, targets = rng.getrandbits(62), self.crop_targets(image)
        with _DRAWING, torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed is the GPU's, too
            return transform(picture, targets)

    def view_settings(self, view: int) -> str:
        """What decides how a cached view of an image looks, beside the image and its :meth:`crop_targets`."""
        section = self.section
        if not view or section.augment == "none":
            return "plain"
        scale = "" if section.augment == "flip" else section.crop_scale
        places = section.augment == "randaugment" and not _KNOW_PLACES.isdisjoint(section.tasks)
        return f"{section.augment} {scale} {places} {view}"

    def crop_targets(self, image: int) -> list[Box] | None:
        """The boxes that crops are made around; None where they don't matter."""
        cropped = self.section.augment in ("crop", "randaugment") and "grounding" in self.section.tasks
        return self.targets(image) if cropped else None

    def targets(self, image: int) -> list[Box]:
        """Boxes of an image that a crop may be made around: their phrases name no direction."""
        self._settle([image])
        phrases = [record for _, record in self.by_image[image].get("grounding", ())]
        return [phrase.box for phrase in phrases if not names_direction(phrase.phrase)]


_DRAWING = threading.Lock()
"""Held while an augmentation draws: torch's transforms draw from the one generator of the process."""
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
