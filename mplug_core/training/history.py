"""What a run folder tells about its run: figures, events, checkpoints, state. Needs no torch and changes nothing.

A log may be long, half written or damaged. Of a long one only every n-th line of figures is parsed, and curves are
thinned further to what a plot can show, with their extremes; lines that are none are counted.
"""

from __future__ import annotations

import json
import math
import os
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from mplug_core import bounded
from mplug_core.bounded import Unreadable, open_regular, read_bytes, read_yaml
from mplug_core.errors import DataError
from mplug_core.outputs import path_shown
from mplug_core.training import journal
from mplug_core.training.figures import PLACE, is_counter, is_number

METRICS = "metrics.jsonl"
MOST_PARSED = 50_000
"""Lines of figures that are parsed of a log; evaluations and the last lines always are."""
TAIL = 20
MOST_LINE_BYTES = 1 << 20
LARGEST_STEP = 2**53
SILENCE_SECONDS = 900.0
"""After which a run on another machine is taken to run no more, or longer where its steps take longer."""


@dataclass
class Curve:
    """Values of one figure over steps, by rising step."""

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def add(self, step: int, value: float) -> None:
        self.steps.append(step)
        self.values.append(value)

    def forget_from(self, step: int) -> None:
        """Leave out what is at ``step`` or later."""
        keep = bisect_right(self.steps, step - 1)
        del self.steps[keep:], self.values[keep:]


@dataclass
class Thinned:
    """A curve in at most so many bins: mean of each bin's finite values, lowest and highest."""

    steps: list[float]
    means: list[float]
    lows: list[float]
    highs: list[float]


def thin(curve: Curve, points: int) -> Thinned:
    """``curve`` in at most ``points`` bins of equal numbers of values; a bin without a finite value is a gap (NaN)."""
    count = len(curve.steps)
    edges = sorted({round(i * count / min(points, count)) for i in range(min(points, count) + 1)}) if count else []
    thinned = Thinned([], [], [], [])
    for begin, end in pairwise(edges):
        finite = [value for value in curve.values[begin:end] if math.isfinite(value)] or [math.nan]
        thinned.steps.append(sum(curve.steps[begin:end]) / (end - begin))
        thinned.means.append(sum(finite) / len(finite))
        thinned.lows.append(min(finite))
        thinned.highs.append(max(finite))
    return thinned


@dataclass
class Log:
    """What a log of figures holds.

    ``figures`` and ``evaluations`` are curves by name; ``marks`` of each counter the steps at which it has risen, and
    by how much; ``rewinds`` the steps to which the log went back, ``last`` the last figures.
    """

    figures: dict[str, Curve] = field(default_factory=dict)
    evaluations: dict[str, Curve] = field(default_factory=dict)
    stages: list[tuple[int, str]] = field(default_factory=list)
    marks: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    rewinds: list[int] = field(default_factory=list)
    last: dict[str, Any] = field(default_factory=dict)
    lines: int = 0
    unreadable: int = 0
    every: int = 1

    def add(self, line: dict[str, Any]) -> None:
        """Take a parsed line; raises ValueError where it is none of ours."""
        step = line.get("step")
        if not is_number(step) or not 0 <= step <= LARGEST_STEP:
            raise ValueError("no step")
        line = {name: value for name, value in line.items() if not _is_beyond(value)}
        step = int(step)
        if step < self.last.get("step", 0):
            self._go_back(step)
        scores = line.get("evaluation")
        if isinstance(scores, dict):
            for name, value in scores.items():
                if is_number(value) and not _is_beyond(value):
                    self.evaluations.setdefault(name, Curve()).add(step, float(value))
            return
        stage = line.get("stage")
        if isinstance(stage, str) and (not self.stages or self.stages[-1][1] != stage):
            self.stages.append((step, stage))
        for name, value in line.items():
            if value is None and name in self.figures:  # a number that was not finite
                value = math.nan
            if name in PLACE or not is_number(value):
                continue
            self.figures.setdefault(name, Curve()).add(step, float(value))
            if is_counter(name, value):
                before = self.last.get(name)
                risen = value - (before if is_counter(name, before) else 0)
                if risen > 0:
                    self.marks.setdefault(name, []).append((step, risen))
        self.last = line | {"step": step}

    def _go_back(self, step: int) -> None:
        """The run went on from an earlier step: what came after it is computed again."""
        self.rewinds.append(step)
        for curve in (*self.figures.values(), *self.evaluations.values()):
            curve.forget_from(step)
        self.stages = [stage for stage in self.stages if stage[0] < step]
        self.marks = {name: [mark for mark in marks if mark[0] < step] for name, marks in self.marks.items()}
        self.last = {}
        for name, marks in self.marks.items():
            self.last[name] = sum(risen for _, risen in marks)


