"""Runs that are killed at random moments and gone on with: ``python -m tests.faults.random_kills [plain] [zero2]``.

One table an engine: when each run was killed, what it left behind, and whether what it came to after ``--resume auto``
is to the bit what the uninterrupted run came to: weights, best weights, masters, optimizer, teacher, queue, average,
random states and the log. Of two ranks sometimes one alone is killed; the other has to end by itself.

Half of the moments are spread evenly over the steps, with the time before the first one as a step of its own; the
others are aimed at a save: between the appearance of its hidden folder and the publication of its model.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mplug_core.data.scenes import write_scenes
from mplug_core.recipe import Recipe
from tests.faults.runs import BOUND, Run, Runs, checkpoints, differences, pointer
from tests.training.recipes import scene_recipe

ENGINES = {
    "plain": (1, ("engine.name=plain",)),
    "zero2": (2, ("engine.name=deepspeed", "engine.zero_stage=2")),
}
"""Name -> number of processes, settings."""
STAGES = [{"name": "see", "steps": 4, "objectives": {"patches": 1}}, {"name": "learn", "steps": 8}]
STEPS = 12
SAVES = (2, 4, 6, 8, 10, 12)
"""Steps after which the runs save; the fourth also ends a stage."""
ALONE = 60.0
"""Seconds in which a rank has to notice that the other one is gone."""
POLL = 0.003


def killed_recipe(scenes: Path, folder: Path, *overrides: str) -> Recipe:
    """Everything that a resume has to bring back: dropout, teacher, queue, average, accumulation, stages, best."""
    evaluate = {"val": {"path": str(scenes), "split": "train", "tasks": ["grounding"], "limit": 4}}
    settings = (
        "run.average=0.9", "engine.accumulate=2", "run.save_every=2", "run.evaluate_every=3",
        "data.sources.scenes.batch_size=4", "run.best=val/grounding/iou",
    )  # fmt: skip
    return scene_recipe(scenes, folder, *settings, *overrides, stages=STAGES, evaluate=evaluate)


@dataclass(frozen=True)
class Moment:
    """When to kill: ``share`` of the way through the step after ``step``, or through the save after it."""

    step: int
    share: float
    saving: bool
    ranks: tuple[int, ...] | None = None

    def __str__(self) -> str:
        where = "save" if self.saving else "step"
        who = "" if self.ranks is None else f", rank {self.ranks[0]} alone"
        return f"{where} {self.step} + {self.share:.2f}{who}"


@dataclass
class Paces:
    """Seconds that parts of the uninterrupted run took: before the first step, a step, a save."""

    start: float
    step: float
    save: float


@dataclass
class Outcome:
    """What came of one kill."""

    moment: Moment
    left: str
    in_save: bool
    codes: list[int]
    resumed: str
    differs: list[str]
    seconds: float

    @property
    def ended(self) -> bool:
        """The run was over when the kill came."""
        return all(code == 0 for code in self.codes)


def moments(points: int, seed: int, processes: int) -> list[Moment]:
    """``points`` moments: by turns in a step and in a save; of two processes every fourth kills one alone."""
    rng = random.Random(seed)
    found = []
    for number in range(points):
        saving = number % 2 == 1
        # stratified, so that no part of the run is left out by chance
        place = (number // 2 + rng.random()) / ((points + 1) // 2)
        step = SAVES[int(place * len(SAVES))] if saving else int(place * (STEPS + 1))
        alone = processes > 1 and number % 4 >= 2 and step > 0
        ranks = (rng.randrange(processes),) if alone else None
        found.append(Moment(step, rng.random(), saving, ranks))
    return found


def logged_steps(folder: Path) -> int:
    """The last step whose line is in the log, 0 without any."""
    try:
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return max((json.loads(line)["step"] for line in lines if '"evaluation"' not in line), default=0)
    except (OSError, ValueError):
        return 0


def until(run: Run, condition: Callable[[], bool]) -> bool:
    """Wait for ``condition``; whether it came before the run ended."""
    ends = time.monotonic() + BOUND
    looked = time.monotonic()
    while not condition():
        if time.monotonic() - looked > 0.2:
            looked = time.monotonic()
            if not run.runs_still():
                return condition()
        assert time.monotonic() < ends, f"nothing for {BOUND:.0f} s\n{run.said()[-2000:]}"
        time.sleep(POLL)
    return True


def unfinished_save(folder: Path) -> str:
    """The traces of a save that was cut off, in words; empty where there are none."""
    root = folder / "checkpoints"
    traces = [path.name for path in [*root.glob(".*"), *folder.glob(".model-*"), *folder.glob(".best-*")]]
    if checkpoints(folder):
        try:
            newest, pointed = checkpoints(folder)[-1], pointer(folder)
        except OSError:
            return ", ".join(traces) or "no pointer yet"
        weights = [path / "model.safetensors" for path in (folder / "model", root / pointed / "model")]
        if newest != pointed:
            traces.append("older pointer")
        elif not weights[0].is_file() or weights[0].stat().st_ino != weights[1].stat().st_ino:
            traces.append("older model/")  # the weights of the two are one file
    return ", ".join(traces)


def measured(run: Run, folder: Path) -> Paces:
    """The paces of a run, watched while it goes on; it must end well."""
    began = time.monotonic()
    until(run, lambda: logged_steps(folder) > 0)
    first = time.monotonic()
    name = f"step-{SAVES[2]:08d}"
    until(run, lambda: (folder / "checkpoints" / f".{name}").exists() or (folder / "checkpoints" / name).exists())
    opened = time.monotonic()
    until(run, lambda: (folder / "checkpoints" / name).exists() and not unfinished_save(folder))
    saved = time.monotonic()
    codes = run.wait(5 * BOUND)
    assert not any(codes), run.said()[-3000:]
    return Paces(first - began, (time.monotonic() - first) / (STEPS - 1), saved - opened)


def strike(run: Run, folder: Path, moment: Moment, paces: Paces) -> None:
    """Wait for the moment, and kill."""
    if moment.saving:
        root, name = folder / "checkpoints", f"step-{moment.step:08d}"
        until(run, lambda: (root / f".{name}").exists() or (root / name).exists())
        pause = paces.save
    else:
        until(run, lambda: logged_steps(folder) >= moment.step)
        pause = paces.step if moment.step else paces.start
    time.sleep(moment.share * pause)
    run.kill(moment.ranks)


def outcomes(name: str, place: Path, points: int, seed: int) -> Iterator[Outcome]:
    """Kill ``points`` runs of an engine, each in a folder of its own, and go on with each."""
    processes, settings = ENGINES[name]
    scenes, whole = place / "scenes", place / "whole"
    write_scenes(scenes, 40, 0, 48)
    with Runs(place / "logs") as runs:
        paces = measured(runs.start(killed_recipe(scenes, whole, *settings), processes), whole)
        for number, moment in enumerate(moments(points, seed, processes)):
            began, folder = time.monotonic(), place / f"killed-{number:02d}"
            recipe = killed_recipe(scenes, folder, *settings)
            run = runs.start(recipe, processes)
            strike(run, folder, moment, paces)
            codes = run.wait(ALONE if moment.ranks else 10.0)
            left = unfinished_save(folder)
            again = runs.finish(recipe, processes)
            yield Outcome(
                moment, left, bool(left), codes, resumed_from(again), differences(whole, folder),
                time.monotonic() - began,
            )  # fmt: skip
            shutil.rmtree(folder)


def resumed_from(run: Run) -> str:
    """The checkpoint that a run says it went on from, or ``anew``."""
    lines = [line for line in run.said().splitlines() if "resumed " in line]
    return lines[0].rsplit("at ", 1)[-1] if lines else "anew"


def faults_of(outcome: Outcome) -> list[str]:
    """What is wrong with an outcome; nothing when the promise is kept."""
    found = [f"{len(outcome.differs)} differences, first {outcome.differs[0]}"] if outcome.differs else []
    if outcome.moment.ranks is not None and not outcome.ended:
        others = [code for rank, code in enumerate(outcome.codes) if rank not in outcome.moment.ranks]
        if not all(others):
            found.append(f"the other rank ended with {others}")
    return found


def table(name: str, points: int, seed: int, place: Path) -> list[Outcome]:
    """Print a line for each kill as it comes; returns the outcomes."""
    print(
        f"{name}, seed {seed}\n{'killed in':<32} {'left behind':<34} {'codes':<10} {'resumed':<8} {'s':>5}  result",
        flush=True,
    )
    found = []
    for outcome in outcomes(name, place, points, seed):
        found.append(outcome)
        codes = " ".join(map(str, outcome.codes))
        result = "; ".join(faults_of(outcome)) or ("identical (had ended)" if outcome.ended else "identical")
        print(
            f"{outcome.moment!s:<32} {outcome.left[:33] or '-':<34} {codes:<10} {outcome.resumed:<8} "
            f"{outcome.seconds:5.1f}  {result}", flush=True,
        )  # fmt: skip
    sound = sum(not faults_of(outcome) for outcome in found)
    killed = sum(not outcome.ended for outcome in found)
    in_save, alone = sum(o.in_save for o in found), sum(o.moment.ranks is not None for o in found)
    print(
        f"{sound} of {len(found)} identical; {killed} killed before their end, {in_save} in a save, "
        f"{alone} one rank alone"
    )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("engines", nargs="*", default=[], metavar="plain|zero2")
    parser.add_argument("--points", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    wrong = 0
    for name in options.engines or ENGINES:
        if name not in ENGINES:
            parser.error(f"no engine {name}: {', '.join(ENGINES)}")
        with tempfile.TemporaryDirectory() as place:
            wrong += sum(bool(faults_of(outcome)) for outcome in table(name, options.points, options.seed, Path(place)))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
