"""Whether reading images keeps a model busy: captions of files beside those of images that are open already."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mplug_core.api import Mplug
from mplug_core.bench.measure import Machine, Report, Timing, take_turns
from mplug_core.cpu import usable_cores
from mplug_core.data.images import open_image

FILES, OPENED = "captions of files", "captions of open images"


def bench_load(
    model: Mplug,
    files: Sequence[Path],
    repeats: int = 3,
    batch_size: int = 16,
    advance: Callable[[str], None] = lambda name: None,
) -> Report:
    """Images per second of captions from files and of ones in memory, and of opening files by threads.

    Opening is decoding, by JPEG's own smaller scales unless it says "in full", and resizing. ImageError for a file
    that is no image.
    """
    opened = [model.open(file) for file in files]
    actions: dict[str, Callable[[], object]] = {
        FILES: lambda: model.caption(files, batch_size=batch_size),
        OPENED: lambda: model.caption(opened, batch_size=batch_size),
    }
    for threads in thread_counts():
        actions[_opening(threads)] = lambda threads=threads: _each(model.open, files, threads)
    actions["opening, 1 thread, in full"] = lambda: _each(lambda file: model.place(open_image(file)), files, 1)
    timings = take_turns(actions, repeats, advance=advance)
    return _report(timings, len(files), model)


def thread_counts() -> list[int]:
    """1, 2, 4 and so on, as far as there are cores for them."""
    most = max(usable_cores(), 2)
    return [count for count in (1, 2, 4, 8) if count <= most]


def _opening(threads: int) -> str:
    return f"opening, {threads} thread{'s' if threads > 1 else ''}"


def _each(work: Callable[[Path], object], files: Sequence[Path], threads: int) -> None:
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(work, files):
            pass


def _report(timings: dict[str, Timing], count: int, model: Mplug) -> Report:
    dtype = str(model.dtype).removeprefix("torch.")
    report = Report("load", "Reading images", ("work", "images/s", "from-to"), Machine.here(str(model.device), dtype))
    rates = {name: count / timing.median for name, timing in timings.items()}
    for name, timing in timings.items():
        spread = f"{count / timing.high:.3g}-{count / timing.low:.3g}"
        report.rows.append((name, f"{rates[name]:.1f}", spread))
    share = rates[FILES] / rates[OPENED]
    # what both take of the cores: a model on the CPU and the decoder can't have the same ones
    possible = 1 / (1 + rates[OPENED] / (rates[_opening(1)] * max(usable_cores(), 1)))
    report.figures.update(
        images=count, rates=rates, seconds={name: list(timing.seconds) for name, timing in timings.items()},
        share=share, cores=os.cpu_count(),
    )  # fmt: skip
    report.notes.append(f"{count} images; from files {share:.0%} of the rate of open images")
    if model.device.type == "cpu":
        report.notes.append(f"where opening and model share all cores, {possible:.0%} is what their costs add up to")
    return report
