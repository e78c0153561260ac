"""Trackers: what they get, that they never stop or slow a run, and that a resume goes on in the same one."""

from __future__ import annotations

import json
import sys
import threading
import time
import types
from pathlib import Path
from typing import Any

import pytest

from mplug_core.errors import CheckpointError, Preempted, RecipeError
from mplug_core.recipe import Recipe, check_recipe
from mplug_core.training.trackers import (
    FILE,
    Background,
    Followers,
    TensorBoard,
    WandB,
    check_trackers,
    tracked_values,
)

FIGURES = {
    "stage": "train", "step": 3, "stage_step": 3, "stage_steps": 9, "loss": 2.5, "itc": 1.5, "lr": 1e-4, "mfu": 0.25,
    "images_per_second": 8.0, "bad_images": 0, "note": "x",
}  # fmt: skip


def recipe_of(*trackers: str, **wandb: Any) -> Recipe:
    return check_recipe({"name": "mine", "run": {"trackers": list(trackers), "wandb": wandb}})


class FakeWandb(types.ModuleType):
    """Does with steps what wandb does: those before the last are refused."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.runs: dict[str, dict[int, dict[str, float]]] = {}
        self.inits: list[dict[str, Any]] = []
        self.ends: list[int] = []
        self.fault: Exception | None = None
        self.Settings = lambda **values: values

    def init(self, **arguments: Any) -> Any:
        self.inits.append(arguments)
        rows = self.runs.setdefault(arguments["id"], {})

        def log(values: dict[str, float], step: int) -> None:
            if self.fault:
                raise self.fault
            assert step >= max(rows, default=0), "a step is repeated"
            rows.setdefault(step, {}).update(values)

        return types.SimpleNamespace(log=log, finish=lambda exit_code: self.ends.append(exit_code))


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


class Heard(list):
    """A display that keeps its events."""

    def __call__(self, kind: str, figures: dict[str, Any]) -> None:
        self.append((kind, figures))

    @property
    def warnings(self) -> list[str]:
        return [f["text"] for kind, f in self if kind == "note"]


def follow(recipe: Recipe, folder: Path, first: int, last: int, resumed: bool = False, ends: bool = True) -> Heard:
    """A run's events from step ``first`` + 1 to ``last``."""
    heard = Heard()
    with Followers(recipe, folder, heard) as followers:
        followers.begin(first, resumed, 9)
        followers("start", {"stage": "train", "step": first, "steps": 9, "total": first})
        for step in range(first + 1, last + 1):
            followers("step", FIGURES | {"step": step})
            if step % 2 == 0:
                followers("evaluation", {"stage": "train", "step": step, "evaluation": {"val/a": step / 10}})
        if ends:
            followers("end", {"folder": str(folder), "seconds": 1.0})
        else:
            raise Preempted("stopped")
    return heard


def test_values_are_named_by_what_they_are() -> None:
    assert tracked_values(FIGURES) == {
        "loss/loss": 2.5, "loss/itc": 1.5, "train/lr": 1e-4, "train/mfu": 0.25, "train/images_per_second": 8.0,
        "count/bad_images": 0.0,
    }  # fmt: skip
    assert tracked_values({"step": 3, "evaluation": {"val/a": 1, "b": None}}) == {"evaluation/val/a": 1.0}


