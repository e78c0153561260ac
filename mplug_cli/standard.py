"""The standard streams of this process: closed ones, full ones, and ones whose reader has gone."""

from __future__ import annotations

import contextlib
import os
import sys


def settle() -> None:
    """Make a stream of each standard stream that was closed when the process began (``>&-``).

    Else the next file that is opened takes its number, and gets what libraries and other programs write there. A closed
    standard output stays one that takes nothing: who writes to it gets an OSError. What goes to a closed standard error
    is dropped.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            place = os.open(os.devnull, os.O_WRONLY if number == 2 else os.O_RDONLY)
            os.set_inheritable(place, True)
    if sys.stdout is None:
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115


def refusal() -> OSError | None:
    """Why standard output does not take what is still to be written to it; None where it does."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        return error
    return None


def drop_unwritten() -> None:
    """Let what can't be written go nowhere, so that the end of the process says nothing of it."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            with contextlib.suppress(OSError, ValueError):  # one without a file
                os.dup2(nowhere, stream.fileno())
                stream.flush()
        except (AttributeError, ValueError):  # no stream, or a closed one
            pass
    os.close(nowhere)
