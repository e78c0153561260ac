"""What a run folder tells: logs long, torn, old or broken; states; checkpoints."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mplug_core.errors import DataError
from mplug_core.training import journal
from mplug_core.training.history import Curve, find_runs, read_checkpoints, read_log, read_run, run_state, thin
from mplug_core.training.journal import Journal


def step(number: int, **figures: Any) -> dict[str, Any]:
    base = {"stage": "train", "step": number, "stage_step": number, "stage_steps": 100}
    return {**base, "loss": 1.0 / number, "lr": 1e-4, "seconds": 2.0 * number, **figures}


def write(file: Path, *lines: dict[str, Any] | bytes) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"".join(x if isinstance(x, bytes) else json.dumps(x).encode() + b"\n" for x in lines))
    return file


def test_figures_evaluations_and_marks(tmp_path: Path) -> None:
    log = read_log(write(
        tmp_path / "m", step(1, bad_images=0), step(2, bad_images=3, mfu=0.5),
        {"stage": "train", "step": 2, "evaluation": {"val/vqa/accuracy": 0.25}, "evaluation_seconds": 1.5},
        step(3, bad_images=3, stage="late"), step(4, bad_images=4, stage="late", loss=math.nan),
    ))  # fmt: skip
    assert log.figures["loss"].steps == [1, 2, 3, 4] and math.isnan(log.figures["loss"].values[-1])
    assert log.figures["mfu"] == Curve([2], [0.5])
    assert log.evaluations == {"val/vqa/accuracy": Curve([2], [0.25])}
    assert log.marks == {"bad_images": [(2, 3), (4, 1)]}
    assert log.stages == [(1, "train"), (3, "late")]
    assert (log.last["step"], log.unreadable, log.rewinds) == (4, 0, [])


def test_what_is_no_line_is_counted_and_left_out(tmp_path: Path) -> None:
    file = write(
        tmp_path / "m", step(1), b"\x00\xff\x80junk\n", b"[1, 2]\n", b'"text"\n', b'{"step": "x"}\n',
        b'{"step": 1e400}\n',
        b'{"loss": 1}\n', b"\n", b"[" * 100_000 + b"\n", step(2, loss="high", note=None, ok=True, extra=[1]),
        b'{"stage": "train", "step": 3, "lo',
    )  # fmt: skip
    log = read_log(file)
    assert log.unreadable == 8
    assert log.figures["loss"].steps == [1] and log.figures["lr"].steps == [1, 2] and log.last["step"] == 2


def test_a_log_that_goes_back_is_continued_from_there(tmp_path: Path) -> None:
    """Older versions left in the log what a resumed run computes again."""
    lines = [step(n, skipped_steps=int(n > 2)) for n in (1, 2, 3, 4)]
    late = {"step": 4, "evaluation": {"a": 0.1}}
    log = read_log(write(tmp_path / "m", *lines, late, step(3, loss=9.0, skipped_steps=0), step(4, skipped_steps=2)))
    assert log.rewinds == [3]
    assert log.figures["loss"].steps == [1, 2, 3, 4] and log.figures["loss"].values[2] == 9.0
    assert log.evaluations["a"].steps == [] and log.marks["skipped_steps"] == [(4, 2)]


def test_a_long_log_is_sampled_but_not_its_evaluations_and_its_end(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = []
    for n in range(1, 3001):
        lines.append(step(n, skipped_steps=n // 1000))
        if n % 100 == 0:
            lines.append({"stage": "train", "step": n, "evaluation": {"a": n / 3000}})
    log = read_log(write(tmp_path / "m", *lines), most=200)
    assert 10 < log.every < 20 and log.lines == 3030 and log.unreadable == 0
    assert len(log.figures["loss"].steps) < 320 and log.rewinds == []
    assert log.evaluations["a"].steps == list(range(100, 3001, 100))
    assert log.last["step"] == 3000 == log.figures["loss"].steps[-1]
    assert sum(risen for _, risen in log.marks["skipped_steps"]) == 3
    assert all(
        abs(at - want) < log.every for (at, _), want in zip(log.marks["skipped_steps"], (1000, 2000, 3000), strict=True)
    )


def test_thinning_keeps_extremes_and_gaps() -> None:
    curve = Curve(list(range(10_000)), [1.0] * 10_000)
    curve.values[5005], curve.values[7007] = 50.0, math.nan
    thinned = thin(curve, 100)
    assert len(thinned.steps) == 100 and max(thinned.highs) == 50.0 and min(thinned.lows) == 1.0
    assert thin(Curve([1, 2, 3], [3.0, math.inf, 1.0]), 10).means[::2] == [3.0, 1.0]
    assert math.isnan(thin(Curve([1, 2, 3], [3.0, math.inf, 1.0]), 10).means[1])
    assert thin(Curve(), 10).steps == []


class TestState:
    def test_of_this_process(self, tmp_path: Path) -> None:
        write(tmp_path / "metrics.jsonl", step(1))
        ours = Journal(tmp_path)
        ours.begin(0, resumed=False, steps=50)
        run = read_run(tmp_path)
        assert (run.state, run.steps, run.step) == ("running", 50, 1) and str(os.getpid()) in run.why
        ours.write("stopped", step=1, why="stopped at step 1")
        assert read_run(tmp_path).state == "stopped"
        ours.begin(1, resumed=True)
        ours.write("finished", step=2)
        run = read_run(tmp_path)
        assert (run.state, run.resumes) == ("finished", [1])
        ours.begin(0, resumed=False)
        assert read_run(tmp_path).resumes == [], "a run that starts anew forgets the old one"

    def test_of_a_process_that_is_gone(self, tmp_path: Path) -> None:
        code = "import sys; from mplug_core.training.journal import *; Journal(Path(sys.argv[1])).begin(0, False)"
        subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
        assert read_run(tmp_path).state == "failed"

    def test_a_folder_that_another_process_runs_in(self, tmp_path: Path) -> None:
        code = (
            "import sys; from mplug_core.training.journal import *; Journal(Path(sys.argv[1])).begin(0, False); "
            "print(flush=True); sys.stdin.read()"
        )
        command = [sys.executable, "-c", code, str(tmp_path)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
            other.stdout.readline()
            assert Journal(tmp_path).holder() == other.pid
            other.stdin.close()
        assert Journal(tmp_path).holder() is None  # it has gone without a word
        Journal(tmp_path).begin(0, resumed=True)
        assert Journal(tmp_path).holder() is None  # it is this process

    def test_a_number_that_another_process_has_by_now(self) -> None:
        begin = {"event": "begin", **journal.this_process()}
        assert journal.is_alive(begin) is True
        if begin["started"] is not None:
            assert journal.is_alive({**begin, "started": "1"}) is False
        for pid in (None, "x", -1, 0, 2**40):
            assert journal.is_alive({**begin, "pid": pid}) is None

    def test_elsewhere_it_is_known_by_its_silence(self, tmp_path: Path) -> None:
        begin = [{"event": "begin", "host": "another machine", "pid": 1}]
        log = read_log(write(tmp_path / "m", step(1), step(2)))
        assert run_state(log, begin, 1000.0, None, now=1010.0)[0] == "running"
        assert run_state(log, begin, 1000.0, None, now=9000.0)[0] == "unknown"
        slow = read_log(write(tmp_path / "m", step(1), step(2, seconds=4000.0)))
        assert run_state(slow, begin, 1000.0, None, now=9000.0)[0] == "running", "two lines are 4000 s apart"

    def test_without_events(self, tmp_path: Path) -> None:
        log = read_log(write(tmp_path / "m", step(99), step(100)))
        assert run_state(log, [], 0.0, None, now=1e6)[0] == "finished"
        assert run_state(log, [], 0.0, "train", now=1e6)[0] == "finished"
        assert run_state(log, [], 0.0, "next", now=1e6)[0] == "stopped"
        assert run_state(log, [], 0.0, "next", now=10.0)[0] == "running"
        assert run_state(read_log(tmp_path / "none"), [], None, None)[0] == "unknown"

    def test_events_after_a_torn_line(self, tmp_path: Path) -> None:
        (tmp_path / "events.jsonl").write_bytes(b'{"event": "begin", "ti')
        Journal(tmp_path).write("finished", step=3)
        assert [e["event"] for e in read_run(tmp_path).events] == ["finished"]

    def test_a_folder_that_takes_no_events(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        Journal(tmp_path / "file").begin(0, resumed=False)


def checkpoint(run: Path, name: str, meta: Any, manifest: Any = None, **files: bytes) -> Path:
    folder = run / "checkpoints" / name
    (folder / "part").mkdir(parents=True)
    for file, content in files.items():
        (folder / "part" / file).write_bytes(content)
    for file, values in (("meta.json", meta), ("manifest.json", manifest)):
        if values is not None:
            (folder / file).write_text(values if isinstance(values, str) else json.dumps(values))
    return folder


def test_checkpoints(tmp_path: Path) -> None:
    meta = {"progress": {"total": 20}, "world": 4, "stage": "late"}
    listed = {"files": {"part/a": {"size": 3, "sha256": "0"}}}
    checkpoint(tmp_path, "step-00000020", meta, listed, a=b"abc")
    checkpoint(tmp_path, "step-00000030", meta | {"progress": {"total": 30}}, listed, a=b"ab")
    checkpoint(tmp_path, "step-00000040", meta | {"progress": None}, {"files": {"part/b": {"size": 3}}}, a=b"abc")
    checkpoint(tmp_path, "step-00000050", "{not json", None, a=b"abc")
    checkpoint(tmp_path, "step-00000060", {"world": "many"}, "[]", a=b"abc")
    checkpoint(tmp_path, "step-00000010", meta | {"progress": {"total": 10}}, None, a=b"abc")
    checkpoint(tmp_path, ".step-00000070", None, None, a=b"abc")
    (tmp_path / "checkpoints" / "latest").write_text("step-00000020\n")
    (tmp_path / "checkpoints" / "step-file").write_text("")
    found = {c.step: c for c in read_checkpoints(tmp_path)}
    assert list(found) == [10, 20, 30, 40, 50, 60, 70]
    assert {n: c.condition for n, c in found.items()} == {
        10: "complete",
        20: "sound",
        30: "damaged: part/a has 2 bytes instead of 3",
        40: "damaged: part/b is missing",
        50: "damaged: meta.json is no JSON",
        60: "damaged: manifest.json is none",
        70: "unfinished",
    }
    assert (found[20].world, found[20].stage, found[20].latest, found[60].world) == (4, "late", True, None)
    assert found[20].bytes > 3 and [c.latest for c in found.values()].count(True) == 1
    assert read_run(tmp_path).step == 60


def test_best_is_by_the_recipe(tmp_path: Path) -> None:
    lines = [{"step": n, "evaluation": {"a/loss": v}} for n, v in ((1, 3.0), (2, 1.0), (3, math.nan), (4, 1.0))]
    write(tmp_path / "metrics.jsonl", *lines)
    (tmp_path / "recipe.yaml").write_text("name: mine\nrun: {best: -a/loss}\n")
    run = read_run(tmp_path)
    assert run.recipe == "mine" and run.best == {"metric": "a/loss", "step": 2, "value": 1.0, "kept": False}
    (tmp_path / "recipe.yaml").write_bytes(b"\xff\x00: [")
    run = read_run(tmp_path)
    assert run.recipe is None and run.best == {}


def test_what_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    for path, words in (("none", "no folder"), ("file", "is no folder"), ("empty", "holds no run")):
        with pytest.raises(DataError, match=words):
            read_run(tmp_path / path)
    (tmp_path / "empty" / "metrics.jsonl").mkdir()
    with pytest.raises(DataError, match="cannot read"):
        read_run(tmp_path / "empty")


def test_find_runs(tmp_path: Path) -> None:
    for name in ("b", "a", "group/c"):
        write(tmp_path / name / "metrics.jsonl", step(1))
        (tmp_path / name / "recipe.yaml").write_text("name: x\n")
    write(tmp_path / "old" / "metrics.jsonl", step(1))
    (tmp_path / "other").mkdir()
    assert [p.relative_to(tmp_path).as_posix() for p in find_runs(tmp_path)] == ["a", "b", "group/c", "old"]
    assert find_runs(tmp_path / "a") == [tmp_path / "a"]
    with pytest.raises(DataError):
        find_runs(tmp_path / "none")


def test_needs_no_torch() -> None:
    code = "import sys, mplug_core.training.history, mplug_core.training.journal; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