def _is_beyond(value: Any) -> bool:
    """Whether a value is a number that nothing can be computed with."""
    return isinstance(value, int) and abs(value) > LARGEST_STEP


def read_log(file: Path, most: int = MOST_PARSED) -> Log:
    """The figures in a ``metrics.jsonl``; an empty log where there is no file. DataError where it can't be read."""
    log = Log()
    tail: deque[tuple[int, bytes]] = deque(maxlen=TAIL)
    parsed = -1
    try:
        size = file.stat().st_size
        with open_regular(file) as stream:
            head = stream.read(1 << 16)
            average = len(head) / max(head.count(b"\n"), 1)
            log.every = max(1, math.ceil(size / max(average, 1) / most))
            stream.seek(0)
            for number, line in enumerate(_lines(stream)):
                log.lines += 1
                if number % log.every == 0:
                    parsed = number
                    _take(log, line)
                elif b'"evaluation"' in line:
                    _take(log, line)
                elif log.every > 1:
                    tail.append((number, line))
    except FileNotFoundError:
        return log
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}", "name a run folder") from error
    except Unreadable as error:
        raise DataError(f"cannot read {file}: {error}", "name a run folder") from error
    for number, line in tail:
        if number > parsed:
            _take(log, line)
    return log


def _lines(stream: Any) -> Iterator[bytes]:
    """Lines that aren't blank; of what is no text, pieces."""
    while line := stream.readline(MOST_LINE_BYTES):
        if line.strip():
            yield line


def _take(log: Log, line: bytes) -> None:
    try:
        values = json.loads(line)
        if not isinstance(values, dict):
            raise ValueError("no mapping")
        log.add(values)
    except (ValueError, RecursionError, OverflowError):
        log.unreadable += 1


@dataclass
class Checkpoint:
    """A checkpoint folder; ``fault`` says what is wrong with it, ``checked`` whether its sizes were listed at all."""

    name: str
    step: int | None
    bytes: int
    written: float
    world: int | None = None
    stage: str | None = None
    fault: str | None = None
    checked: bool = False
    latest: bool = False
    unfinished: bool = False

    @property
    def condition(self) -> str:
        """One word or phrase: sound, complete, being written, damaged: WHY."""
        if self.unfinished:
            return "unfinished"
        if self.fault:
            return f"damaged: {self.fault}"
        return "sound" if self.checked else "complete"


def read_checkpoints(run: Path) -> list[Checkpoint]:
    """The checkpoints of a run folder by step: sizes are compared with the manifest's, contents are not read."""
    root = run / "checkpoints"
    try:
        latest = read_bytes(root / "latest").decode("utf-8", "replace").strip()
    except Unreadable:
        latest = None
    try:
        folders = [folder for folder in root.iterdir() if folder.is_dir() and "step-" in folder.name]
    except OSError:
        return []
    found = [read_checkpoint_folder(folder) for folder in folders]
    for checkpoint in found:
        checkpoint.latest = checkpoint.name == latest
    return sorted(found, key=lambda c: (c.step is None, c.step or 0, c.name))


def read_checkpoint_folder(folder: Path) -> Checkpoint:
    """What the metadata of one checkpoint tell."""
    sizes: dict[str, int] = {}
    for place, _, names in os.walk(folder):
        for name in names:
            path = Path(place) / name
            try:
                sizes[path.relative_to(folder).as_posix()] = path.stat().st_size
            except OSError:
                continue
    digits = folder.name.rpartition("-")[2]
    checkpoint = Checkpoint(
        folder.name,
        int(digits) if digits.isascii() and digits.isdigit() else None,
        sum(sizes.values()),
        _modified(folder / "meta.json") or _modified(folder) or 0.0,
        unfinished=folder.name.startswith("."),
    )
    meta = read_json(folder / "meta.json")
    if meta is None:
        checkpoint.fault = "meta.json is missing" if "meta.json" not in sizes else "meta.json is no JSON"
        return checkpoint
    progress = meta.get("progress")
    total = progress.get("total") if isinstance(progress, dict) else None
    checkpoint.step = total if _is_count(total) else checkpoint.step
    checkpoint.world = meta.get("world") if _is_count(meta.get("world")) else None
    checkpoint.stage = meta.get("stage") if isinstance(meta.get("stage"), str) else None
    manifest = read_json(folder / "manifest.json")
    listed = manifest.get("files") if manifest else None
    if isinstance(listed, dict):
        checkpoint.checked = True
        checkpoint.fault = _size_fault(listed, sizes)
    elif "manifest.json" in sizes:
        checkpoint.fault = "manifest.json is none"
    return checkpoint


