"""The user's home folder, or a place in its stead where there is none.

In a container a process may have a user number that no list knows, and no ``HOME``. Libraries then write into a folder
named ``~``, or fail when they ask for the user's name. :func:`settle_home` sets the variables that all of them read.
"""

from __future__ import annotations

import getpass
import os
import stat
import tempfile
from pathlib import Path


def settle_home() -> None:
    """Set ``HOME`` and ``USER`` where the system tells neither a home folder nor a name; else change nothing."""
    if os.name != "posix":
        return
    if not os.environ.get("HOME"):
        os.environ.pop("HOME", None)  # an empty one is the folder / to some libraries
    if not os.path.isabs(os.path.expanduser("~")):
        os.environ["HOME"] = _own_folder()
    try:
        getpass.getuser()
    except (KeyError, OSError, ImportError):
        os.environ["USER"] = f"uid{os.getuid()}"


def cache_home() -> Path:
    """``$XDG_CACHE_HOME``, else ``~/.cache``. A relative one is ignored, as the variable's specification says."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return Path(base if os.path.isabs(base) else os.path.expanduser("~/.cache")).absolute()


def _own_folder() -> str:
    """A folder for temporary files that is this user's alone, the same for each process."""
    try:
        place = os.path.join(tempfile.gettempdir(), f"mplug-home-{os.getuid()}")
        try:
            os.mkdir(place, 0o700)
        except FileExistsError:
            found = os.lstat(place)
            # what another user has put there could be changed by that user
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
                return tempfile.mkdtemp(prefix="mplug-home-")
        return place
    except OSError:  # nothing can be written anywhere
        return "/nonexistent"
