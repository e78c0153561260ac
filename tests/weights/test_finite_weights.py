"""Weights that are not finite are named where they are read, whatever the layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import mplug_core
from mplug_core.data.text import Tokenizer
from mplug_core.errors import CheckpointError
from mplug_core.json_text import to_json
from mplug_core.training.loop import Progress
from mplug_core.training.start import fill_from
from mplug_core.weights.conversion import convert_model
from mplug_core.weights.export import export_int8, read_source
from mplug_core.weights.faults import not_finite
from mplug_core.weights.folder import load_model, read_model, save_model
from tests.small import small_model


@pytest.fixture
def folder(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    save_model(tmp_path / "m", small_model(vocab_size=tokenizer.vocab_size), tokenizer, dtype=torch.float32)
    return tmp_path / "m"


def spoil(folder: Path, name: str, value: float, count: int = 1) -> None:
    state = load_file(folder / "model.safetensors")
    state[name].view(-1)[:count] = value
    save_file(state, folder / "model.safetensors")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_numbers_are_counted(value: float, dtype: torch.dtype) -> None:
    weight = torch.full((70, 30), 3e4).to(dtype)  # whose sum is beyond fp16, and whose numbers are not
    assert not_finite(weight) == 0
    weight[3, :2] = value
    weight[9, 9] = -value
    assert not_finite(weight) == 3
    assert not_finite(torch.tensor([1, 2])) == 0 == not_finite(torch.empty(2, device="meta"))


def test_a_sum_beyond_fp32_is_no_fault() -> None:
    assert not_finite(torch.full((10,), 3e38)) == 0


def some_weight(folder: Path) -> str:
    return max(name for name in load_file(folder / "model.safetensors") if name.startswith("decoder.layers"))


@pytest.mark.parametrize("count", [1, 3])
def test_every_way_of_loading_names_them(folder: Path, tokenizer: Tokenizer, count: int) -> None:
    name = some_weight(folder)
    spoil(folder, name, float("nan"), count)
    fresh = small_model(vocab_size=tokenizer.vocab_size)
    said = rf"{name} holds {count} number"
    ways = {
        "command line": lambda: load_model(str(folder)),
        "another type": lambda: load_model(str(folder), dtype=torch.bfloat16),
        "API": lambda: mplug_core.load(folder),
        "conversion": lambda: convert_model(str(folder), folder.parent / "out"),
        "export": lambda: read_source(str(folder)),
        "start model": lambda: fill_from(fresh, tokenizer, read_model(str(folder))),
    }  # fmt: skip
    for way, load in ways.items():
        with pytest.raises(CheckpointError, match=said) as caught:
            load()
        assert caught.value.exit_code == 5, way
    # what is not loaded is not asked
    assert load_model(str(folder), without=("decoder",))


def test_other_tensors_are_counted(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    first, second, third, *_ = [name for name, value in state.items() if value.is_floating_point()]
    for name in (first, second, third):
        spoil(folder, name, float("inf"))
    with pytest.raises(CheckpointError, match="and so do 2 further tensors"):
        load_model(str(folder))


def test_scales_of_int8_weights(folder: Path, tmp_path: Path) -> None:
    export_int8(read_source(str(folder)), tmp_path / "int8", "fp32", "")
    assert load_model(str(tmp_path / "int8"))
    scale = next(n for n in load_file(tmp_path / "int8" / "model.safetensors") if n.endswith("_scale") and "text" in n)
    spoil(tmp_path / "int8", scale, float("nan"))
    for dtype in (torch.float32, torch.bfloat16):  # int8 kernels, and floats
        with pytest.raises(CheckpointError, match="not finite"):
            load_model(str(tmp_path / "int8"), dtype=dtype)


def test_json_has_null_for_what_is_no_number() -> None:
    values = {"a": [1.5, float("nan"), {"b": (float("inf"), -float("inf"))}], "c": "NaN", "d": None, "e": True}
    text = to_json(values, indent=1)
    json.loads(text, parse_constant=lambda word: pytest.fail(word))
    assert json.loads(text) == {"a": [1.5, None, {"b": [None, None]}], "c": "NaN", "d": None, "e": True}
    assert to_json({"a": "ä"}, ensure_ascii=False) == '{"a": "ä"}'


def test_progress_comes_back_from_json() -> None:
    progress = Progress(total=3, scores={"cider": float("nan")}, unwritten={"loss": [float("inf"), 2]})
    read = Progress.read(json.loads(to_json(vars(progress))))
    assert read.total == 3 and read.scores["cider"] != read.scores["cider"]
    assert read.unwritten["loss"][0] != read.unwritten["loss"][0] and read.unwritten["loss"][1] == 2
