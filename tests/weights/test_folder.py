"""The native folder: what is saved is loaded, whole or not at all, and damage is named."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mplug_core import atomic
from mplug_core.atomic import replace_folder
from mplug_core.data.text import Tokenizer, build_vocabulary
from mplug_core.errors import CheckpointError
from mplug_core.model.mplug import MplugModel
from mplug_core.recipe import check_recipe, read_yaml
from mplug_core.weights.folder import EMBEDDED, find_model, load_model, save_model
from tests.small import CLASSIFIERS, CNN, small_model


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(build_vocabulary(["a red ball on a green table"], box_bins=4))


@pytest.fixture
def model(tokenizer: Tokenizer) -> MplugModel:
    return small_model(
        vocab_size=tokenizer.vocab_size, box_bins=4, classifiers=CLASSIFIERS, vision=CNN, summary_tokens=2
    )


@pytest.fixture
def folder(tmp_path: Path, model: MplugModel, tokenizer: Tokenizer) -> Path:
    save_model(tmp_path / "m", model, tokenizer, card="# card\n")
    return tmp_path / "m"


def test_round_trip_is_exact_in_fp32(tmp_path: Path, model: MplugModel, tokenizer: Tokenizer) -> None:
    save_model(tmp_path / "deep" / "m", model, tokenizer, dtype=torch.float32)
    loaded = load_model(str(tmp_path / "deep" / "m"))
    assert loaded.config == model.config and loaded.tokenizer.pieces == tokenizer.pieces
    assert loaded.name == "m" and not loaded.is_embedded
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded.model.encode_image(pixels).tokens, model.encode_image(pixels).tokens)
    state = loaded.model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert not loaded.model.training and not any(p.requires_grad for p in loaded.model.parameters())


def test_default_is_half_the_size(folder: Path, model: MplugModel) -> None:
    stored = load_file(folder / "model.safetensors")
    assert all(t.dtype == torch.bfloat16 for t in stored.values() if t.is_floating_point())
    loaded = load_model(str(folder))
    assert loaded.dtype == torch.float32
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], value.bfloat16().float()), name
    assert load_model(str(folder), dtype=torch.bfloat16).dtype == torch.bfloat16


def test_files(folder: Path) -> None:
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "config.json", "model.safetensors", "vocab.txt"]
    assert [p.name for p in folder.parent.iterdir()] == ["m"], "nothing is left beside it"
    assert folder.stat().st_mode & 0o777 == 0o755


def test_recipe_can_be_run_again(tmp_path: Path, model: MplugModel, tokenizer: Tokenizer) -> None:
    # 768 is the default of a field that the named size sets otherwise
    values = {"name": "x", "model": {"size": "tiny", "intermediate": 3072, "dropout": 0.1}, "optimizer": {"lr": 1e-5}}
    recipe = check_recipe(values)
    save_model(tmp_path / "m", model, tokenizer, recipe)
    assert check_recipe(read_yaml(tmp_path / "m" / "recipe.yaml")) == recipe


def test_replaces_a_folder(folder: Path, tokenizer: Tokenizer) -> None:
    (folder / "stray.txt").write_text("old")
    other = small_model(seed=9, vocab_size=tokenizer.vocab_size, box_bins=4)
    save_model(folder, other, tokenizer)
    assert load_model(str(folder)).config == other.config
    assert not (folder / "stray.txt").exists() and [p.name for p in folder.parent.iterdir()] == ["m"]


def test_a_link_leads_to_the_folder_that_is_replaced(folder: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "links").mkdir()
    link = tmp_path / "links" / "m"
    link.symlink_to(folder)
    other = small_model(seed=9, vocab_size=tokenizer.vocab_size, box_bins=4)
    save_model(link, other, tokenizer)
    assert link.is_symlink() and load_model(str(folder)).config == other.config
    assert sorted(p.name for p in [*tmp_path.iterdir(), *link.parent.iterdir()]) == ["links", "m", "m"]


def test_a_file_is_not_replaced(tmp_path: Path, model: MplugModel, tokenizer: Tokenizer) -> None:
    (tmp_path / "file").write_text("dear")
    with pytest.raises(CheckpointError, match="Not a directory"):
        save_model(tmp_path / "file", model, tokenizer)
    assert [p.read_text() for p in tmp_path.iterdir()] == ["dear"]


def test_failure_while_writing_leaves_the_old_one(
    folder: Path, model: MplugModel, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (folder / "model.safetensors").read_bytes()

    def full(self: Tokenizer, path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Tokenizer, "save", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        save_model(folder, model, tokenizer)
    assert (folder / "model.safetensors").read_bytes() == before
    assert [p.name for p in folder.parent.iterdir()] == ["m"]


def test_failure_while_renaming_puts_the_old_one_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where two folders can't change names at once."""
    monkeypatch.setattr(atomic, "exchange", lambda one, other: False)
    old, new = tmp_path / "m", tmp_path / ".m-new"
    old.mkdir(), new.mkdir()
    (old / "a").write_text("old")
    rename = os.rename

    def fail(source: Path, target: Path) -> None:
        if Path(source) == new:
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(OSError):
        replace_folder(new, old)
    assert (old / "a").read_text() == "old"


