"""In which numbers a model computes by default, on processors of every kind."""

from __future__ import annotations

import pytest
import torch

from mplug_core.device import choose_dtype
from mplug_core.errors import UsageError
from mplug_core.weights.folder import load_model, save_model
from tests.small import CNN, scene_tokenizer, small_model

CPU = torch.device("cpu")


@pytest.fixture
def automatic(monkeypatch: pytest.MonkeyPatch):
    """Called with capabilities, has the processor be one with them."""
    monkeypatch.delenv("MPLUG_DTYPE")

    def have(**capabilities: bool) -> None:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)

    return have


def test_bf16_where_there_are_matrix_units_for_it(automatic):
    automatic(amx_bf16=True)
    assert choose_dtype(CPU, matrices=True) == torch.bfloat16
    assert choose_dtype(CPU, matrices=False) == torch.float32
    automatic(avx2=True, avx512_bf16=True, amx_bf16=False)
    assert choose_dtype(CPU, matrices=True) == torch.float32


def test_devices(automatic, monkeypatch):
    automatic(avx2=True)
    assert choose_dtype(torch.device("cuda"), matrices=False) == torch.bfloat16
    assert choose_dtype(torch.device("mps"), matrices=True) == torch.float32
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert choose_dtype(CPU, matrices=True) == torch.float32


def test_the_variable_wins(automatic, monkeypatch):
    automatic(amx_bf16=True)
    for name, kind in (("float16", torch.float16), ("float32", torch.float32), ("auto", torch.bfloat16)):
        monkeypatch.setenv("MPLUG_DTYPE", name)
        assert choose_dtype(CPU, matrices=True) == kind
    monkeypatch.setenv("MPLUG_DTYPE", "int4")
    with pytest.raises(UsageError, match="MPLUG_DTYPE=int4"):
        choose_dtype(CPU, matrices=True)


def test_models_by_their_encoder(automatic, scenes, tmp_path):
    tokenizer = scene_tokenizer(scenes)
    automatic(amx_bf16=True)
    for name, fields in (("transformer", {}), ("convolutional", {"vision": CNN})):
        model = small_model(vocab_size=tokenizer.vocab_size, box_bins=tokenizer.bins, **fields)
        save_model(tmp_path / name, model, tokenizer)
    assert load_model(str(tmp_path / "transformer")).dtype == torch.bfloat16
    assert load_model(str(tmp_path / "transformer"), dtype=torch.float32).dtype == torch.float32
    assert load_model(str(tmp_path / "convolutional")).dtype == torch.float32
