"""The batches of a step in as few passes as they allow: sources of one kind go through the model together.

A step draws a batch from each source. Computed one by one they are many small matrix products, which leave most of a
processor idle; images of several sources are encoded at once, and their records of a task are one block.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mplug_core.data.batches import Batch, Block
from mplug_core.objectives.masked_language import IGNORED

PADDING = {"labels": IGNORED}
"""What fills rows of a block up to the longest; nothing said is 0."""
SHARED = {"box_ids"}
"""What a block says once for all of its records."""
ROWS_OF = {"image": "images", "question": "ids", "fused": "ids"}
"""Entries that number rows: of the batch's images, or of another entry of the block."""


def merge(batches: Sequence[Batch], sources: Sequence[str]) -> list[Batch]:
    """Batches of one kind (of input, and of weight) as one, in the order of the first of each.

    ``sources``: the names of all sources of the run. Image ids of different sources are made to differ. A loss is then
    the mean over the records of all merged sources. Batches that are ``alone`` stay so.
    """
    groups: dict[object, list[Batch]] = {}
    for batch in batches:
        # ids are those of images within a source
        batch.image_ids = batch.image_ids + (sources.index(batch.source) << 40)
        groups.setdefault(_kind(batch), []).append(batch)
    return [group[0] if len(group) == 1 else _joined(group) for group in groups.values()]


def _kind(batch: Batch) -> object:
    """Equal for batches that can be one."""
    if batch.alone:
        return batch.source
    inputs = (batch.pixels, batch.features, batch.stand_in, batch.aligned)
    return (*(None if value is None else value.shape[1:] for value in inputs), batch.weight)


def _joined(batches: Sequence[Batch]) -> Batch:
    def joined(name: str) -> Tensor | None:
        parts = [getattr(batch, name) for batch in batches]
        return None if parts[0] is None else torch.cat(parts)

    starts = [0]
    for batch in batches:
        starts.append(starts[-1] + len(batch.image_ids))
    tasks = dict.fromkeys(task for batch in batches for task in batch.blocks)
    drawn = {task: sum(batch.images_of(task) for batch in batches if task in batch.blocks) for task in tasks}
    blocks = {}
    for task in tasks:
        having = [number for number, batch in enumerate(batches) if task in batch.blocks]
        blocks[task] = join_blocks([batches[k].blocks[task] for k in having], [starts[k] for k in having])
    dropout = None
    if any(batch.grid_dropout is not None for batch in batches):
        dropout = torch.cat([
            torch.zeros(len(batch.image_ids)) if batch.grid_dropout is None else batch.grid_dropout
            for batch in batches
        ])  # fmt: skip
    return Batch(
        source="+".join(batch.source for batch in batches),
        image_ids=joined("image_ids"), pixels=joined("pixels"), features=joined("features"),
        stand_in=joined("stand_in"), aligned=joined("aligned"),
        blocks=blocks, weight=batches[0].weight, grid_dropout=dropout, drawn=drawn,
    )  # fmt: skip


def join_blocks(blocks: Sequence[Block], first_images: Sequence[int]) -> Block:
    """The records of several blocks of a task in one; ``first_images``: where each block's images begin."""
    if len(blocks) == 1:
        return _moved(blocks[0], {"images": first_images[0]})
    moved, before = [], 0
    for block, first in zip(blocks, first_images, strict=True):
        moved.append(_moved(block, {"images": first, "ids": before}))
        before += len(block["ids"]) if "ids" in block else 0
    return {name: _concatenated(name, [block[name] for block in moved]) for name in blocks[0]}


def _moved(block: Block, starts: dict[str, int]) -> Block:
    return {
        name: value + starts[ROWS_OF[name]] if starts.get(ROWS_OF.get(name, "")) else value
        for name, value in block.items()
    }


def _concatenated(name: str, parts: list) -> Tensor | list:
    if name in SHARED:
        return parts[0]
    if isinstance(parts[0], list):
        return [item for part in parts for item in part]
    if parts[0].dim() == 2 and len({part.shape[1] for part in parts}) > 1:
        longest = max(part.shape[1] for part in parts)
        parts = [F.pad(part, (0, longest - part.shape[1]), value=PADDING.get(name, 0)) for part in parts]
    return torch.cat(parts)
