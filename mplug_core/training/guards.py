"""What watches over a run: steps that come to no number, losses that jump, samples that can't be used, and silence."""

from __future__ import annotations

import math
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from mplug_core.errors import DataError

SPIKE = 6.0
"""Standard deviations over the running mean at which a loss counts as a spike."""
MEMORY = 0.98
"""Share of the old value in the running mean of the loss at each step: a memory of some fifty steps."""
YOUNG = 50
"""Steps before which no loss counts as a spike, since the mean knows too little."""
FEW = 1000
"""Images of which the share of bad ones is taken at least, or the first bad one would always be too many."""


@dataclass
class LossWatch:
    """The running mean and variance of the loss; tells jumps from noise. Its fields are saved with the run."""

    mean: float = 0.0
    variance: float = 0.0
    steps: int = 0

    def jumped(self, loss: float) -> bool:
        """Take the loss of a step; whether it lies far above what the steps before led to expect."""
        if not math.isfinite(loss):
            return False
        if not self.steps:
            self.mean = loss
        deviation = loss - self.mean
        jumped = (
            self.steps >= YOUNG and deviation > SPIKE * math.sqrt(self.variance) and deviation > 0.1 * abs(self.mean)
        )
        # a spike enters the mean as the largest value that would have been none, or the next one would not show
        taken = SPIKE * math.sqrt(self.variance) if jumped else deviation
        self.mean += (1 - MEMORY) * taken
        self.variance = MEMORY * (self.variance + (1 - MEMORY) * taken**2)
        self.steps += 1
        return jumped


def check_budget(bad: int, seen: int, share: float) -> None:
    """DataError when more than ``share`` of the images ``seen`` could not be used."""
    if bad > share * max(seen, FEW):
        raise DataError(
            f"{bad} of {seen} images can't be read, more than {share:.2%}",
            "repair them, or raise data.max_bad_fraction",
        )


class StallWatch:
    """Ends the process when no step is done for ``seconds``: a process that waits for a lost one, or for a dead disk,
    would otherwise hold its machine for as long as the job may take.

    The main thread may be inside of a call that never comes back, so there is nobody to raise an error in.
    """

    def __init__(self, seconds: float, last_words: str = "") -> None:
        self.seconds, self.last_words = seconds, last_words
        self.step = 0
        self._last: float | None = None
        self._ended = threading.Event()

    @contextmanager
    def watching(self) -> Iterator[StallWatch]:
        """Watch within this context, from the first :meth:`beat` on. 0 seconds: not at all."""
        if self.seconds:
            threading.Thread(target=self._watch, daemon=True).start()
        try:
            yield self
        finally:
            self._ended.set()

    def beat(self, step: int) -> None:
        """Step ``step`` is done."""
        self.step, self._last = step, time.monotonic()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within this context silence is no stall: evaluations and checkpoints take their time."""
        self._last = None
        try:
            yield
        finally:
            self._last = time.monotonic()

    def _watch(self) -> None:
        while not self._ended.wait(min(1.0, self.seconds / 4)):
            last = self._last
            if last is not None and time.monotonic() - last > self.seconds:
                with suppress(AttributeError, OSError):  # none, or one that can't be written
                    sys.stderr.write(
                        f"error: no step after {self.step} for {self.seconds:.0f} seconds ({self.last_words})\n"
                    )
                    sys.stderr.flush()
                os._exit(1)
