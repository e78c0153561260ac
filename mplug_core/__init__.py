"""The mPLUG toolkit in Python: ``mplug_core.load()`` gives a model that captions, answers, ranks, finds and judges.

See :mod:`mplug_core.api`, which is imported, and torch with it, when a name of it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mplug_core.home import settle_home

if TYPE_CHECKING:
    from mplug_core.api import Answer, Box, ImageSource, Judgement, Mplug, Picture, RankedText, load
    from mplug_core.errors import CheckpointError, ImageError, MplugError, UsageError

__all__ = [
    "Answer", "Box", "CheckpointError", "ImageError", "ImageSource", "Judgement", "Mplug", "MplugError", "Picture",
    "RankedText", "UsageError", "load",
]  # fmt: skip

_ERRORS = ("CheckpointError", "ImageError", "MplugError", "UsageError")


settle_home()


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module("mplug_core.errors" if name in _ERRORS else "mplug_core.api"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
