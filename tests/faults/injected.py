"""Faults that come from within: each function breaks something of the process that calls it, before it trains.

Named by :class:`tests.faults.runs.Runs`, and called in the process of a rank. ``calls`` count from 1, in this process.
"""

from __future__ import annotations

import hashlib
import os
import resource
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def _wrap(owner: Any, name: str, around: Callable[..., Any]) -> None:
    """Replace a function by ``around(call, original, *arguments)``, where ``call`` counts from 1."""
    original, count = getattr(owner, name), 0

    def wrapped(*arguments: Any, **named: Any) -> Any:
        nonlocal count
        count += 1
        return around(count, lambda: original(*arguments, **named), *arguments)

    setattr(owner, name, wrapped)


class _NoNumberBack(torch.autograd.Function):
    """A value as it is, and a gradient that is no number."""

    @staticmethod
    def forward(context: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        return gradient * float("nan")


def no_number(calls: Sequence[int], where: str = "loss") -> None:
    """The ``loss``, or with a finite loss its ``gradient``, is no number at these calls of the model."""
    from mplug_core.training.step import TrainStep

    def around(call: int, original: Callable[[], Any], *_: Any) -> Any:
        loss, parts = original()
        if call in calls:
            loss = loss * float("inf") * 0 if where == "loss" else _NoNumberBack.apply(loss)
        return loss, parts

    _wrap(TrainStep, "forward", around)


def slow_step(call: int, seconds: float, mark: str) -> None:
    """The model takes so long once, and a file ``mark`` says when it does."""
    from mplug_core.training.step import TrainStep

    def around(count: int, original: Callable[[], Any], *_: Any) -> Any:
        if count == call:
            Path(mark).touch()
            time.sleep(seconds)
        return original()

    _wrap(TrainStep, "forward", around)


def bad_worker(lot: int, kind: str) -> None:
    """The worker of the data loader that draws micro-step ``lot`` is ``killed``, or ``hangs``."""
    from torch.utils.data import get_worker_info

    from mplug_core.data.batches import Lots

    def around(call: int, original: Callable[[], Any], lots: Lots, number: int) -> Any:
        if number == lot:
            assert get_worker_info() is not None
            if kind == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(3600)
        return original()

    _wrap(Lots, "__getitem__", around)


def without_records(task: str, lots: Sequence[int]) -> None:
    """These micro-steps draw no record of a task."""
    from mplug_core.data.batches import Lots

    def around(call: int, original: Callable[[], Any], _: Lots, number: int) -> Any:
        batches = original()
        for batch in batches:
            if number in lots:
                del batch.blocks[task]
        return batches

    _wrap(Lots, "__getitem__", around)


def small_files(save: int, size: int) -> None:
    """From the ``save``-th checkpoint on the system lets no file grow beyond ``size`` bytes: writes fail half-way."""
    from mplug_core.training.loop import StageLoop

    def around(call: int, original: Callable[[], Any], *_: Any) -> Any:
        if call == save:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        return original()

    _wrap(StageLoop, "_write_checkpoint", around)


def failing_evaluation(call: int) -> None:
    """An evaluation raises what nobody has thought of."""
    from mplug_core.training.trainer import Trainer

    def around(count: int, original: Callable[[], Any], *_: Any) -> Any:
        if count == call:
            raise ZeroDivisionError("no caption has a word")
        return original()

    _wrap(Trainer, "evaluate", around)


def slow_end_of_evaluation(call: int, seconds: float) -> None:
    """Between an evaluation, its line in the log included, and what follows there is so much time."""
    from mplug_core.training.loop import StageLoop

    def around(count: int, original: Callable[[], Any], *_: Any) -> Any:
        original()
        if count == call:
            time.sleep(seconds)

    _wrap(StageLoop, "_evaluate", around)


class Unreachable:
    """A tracker that raises at every call."""

    def open(self) -> None:
        pass

    def log(self, step: int, values: dict[str, float]) -> None:
        raise ConnectionError("the server of figures is gone")

    def close(self, ok: bool) -> None:
        raise ConnectionError("the server of figures is gone")


def lost_tracker() -> None:
    """The run is followed by a tracker whose server is gone."""
    from mplug_core.training import trackers

    trackers.build_trackers = lambda *_: [trackers.Background("tracker", Unreachable())]


def leave_digest(file: str) -> None:
    """At the end of each stage the rank writes the hash of its weights to ``file``, with its rank before the suffix."""
    from mplug_core.training.loop import StageLoop

    def around(call: int, original: Callable[[], Any], loop: StageLoop) -> Any:
        original()
        digest = hashlib.sha256()
        parameters = list(loop.module.parameters())
        with loop.engine.whole(parameters):
            for parameter in parameters:
                digest.update(parameter.detach().float().numpy().tobytes())
        path = Path(file)
        path.with_suffix(f".{loop.world.rank}").write_text(digest.hexdigest())

    _wrap(StageLoop, "run", around)
