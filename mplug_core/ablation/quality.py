"""What fusion networks learn when all are trained alike: one run a network, read after equal steps and equal time.

The first stage of the recipe, in which no fusion takes part, is run once; every network goes on from its weights
through the other stages. Where these leave the visual encoder frozen its features are computed once for all. A second
seed draws other batches.

Runs may meet neighbours on the machine, so a run's own clock is not believed: the step of each network is measured
afterwards, in turns with the others, and its time on the axis is the number of steps times the median.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from mplug_core.ablation.variants import Variant, distinct, of_all
from mplug_core.bench.measure import Timing, take_turns
from mplug_core.errors import DataError, RecipeError
from mplug_core.model.config import MplugConfig
from mplug_core.recipe import Recipe, check_recipe
from mplug_core.training.engine import build_engine
from mplug_core.training.history import METRICS, Curve, read_log
from mplug_core.training.loop import Watch
from mplug_core.training.merging import merge
from mplug_core.training.optimizer import for_stage
from mplug_core.training.run_folder import EXPERIMENT, check_run_folder, claim
from mplug_core.training.step import TrainStep, build_context
from mplug_core.training.trainer import Trainer, train

SHARED, FEATURES = "shared", "features"
READY_BATCHES = 8
"""Different batches that the measured steps go through."""


@dataclass(frozen=True)
class Experiment:
    """A recipe of at least two stages, the folder of all its runs, and the seeds that each network is trained with.

    RecipeError for a recipe that can't be compared so.
    """

    recipe: Recipe
    folder: Path
    seeds: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        if len(self.recipe.stages) < 2:
            raise RecipeError(
                f"{self.recipe.name} has too few stages: the first is shared, the others are compared",
                "recipe ablation/fusion is an example",
            )
        if not self.recipe.evaluate or not self.recipe.run.evaluate_every:
            raise RecipeError(f"{self.recipe.name} evaluates nothing", "set evaluate and run.evaluate_every")
        if self.recipe.model.fusion == "none" or not self.recipe.model.fusion_layers:
            raise RecipeError(f"{self.recipe.name} has no fusion layers to compare", "set model.fusion_layers")

    def shared_recipe(self) -> Recipe:
        """The first stage."""
        return self._changed({"stages": self.recipe.stages[:1], "evaluate": {}}, SHARED, evaluate_every=0)

    def recipe_of(self, variant: Variant, seed: int) -> Recipe:
        """The other stages with one fusion, from the weights of the first."""
        stages = self.recipe.stages[1:]
        values = self.recipe.model_dump(exclude_unset=True)
        values["model"] |= variant.fields
        values["start"] = {"model": str(self.folder / SHARED / "model")}
        values["seed"] = seed
        if all("visual" in (stage.freeze if stage.freeze is not None else self.recipe.freeze) for stage in stages):
            for source in values["data"]["sources"].values():
                source["cached_views"] = source.get("cached_views") or 1
        varied = check_recipe(values, name=self.recipe.name)
        return self._changed({"stages": stages}, self.run_of(variant, seed), varied)

    def _changed(self, update: dict[str, Any], run: str, recipe: Recipe | None = None, **run_fields: Any) -> Recipe:
        recipe = recipe or self.recipe
        section = recipe.run.model_copy(update={"folder": str(self.folder / run), **run_fields})
        return recipe.model_copy(update={**update, "run": section})

    @property
    def config(self) -> MplugConfig:
        """The architecture but for the vocabulary."""
        return MplugConfig(**self.recipe.model.model_dump())

    def run_of(self, variant: Variant, seed: int) -> str:
        """The name of a run's folder: that of the network, whichever variant asks for it."""
        return f"{variant.layout(self.config)}-seed{seed}"

    def check_folder(self) -> None:
        """UsageError where the folder holds something else; MplugError where it can't be written."""
        check_run_folder(self.folder, EXPERIMENT, "name a new or empty folder")

    def train(self, variants: Sequence[Variant], watch: Watch) -> None:
        """Train what is not trained yet; what was interrupted goes on. Of networks that are the same only the first.

        Several processes may train different networks in one folder at the same time.
        Raises Preempted, with everything saved, when told to stop.
        """
        claim(self.folder, EXPERIMENT)
        # two processes may each train some of the networks
        with FileLock(self.folder / f".{SHARED}.lock"):
            train(self.shared_recipe(), watch=watch)
        for seed in self.seeds:
            for variant in distinct(variants, self.config):
                self._share_features(variant, seed)
                watch("note", {"text": f"{variant.title}, seed {seed}"})
                train(self.recipe_of(variant, seed), watch=watch)

    def _share_features(self, variant: Variant, seed: int) -> None:
        """Have a run look for its visual features where those of all runs are."""
        (self.folder / FEATURES).mkdir(parents=True, exist_ok=True)
        own = self.folder / self.run_of(variant, seed) / FEATURES
        claim(own.parent)
        if not own.exists():
            own.symlink_to(Path("..") / FEATURES)

    def step_seconds(
        self, variants: Sequence[Variant], repeats: int = 8, advance: Callable[[str], None] = lambda name: None
    ) -> dict[str, Timing]:
        """Of a whole training step of each network, the update of the weights and all losses included."""
        networks = distinct(variants, self.config)
        steps = {first.name: self._step(first) for first in networks}
        return of_all(networks, take_turns(steps, repeats, advance=advance))

    def _step(self, variant: Variant) -> Callable[[], None]:
        self._share_features(variant, self.seeds[0])
        trainer = Trainer(self.recipe_of(variant, self.seeds[0]), lambda kind, figures: None, "never")
        recipe, stage = trainer.recipe, trainer.stages[0]
        objectives = stage.objectives or recipe.objectives
        trainer.model.freeze(recipe.frozen(stage))
        sources = list(trainer.sources.values())
        module = TrainStep(trainer.model, trainer.tasks)
        optimizer = for_stage(recipe.optimizer, stage)
        engine = build_engine(module, recipe.engine, optimizer, trainer.world, sources[0].section.batch_size)
        ready = [[source.draw(recipe.seed, lot) for source in sources] for lot in range(READY_BATCHES)]
        generator = torch.Generator().manual_seed(0)
        done = 0

        def step() -> None:
            nonlocal done
            drawn = [replace(batch) for batch in ready[done % READY_BATCHES]]
            merged = merge(drawn, list(trainer.sources))
            batches = [batch.to(trainer.world.device, engine.dtype) for batch in merged]
            contexts = [
                build_context(recipe, batch, objectives, 0.0, None, None, nullcontext, generator) for batch in batches
            ]
            loss, _ = engine.forward(batches, contexts, objectives)
            engine.backward(loss)
            engine.step(done, 1_000_000)
            done += 1

        return step

    def curves(self, variants: Sequence[Variant]) -> dict[str, dict[str, list[Curve]]]:
        """Of each variant by its name the evaluated metrics, over steps: a curve a seed. DataError without a run."""
        networks = distinct(variants, self.config)
        found: dict[str, dict[str, list[Curve]]] = {}
        for first in networks:
            metrics: dict[str, list[Curve]] = {}
            for seed in self.seeds:
                log = read_log(self.folder / self.run_of(first, seed) / METRICS)
                if not log.evaluations:
                    raise DataError(f"{self.folder} has no evaluations of {first.name}", "train it first")
                for name, curve in log.evaluations.items():
                    metrics.setdefault(name, []).append(curve)
            found[first.name] = metrics
        return of_all(networks, found)


