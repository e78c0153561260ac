"""Runs that are cut off and gone on with: ``python -m tests.training.continued save|load|both FOLDER [NAME]...``.

``save``: each engine trains to the end, and again to the middle, where it saves. ``load``: engines go on from what
others saved. Losses are those of the global batch after the middle. NAMEs are of ``losses``, whose engines these are.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from mplug_core.recipe import EngineSection
from mplug_core.training.distributed import World, end_process
from mplug_core.training.engine import Engine, build_engine, import_deepspeed
from mplug_core.training.engine_state import whole_state
from tests.training.losses import OPTIMIZER, RUNS, Step

MIDDLE, END, ROWS = 3, 6, 8


def built(name: str, world: World) -> Engine:
    torch.manual_seed(0)
    return build_engine(Step(), EngineSection(**RUNS[name]), OPTIMIZER, world, ROWS // world.size)


def trained(engine: Engine, first: int, last: int, world: World) -> list[float]:
    losses, count = [], ROWS // world.size
    rows = slice(world.rank * count, (world.rank + 1) * count)
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        pixels = torch.randn(ROWS, 3, 32, 32, generator=generator).to(engine.dtype)
        ids = torch.randint(5, 32, (ROWS, 6), generator=generator)
        loss = engine.forward(pixels[rows], ids[rows])
        engine.backward(loss)
        engine.step(step, END + 2)
        losses.append(world.sum([float(loss.detach())])[0] / world.size)
    return losses


def saved(name: str, folder: Path, world: World, found: dict[str, Any]) -> None:
    """Train to the end, and to the middle and on in another engine of the same kind."""
    whole = built(name, world)
    found[f"{name} | uninterrupted"] = trained(whole, 0, END, world)[MIDDLE:]
    cut = built(name, world)
    trained(cut, 0, MIDDLE, world)
    place = folder / name.replace(" ", "_")
    place.mkdir(exist_ok=True)
    cut.save(place)
    del cut
    again = built(name, world)
    again.load(place)
    found[f"{name} | {name}"] = trained(again, MIDDLE, END, world)
    masters, others = whole_state(whole.module, whole), whole_state(again.module, again)
    found[f"{name} | masters"] = [float(all(torch.equal(masters[key], others[key]) for key in masters))]
    with whole.whole(list(whole.module.parameters())), again.whole(list(again.module.parameters())):
        pairs = zip(whole.module.parameters(), again.module.parameters(), strict=True)
        found[f"{name} | rounded"] = [float(all(torch.equal(one, other) for one, other in pairs))]


def main(what: str, folder: Path, names: list[str]) -> None:
    world = World.from_environment()
    import_deepspeed()
    names = names or [
        name for name in RUNS if "accumulated" not in name and (world.size == 1 or name.startswith("zero"))
    ]
    found: dict[str, list[float]] = {}
    if what != "load":
        for name in names:
            saved(name, folder, world, found)
        world.barrier()
    if what != "save":
        places = sorted(folder.iterdir())
        pairs = [(place.name.replace("_", " "), name) for place in places for name in names]
        if what == "both":  # each engine is once a source and once a target of another stage or kind
            near = [(names[i], names[i - 1]) for i in range(len(names))]
            pairs = [pair for pair in near if ("bf16" in pair[0]) == ("bf16" in pair[1])]
        for source, name in pairs:
            if ("bf16" in source) == ("bf16" in name):
                engine = built(name, world)
                engine.load(folder / source.replace(" ", "_"))
                found[f"{source} | {name}"] = trained(engine, MIDDLE, END, world)
    if world.is_first:
        print("RESULT " + json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
    end_process(0)
