"""Images per second of the loader alone, on local shards, beside what training takes from it.

    python benchmarks/loader.py [--scenes 2000] [--photos 400] [--workers 0 1 2] [--repeats 5]

Data: rendered scenes of 96 pixels with all their texts, and photo-like JPEGs of 640 x 480 with captions, both packed
here. The loader opens, decodes, resizes and encodes as recipe ``tiny`` does (without its dense labels). Training is
recipe ``tiny``'s step, all losses, on batches drawn before. Medians over repeats after one that doesn't count. On a
busy machine the clock says little: rates of one process are also given per second of its CPU time, and the bar is that
a loading process gives five times the scenes that a training process takes in the same CPU time.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

# before torch
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from rich.console import Console
from rich.table import Table

from mplug_core.bench.photos import write_photos
from mplug_core.data.batches import Lots
from mplug_core.data.scenes import write_scenes
from mplug_core.data.shards.pack import PackOptions, pack
from mplug_core.recipe import Recipe, check_recipe, find_recipe, read_inherited
from mplug_core.training.trainer import Trainer, train

BAR = 5.0
TRAIN_STEPS = 12


def write_captioned(folder: Path, count: int) -> None:
    """``captions.jsonl`` on ``count`` photo-like pictures."""
    photos = write_photos(folder / "images", count)
    with open(folder / "captions.jsonl", "w", encoding="utf-8") as file:
        for k, photo in enumerate(photos):
            captions = [f"a photo of {k % 10} things in front of number {k % 7}"] * 5
            file.write(json.dumps({"image": f"images/{photo.name}", "caption": captions}) + "\n")


def tiny_on(pack_folder: Path, run: Path, tasks: dict[str, float], augment: str = "none") -> Recipe:
    """Recipe tiny on one pack, one stage with all the losses that the tasks have."""
    values = read_inherited(find_recipe("tiny"))
    objectives = {k: v for k, v in values["objectives"].items() if k != "patches"}
    if "vqa" not in tasks:
        objectives = {k: v for k, v in objectives.items() if k in ("itc", "itm", "mlm", "prefix_lm", "caption")}
    source = {"path": str(pack_folder), "batch_size": 16, "augment": augment, "tasks": tasks}
    values |= {
        "stages": [], "steps": TRAIN_STEPS, "evaluate": {}, "objectives": objectives,
        "run": {"folder": str(run), "log_every": 1, "save_every": 10_000},
    }  # fmt: skip
    values["data"] |= {"sources": {"pack": source}, "root": str(pack_folder)}
    values["engine"] = {"name": "plain", "threads": 1}
    return check_recipe(values)


Speed = tuple[float, float]
"""Images per second, and per second of this process's CPU time."""


def loader_speed(trainer: Trainer, workers: int, seconds: float = 3.0) -> Speed:
    """Of the loader, counted from its first batch on."""
    batches = Lots(list(trainer.sources.values()), 0).loader(0, 1_000_000, workers)
    next(batches)
    began, cpu, images = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - began < seconds:
        images += sum(len(batch.image_ids) for batch in next(batches))
    return images / (time.perf_counter() - began), images / (time.process_time() - cpu)


def training_speed(recipe: Recipe) -> Speed:
    """Of the median step of a recipe, on batches that are there already."""
    times: list[Speed] = []

    def watch(kind: str, figures: object) -> None:
        if kind == "step":
            times.append((time.perf_counter(), time.process_time()))

    drawn = Trainer.__init__

    def with_ready_batches(self: Trainer, *arguments: object, **options: object) -> None:
        drawn(self, *arguments, **options)  # type: ignore[arg-type]
        for source in self.sources.values():
            ready = [source.draw(0, lot) for lot in range(8)]
            source.draw = lambda seed, lot, ready=ready: ready[lot % 8]  # type: ignore[method-assign]

    Trainer.__init__ = with_ready_batches  # type: ignore[method-assign]
    try:
        train(recipe, "never", watch)
    finally:
        Trainer.__init__ = drawn  # type: ignore[method-assign]
    steps = [(b[0] - a[0], b[1] - a[1]) for a, b in zip(times[1:], times[2:], strict=False)]
    images = sum(source.batch_size for source in recipe.data.sources.values())
    wall, cpu = (images / statistics.median(column) for column in zip(*steps, strict=True))
    return wall, cpu


def main() -> int:
    """Print the table; 1 where a loader misses the bar."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--scenes", type=int, default=2000)
    parser.add_argument("--photos", type=int, default=400)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    table = Table("shards", "workers", "loader", "lowest to highest", "training", "times", "times by CPU", box=None)
    scenes_ratio = 0.0
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        write_scenes(root / "scenes", arguments.scenes, 0)
        write_captioned(root / "photos", arguments.photos)
        pack(PackOptions(str(root / "scenes"), split="train", shard_size=5_000_000), root / "scenes-pack")
        pack(PackOptions(str(root / "photos"), shard_size=5_000_000), root / "photos-pack")
        all_tasks = {"pretrain": 1, "caption": 1, "vqa": 4, "grounding": 2, "statements": 1, "entailment": 1}
        for shards, tasks, augment in (
            ("scenes, 96 px", all_tasks, "none"),
            ("photos, 640 x 480", {"pretrain": 1, "caption": 1}, "none"),
            ("photos, augmented", {"pretrain": 1, "caption": 1}, "randaugment"),
        ):
            folder = root / ("scenes-pack" if "scenes" in shards else "photos-pack")
            recipe = tiny_on(folder, root / f"run-{shards}", tasks, augment)
            trainer = Trainer(recipe, lambda kind, figures: None, "never")
            training, training_cpu = training_speed(recipe)
            for workers in arguments.workers:
                runs = [loader_speed(trainer, workers) for _ in range(arguments.repeats + 1)][1:]
                wall, cpu = (statistics.median(column) for column in zip(*runs, strict=True))
                by_cpu = f"{cpu / training_cpu:.1f}" if workers == 0 else ""
                if workers == 0 and "scenes" in shards:
                    scenes_ratio = cpu / training_cpu
                table.add_row(
                    shards, str(workers), f"{wall:,.0f}", f"{min(runs)[0]:,.0f} to {max(runs)[0]:,.0f}",
                    f"{training:,.1f}", f"{wall / training:.1f}", by_cpu,
                )  # fmt: skip
    print("images per second; 'times' is loader over training")
    Console(width=110).print(table)
    if not scenes_ratio:
        return 0
    print(f"bar, scenes by CPU time: at least {BAR:g}: {'pass' if scenes_ratio >= BAR else 'FAIL'}")
    return 0 if scenes_ratio >= BAR else 1


if __name__ == "__main__":
    sys.exit(main())
