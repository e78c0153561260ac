"""What a model may be written over: another model, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from mplug_core.errors import MplugError
from mplug_core.weights.destination import check_destination

MODEL = ("model.safetensors", "config.json", "vocab.txt")


def filled(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x")
    return folder


@pytest.mark.parametrize(
    "names",
    [
        MODEL,
        (*MODEL, "recipe.yaml", "README.md", "quantization.json"),
        ("meta.json", "vocab.txt", "README.md", "decoder.onnx", "decoder.onnx.data"),
    ],
)
def test_a_model_is_replaced_when_told_to(tmp_path: Path, names: tuple[str, ...]) -> None:
    place = filled(tmp_path / "m", *names)
    with pytest.raises(MplugError, match="--force"):
        check_destination(place)
    check_destination(place, tmp_path / "other", force=True)


@pytest.mark.parametrize(
    "names",
    [
        (*MODEL, "thesis.txt"), (*MODEL, "src/code.py"), (*MODEL, "mplug.pth"), ("config.json", "README.md"),
        ("README.md",), ("meta.json", "notes.txt"), ("meta.json", "decoder.onnx", "model.safetensors"),
    ],
)  # fmt: skip
def test_what_is_more_than_a_model_stays(tmp_path: Path, names: tuple[str, ...]) -> None:
    with pytest.raises(MplugError, match="is no model folder"):
        check_destination(filled(tmp_path / "m", *names), force=True)


def test_what_is_free(tmp_path: Path) -> None:
    check_destination(tmp_path / "deep" / "m")
    check_destination(filled(tmp_path / "empty"))
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    check_destination(tmp_path / "link")


def test_files_and_the_source_stay(tmp_path: Path) -> None:
    place = filled(tmp_path / "m", *MODEL)
    (tmp_path / "link").symlink_to(place)
    for target in (place, tmp_path / "link", tmp_path):
        for source in (place, place / "model.safetensors"):
            with pytest.raises(MplugError, match="where the model is"):
                check_destination(target, source, force=True)
    with pytest.raises(MplugError, match="is a file"):
        check_destination(place / "vocab.txt", force=True)
