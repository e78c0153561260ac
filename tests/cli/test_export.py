"""``mplug model export``: folders that --model reads again, and usage errors."""

from __future__ import annotations

import pytest

from mplug_cli import export
from mplug_core.weights.folder import load_model
from tests.cli.conftest import save_random


def test_an_int8_model_captions(mplug, able_folder, photo, tmp_path):
    done = mplug("model", "export", able_folder, tmp_path / "q", "--format", "int8")
    assert (done.code, done.out, done.err) == (0, f"{tmp_path / 'q'}\n", "")
    assert {"README.md", "config.json", "model.safetensors", "quantization.json", "vocab.txt"} == {
        file.name for file in (tmp_path / "q").iterdir()
    }
    assert "library_name: mplug" in (tmp_path / "q" / "README.md").read_text(), "a model without a card gets one"
    said = mplug("caption", photo, "--model", tmp_path / "q", "--json")
    assert said.code == 0 and said.objects[0]["caption"]
    asked = mplug("vqa", photo, "what is it?", "--model", tmp_path / "q")
    assert asked.code == 0


def test_safetensors_at_another_size(mplug, able_folder, tmp_path):
    done = mplug("model", "export", able_folder, tmp_path / "m", "--dtype", "fp32", "--image-size", "64")
    assert done.code == 0 and load_model(str(tmp_path / "m")).config.vision.image_size == 64


def test_a_card_is_kept(mplug, able_folder, tmp_path):
    folder = save_random(tmp_path / "m")
    (folder / "README.md").write_text("# mine\n")
    assert mplug("model", "export", folder, tmp_path / "out").code == 0
    assert (tmp_path / "out" / "README.md").read_text() == "# mine\n"


def test_what_is_there_is_replaced_when_told_to(mplug, able_folder, tmp_path):
    assert mplug("model", "export", able_folder, tmp_path / "m").code == 0
    done = mplug("model", "export", able_folder, tmp_path / "m")
    assert done.code == 1 and "--force" in done.error
    assert mplug("model", "export", able_folder, tmp_path / "m", "--force").code == 0
    done = mplug("model", "export", able_folder, able_folder, "--force")
    assert done.code == 2 and "where the model is" in done.error


def test_onnx_without_its_packages_is_one_line(mplug, able_folder, tmp_path, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name.startswith("onnx") else find(name, *rest)
    )
    done = mplug("model", "export", able_folder, tmp_path / "x", "--format", "onnx")
    assert done.code == 1 and "pip install 'mplug[onnx]'" in done.error and not (tmp_path / "x").exists()


@pytest.mark.slow
def test_onnx(mplug, able_folder, tmp_path):
    pytest.importorskip("onnxscript"), pytest.importorskip("onnxruntime")
    done = mplug("model", "export", able_folder, tmp_path / "x", "--format", "onnx")
    assert (done.code, done.out) == (0, f"{tmp_path / 'x'}\n")
    assert done.err.count("from PyTorch") == 7 and (tmp_path / "x" / "decoder.onnx").is_file()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--format", "onx"], ["'onx'", "'onnx'"]),
        (["--dtype", "fp61"], ["'fp61'", "'fp16'"]),
        (["--format", "onnx", "--dtype", "bf16"], ["fp32", "bf16"]),
        (["--opset", "18"], ["--opset", "onnx"]),
        (["--image-size", "0"], ["--image-size"]),
    ],
)
def test_usage_errors(mplug, tmp_path, options, words):
    done = mplug("model", "export", "mini", tmp_path / "x", *options)
    assert done.code == 2 and all(word in done.error for word in words), done.error


def test_no_model_is_one_line(mplug, tmp_path):
    done = mplug("model", "export", "/nowhere", tmp_path / "x")
    assert done.code == 5 and "/nowhere" in done.error


def test_options_are_the_package_s():
    from mplug_core.weights.export import DTYPES
    from mplug_core.weights.onnx import OPSET

    assert tuple(DTYPES) == export.DTYPES and OPSET == export.OPSET
