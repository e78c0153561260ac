"""How a process computes on a CPU: with as many threads as it may really use, and without denormal numbers.

PyTorch counts the machine's cores. In a container with a quota, or where two hardware threads share a core, that is
too many, and threads that wait for each other are slower than fewer. Importing this module does not import torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from mplug_core.errors import UsageError

THREADS_VARIABLE = "MPLUG_THREADS"

CPUS = Path("/sys/devices/system/cpu")
CGROUPS = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")


def asked_threads(threads: int | None = None) -> int | None:
    """``threads``, else ``MPLUG_THREADS``, else None; UsageError for a value that is no number of threads."""
    if threads is not None:
        return threads
    value = os.environ.get(THREADS_VARIABLE, "").strip()
    if not value:
        return None
    if not value.isdecimal() or int(value) < 1:
        raise UsageError(f"{THREADS_VARIABLE}={value} is no number of threads", "1 or more")
    return int(value)


def settle_threads(threads: int | None = None, processes: int = 1) -> int:
    """Have PyTorch compute with as many threads as are asked for, and flush denormal numbers; returns how many.

    What is asked: ``threads``, else ``MPLUG_THREADS``, else what ``OMP_NUM_THREADS`` has told PyTorch already. Else at
    most this one's share of :func:`usable_cores` among ``processes``; a program that has set fewer keeps them.
    """
    threads = asked_threads(threads)
    import torch

    before = torch.get_num_threads()
    if threads is None:
        share = max(1, usable_cores() // processes)
        threads = before if os.environ.get("OMP_NUM_THREADS") else min(before, share)
    # Even if they are as many: in a forked process the first call replaces a thread pool that the fork has broken. Two
    # threads that make it at the same time abort the process (ParallelOpenMP.cpp, "Invalid thread pool!").
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)  # each is a hundred times as slow as another number
    return threads


def usable_cores() -> int:
    """Cores that this process may use: those it may run on, each once, and no more than its groups' quotas pay for."""
    numbers = _allowed()
    return max(1, min([len(_cores(numbers)), *(int(quota) for quota in _quotas())]))


def _allowed() -> set[int]:
    """Numbers of the logical CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _cores(numbers: set[int]) -> set[str]:
    """The cores that logical CPUs belong to; one that is not described is a core of its own."""
    cores = set()
    for number in numbers:
        try:
            cores.add((CPUS / f"cpu{number}" / "topology" / "thread_siblings_list").read_text(encoding="ascii").strip())
        except (OSError, ValueError):
            cores.add(str(number))
    return cores


def _quotas() -> Iterator[float]:
    """CPUs that the control groups of this process, and those around them, may use at once; version 2 and 1."""
    try:
        lines = OWN_GROUPS.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        # within a container the path may be the host's; its own group is then the root
        places = [Path(path.lstrip("/")), *Path(path.lstrip("/")).parents]
        for root in [CGROUPS / controllers, CGROUPS / "cpu"] if controllers else [CGROUPS, CGROUPS / "unified"]:
            for place in places:
                yield from _quota(root / place)


def _quota(group: Path) -> Iterator[float]:
    try:
        if (group / "cpu.max").is_file():
            quota, period = (group / "cpu.max").read_text(encoding="ascii").split()
        else:
            quota = (group / "cpu.cfs_quota_us").read_text(encoding="ascii")
            period = (group / "cpu.cfs_period_us").read_text(encoding="ascii")
        if quota != "max" and int(quota) > 0:
            yield int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return
