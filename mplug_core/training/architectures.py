"""The architecture that a start model has by its name, where the model itself is not at hand."""

from __future__ import annotations

import re

from mplug_core.errors import RecipeError
from mplug_core.recipe import ModelSection, Recipe, find_recipe, load_recipe, merge, named_size

PAPER_SIZES = ("base", "large")
"""Sizes that released models are named after: ``mplug_large.pth``, ``ms:damo/mplug_..._large_en``."""


def start_architecture(recipe: Recipe) -> tuple[ModelSection, str] | None:
    """The architecture that a run of ``recipe`` would have, and where it is known from; None where nothing tells it.

    The recipe's own model section tells it where it names a size. Else it is laid on that of the start model: of a
    released one by its name, of a run folder by the shipped recipe of that name.
    """
    if recipe.model.size is not None:
        return recipe.model, "the recipe's model section"
    return None if recipe.start.model is None else _with_changes(recipe, frozenset())


def _with_changes(recipe: Recipe, seen: frozenset[str]) -> tuple[ModelSection, str] | None:
    start = recipe.start.model
    if start is None:
        return recipe.model, f"recipe {recipe.name}"
    found = None if start in seen else _by_name(start, seen | {start})
    if found is None:
        return None
    known, origin = found
    changes = recipe.model.model_dump(exclude_unset=True)
    values = merge(known.model_dump(), changes)
    if "box_bins" in changes and "vocab_size" not in changes:  # each bin is a piece
        values["vocab_size"] = known.vocab_size + changes["box_bins"] - known.box_bins
    return ModelSection(**values), origin


def _by_name(start: str, seen: frozenset[str]) -> tuple[ModelSection, str] | None:
    words = re.split(r"[^a-z0-9]+", start.lower())
    sizes = [size for size in PAPER_SIZES if size in words]
    if "mplug" in words and len(sizes) == 1:
        return ModelSection(**named_size(sizes[0])), f"the paper's mPLUG-{sizes[0]}"
    name = start.rstrip("/").rpartition("/")[2]
    try:
        return _with_changes(load_recipe(str(find_recipe(name))), seen)
    except RecipeError:
        return None
