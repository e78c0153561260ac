"""Values that are one of a few names."""

from __future__ import annotations

from collections.abc import Collection

from mplug_core.errors import UsageError


def check_choice(what: str, value: str | None, choices: Collection[str]) -> None:
    """UsageError, with the nearest name, unless ``value`` is one of ``choices``, or None."""
    from mplug_core.recipe import nearest

    if value is not None and value not in choices:
        raise UsageError(f"no {what} {value!r}{nearest(value, choices)}", f"{what}s: {', '.join(choices)}")
