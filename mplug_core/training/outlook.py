"""How long the rest of a run takes: later stages by their own steps and pace, and evaluations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from mplug_core.recipe import Recipe, StageSection


@dataclass(frozen=True)
class Leg:
    """A stage that trains, with its optimizer steps; ``work``: FLOPs of a step, if they are known."""

    stage: StageSection
    steps: int
    work: float | None = None


def evaluations_after(done: int, steps: int, every: int) -> int:
    """How many evaluations a stage of ``steps`` steps has behind its step ``done``: the last step has one."""
    between = (steps - 1) // every - min(done, steps - 1) // every if every else 0
    return between + 1 if done < steps else 0


def seconds_left(
    recipe: Recipe, legs: Sequence[Leg], done: int, paces: Mapping[str, float], evaluation: float = 0.0
) -> float:
    """Seconds until the end of the last of ``legs``, of whose first ``done`` steps are made.

    ``paces`` are seconds of a step by stage, that of the first leg among them. A stage whose pace isn't known takes
    that of one with the same losses, sources and frozen parts, else the first leg's in proportion to its work, where
    that is known of both. ``evaluation``: seconds of one.
    """
    every, first = recipe.run.evaluate_every, legs[0]
    left = (first.steps - done) * paces[first.stage.name] + evaluations_after(done, first.steps, every) * evaluation
    for leg in legs[1:]:
        pace = _pace_like(recipe, leg.stage, paces)
        if pace is None:
            more = leg.work / first.work if leg.work and first.work else 1.0
            pace = paces[first.stage.name] * more
        left += leg.steps * pace + evaluations_after(0, leg.steps, every) * evaluation
    return left


def _pace_like(recipe: Recipe, stage: StageSection, paces: Mapping[str, float]) -> float | None:
    """The pace of a stage, or of the last one whose steps do the same."""

    def what(stage: StageSection) -> tuple[dict[str, float], list[str], set[str]]:
        objectives = recipe.objectives if stage.objectives is None else stage.objectives
        frozen = recipe.frozen(stage)
        return {k: v for k, v in objectives.items() if v > 0}, recipe.sources_of(stage), set(frozen)

    def same(one: StageSection) -> bool:
        (losses, *rest), (others, *theirs) = what(one), what(stage)
        return losses.keys() == others.keys() and rest == theirs

    alike = [one.name for one in recipe.stages if one.name in paces and same(one)]
    return paces[stage.name] if stage.name in paces else paces[alike[-1]] if alike else None


def with_work(legs: Sequence[Leg], count: Callable[[StageSection], float | None]) -> list[Leg]:
    """The legs with their work, as far as ``count`` can tell it; not counted where there is nothing to compare."""
    return [Leg(leg.stage, leg.steps, count(leg.stage)) for leg in legs] if len(legs) > 1 else list(legs)
