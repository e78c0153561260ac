"""What is wrong with a recipe's stages that shows when its model and tasks are known: before anything is computed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from mplug_core.data.batches import Source
from mplug_core.errors import DataError
from mplug_core.recipe import WITH_CAPTIONS, Recipe, StageSection, nearest

OF_PHOTOS = frozenset(("itc", "itm"))
"""Objectives that captions without photos don't give."""


def stage_faults(recipe: Recipe, tasks: Mapping[str, Any], parts: Iterable[str]) -> list[str]:
    """Parts to freeze that the model doesn't have, and stages whose sources give none of their objectives."""
    faults, parts = [], list(parts)
    for stage in recipe.stages or [StageSection(name="train")]:
        frozen = recipe.frozen(stage)
        unknown = [name for name in frozen if name not in parts]
        faults += [f"stage {stage.name}: freeze: no part {name!r}{nearest(name, parts)}" for name in unknown]
        if stage.align is not None:
            continue
        objectives = recipe.objectives if stage.objectives is None else stage.objectives
        wanted = {name for name, weight in objectives.items() if weight > 0}
        sections = [recipe.data.sources[name] for name in recipe.sources_of(stage)]
        given = {
            objective
            for section in sections
            for task in section.tasks
            for objective in tasks[task].objectives
            if not (section.text_only and objective in OF_PHOTOS)
        }
        if sections and not wanted & given:
            names = ", ".join(objectives) or "no objectives"
            faults.append(f"stage {stage.name}: no source gives any of {names}")
    return faults


def require_captions(recipe: Recipe, sources: Mapping[str, Source]) -> None:
    """DataError where an ``align`` stage has photos without a caption."""
    for stage in recipe.stages:
        if stage.align is None:
            continue
        for source in (sources[name] for name in recipe.sources_of(stage)):
            if not source.section.cached_views:
                continue
            bare = [
                source.shown(i) for i, tasks in enumerate(source.by_image) if tasks.keys().isdisjoint(WITH_CAPTIONS)
            ]
            if bare:
                raise DataError(
                    f"stage {stage.name}: {len(bare)} of {len(source.images)} photos of {source.name} have no caption, "
                    f"the first is {bare[0]}",
                    "give the other tasks a source of their own, which the stage does not name",
                )
