"""A try of a recipe: a few steps of every stage on a part of the data, and what the whole run would take."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mplug_core.data.batches import Source
from mplug_core.errors import UsageError
from mplug_core.recipe import Recipe, StageSection
from mplug_core.training import run_folder
from mplug_core.training.distributed import World
from mplug_core.training.features import FeatureCache
from mplug_core.training.journal import Journal
from mplug_core.training.loop import Watch
from mplug_core.training.run_folder import refuse_own_start, try_folder
from mplug_core.training.trainer import Trainer

EVALUATED = 16
"""Records of each evaluation of a task."""
FEWEST = 64
"""Images that are kept of a source at least."""
IMAGES_PER_FOLD = 20
"""So many, that an align stage finds some in each of its folds."""


@dataclass(frozen=True)
class Share:
    """A part of the whole run: how often it comes, and what one takes."""

    part: str
    count: int
    each_seconds: float

    @property
    def seconds(self) -> float:
        return self.count * self.each_seconds


def try_run(recipe: Recipe, steps: int, watch: Watch = lambda kind, figures: None) -> list[Share]:
    """Run ``steps`` steps of every stage in :func:`try_folder`, which is started anew.

    Returns the parts of the whole run, as far as their pace is known now; on the first process alone.
    """
    trainer = TryTrainer(recipe, steps, watch)
    with trainer.followers:
        trainer.run()
    return list(trainer.shares()) if trainer.world.is_first else []


def short_recipe(recipe: Recipe, steps: int, lots: int) -> Recipe:
    """The recipe with ``steps`` steps of every stage, few scenes and short evaluations, in a folder of its own.

    ``lots`` are those of a step, one for each process and accumulated part.
    """
    run = recipe.run.model_copy(
        update={
            "folder": str(try_folder(recipe)), "log_every": 1, "save_every": steps, "evaluate_every": 0, "keep": 1,
            "patience": 0, "trackers": [],
        }
    )  # fmt: skip
    stages = [stage.model_copy(update={"steps": steps}) for stage in recipe.stages]
    scenes = recipe.data.scenes
    if scenes is not None:
        largest = max((source.batch_size for source in recipe.data.sources.values()), default=1)
        scenes = scenes.model_copy(update={"n": min(scenes.n, max(FEWEST, steps * lots * largest))})
    evaluate = {}
    for name, section in recipe.evaluate.items():
        limit = min(EVALUATED, section.options.get("limit") or section.limit or EVALUATED)
        options = {key: value for key, value in section.options.items() if key != "limit"}
        evaluate[name] = section.model_copy(update={"limit": limit, "options": options})
    changes: dict[str, Any] = {"run": run, "stages": stages, "evaluate": evaluate}
    changes["data"] = recipe.data.model_copy(update={"scenes": scenes})
    if not stages:
        changes |= {"steps": steps, "epochs": None}
    return recipe.model_copy(update=changes)


class TryTrainer(Trainer):
    """Trains on as many images of each source as the steps draw, and takes the time of what it does."""

    kind = run_folder.TRY

    def __init__(self, recipe: Recipe, steps: int, watch: Watch) -> None:
        world = World.from_environment()
        self.whole, self.display = recipe, watch
        lots = world.size * recipe.engine.accumulate
        self.images_of_a_step = {name: lots * source.batch_size for name, source in recipe.data.sources.items()}
        self.planned: list[tuple[StageSection, int]] = []
        self.views = self.captions = 0.0
        """Views and captions of a process in the whole run, for each that it computes here."""
        self.view_seconds, self.paces = 0.0, Paces()
        short = short_recipe(recipe, steps, lots)
        refuse_own_start(try_folder(recipe), recipe.start.model)  # before anything of it goes
        if world.is_first:
            clear(try_folder(recipe), [stage.name for stage in recipe.stages])
        super().__init__(short, self._note, "never")

    def _note(self, kind: str, figures: dict[str, Any]) -> None:
        self.paces.note(kind, figures)
        self.display(kind, figures)

    def _set_up(self, recipe: Recipe) -> None:
        super()._set_up(recipe)
        whole = self.whole.stages or self.stages
        self.planned = [(stage, self.whole_steps(stage)) for stage in whole]
        cached = [self.sources[name] for name in self.recipe.cached_sources()]
        cache = FeatureCache(self.model.visual, cached, self.folder / "features")
        self.views = sum(map(len, cache.views().values())) / self.world.size
        self.captions = self._captions()
        folds = max((stage.align.folds for stage in self.stages if stage.align is not None), default=0)
        steps = self.stages[0].steps or self.recipe.steps
        for name, source in self.sources.items():
            if type(source) is Source:  # a pack is streamed
                images = max(FEWEST, IMAGES_PER_FOLD * folds, steps * self.images_of_a_step[name])
                source.keep_part(images, self.recipe.seed)

    def whole_steps(self, stage: StageSection) -> int:
        """Steps of a stage in the whole run."""
        if stage.align is not None:
            return self.align_steps(stage)
        return self.planned_steps(stage, self.whole)

    def _captions(self) -> int:
        """How many captions the align stages read."""
        names = {n for stage in self.stages if stage.align is not None for n in self.recipe.sources_of(stage)}
        records = itertools.chain.from_iterable(self.sources[name].by_image for name in names)
        return sum(
            len(rs[0][1].captions) for tasks in records for rs in tasks.values() if hasattr(rs[0][1], "captions")
        )

    def shares(self) -> Iterator[Share]:
        """The parts of the whole run, as far as their pace is known."""
        if self.paces.view_seconds:
            yield Share("features of images", round(self.views), self.paces.view_seconds)
        evaluations, every = 0, self.whole.run.evaluate_every
        for stage, steps in self.planned:
            if stage.align is not None and (pace := self.paces.align.get(stage.name)):
                texts = pace["text_seconds"] / max(pace["captions"], 1)
                yield Share(f"stage {stage.name}: captions", self.captions, texts)
                yield Share(f"stage {stage.name}: steps", steps * stage.align.folds, pace["step_seconds"])
            elif seconds := self.paces.steps.get(stage.name):
                # the first step also sets things up
                yield Share(f"stage {stage.name}: steps", steps, statistics.median(seconds[1:] or seconds))
                evaluations += 1 + ((steps - 1) // every if every else 0)
        if self.paces.evaluation_seconds and self.whole.evaluate:
            whole, here = self._evaluated()
            yield Share("evaluations", evaluations, self.paces.evaluation_seconds * whole / max(here, 1))

    def _evaluated(self) -> tuple[int, int]:
        """Records that an evaluation of the whole run has, and those that one has here."""
        whole = here = 0
        for (name, _), records in self.evaluated_records.items():
            section = self.whole.evaluate[name]
            whole += min(records, section.options.get("limit") or section.limit or records)
            here += min(records, self.recipe.evaluate[name].limit)
        return whole, here


class Paces:
    """What things take, from the events of a run."""

    def __init__(self) -> None:
        self.steps: dict[str, list[float]] = {}
        self.align: dict[str, dict[str, float]] = {}
        self.view_seconds = self.evaluation_seconds = self.seconds = 0.0

    def note(self, kind: str, figures: dict[str, Any]) -> None:
        if kind == "features" and figures["of"] == "images":
            self.view_seconds = figures["seconds"] / figures["done"]
        elif kind == "align":
            self.align[figures["stage"]] = figures
        elif kind == "step":
            self.steps.setdefault(figures["stage"], []).append(figures["seconds"] - self.seconds)
            self.seconds = figures["seconds"]
        elif kind == "evaluation":
            self.evaluation_seconds = figures["evaluation_seconds"]


def clear(folder: Path, stages: Iterable[str] = ()) -> None:
    """Empty the folder of an earlier try; UsageError for what is no such folder, or in use."""
    holder = Journal(folder).holder()
    if holder is not None:
        raise UsageError(f"process {holder} is running in {folder}", "stop it, wait for it, or set run.folder")
    run_folder.clear(folder, stages)
