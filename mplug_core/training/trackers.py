"""Trackers (TensorBoard, Weights & Biases) and the journal beside the display: all who follow a run.

A tracker may be slow, lose its connection or fail at every call: its calls run in a thread of their own behind a queue
that drops when it is full, failures become one note and a count, and the end waits for it only so long. What it has
been given before a resume it is not given again.
"""

from __future__ import annotations

import contextlib
import math
import os
import queue
import secrets
import threading
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from mplug_core.bounded import read_json
from mplug_core.errors import MplugError, Preempted, RecipeError, values_without_secrets
from mplug_core.json_text import to_json
from mplug_core.recipe import Recipe
from mplug_core.training.figures import PLACE, is_counter, is_loss, is_number
from mplug_core.training.journal import Journal

FILE = "trackers.json"
QUEUE_LENGTH = 1000
CLOSE_SECONDS = 15.0
RETRY_SECONDS = 300.0
PACKAGES = {"tensorboard": ("torch.utils.tensorboard", "tensorboardX"), "wandb": ("wandb",)}


class Tracker(Protocol):
    """Where figures go. Every method may raise and may block."""

    def open(self) -> None: ...

    def log(self, step: int, values: dict[str, float]) -> None: ...

    def close(self, ok: bool) -> None: ...


def check_trackers(recipe: Recipe) -> None:
    """RecipeError if the package of a tracker that the recipe names can't be imported."""
    for name in recipe.run.trackers:
        import_tracker(name)


def import_tracker(name: str) -> Any:
    """The module of a tracker: for ``tensorboard`` the one of torch, else tensorboardX."""
    faults = []
    if name == "wandb":
        os.environ.setdefault("WANDB_SILENT", "true")  # or it asks for a key, on the terminal and for ever
    for module in PACKAGES[name]:
        try:
            return import_module(module)
        except ImportError as error:
            faults.append(str(error))
        except Exception as error:  # a broken installation fails in its own ways
            faults.append(f"{type(error).__name__}: {error}")
    raise RecipeError(
        f"run.trackers: {name} can't be imported: {faults[0]}",
        f'pip install "mplug[{name}]", or leave it out of run.trackers',
    )


def tracked_values(figures: dict[str, Any]) -> dict[str, float]:
    """The figures of a step or an evaluation as a tracker names them: loss/, train/, count/, evaluation/."""
    if isinstance(figures.get("evaluation"), dict):
        scores = {name: value for name, value in figures["evaluation"].items() if is_number(value)}
        return {f"evaluation/{name}": float(value) for name, value in scores.items()}
    values = {}
    for name, value in figures.items():
        if name not in PLACE and is_number(value):
            group = "count" if is_counter(name, value) else "loss" if is_loss(name) else "train"
            values[f"{group}/{name}"] = float(value)
    return values


class TensorBoard:
    """Event files in ``RUN/tensorboard``. Going on from a step hides what was written after it."""

    def __init__(self, folder: Path, step: int, resumed: bool) -> None:
        self.folder, self.step, self.resumed = folder / "tensorboard", step, resumed
        self.writer: Any = None

    def open(self) -> None:
        module = import_tracker("tensorboard")
        if not self.resumed:
            for old in self.folder.glob("events.out.tfevents.*"):
                old.unlink()
        self.writer = module.SummaryWriter(
            str(self.folder), purge_step=self.step + 1 if self.resumed else None, flush_secs=30
        )

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self, ok: bool) -> None:
        self.writer.close()


