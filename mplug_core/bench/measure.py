"""How things are measured: warm-up, then rounds in which every action has its turn, medians, and where it was.

Machines have neighbours: a figure alone says little, and two that were measured one after the other may have met
different machines. So the actions that are compared take turns, and what is quoted is the ratio of their medians.
"""

from __future__ import annotations

import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mplug_core.json_text import to_json

PACKAGES = ("mplug", "torch", "torchvision", "transformers", "timm")


@dataclass(frozen=True)
class Timing:
    """Seconds of each repeat, in their order."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def low(self) -> float:
        return min(self.seconds)

    @property
    def high(self) -> float:
        return max(self.seconds)

    @property
    def spread(self) -> str:
        """Lowest to highest, as text in seconds."""
        return f"{self.low:.3g}-{self.high:.3g}"


def take_turns(
    actions: Mapping[str, Callable[[], object]],
    repeats: int,
    warmup: int = 1,
    advance: Callable[[str], None] = lambda name: None,
    once: Collection[str] = (),
) -> dict[str, Timing]:
    """Seconds of each action, ``repeats`` times after ``warmup`` rounds that don't count.

    In each round every action has one turn, so that all meet the same machine; the order turns round from one round to
    the next. ``advance`` is called with an action's name after each turn. Actions named in ``once``, those that take
    minutes, have a single turn, in the first round that counts.
    """
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for number in range(warmup + repeats):
        names = [name for name in actions if name not in once or number == warmup]
        for name in names[number % len(names) :] + names[: number % len(names)]:
            gc.collect()  # or one pays for what another left
            began = time.perf_counter()
            actions[name]()
            took = time.perf_counter() - began
            if number >= warmup:
                seconds[name].append(took)
            advance(name)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


@dataclass(frozen=True)
class Machine:
    """Where figures come from."""

    processor: str
    cores: int
    threads: int
    dtype: str
    device: str
    python: str
    packages: dict[str, str]

    @classmethod
    def here(cls, device: str = "cpu", dtype: str = "float32") -> Machine:
        """This machine, as torch is set up now."""
        import torch

        name = torch.cuda.get_device_name(device) if device.startswith("cuda") else processor_name()
        packages = {}
        for package in PACKAGES:
            try:
                packages[package] = version(package)
            except PackageNotFoundError:
                continue
        threads = torch.get_num_threads()
        return cls(name, os.cpu_count() or 1, threads, dtype, device, platform.python_version(), packages)

    def __str__(self) -> str:
        packages = ", ".join(f"{name} {number}" for name, number in self.packages.items())
        threads = f"{self.threads} thread{'s' if self.threads != 1 else ''} of {self.cores}"
        return f"{self.processor}, {threads}, {self.device}, {self.dtype}; Python {self.python}, {packages}"


def processor_name() -> str:
    """What the processor calls itself."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


@dataclass
class Report:
    """A benchmark's table: ``columns`` of text, ``rows`` of the same length, ``figures`` with all digits for programs,
    and ``notes``, a line each: what was computed, and what the ratios say."""

    name: str
    title: str
    columns: Sequence[str]
    machine: Machine
    rows: list[Sequence[str]] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def markdown(self) -> str:
        """A heading, the table, notes and machine."""
        lines = [f"### {self.title}", "", "| " + " | ".join(self.columns) + " |", "|" + "---|" * len(self.columns)]
        lines += ["| " + " | ".join(row) + " |" for row in self.rows]
        return "\n".join([*lines, "", *(f"- {note}" for note in self.notes), f"- {self.machine}", ""])

    def json(self) -> str:
        """One object: name, figures, notes and machine."""
        content = {"benchmark": self.name, **self.figures, "notes": self.notes, "machine": asdict(self.machine)}
        return to_json(content)
