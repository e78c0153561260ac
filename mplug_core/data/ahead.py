"""Work done ahead in threads while the model computes: files are opened and decoded before their turn comes.

Order is kept, and batches are formed from what is there: a slow source (a pipe that paths come through) gets its
answers at once instead of when a batch is full.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

from mplug_core.errors import MplugError

T = TypeVar("T")
R = TypeVar("R")

# Seconds that a batch which has something waits for more; a source on this machine is far quicker.
_PATIENCE = 0.05


@dataclass(frozen=True)
class _End:
    """No more items, because of ``error`` if there is one."""

    error: BaseException | None


def batches_ahead(
    items: Iterable[T], work: Callable[[T], R], size: int, threads: int | None = None
) -> Iterator[list[tuple[T, R | MplugError]]]:
    """Batches of 1 to ``size`` (item, what ``work`` made of it) in the order of ``items``.

    An MplugError of ``work`` takes the place of its result; any other exception, and any of ``items``, is raised here.
    At most a few batches are held. Threads are daemons: none delays the end of the process.
    """
    threads = threads or min(4, os.cpu_count() or 1)
    jobs: queue.SimpleQueue[tuple[T, Future] | None] = queue.SimpleQueue()
    turns: queue.Queue[tuple[T, Future] | _End] = queue.Queue(maxsize=2 * size + threads)
    stopped = threading.Event()

    def feed() -> None:
        error: BaseException | None = None
        try:
            for item in items:
                job = (item, Future())
                jobs.put(job)
                turns.put(job)
                if stopped.is_set():
                    break
        except BaseException as raised:
            error = raised
        for _ in range(threads):
            jobs.put(None)
        turns.put(_End(error))

    def run() -> None:
        _stand_back()
        while (job := jobs.get()) is not None:
            item, future = job
            if stopped.is_set():
                continue
            try:
                future.set_result(work(item))
            except MplugError as error:
                future.set_result(error)
            except BaseException as error:
                future.set_exception(error)

    for target in (feed, *[run] * threads):
        threading.Thread(target=target, daemon=True).start()
    turn: tuple[T, Future] | _End | None = None
    try:
        while True:
            batch: list[tuple[T, R | MplugError]] = []
            while len(batch) < size:
                patience = _PATIENCE if batch else None
                try:
                    turn = turn or turns.get(timeout=patience)
                except queue.Empty:
                    break
                if isinstance(turn, _End) or not wait([turn[1]], patience).done:
                    break
                batch.append((turn[0], turn[1].result()))
                turn = None
            if batch:
                yield batch
            elif isinstance(turn, _End):
                if turn.error is not None:
                    raise turn.error
                return
    finally:
        stopped.set()
        with suppress(queue.Empty):  # a feeder that waits for room goes on, and sees that it has to stop
            while True:
                turns.get_nowait()


def _stand_back() -> None:
    """Have this thread run where the model's threads leave a core free: they wait for each other, so that one which
    shares its core holds all of them up. Only Linux has priorities of threads."""
    if sys.platform.startswith("linux"):
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
