"""Whose a run folder is, other data than before, and weights that are not finite."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mplug_core.data.records.types import CaptionRecord, PhraseRecord, StatementRecord
from mplug_core.errors import DataError, Diverged, MplugError, UsageError
from mplug_core.training.checkpoint import latest_checkpoint
from mplug_core.training.data_fingerprint import changed_data, of_records
from mplug_core.training.engine_state import is_finite
from mplug_core.training.run_folder import EXPERIMENT, MARKER, RUN, TRY, check_run_folder, claim, clear, kinds_of
from mplug_core.training.trainer import train
from mplug_core.training.trial import try_run
from tests.training.recipes import scene_recipe

QUICK = ("objectives={caption: 1}", "data.sources.scenes.tasks={caption: 1}", "steps=2", "run.save_every=1")


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def data(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Captions of scenes, of which there may be fewer tomorrow."""
    folder = tmp_path_factory.mktemp("data") / "scenes"
    shutil.copytree(scenes / "train", folder / "train")
    return folder


@pytest.fixture(scope="module")
def stopped(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was cut off after its first step was saved."""
    folder = tmp_path_factory.mktemp("stopped") / "run"

    class Cut(Exception):
        pass

    def cut(kind: str, figures: dict[str, Any]) -> None:
        if kind == "step" and figures["step"] == 2:
            raise Cut

    with pytest.raises(Cut):
        train(scene_recipe(data, folder, *QUICK), watch=cut)
    return folder


# -- whose a folder is -------------------------------------------------------------------------------------------------


def filled(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        path = folder / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


FOREIGN = {
    "a model": {"model__model_dot_safetensors": "w", "vocab_dot_txt": "[PAD]"},
    "notes": {"notes_dot_txt": "mine"},
    "results": {"best__photo_dot_jpg": "x", "metrics_dot_jsonl": '{"epoch": 1}'},
    "another tool's run": {"checkpoints___dot_mine": "x", "recipe_dot_yaml": "name: soup", "events_dot_jsonl": "{}"},
    "another marker": {"run_dot_json": '{"format": "theirs", "kind": "run"}'},
    "features": {"features__mine_dot_csv": "x"},
    "scenes": {"scenes__act1_dot_txt": "enter"},
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_folder_that_is_no_run_stays_as_it_is(data: Path, tmp_path: Path, kind: str) -> None:
    folder = filled(tmp_path / "theirs", **FOREIGN[kind])
    before = content(folder)
    for resume in ("auto", "never"):
        with pytest.raises(UsageError, match="is not of a run, and is left as it is") as caught:
            train(scene_recipe(data, folder, *QUICK), resume)
        assert caught.value.exit_code == 2 and "run.folder" in caught.value.hint
    (folder.parent / "theirs-try").mkdir()
    for wanted in (TRY, EXPERIMENT):
        with pytest.raises(UsageError, match="is left as it is"):
            check_run_folder(folder, wanted)
    with pytest.raises(UsageError, match="is left as it is"):
        clear(folder)
    assert content(folder) == before and {path.name for path in folder.rglob("*")} >= {Path(n).name for n in before}


def test_kinds_of_folders(tmp_path: Path) -> None:
    for kind in (RUN, TRY, EXPERIMENT):
        claim(tmp_path / kind, kind)
        assert kind in kinds_of(tmp_path / kind)
    with pytest.raises(UsageError, match="another kind .run"):
        check_run_folder(tmp_path / RUN, TRY)
    claim(tmp_path / TRY, RUN)  # a try may become a run, which is not emptied from then on
    with pytest.raises(UsageError):
        clear(tmp_path / TRY)


@pytest.mark.parametrize("name", ["x" * 300, "file", "file/run", "/proc/none/run"])
def test_places_that_can_not_be_written(data: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MplugError) as caught:
        train(scene_recipe(data, tmp_path / name, *QUICK))
    assert len(str(caught.value)) < 300 and sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_own_run_goes_on_and_what_the_user_put_there_stays(stopped: Path, data: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(stopped, tmp_path / "run"))
    mine = ("notes.txt", "checkpoints/.mine", "checkpoints/copy.txt", ".model-notes")
    for name in mine:
        (run / name).write_text("mine")
    for name in (".old-step-00000000", ".step-00000009"):
        (run / "checkpoints" / name).mkdir()
    train(scene_recipe(data, run, *QUICK))
    assert all((run / name).read_text() == "mine" for name in mine)
    assert not (run / "checkpoints" / ".old-step-00000000").exists()
    train(scene_recipe(data, run, *QUICK), "never")
    assert all((run / name).read_text() == "mine" for name in mine)


def test_runs_of_before_go_on(stopped: Path, data: Path, tmp_path: Path) -> None:
    """Without a marker, and with checkpoints that tell neither what data they are of nor that they are finite."""
    run = Path(shutil.copytree(stopped, tmp_path / "run"))
    (run / MARKER).unlink()
    (run / "events.jsonl").unlink()
    for folder in (run / "checkpoints").glob("step-*"):
        change_meta(folder, lambda meta: (meta.pop("data"), meta.pop("finite")))
    notes: list[str] = []
    train(scene_recipe(data, run, *QUICK), watch=lambda kind, f: notes.append(f["text"]) if kind == "note" else None)
    assert sum("doesn't tell which data" in note for note in notes) == 1
    assert (run / MARKER).exists() and json.loads(latest(run, "meta.json").read_text())["data"]["scenes"][
        "records"
    ] == 40


def test_tries_of_before_are_emptied(tmp_path: Path) -> None:
    run = {"log_every": 1, "keep": 1, "evaluate_every": 0, "patience": 0, "trackers": [], "folder": "x-try"}
    recipe = {"name": "x", "data": {}, "objectives": {}, "optimizer": {}, "run": run}
    for wanted, changes in ((TRY, {}), (RUN, {"keep": 2})):
        folder = tmp_path / f"{wanted}-try"
        text = yaml.safe_dump({**recipe, "run": {**run, **changes}})
        filled(folder, recipe_dot_yaml=text, metrics_dot_jsonl='{"step": 1, "stage": "a"}', mine_dot_txt="mine")
        assert (TRY in kinds_of(folder)) == (wanted == TRY)
    clear(tmp_path / "try-try")
    assert {path.name for path in (tmp_path / "try-try").iterdir()} == {"mine.txt", MARKER}


def test_a_run_does_not_write_over_the_model_that_it_starts_from(stopped: Path, data: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(stopped, tmp_path / "run"))
    before = content(run)
    for start in (run, run / "model", run / "model" / "model.safetensors"):
        with pytest.raises(UsageError, match="is in the run folder"):
            train(scene_recipe(data, run, *QUICK, f"start.model={start}"), "never")
    assert content(run) == before


def test_a_try_does_not_remove_the_model_that_it_starts_from(stopped: Path, data: Path, tmp_path: Path) -> None:
    """It is refused before the folder of the try before is emptied."""
    tried = Path(shutil.copytree(stopped, tmp_path / "run-try"))
    (tried / MARKER).write_text('{"format": "mplug run", "version": 1, "kind": "try"}')
    before = content(tried)
    for start in (tried, tried / "model"):
        with pytest.raises(UsageError, match="is in the run folder"):
            try_run(scene_recipe(data, tmp_path / "run", *QUICK, f"start.model={start}"), 1)
    assert content(tried) == before


# -- data --------------------------------------------------------------------------------------------------------------


def latest(run: Path, name: str) -> Path:
    found = latest_checkpoint(run)
    assert found is not None
    return found / name


def change_meta(folder: Path, change: Any) -> None:
    from mplug_core.training.checkpoint import sha256

    meta = json.loads((folder / "meta.json").read_text())
    change(meta)
    (folder / "meta.json").write_text(json.dumps(meta))
    manifest = json.loads((folder / "manifest.json").read_text())
    sealed = {"size": (folder / "meta.json").stat().st_size, "sha256": sha256(folder / "meta.json")}
    manifest["files"]["meta.json"] = sealed
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_data_that_has_changed_is_an_error_unless_allowed(stopped: Path, data: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(stopped, tmp_path / "run"))
    moved = Path(shutil.copytree(data, tmp_path / "elsewhere"))  # other times, another root
    file = moved / "train" / "captions.jsonl"
    lines = file.read_text().splitlines(True)
    path = "data.sources.scenes.path='{root}'"
    recipe = scene_recipe(data, run, *QUICK)
    meta = json.loads(latest(run, "meta.json").read_text())
    assert meta["data"]["scenes"]["records"] == 40
    for folder in (run / "checkpoints").glob("step-*"):
        change_meta(folder, lambda meta: meta["recipe"]["data"]["sources"]["scenes"].update(path="{root}"))
    recipe = scene_recipe(data, run, *QUICK, path, f"data.root={moved}")
    file.write_text("".join(lines[:20]))
    with pytest.raises(DataError, match="source scenes has 20 records, and had 40") as caught:
        train(recipe)
    assert caught.value.exit_code == 3 and "--allow-changed-data" in caught.value.hint
    file.write_text("".join(lines).replace("red", "blue"))
    with pytest.raises(DataError, match="source scenes has other records .*40 then and now"):
        train(recipe)
    file.write_text("".join(lines))
    notes: list[str] = []
    watch = lambda kind, figures: notes.append(figures["text"]) if kind == "note" else None  # noqa: E731
    shutil.copytree(run, tmp_path / "again")
    train(recipe, watch=watch)
    assert not any("records" in note for note in notes)
    file.write_text("".join(lines[:20]))
    again = recipe.model_copy(update={"run": recipe.run.model_copy(update={"folder": str(tmp_path / "again")})})
    train(again, watch=watch, allow_changed_data=True)
    assert any("has 20 records, and had 40" in note for note in notes)
    assert json.loads(latest(tmp_path / "again", "meta.json").read_text())["data"]["scenes"]["records"] == 20


def test_what_a_fingerprint_is_of() -> None:
    def prints(*records: Any) -> str:
        return of_records({"x": records})["fingerprint"]

    here, there = Path("/a/photos/1.jpg"), Path("/b/c/1.jpg")
    same = [
        (CaptionRecord(here, ("a", "b"), "/a/photos/1.jpg"), CaptionRecord(there, ("a", "b"), "1")),
        (PhraseRecord(here, "dog", (0, 0, 1, 1), "3"), PhraseRecord(there, "dog", (0, 0, 1, 1))),
        (StatementRecord((here, here), "s", True), StatementRecord((there, there), "s", True)),
    ]
    assert all(prints(one) == prints(other) for one, other in same)
    one = same[0][0]
    others = [
        CaptionRecord(here, ("a", "c"), "1"), CaptionRecord(Path("/a/photos/2.jpg"), ("a", "b"), "1"),
        StatementRecord((here, here), "s", False), PhraseRecord(here, "dog", (0, 0, 1, 0.5)),
    ]  # fmt: skip
    assert len({prints(record) for record in [one, *others]}) == len(others) + 1
    assert prints(one, others[0]) != prints(others[0], one) and prints(one) != prints(one, one)
    assert of_records({"caption": [one], "pretrain": [one], "vqa": []}) == of_records({"pretrain": [one], "vqa": []})
    assert of_records({"x": [one, one]}, limit=1) == of_records({"x": [one]})


def test_many_changes_are_one_line() -> None:
    now = {f"source{k}": {"records": k, "fingerprint": "a"} for k in range(9)}
    before = {name: {"records": 9, "fingerprint": "b"} for name in now}
    lines = changed_data(before, now)
    assert len(lines) == 4 and lines[-1] == "and 6 more sources have changed"
    assert changed_data({}, now) == changed_data(now, now) == []


# -- weights -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_divergence_names_the_last_finite_checkpoint(data: Path, tmp_path: Path, precision: str) -> None:
    changes = (*QUICK, "optimizer.warmup_steps=0", f"engine.precision={precision}")
    with pytest.raises(MplugError) as caught:
        train(scene_recipe(data, tmp_path / "run", *changes, "steps=20", "optimizer.lr=1e38"))
    text = str(caught.value)
    assert "\n" not in text and len(text) < 400 and caught.value.exit_code == 1
    found = latest_checkpoint(tmp_path / "run")
    if found is None:
        assert "there is no checkpoint" in text
    else:
        assert str(found) in text and "the last good checkpoint is" in text
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))


@pytest.mark.parametrize("what", ["weight", "average"])
def test_a_checkpoint_that_is_not_finite_is_not_written(
    stopped: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    from mplug_core.training.engine_state import ClientState

    read = ClientState.read

    def broken(self: ClientState, parameter: Any, key: str) -> torch.Tensor:
        value = read(self, parameter, key)
        return value.clone().fill_(float("inf")) if key == ("master" if what == "weight" else "exp_avg_sq") else value

    run = Path(shutil.copytree(stopped, tmp_path / "run"))
    before = latest_checkpoint(run)
    monkeypatch.setattr(ClientState, "read", broken)
    with pytest.raises(Diverged, match="training has diverged by step 2") as caught:
        train(scene_recipe(data, run, *QUICK))
    assert f"the last good checkpoint is {before}" in caught.value.hint and latest_checkpoint(run) == before
    assert (what == "average") == ("optimizer state" in caught.value.message)


def test_a_checkpoint_of_before_that_is_not_finite_is_passed_over(stopped: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    run = Path(shutil.copytree(stopped, tmp_path / "run"))
    folder = latest_checkpoint(run)
    file = folder / "engine-00000-of-00001.safetensors"
    tensors = load_file(file)
    next(value for name, value in tensors.items() if name.startswith("master/") and value.numel() > 1).fill_(torch.nan)
    save_file(tensors, file, {"format": "pt"})
    manifest = json.loads((folder / "manifest.json").read_text())
    from mplug_core.training.checkpoint import sha256

    manifest["files"][file.name] = {"size": file.stat().st_size, "sha256": sha256(file)}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    change_meta(folder, lambda meta: meta.pop("finite"))
    with pytest.raises(MplugError, match="no sound checkpoint .* is not finite"):
        latest_checkpoint(run)


def test_what_is_finite() -> None:
    for good in (torch.ones(3), torch.zeros(0), torch.tensor(2), torch.full((2,), 3e38), torch.tensor([True])):
        assert is_finite(good) and is_finite(good.bfloat16() if good.is_floating_point() else good)
    for bad in (torch.nan, torch.inf, -torch.inf, 3.4e38):
        assert not is_finite(torch.tensor([0.0, bad, 1.0]))