class WandB:
    """One run of Weights & Biases for one run folder: its id is kept there.

    ``WANDB_MODE``, ``WANDB_API_KEY`` and the like are honoured. Steps are never repeated: what was logged after the
    checkpoint that a run goes on from stays as it was.
    """

    def __init__(self, folder: Path, recipe: Recipe, resumed: bool) -> None:
        self.folder, self.recipe, self.resumed = folder, recipe, resumed
        self.run: Any = None
        self.id = ""
        self.logged = -1

    def open(self) -> None:
        wandb = import_tracker("wandb")
        self._recall()
        settings = self.recipe.run.wandb
        self.run = wandb.init(
            id=self.id,
            resume="allow",
            project=settings.project,
            entity=settings.entity,
            name=settings.name or self.recipe.name,
            tags=list(settings.tags) or None,
            mode=settings.mode or os.environ.get("WANDB_MODE") or None,
            dir=str(self.folder),
            config=values_without_secrets(self.recipe.model_dump(mode="json")),
            settings=wandb.Settings(silent=True, console="off", init_timeout=60),
        )
        self._keep()

    def _recall(self) -> None:
        """The id and the last step of this folder's run, or a new id."""
        if not self.id and self.resumed:
            try:
                kept = read_json(self.folder / FILE)["wandb"]
                self.id, self.logged = str(kept["id"]), int(kept["step"])
            except (OSError, ValueError, KeyError, TypeError):
                pass
        self.id = self.id or secrets.token_hex(4)

    def _keep(self) -> None:
        beside = self.folder / f".{FILE}"
        beside.write_text(to_json({"wandb": {"id": self.id, "step": self.logged}}), encoding="utf-8")
        os.replace(beside, self.folder / FILE)

    def log(self, step: int, values: dict[str, float]) -> None:
        # an evaluation comes at the step of the figures before it, and joins them
        if step < self.logged or (step == self.logged and not any(n.startswith("evaluation/") for n in values)):
            return
        self.run.log({name: value for name, value in values.items() if math.isfinite(value)}, step=step)
        if step > self.logged:
            self.logged = step
            self._keep()

    def close(self, ok: bool) -> None:
        self.run.finish(exit_code=0 if ok else 1)


class Background:
    """A tracker in a thread: ``log`` returns at once whatever the tracker does.

    ``notes`` gives what is to be told; the caller asks for it, as a display is not for every thread.
    """

    def __init__(self, name: str, tracker: Tracker, length: int = QUEUE_LENGTH) -> None:
        self.name, self.tracker = name, tracker
        self.waiting: queue.Queue[tuple[int, dict[str, float]] | None] = queue.Queue(length)
        self.dropped = self.failed = 0
        self.told: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.opened = False
        self.retry_at = 0.0
        self.ended = threading.Event()
        self.ok = True
        # no reason for the process to live on
        self.thread = threading.Thread(target=self._work, name=f"tracker-{name}", daemon=True)
        self.thread.start()

    def log(self, step: int, values: dict[str, float]) -> None:
        """Hand figures on, or drop them if the tracker doesn't keep up."""
        try:
            self.waiting.put_nowait((step, values))
        except queue.Full:
            self.dropped += 1
            if self.dropped == 1:
                self.told.put(f"{self.name} doesn't keep up: figures are left out (metrics.jsonl has them)")

    def end(self, ok: bool) -> None:
        """No more will come: it is to finish. Doesn't wait for it."""
        self.ok = ok
        self.ended.set()
        with contextlib.suppress(queue.Full):  # then it finds the end when it has emptied the queue
            self.waiting.put_nowait(None)

    def join(self, seconds: float = CLOSE_SECONDS) -> None:
        """Let it finish, for so long at most."""
        self.thread.join(seconds)
        if self.thread.is_alive():
            self.told.put(f"{self.name} has not finished in time and is left behind")
        counts = {"calls failed": self.failed, "left out": self.dropped}
        lost = [f"{count} {what}" for what, count in counts.items() if count]
        if lost:
            self.told.put(f"{self.name}: {', '.join(lost)}")

    def notes(self) -> list[str]:
        """What is to be told since the last call."""
        found = []
        while not self.told.empty():
            found.append(self.told.get())
        return found

    def _work(self) -> None:
        self._ready()
        while not (self.ended.is_set() and self.waiting.empty()):
            item = self.waiting.get()
            if item is None:
                break
            step, values = item
            if self._ready():
                self._try(lambda step=step, values=values: self.tracker.log(step, values))
            else:
                self.failed += 1
        if self.opened:
            self._try(lambda: self.tracker.close(self.ok))

    def _ready(self) -> bool:
        """Whether the tracker is open; it is tried again now and then."""
        if not self.opened and time.monotonic() >= self.retry_at:
            self.opened = self._try(self.tracker.open)
            self.retry_at = time.monotonic() + RETRY_SECONDS
        return self.opened

    def _try(self, call: Callable[[], None]) -> bool:
        try:
            call()
            return True
        except BaseException as error:  # also what a library raises to end the process
            self.failed += 1
            if self.failed == 1:
                what = " ".join(f"{type(error).__name__}: {error}".split())[:300]
                self.told.put(f"{self.name} fails, the run goes on without it: {what}")
            return False


