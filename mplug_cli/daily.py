"""Notes that come once a day: a stamp in the cache folder remembers when one was last shown.

The stamp's own time counts. One that lies in the future (a clock was set back) counts as old.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

_DAY = 24 * 60 * 60


def is_due(name: str) -> bool:
    """Whether the note ``name`` was not shown to this user for a day; from then on it was.

    Of calls at the same time one is told so. Where the stamp can't be written, every call is.
    """
    from filelock import FileLock, Timeout

    from mplug_core.weights.cache import home

    try:
        folder = home() / "shown"
        # Users may share the cache folder.
        stamp = folder / (f"{name}-{os.getuid()}" if hasattr(os, "getuid") else name)
        if _is_fresh(stamp):
            return False
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{stamp}.lock", timeout=0):
            if _is_fresh(stamp):
                return False
            now = time.time()
            stamp.touch()
            os.utime(stamp, (now, now))
    except Timeout:
        return False  # another call shows it now
    except OSError:
        return True
    return True


def _is_fresh(stamp: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return 0 <= time.time() - stamp.stat().st_mtime < _DAY
    return False