def _size_fault(listed: dict[str, Any], sizes: dict[str, int]) -> str | None:
    for name, entry in listed.items():
        wanted = entry.get("size") if isinstance(entry, dict) else None
        if name not in sizes:
            return f"{name} is missing"
        if isinstance(wanted, int) and sizes[name] != wanted:
            return f"{name} has {sizes[name]} bytes instead of {wanted}"
    return None


@dataclass
class Run:
    """Everything that a run folder tells.

    ``state`` is one of running, finished, stopped, failed, unknown; ``why`` says more about it, in a phrase.
    """

    folder: Path
    recipe: str | None
    log: Log
    events: list[dict[str, Any]]
    checkpoints: list[Checkpoint]
    state: str
    why: str
    steps: int | None
    best_metric: str | None
    best: dict[str, Any]
    changed: float | None

    @property
    def step(self) -> int | None:
        """The last step that is known: of the log, else of a checkpoint."""
        known = [c.step for c in self.checkpoints if c.step is not None and not c.unfinished]
        return self.log.last.get("step", max(known, default=None))

    @property
    def resumes(self) -> list[int]:
        """The steps from which the run went on."""
        begun = [e.get("step") for e in self.events if e.get("event") == "begin" and e.get("resumed")]
        return sorted({step for step in begun if _is_count(step)} | set(self.log.rewinds))


def is_run(folder: Path) -> bool:
    """Whether a folder looks like one that a run writes."""
    return any(os.path.exists(folder / name) for name in (METRICS, journal.FILE, "checkpoints")) and folder.is_dir()


def find_runs(root: Path) -> list[Path]:
    """The run folders in a folder and in its folders; itself, if it is one. DataError without such a folder."""
    if not os.path.isdir(root):
        raise DataError(f"no folder {path_shown(root)}", "runs are written to runs/ unless run.folder says otherwise")
    if is_run(root):
        return [root]
    # model folders inside of runs have no log
    return sorted(path for pattern in ("*", "*/*") for path in root.glob(pattern) if is_run(path))


def read_run(folder: Path, most: int = MOST_PARSED) -> Run:
    """Read a run folder. DataError where there is none, or nothing of a run in it."""
    if not os.path.exists(folder):
        raise DataError(f"no folder {path_shown(folder)}", "`mplug runs ls` lists the runs in runs/")
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder", "name the run's folder")
    if not is_run(folder) and not (folder / "recipe.yaml").is_file():
        raise DataError(f"{folder} holds no run: there is no {METRICS}", "`mplug runs ls FOLDER` looks for runs in it")
    log = read_log(folder / METRICS, most)
    events = read_events(folder / journal.FILE)
    recipe = _recipe(folder)
    checkpoints = read_checkpoints(folder)
    changed = max(filter(None, (_modified(folder / name) for name in (METRICS, journal.FILE))), default=None)
    state, why = run_state(log, events, changed, _last_stage(recipe))
    section = recipe.get("run") if isinstance(recipe.get("run"), dict) else {}
    begun = [event for event in events if event.get("event") == "begin"]
    steps = begun[-1].get("steps") if begun else None
    return Run(
        folder=folder,
        recipe=recipe.get("name") if isinstance(recipe.get("name"), str) else None,
        log=log,
        events=events,
        checkpoints=checkpoints,
        state=state,
        why=why,
        steps=steps if _is_count(steps) else None,
        best_metric=section.get("best") if isinstance(section.get("best"), str) else None,
        best=_best(folder, log, section.get("best")),
        changed=changed,
    )


