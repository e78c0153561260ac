"""What a pack holds, for people: from its index, with a few examples; nothing is fetched or read beyond that."""

from __future__ import annotations

from itertools import islice
from typing import Any

from mplug_core.data.records.inspection import TASKS, Inspection, SplitView, TaskView, example_of
from mplug_core.data.records.types import KINDS
from mplug_core.data.shards.reading import Pack
from mplug_core.errors import DataError

_EXAMPLES = 3


def inspect_pack(pack: Pack, task: str | None = None, verify: bool = False) -> Inspection:
    """The tasks that a pack serves. Damaged files are among the broken ones; ``verify``: every checksum is computed.

    DataError where the pack has nothing for ``task``.
    """
    index = pack.index
    if task is not None:
        index.require(KINDS[task], task, pack.name)
    # of files elsewhere nothing is known before they are fetched
    faults = [error.message for _, error in pack.faults(verify)] if verify or not pack.fetched else []
    views = []
    for name in (task,) if task else TASKS:
        kind = KINDS[name]
        if kind not in index.kinds:
            continue
        found = index.kinds[kind]  # type: ignore[index]
        split = SplitView(
            split="", source=f"{len(index.shards)} shards", format="shards", records=found.records,
            usable=found.records, images=found.images, missing=0, broken=len(faults), first_broken=faults[:5],
        )  # fmt: skip
        words = {key: value if key == "mean" else int(value) for key, value in found.words.items()}
        views.append(TaskView(name, kind, [split], found.values, found.distinct, words, _examples(pack, kind)))
    return Inspection(pack.name, views)


def _examples(pack: Pack, kind: str) -> list[dict[str, Any]]:
    try:
        return [example_of(record) for record in islice(pack.records(kind), _EXAMPLES)]
    except DataError:  # a damaged shard is told of elsewhere
        return []
