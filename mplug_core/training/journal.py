"""``events.jsonl`` of a run folder: when the run began, went on and ended, and how. Needs no torch.

What the log of figures can't say. A line an event, with the time: ``begin`` (with the process that runs, and whether it
goes on from a checkpoint), ``stage``, ``warning``, and one of ``finished``, ``stopped``, ``failed`` at the end. A run
that was killed has no such line: whether the process of its ``begin`` lives tells a running one from it.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from mplug_core.json_text import to_json

FILE = "events.jsonl"
ENDS = ("finished", "stopped", "failed")
MOST_BYTES = 16 << 20
"""Of the file: warnings beyond it are not kept; ends are."""


class Journal:
    """Appends to the events of a run folder. A disk that doesn't take them is no reason to stop."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / FILE

    def begin(self, step: int, resumed: bool, steps: int | None = None) -> None:
        """A process runs from ``step``, of ``steps``; a run that starts anew forgets the events of the old one."""
        if not resumed:
            with contextlib.suppress(OSError):
                self.file.unlink(missing_ok=True)
        self.write("begin", step=step, resumed=resumed, steps=steps, **this_process())

    def holder(self) -> int | None:
        """The process that is running in this folder now, if it is another one on this machine."""
        begin: dict[str, Any] | None = None
        try:
            lines = self.file.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return None
        for line in lines:
            with contextlib.suppress(ValueError, AttributeError, RecursionError):
                event = json.loads(line)
                begin = event if event.get("event") == "begin" else None if event.get("event") in ENDS else begin
        if begin is None or begin.get("pid") == os.getpid() or not is_alive(begin):
            return None
        return begin["pid"]

    def write(self, event: str, **values: Any) -> None:
        """One event with the time now."""
        line = to_json({"event": event, "time": round(time.time(), 3), **values}, default=str) + "\n"
        try:
            if event == "warning" and self.file.is_file() and self.file.stat().st_size > MOST_BYTES:
                return
            with open(self.file, "a+b") as stream:
                if stream.tell():
                    # a line at which a killed process stopped must not spoil this one
                    stream.seek(-1, os.SEEK_END)
                    if stream.read(1) != b"\n":
                        line = "\n" + line
                stream.write(line.encode())
        except OSError:
            pass


def this_process() -> dict[str, Any]:
    """What finds this process again: host, number, and where the system tells it when it was started."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "started": started(os.getpid())}


def started(pid: int) -> str | None:
    """The start of a process by the system's clock, as Linux gives it; None where it can't be known."""
    try:
        # the name in parentheses may hold spaces
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def is_alive(begin: dict[str, Any]) -> bool | None:
    """Whether the process of a ``begin`` event lives; None where it is on another machine."""
    pid = begin.get("pid")
    if begin.get("host") != socket.gethostname() or not isinstance(pid, int) or not 0 < pid < 2**31:
        return None
    if os.name != "posix":  # there a signal 0 would end the process
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    # the number may be another process's by now
    return begin.get("started") in (None, started(pid))
