"""What a shell completes: names of recipes and models, devices, choices. Imports neither torch nor the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable

Complete = Callable[[str], list[str]]
"""The completions of what is typed so far; none of them: the shell completes names of files."""

DEVICES = ("cpu", "cuda", "cuda:0", "mps")


def one_of(names: Iterable[str]) -> Complete:
    """Completes one of a few names."""
    known = tuple(names)

    def complete(incomplete: str) -> list[str]:
        return [name for name in known if name.startswith(incomplete)]

    return complete


def recipes(incomplete: str) -> list[str]:
    """Shipped recipes: short names, and with their folder once a slash is typed."""
    from mplug_core.recipe import shipped_recipes

    names = list(shipped_recipes())
    if "/" not in incomplete:
        names = list(dict.fromkeys(name.rpartition("/")[2] for name in names))
    return [name for name in names if name.startswith(incomplete)]


def models(incomplete: str) -> list[str]:
    """The embedded model and the names of mplug model ls."""
    from mplug_core.weights.registry import RELEASED

    return [name for name in ("mini", *RELEASED) if name.startswith(incomplete)]


def sizes(incomplete: str) -> list[str]:
    """The named sizes of models."""
    from mplug_core.recipe import size_table

    return [name for name in size_table() if name.startswith(incomplete)]


def formats(incomplete: str) -> list[str]:
    """The formats of records, of every task."""
    from mplug_core.data.records.types import FORMATS

    names = sorted({name for names in FORMATS.values() for name in names} | {"shards"})
    return [name for name in names if name.startswith(incomplete)]


def tasks(incomplete: str) -> list[str]:
    """The tasks that records serve."""
    from mplug_core.data.records.types import FORMATS

    return [name for name in FORMATS if name.startswith(incomplete)]


def models_or_none(incomplete: str) -> list[str]:
    """As :func:`models`, and ``none`` where only a baseline is scored."""
    return [*models(incomplete), *one_of(("none",))(incomplete)]