class TestPackages:
    @pytest.mark.parametrize("name", ["tensorboard", "wandb"])
    def test_missing(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        for module in ("wandb", "tensorboardX", "torch.utils.tensorboard"):
            monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(RecipeError, match=rf'pip install "mplug\[{name}\]"'):
            check_trackers(recipe_of(name))

    def test_before_anything_else_of_a_run(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        from mplug_core.training.trainer import train

        monkeypatch.setitem(sys.modules, "wandb", None)
        settings = check_recipe(
            {"name": "x", "run": {"folder": str(tmp_path / "run"), "trackers": ["wandb"]}, "start": {"model": "none"}}
        )
        with pytest.raises(RecipeError, match="run.trackers"):
            train(settings)
        assert not (tmp_path / "run").exists()

    def test_none_is_asked_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "wandb", None)
        check_trackers(recipe_of())

    def test_unknown(self) -> None:
        with pytest.raises(RecipeError, match=r"run\.trackers"):
            recipe_of("tensorbord")


class TestWandB:
    def test_a_run(self, wandb: FakeWandb, tmp_path: Path) -> None:
        settings = recipe_of("wandb", project="p", entity="team", tags=["a"], mode="offline")
        heard = follow(settings, tmp_path, 0, 4)
        (init,) = wandb.inits
        assert (init["project"], init["entity"], init["name"], init["mode"]) == ("p", "team", "mine", "offline")
        assert init["resume"] == "allow" and init["config"]["name"] == "mine" and init["dir"] == str(tmp_path)
        (rows,) = wandb.runs.values()
        assert list(rows) == [1, 2, 3, 4] and rows[2]["evaluation/val/a"] == 0.2 and rows[2]["loss/loss"] == 2.5
        assert wandb.ends == [0] and heard.warnings == []

    def test_a_resume_is_the_same_run_and_repeats_no_step(self, wandb: FakeWandb, tmp_path: Path) -> None:
        settings = recipe_of("wandb")
        with pytest.raises(Preempted):
            follow(settings, tmp_path, 0, 5, ends=False)
        # from the checkpoint of step 3: steps 4 and 5 come again
        heard = follow(settings, tmp_path, 3, 7, resumed=True)
        assert heard.warnings == [] and len(wandb.runs) == 1 and wandb.ends == [1, 0]
        assert list(next(iter(wandb.runs.values()))) == [1, 2, 3, 4, 5, 6, 7]

    def test_a_run_started_anew_is_another(self, wandb: FakeWandb, tmp_path: Path) -> None:
        follow(recipe_of("wandb"), tmp_path, 0, 2)
        follow(recipe_of("wandb"), tmp_path, 0, 2)
        assert len(wandb.runs) == 2

    def test_what_is_kept_may_be_damaged(self, wandb: FakeWandb, tmp_path: Path) -> None:
        (tmp_path / FILE).write_text('{"wandb": ')
        assert follow(recipe_of("wandb"), tmp_path, 3, 4, resumed=True).warnings == []
        assert json.loads((tmp_path / FILE).read_text())["wandb"]["step"] == 4

    def test_no_number_is_left_out(self, wandb: FakeWandb, tmp_path: Path) -> None:
        tracker = WandB(tmp_path, recipe_of("wandb"), resumed=False)
        tracker.open()
        tracker.log(1, {"a": float("nan"), "b": 1.0})
        assert next(iter(wandb.runs.values())) == {1: {"b": 1.0}}


class TestFailures:
    def test_every_call(self, wandb: FakeWandb, tmp_path: Path) -> None:
        wandb.fault = ConnectionError("no\nnetwork")
        heard = follow(recipe_of("wandb"), tmp_path, 0, 6)
        assert len(heard.warnings) == 2, "one when it begins, the count at the end"
        assert "wandb fails" in heard.warnings[0] and "ConnectionError: no network" in heard.warnings[0]
        assert "9 calls failed" in heard.warnings[1]
        assert [kind for kind, _ in heard if kind == "step"] == ["step"] * 6

    def test_at_the_start(self, wandb: FakeWandb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def init(**arguments: Any) -> Any:
            raise SystemExit(1)

        monkeypatch.setattr(wandb, "init", init)
        heard = follow(recipe_of("wandb"), tmp_path, 0, 3)
        assert "SystemExit" in heard.warnings[0] and len(heard.warnings) == 2

    def test_after_a_while_it_is_tried_again(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("mplug_core.training.trackers.RETRY_SECONDS", 0.0)
        calls: list[Any] = []

        class Late:
            def open(self) -> None:
                calls.append("open")
                if len(calls) < 3:
                    raise OSError("not yet")

            def log(self, step: int, values: dict[str, float]) -> None:
                calls.append(step)

            def close(self, ok: bool) -> None:
                calls.append(ok)

        background = Background("late", Late())
        for step in range(4):
            background.log(step, {})
        background.end(True)
        background.join(10.0)
        assert calls == ["open", "open", "open", 1, 2, 3, True]

    def test_a_call_that_never_returns(self) -> None:
        """The queue fills, the rest is left out, and nobody waits for it: not a step, not the end."""
        release, entered = threading.Event(), threading.Event()

        class Stuck:
            def open(self) -> None: ...

            def log(self, step: int, values: dict[str, float]) -> None:
                entered.set()
                release.wait(60)

            def close(self, ok: bool) -> None: ...

        background = Background("stuck", Stuck(), length=5)
        background.log(0, {})
        assert entered.wait(10)
        for step in range(1, 101):
            background.log(step, {})
        assert background.dropped == 95
        assert ["left out" in text for text in background.notes()] == [True], "told once"
        background.end(True)
        background.join(0.05)
        notes = background.notes()
        assert "left behind" in notes[0] and "95 left out" in notes[1]
        release.set()
        background.thread.join(10)
        assert not background.thread.is_alive()

    def test_the_display_is_called_by_the_thread_of_the_run_alone(self, wandb: FakeWandb, tmp_path: Path) -> None:
        wandb.fault = OSError("x")
        threads = set()
        followers = Followers(recipe_of("wandb"), tmp_path, lambda kind, figures: threads.add(threading.get_ident()))
        followers.begin(0, False)
        for step in range(1, 4):
            followers("step", FIGURES | {"step": step})
        followers("end", {})
        assert threads == {threading.get_ident()}


class TestJournal:
    def events(self, folder: Path) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]

    @pytest.mark.parametrize(
        ("error", "event", "why"),
        [
            (Preempted("stopped at step 3"), "stopped", "stopped at step 3"),
            (KeyboardInterrupt(), "stopped", "interrupted at once, not saved"),
            (CheckpointError("disk full"), "failed", "disk full"),
            (ZeroDivisionError("x\ny"), "failed", "ZeroDivisionError: x y"),
        ],
    )
    def test_how_a_run_ends(self, tmp_path: Path, error: BaseException, event: str, why: str) -> None:
        followers = Followers(recipe_of(), tmp_path, Heard())
        with pytest.raises(type(error)), followers:
            followers.begin(0, False, 9)
            followers("step", FIGURES)
            raise error
        begin, end = self.events(tmp_path)
        assert (begin["event"], begin["steps"], begin["resumed"]) == ("begin", 9, False)
        assert (end["event"], end["step"], end["why"]) == (event, 3, why)

    def test_stages_and_warnings(self, tmp_path: Path) -> None:
        followers = Followers(recipe_of(), tmp_path, Heard())
        with followers:
            followers.begin(0, False)
            followers("start", {"stage": "train", "step": 0, "steps": 9})
            followers("note", {"text": "resumed"})
            followers("note", {"text": "the loss jumps", "level": "warning"})
        assert [e["event"] for e in self.events(tmp_path)] == ["begin", "stage", "warning", "finished"]

    def test_a_fault_before_the_run_leaves_nothing(self, tmp_path: Path) -> None:
        with pytest.raises(RecipeError), Followers(recipe_of(), tmp_path, Heard()):
            raise RecipeError("no")
        assert list(tmp_path.iterdir()) == []


def scalars(folder: Path, tag: str) -> dict[int, float]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulator.EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    found.Reload()
    return {event.step: event.value for event in found.Scalars(tag)}


class TestTensorBoard:
    @pytest.fixture(autouse=True)
    def installed(self) -> None:
        pytest.importorskip("tensorboard")

    def test_a_run_that_is_killed_and_goes_on(self, tmp_path: Path) -> None:
        first = TensorBoard(tmp_path, 0, resumed=False)
        first.open()
        for step in range(1, 6):
            first.log(step, {"loss/loss": float(step)})
        first.writer.flush()
        time.sleep(1.1)  # the names of event files are seconds
        assert follow(recipe_of("tensorboard"), tmp_path, 3, 7, resumed=True).warnings == []
        assert scalars(tmp_path, "loss/loss") == {1: 1.0, 2: 2.0, 3: 3.0, 4: 2.5, 5: 2.5, 6: 2.5, 7: 2.5}
        assert scalars(tmp_path, "evaluation/val/a") == pytest.approx({4: 0.4, 6: 0.6})

    def test_a_run_started_anew_shows_nothing_of_the_old_one(self, tmp_path: Path) -> None:
        follow(recipe_of("tensorboard"), tmp_path, 0, 6)
        follow(recipe_of("tensorboard"), tmp_path, 0, 2)
        assert list(scalars(tmp_path, "loss/loss")) == [1, 2]

    def test_a_disk_that_takes_nothing(self, tmp_path: Path) -> None:
        (tmp_path / "tensorboard").write_text("a file where the folder should be")
        heard = follow(recipe_of("tensorboard"), tmp_path, 0, 3)
        assert heard.warnings[0].startswith("tensorboard fails") and len(heard.warnings) == 2
