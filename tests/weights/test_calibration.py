"""A calibration beside the weights: stored, copied, kept by what writes models, and left behind by training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import mplug_core
from mplug_core.data.text import Tokenizer, build_vocabulary
from mplug_core.errors import CheckpointError, MplugError, UsageError
from mplug_core.model.config import Calibration, MplugConfig
from mplug_core.recipe import ModelSection
from mplug_core.training.start import changed_config
from mplug_core.weights import calibration
from mplug_core.weights.calibration import check_calibrated, save_calibration
from mplug_core.weights.conversion import convert_model
from mplug_core.weights.export import export_int8, export_safetensors, read_source
from mplug_core.weights.folder import EMBEDDED, load_model, save_model
from tests.small import CLASSIFIERS, CNN, small_config, small_model

KNOWN = {"vqa": Calibration(temperature=1.7, bias=-0.3), "statement": Calibration(temperature=2.5)}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(build_vocabulary(["a red ball on a green table"], box_bins=4))


@pytest.fixture
def folder(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    model = small_model(vocab_size=tokenizer.vocab_size, box_bins=4, classifiers=CLASSIFIERS, vision=CNN)
    save_model(tmp_path / "m", model, tokenizer, card="# mine\n")
    return tmp_path / "m"


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_only_the_configuration_changes(folder: Path) -> None:
    before = files(folder)
    assert save_calibration(folder, KNOWN) == folder
    after = files(folder)
    assert after.keys() == before.keys()
    assert [name for name in after if after[name] != before[name]] == ["config.json"]
    was, now = json.loads(before["config.json"]), json.loads(after["config.json"])
    assert now.pop("calibration") == {name: part.model_dump() for name, part in KNOWN.items()}
    assert was.pop("calibration") == {} and was == now


def test_a_further_kind_is_added_and_the_same_one_replaced(folder: Path) -> None:
    save_calibration(folder, KNOWN)
    save_calibration(folder, {"vqa": Calibration(temperature=3.0), "grounding": Calibration(temperature=0.5)})
    found = MplugConfig.load(folder / "config.json").calibration
    assert {kind: part.temperature for kind, part in found.items()} == {"vqa": 3.0, "statement": 2.5, "grounding": 0.5}


def test_a_copy_leaves_the_model_as_it_is(folder: Path, tmp_path: Path) -> None:
    before = files(folder)
    copy = save_calibration(folder, KNOWN, tmp_path / "deep" / "copy")
    assert files(folder) == before and files(copy).keys() == before.keys()
    assert load_model(str(copy)).config.calibration == KNOWN
    assert (copy / "model.safetensors").read_bytes() == before["model.safetensors"]


def test_a_configuration_without_one_is_as_before(folder: Path) -> None:
    values = json.loads((folder / "config.json").read_text())
    del values["calibration"]
    (folder / "config.json").write_text(json.dumps(values))
    assert load_model(str(folder)).config.calibration == {}
    save_calibration(folder, KNOWN)
    assert load_model(str(folder)).config.calibration == KNOWN


@pytest.mark.parametrize("values", ['{"vqa": {"temperature": 0}}', '{"vqa": {"bias": NaN}}', '{"poems": {}}'])
def test_a_wrong_one_is_an_error(folder: Path, values: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    text = json.dumps(config | {"calibration": "HERE"}).replace('"HERE"', values)
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match="calibration"):
        load_model(str(folder))


def test_what_writes_models_keeps_it(folder: Path, tmp_path: Path) -> None:
    save_calibration(folder, KNOWN)
    source = read_source(str(folder))
    export_safetensors(source, tmp_path / "bf16", "bf16", "# card\n")
    export_int8(source, tmp_path / "int8", "fp32", "# card\n")
    convert_model(str(folder), tmp_path / "converted", image_size=48)
    mplug_core.load(folder).save_pretrained(tmp_path / "saved")
    for name in ("bf16", "int8", "converted", "saved"):
        assert mplug_core.load(tmp_path / name).config.calibration == KNOWN, name


def test_training_starts_without_it(tokenizer: Tokenizer) -> None:
    start = small_config(calibration=KNOWN, vocab_size=tokenizer.vocab_size, box_bins=4)
    config = changed_config(start, ModelSection(), tokenizer)
    assert config.calibration == {} and ModelSection(**config.architecture()).width == start.width


class TestWhereItMayBeStored:
    def test_in_the_users_own_folder(self, folder: Path, tmp_path: Path) -> None:
        assert check_calibrated(str(folder), None) == folder
        (tmp_path / "run").mkdir()
        shutil.copytree(folder, tmp_path / "run" / "best")
        assert check_calibrated(str(tmp_path / "run"), None) == tmp_path / "run" / "best"

    def test_not_in_the_embedded_model_unless_its_folder_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("MPLUG_MODEL", raising=False)
        for spec in (None, "mini"):
            with pytest.raises(UsageError, match="part of the package"):
                check_calibrated(spec, None)
        assert check_calibrated(str(EMBEDDED), None) == EMBEDDED

    def test_not_in_a_download(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(calibration, "find_model", lambda spec: folder)
        with pytest.raises(UsageError, match="hf:org/name is a download"):
            check_calibrated("hf:org/name", None)

    def test_not_in_a_checkpoint(self, folder: Path) -> None:
        (folder.parent / "manifest.json").write_text("{}")
        with pytest.raises(UsageError, match="part of a checkpoint"):
            check_calibrated(str(folder), None)

    def test_not_in_what_is_no_folder(self, folder: Path, tmp_path: Path) -> None:
        (tmp_path / "m.pth").write_bytes(b"x")
        with pytest.raises(CheckpointError, match="mplug model convert"):
            check_calibrated(str(tmp_path / "m.pth"), None)

    def test_a_copy_replaces_only_what_it_is_told_to(self, folder: Path, tmp_path: Path) -> None:
        save_calibration(folder, KNOWN, tmp_path / "copy")
        with pytest.raises(MplugError, match="--force replaces it"):
            check_calibrated(str(folder), tmp_path / "copy")
        assert check_calibrated(str(folder), tmp_path / "copy", force=True) == folder
        with pytest.raises(UsageError, match="--force is for a copy"):
            check_calibrated(str(folder), None, force=True)
        with pytest.raises(MplugError, match="is where the model is"):
            check_calibrated(str(folder), folder, force=True)