def at_step(curve: Curve, step: float) -> float:
    """The value of a curve at a step, between two evaluations in proportion; before the first as the first."""
    later = next((place for place, known in enumerate(curve.steps) if known >= step), None)
    if later is None:
        return curve.values[-1]
    if later == 0:
        return curve.values[0]
    before, after = curve.steps[later - 1], curve.steps[later]
    share = (step - before) / (after - before)
    return curve.values[later - 1] * (1 - share) + curve.values[later] * share


@dataclass(frozen=True)
class Quality:
    """Of one network and metric, means over seeds: after the last step that all have seen (``equal_steps``), and in
    the time that the fastest network takes for it (``equal_time``, at step ``steps_in_time``); ``spread`` is highest
    minus lowest seed at equal steps."""

    equal_steps: float
    equal_time: float
    steps_in_time: float
    spread: float


def last_step(curves: Mapping[str, Mapping[str, Sequence[Curve]]], metric: str) -> int:
    """The last step that all networks and seeds have seen."""
    return min(curve.steps[-1] for metrics in curves.values() for curve in metrics[metric])


def equal_time(curves: Mapping[str, Mapping[str, Sequence[Curve]]], seconds: Mapping[str, float], metric: str) -> float:
    """Seconds in which the fastest network, by the ``seconds`` of its step, comes to :func:`last_step`."""
    return last_step(curves, metric) * min(seconds[name] for name in curves)


def qualities(
    curves: Mapping[str, Mapping[str, Sequence[Curve]]], seconds: Mapping[str, float], metric: str
) -> dict[str, Quality]:
    """The quality of each network by ``metric``; ``seconds`` are those of its step."""
    last, budget = last_step(curves, metric), equal_time(curves, seconds, metric)
    found = {}
    for name, metrics in curves.items():
        steps = budget / seconds[name]
        ends = [at_step(curve, last) for curve in metrics[metric]]
        in_time = [at_step(curve, steps) for curve in metrics[metric]]
        found[name] = Quality(statistics.mean(ends), statistics.mean(in_time), steps, max(ends) - min(ends))
    return found
