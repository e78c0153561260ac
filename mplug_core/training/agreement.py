"""An error of one process of a run becomes an error of all, or the others would wait for it for ever."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mplug_core import errors
from mplug_core.errors import MplugError
from mplug_core.training.distributed import World


@contextmanager
def together(world: World) -> Iterator[None]:
    """An error of one process within becomes an error of all.

    What happens within must be no meeting of the processes, or such that an error of one comes after its last one.
    Raises the process's own error, else a :class:`MplugError` of the same class and words as the first other's.
    """
    own: Exception | None = None
    try:
        yield
    except Exception as caught:
        own = caught
    if world.any(own is not None):
        told = [words for words in world.gather_objects(own and _telling(own)) if words]
        raise own if own is not None else _told(told[0])


def _telling(error: Exception) -> list[str | None]:
    if isinstance(error, MplugError):
        return [type(error).__name__, error.message, error.hint]
    return ["MplugError", f"another process: {type(error).__name__}: {error}", None]


def _told(words: list[str | None]) -> MplugError:
    return getattr(errors, str(words[0]), MplugError)(words[1], words[2])
