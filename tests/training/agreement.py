"""Losses of twenty steps under each engine and number of processes: ``python -m tests.training.agreement``.

One table: the largest difference of any loss from that of the plain engine in one process, for the same data, seed and
global batch. Each run is a command line of its own. Without dropout, since each process draws its own.

In one process a global batch is two lots of 8 images in turn (``accumulate``), in two processes a lot each. All losses
but ITC are then the same computation; ITC, which compares with all pairs that are there at once, is compared alone,
with 16 images at once in one process and 8 in each of two.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from mplug_core.data.scenes import write_scenes
from mplug_core.recipe import Recipe
from tests.training.processes import ROOT, without_launcher
from tests.training.recipes import scene_recipe

STEPS = 20
COMMON = (f"steps={STEPS}", "model.dropout=0", "engine.threads=1", "run.save_every=1000", "optimizer.lr=5e-4")
"""At four times this rate the last bits, which depend on the order of sums, grow to 1e-3 within twenty steps."""
ITC = (*COMMON, "objectives={itc: 1}", "data.sources.scenes.tasks={pretrain: 1}", "data.sources.scenes.augment=none")


def single_captions(scenes: Path) -> None:
    """Leave each scene one caption: which of several is drawn depends on the lot that it is in."""
    for file in scenes.glob("*/captions.jsonl"):
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        kept = [
            {**line, "caption": line["caption"] if isinstance(line["caption"], str) else line["caption"][0]}
            for line in lines
        ]
        file.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")


def losses(recipe: Recipe, processes: int = 1) -> list[dict[str, float]]:
    """The losses of each step of a run as a command line."""
    folder = Path(recipe.run.folder)
    folder.mkdir(parents=True)
    file = folder.with_suffix(".json")
    file.write_text(recipe.model_dump_json(), encoding="utf-8")
    file = file.rename(file.with_suffix(".yaml"))  # JSON is YAML
    done = subprocess.run(
        [sys.executable, "-m", "mplug_cli.app", "pretrain", "--recipe", str(file), "--devices", str(processes)],
        capture_output=True, text=True, cwd=ROOT, env=without_launcher(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    names = [name for name, weight in recipe.objectives.items() if weight]
    return [{name: line[name] for name in names} for line in lines if "loss" in line]


def difference(one: list[dict[str, float]], other: list[dict[str, float]]) -> float:
    """The largest difference of a loss at any step."""
    assert len(one) == len(other) == STEPS
    return max(abs(a[name] - b[name]) for a, b in zip(one, other, strict=True) for name in a)


def differences(
    folder: Path, precisions: Sequence[str] = ("fp32", "bf16"), stages: Sequence[int] = (0, 1, 2, 3)
) -> Iterator[tuple[str, float]]:
    """Name of a run, and its largest difference from the plain engine, one after the other."""
    scenes = folder / "scenes"
    write_scenes(scenes, 40, 0, 48)

    def run(name: str, *settings: str, processes: int = 1) -> list[dict[str, float]]:
        return losses(scene_recipe(scenes, folder / name.replace(" ", "-"), *settings), processes)

    exact: list[dict[str, float]] = []
    for precision in precisions:
        common = (*COMMON, f"engine.precision={precision}", "data.sources.scenes.batch_size=8")
        plain = run(f"plain {precision}", *common, "engine.accumulate=2")
        if exact:  # the noise of the precision itself, to compare with
            yield f"plain, {precision} against {precisions[0]}", difference(exact, plain)
        exact = exact or plain
        plain_but_itc = run(f"but itc {precision}", *common, "engine.accumulate=2", "objectives.itc=0")
        for stage in stages:
            if precision == "bf16" and stage == 0:  # refused
                continue
            engine = (*common, "engine.name=deepspeed", f"engine.zero_stage={stage}")
            one = run(f"zero {stage} {precision}", *engine, "engine.accumulate=2")
            yield f"zero {stage}, {precision}", difference(plain, one)
            two = run(f"zero {stage} {precision} two", *engine, "objectives.itc=0", processes=2)
            yield f"zero {stage}, {precision}, 2 processes, all but ITC", difference(plain_but_itc, two)
    single_captions(scenes)
    whole = run("itc plain", *ITC, "engine.precision=fp32", "data.sources.scenes.batch_size=16")
    for stage in stages:
        engine = ("engine.name=deepspeed", "engine.precision=fp32", f"engine.zero_stage={stage}")
        halves = run(f"itc zero {stage}", *ITC, *engine, "data.sources.scenes.batch_size=8", processes=2)
        yield f"zero {stage}, fp32, 2 processes, ITC", difference(whole, halves)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        for name, value in differences(Path(folder), tuple(sys.argv[1:]) or ("fp32", "bf16")):
            print(f"{name:<45} {value:.1e}", flush=True)