def test_place_that_cannot_be_written(tmp_path: Path, model: MplugModel, tokenizer: Tokenizer) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write"):
        save_model(tmp_path / "file" / "m", model, tokenizer)


@pytest.mark.parametrize("missing", ["model.safetensors", "config.json", "vocab.txt"])
def test_missing_file_is_named(folder: Path, missing: str) -> None:
    (folder / missing).unlink()
    with pytest.raises(CheckpointError, match=missing) as caught:
        load_model(str(folder))
    assert caught.value.exit_code == 5


@pytest.mark.parametrize("damage", [b"", b"\0" * 20, b"<!DOCTYPE html>", None])
def test_damaged_weights(folder: Path, damage: bytes | None) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000] if damage is None else damage)
    with pytest.raises(CheckpointError, match=r"cannot read .*model\.safetensors"):
        load_model(str(folder))


def test_weights_of_another_model(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate": 32}))
    with pytest.raises(CheckpointError, match="tensors don't fit config.json"):
        load_model(str(folder))
    (folder / "config.json").write_text(json.dumps({**config, "text_layers": 3}))
    with pytest.raises(CheckpointError, match=r"lacks text\.layers\.2"):
        load_model(str(folder))
    (folder / "config.json").write_text(json.dumps({**config, "text_layers": 1}))
    with pytest.raises(CheckpointError, match=r"unknown tensor text\.layers\.1"):
        load_model(str(folder))


def test_vocabulary_of_another_model(folder: Path, tokenizer: Tokenizer) -> None:
    Tokenizer([*tokenizer.pieces, "more"]).save(folder / "vocab.txt")
    with pytest.raises(CheckpointError, match=rf"{tokenizer.vocab_size + 1} pieces in vocab.txt"):
        load_model(str(folder))


def test_without_parts(folder: Path) -> None:
    loaded = load_model(str(folder), without=("text", "fusion"))
    assert all(p.is_meta for p in loaded.model.text.parameters())
    assert not any(p.is_meta for p in loaded.model.decoder.parameters())
    with torch.no_grad():
        tokens = loaded.model.encode_image(torch.randn(1, 3, 32, 32)).tokens
        assert loaded.model.decode(torch.tensor([[2, 7]]), tokens).isfinite().all()
    stored = {n: v for n, v in load_file(folder / "model.safetensors").items() if not n.startswith("text.")}
    save_file(stored, folder / "model.safetensors")
    load_model(str(folder), without=("text",))
    with pytest.raises(CheckpointError, match=r"lacks text\."):
        load_model(str(folder))


def test_buffers_that_no_file_holds(tmp_path: Path, tokenizer: Tokenizer) -> None:
    options = {
        "embed_dim": 16,
        "depths": [2, 1],
        "num_heads": [1, 2],
        "img_size": 32,
        "patch_size": 4,
        "window_size": 4,
    }
    vision = {"backbone": "swin_tiny_patch4_window7_224", "image_size": 32, "options": options}
    model = small_model(vocab_size=tokenizer.vocab_size, vision=vision)
    save_model(tmp_path / "m", model, tokenizer, dtype=torch.float32)
    loaded = load_model(str(tmp_path / "m"))
    pixels = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded.model.encode_image(pixels).tokens, model.encode_image(pixels).tokens)


def test_run_folder_holds_its_model(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    folder.rename(run / "model")
    assert load_model(str(run)).folder == run / "model"


def test_run_folder_with_a_best_is_that(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    shutil.copytree(folder, run / "model")
    (run / "best").mkdir()
    assert find_model(str(run)) == run / "model", "an empty folder is no model"
    folder.rename(run / "best2")
    (run / "best").rmdir()
    (run / "best2").rename(run / "best")
    assert load_model(str(run)).folder == run / "best"


def test_where_a_model_is_looked_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPLUG_MODEL", str(folder))
    assert find_model(None) == folder
    with pytest.raises(CheckpointError, match="no model folder /nowhere"):
        find_model("/nowhere")
    monkeypatch.delenv("MPLUG_MODEL")
    if (EMBEDDED / "model.safetensors").is_file():
        assert find_model(None) == find_model("mini") == EMBEDDED
    else:
        with pytest.raises(CheckpointError, match="no embedded model"):
            find_model(None)
