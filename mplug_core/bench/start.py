"""How long commands take from nothing to their end: whole processes, beside one that imports torch and no more."""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from mplug_core.bench.measure import Machine, Report, take_turns
from mplug_core.bench.photos import write_photos
from mplug_core.errors import MplugError

TORCH = "import torch"


def command_lines(image: Path, model: str) -> dict[str, list[str]]:
    """What is started, by the name that the report has for it."""
    mplug = [sys.executable, "-m", "mplug_cli.app"]
    answering = ["--quiet", "--device", "cpu", "--model", model]
    return {
        "mplug --help": [*mplug, "--help"],
        TORCH: [sys.executable, "-c", "import torch"],
        "first caption": [*mplug, "caption", str(image), *answering],
        "first answer": [*mplug, "vqa", str(image), "what is this?", *answering],
    }


def bench_start(model: str = "mini", repeats: int = 5, advance: Callable[[str], None] = lambda name: None) -> Report:
    """Seconds of wall and CPU time of each process, and how many times those of ``import torch``.

    MplugError where one of them fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        (image,) = write_photos(Path(folder), 1)
        return _compare(command_lines(image, model), repeats, advance)


def _compare(lines: Mapping[str, Sequence[str]], repeats: int, advance: Callable[[str], None]) -> Report:
    spent: dict[str, list[float]] = {name: [] for name in lines}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}

    def start(name: str) -> Callable[[], None]:
        def run() -> None:
            before = _children()
            done = subprocess.run(
                lines[name], stdin=subprocess.DEVNULL, capture_output=True, text=True, env=environment, check=False
            )
            spent[name].append(_children() - before)
            if done.returncode:
                reason = (done.stderr.strip().splitlines() or [f"code {done.returncode}"])[-1]
                raise MplugError(f"{name} failed: {reason}", "see what it says by itself")

        return run

    walls = take_turns({name: start(name) for name in lines}, repeats, advance=advance)
    processor = {name: statistics.median(values[-repeats:]) for name, values in spent.items()}
    columns = ("process", "CPU s", "wall s", "from-to", f"CPU of {TORCH}", f"wall of {TORCH}")
    report = Report("start", "From nothing to the end of a process", columns, Machine.here())
    report.figures["processes"] = {}
    for name, wall in walls.items():
        ratios = processor[name] / processor[TORCH], wall.median / walls[TORCH].median
        report.rows.append(
            (name, f"{processor[name]:.2f}", f"{wall.median:.2f}", wall.spread, *(f"{ratio:.2f}x" for ratio in ratios))
        )
        report.figures["processes"][name] = {
            "cpu": spent[name][-repeats:], "cpu_median": processor[name], "wall": list(wall.seconds),
            "wall_median": wall.median, "cpu_of_torch": ratios[0], "wall_of_torch": ratios[1],
        }  # fmt: skip
    report.notes.append(f"medians of {repeats} in turns after one that does not count: files are in the system's cache")
    return report


def _children() -> float:
    """Seconds of CPU time that the processes started here took, as far as they have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
