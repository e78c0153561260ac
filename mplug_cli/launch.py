"""One command, all devices: a training command starts itself once for each local device.

A launcher that did so already (torchrun, DeepSpeed's, SLURM's) has set variables, and is left its work.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

from mplug_core.errors import UsageError

GRACE = 20.0
"""Seconds that the other processes get to end by themselves when one has failed."""
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
"""Variables by which a process knows that a launcher has started it."""
PDEATHSIG = 1
"""Option ``PR_SET_PDEATHSIG`` of Linux's ``prctl``."""


def is_launched() -> bool:
    """Whether this process is one of those that a launcher started."""
    from mplug_core.training.distributed import launched_by_slurm

    return any(name in os.environ for name in LAUNCHERS) or launched_by_slurm(os.environ)


def processes_wanted(devices: str, engine: str) -> int:
    """How many processes this command is to run as: 1 where a launcher has started this one.

    ``devices`` is a number or ``auto``: all CUDA devices, or one process on a CPU.
    """
    if devices != "auto" and not is_count(devices):
        raise UsageError(f"--devices {devices}: not a number of devices", "--devices auto, or --devices 2")
    if is_launched():
        if devices != "auto" and os.environ.get("WORLD_SIZE", devices) != str(int(devices)):
            raise UsageError(f"--devices {devices}, and a launcher has started the processes", "leave --devices out")
        return 1
    if engine == "plain":
        if devices not in ("auto", "1"):
            raise UsageError("engine.name=plain runs in one process", "leave --devices out")
        return 1
    import torch

    available = torch.cuda.device_count()
    if devices == "auto":
        return max(1, available)
    if 0 < available < int(devices):
        raise UsageError(f"--devices {devices}: there are {available}", "ask for as many at most")
    return int(devices)


def is_count(devices: str) -> bool:
    """Whether a text is a number of devices that a run may have."""
    return re.fullmatch(r"[0-9]{1,6}", devices) is not None and int(devices) > 0


def run_in_processes(count: int, arguments: Sequence[str]) -> int:
    """Run ``mplug`` with ``arguments`` in ``count`` processes that know of each other; returns the exit code.

    Signals that ask a run to stop are handed on. When a process fails the others are ended, and its code is returned.
    """
    master = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(count)}
    processes: list[subprocess.Popen] = []

    def hand_on(number: int, frame: object) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    handled = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    previous = {number: signal.signal(number, hand_on) for number in handled}
    try:
        for rank in range(count):
            environment = {**os.environ, **master, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            # else each takes all cores for itself
            environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
            command = [sys.executable, "-m", "mplug_cli.app", *arguments]
            processes.append(subprocess.Popen(command, env=environment, preexec_fn=_end_with_parent))
        return _wait(processes)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
        for number, handler in previous.items():
            signal.signal(number, handler)


def _end_with_parent() -> None:
    """Have the system ask this process to stop when the one that started it dies, however it dies; Linux alone can."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(PDEATHSIG, signal.SIGTERM)


def _wait(processes: Sequence[subprocess.Popen]) -> int:
    """The exit code of the first process that fails, once all have ended; 0 if none does."""
    failed: int | None = None
    until = 0.0
    while True:
        codes = [process.poll() for process in processes]
        bad = [code for code in codes if code]
        if failed is None and bad:
            failed = bad[0]
            # a process that was told to stop has saved together with the others; they only have to end
            until = time.monotonic() + GRACE
        if all(code is not None for code in codes):
            return _code(failed)
        if failed is not None and time.monotonic() > until:
            for process in processes:
                if process.poll() is None:
                    process.kill()
        time.sleep(0.05)


def _code(status: int | None) -> int:
    """An exit code from what subprocess says: a process that a signal ended has 128 and its number, as in a shell."""
    return 0 if status is None else 128 - status if status < 0 else status


def free_port() -> int:
    """A port that nobody uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