def read_events(file: Path) -> list[dict[str, Any]]:
    """The events of a run; none where there is no file. Lines that are none are left out."""
    events = []
    try:
        with open_regular(file) as stream:
            for line in _lines(stream):
                try:
                    event = json.loads(line)
                except (ValueError, RecursionError):
                    continue
                if isinstance(event, dict) and isinstance(event.get("event"), str):
                    events.append(event)
    except (OSError, Unreadable):
        pass
    return events


def run_state(
    log: Log, events: list[dict[str, Any]], changed: float | None, last_stage: str | None, now: float | None = None
) -> tuple[str, str]:
    """(state, why) of a run: by its events, or without any by how its log ends and when it last grew."""
    now = time.time() if now is None else now
    silent = now - changed if changed is not None else math.inf
    patience = max(SILENCE_SECONDS, 5 * _interval(log))
    begins = [number for number, event in enumerate(events) if event["event"] == "begin"]
    if not begins:
        return _state_of_log(log, silent, patience, last_stage)
    begin, since = events[begins[-1]], events[begins[-1] + 1 :]
    ends = [event for event in since if event["event"] in journal.ENDS]
    if ends:
        return ends[-1]["event"], str(ends[-1].get("why") or "")
    alive = journal.is_alive(begin)
    if alive:
        return "running", f"process {begin['pid']}" + (f", silent for {ago(silent)}" if silent > patience else "")
    if alive is False:
        return "failed", "its process is gone without a word: killed?"
    if silent <= patience:
        return "running", f"on {begin.get('host')}"
    return "unknown", f"on {begin.get('host')}, silent for {ago(silent)}"


def _state_of_log(log: Log, silent: float, patience: float, last_stage: str | None) -> tuple[str, str]:
    """Of a run without events, which older versions wrote."""
    last = log.last
    if not last:
        return "unknown", "nothing is logged yet"
    if (last.get("stage_step"), last.get("stage")) == (last.get("stage_steps"), last_stage or last.get("stage")):
        return "finished", ""
    if silent <= patience:
        return "running", "by the age of its log"
    return "stopped", "by the age of its log"


def _interval(log: Log) -> float:
    """Seconds between two lines of the log, about."""
    seconds = log.figures.get("seconds")
    if seconds is None or len(seconds.values) < 2:
        return 0.0
    took = (seconds.values[-1] - seconds.values[0]) / (len(seconds.values) - 1) / log.every
    return took if math.isfinite(took) else 0.0


def _recipe(folder: Path) -> dict[str, Any]:
    try:
        values = read_yaml(folder / "recipe.yaml")
    except Unreadable:
        return {}
    return values if isinstance(values, dict) else {}


def _last_stage(recipe: dict[str, Any]) -> str | None:
    stages = recipe.get("stages")
    trained = [s for s in stages if isinstance(s, dict) and not s.get("align")] if isinstance(stages, list) else []
    name = trained[-1].get("name") if trained else None
    return name if isinstance(name, str) else None


def _best(folder: Path, log: Log, metric: Any) -> dict[str, Any]:
    """Step and value of the best evaluation by the recipe's ``run.best``, and whether its model is kept."""
    if not isinstance(metric, str):
        return {}
    curve = log.evaluations.get(metric.removeprefix("-"))
    scored = [(v, s) for s, v in zip(curve.steps, curve.values, strict=True) if math.isfinite(v)] if curve else []
    if not scored:
        return {}
    sign = -1 if metric.startswith("-") else 1
    value, step = max(scored, key=lambda pair: (sign * pair[0], -pair[1]))
    return {"metric": metric.removeprefix("-"), "step": step, "value": value, "kept": (folder / "best").is_dir()}


def read_json(file: Path) -> dict[str, Any] | None:
    """A JSON mapping, or None where there is none."""
    try:
        values = bounded.read_json(file)
    except Unreadable:
        return None
    return values if isinstance(values, dict) else None


def _is_count(value: Any) -> bool:
    """Whether a value is a number of steps or of processes."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST_STEP


def _modified(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def ago(seconds: float) -> str:
    """How long, in the largest unit: 12 s, 5 min, 3 h, 2 days."""
    for unit, size in (("days", 172_800), ("h", 5400), ("min", 90)):
        if seconds >= size:
            length = {"days": 86_400, "h": 3600, "min": 60}[unit]
            return f"{seconds / length:.0f} {unit}" if math.isfinite(seconds) else "ever"
    return f"{max(seconds, 0):.0f} s"