def build_trackers(recipe: Recipe, folder: Path, step: int, resumed: bool) -> list[Background]:
    """The recipe's trackers, running."""
    trackers: list[Background] = []
    for name in dict.fromkeys(recipe.run.trackers):
        tracker: Tracker = (
            TensorBoard(folder, step, resumed) if name == "tensorboard" else WandB(folder, recipe, resumed)
        )
        trackers.append(Background(name, tracker))
    return trackers


class Followers:
    """A :data:`~mplug_core.training.loop.Watch` that hands events on to the display, the journal and the trackers.

    As a context it writes down how the run ended. Only the display's own errors reach the run.
    """

    def __init__(self, recipe: Recipe, folder: Path, display: Callable[[str, dict[str, Any]], None]) -> None:
        self.recipe, self.folder, self.display = recipe, folder, display
        self.journal: Journal | None = None
        self.trackers: list[Background] = []
        self.step = 0

    def begin(self, step: int, resumed: bool, steps: int | None = None) -> None:
        """The run folder is there, and the run goes on from ``step``, of ``steps`` if all goes as planned."""
        self.step = step
        self.journal = Journal(self.folder)
        self.journal.begin(step, resumed, steps)
        self.trackers = build_trackers(self.recipe, self.folder, step, resumed)
        self.display("begin", {"step": step, "steps": steps, "resumed": resumed})

    def __call__(self, kind: str, figures: dict[str, Any]) -> None:
        if kind in ("step", "evaluation"):
            self.step = figures.get("step", self.step)
            values = tracked_values(figures)
            for tracker in self.trackers:
                tracker.log(self.step, dict(values))
        elif self.journal is not None:
            if kind == "start":
                self.journal.write("stage", stage=figures.get("stage"), step=self.step)
            elif kind == "note" and figures.get("level") == "warning":
                self.journal.write("warning", step=self.step, text=str(figures.get("text")))
            elif kind == "end":
                self._end("finished")
        self._tell()
        self.display(kind, figures)

    def _tell(self) -> None:
        for tracker in self.trackers:
            for text in tracker.notes():
                self.display("note", {"text": text, "level": "warning"})

    def _end(self, event: str, why: str = "") -> None:
        if self.journal is None:
            return
        journal, self.journal = self.journal, None
        journal.write(event, step=self.step, **({"why": why} if why else {}))
        deadline = time.monotonic() + CLOSE_SECONDS
        for tracker in self.trackers:
            tracker.end(event == "finished")
        for tracker in self.trackers:
            tracker.join(max(deadline - time.monotonic(), 0.1))
        self._tell()
        self.trackers = []

    def __enter__(self) -> Followers:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None:
            self._end("finished")
            return
        with contextlib.suppress(Exception):  # of a display that can't take notes any more
            self._end(*how_it_ended(error))


def how_it_ended(error: BaseException) -> tuple[str, str]:
    """(event of the journal, why) for what ended a run early."""
    if isinstance(error, KeyboardInterrupt):
        return "stopped", "interrupted at once, not saved"
    if isinstance(error, Preempted):
        return "stopped", error.message
    what = " ".join(str(error).split()) or "no message"
    return "failed", (what if isinstance(error, MplugError) else f"{type(error).__name__}: {what}")[:500]
