"""Configurations: named sizes, files, and which fusion layers connect the streams."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from mplug_core.errors import CheckpointError, RecipeError
from mplug_core.model.config import MplugConfig
from mplug_core.recipe import size_table
from tests.small import small_config


@pytest.mark.parametrize(
    ("rule", "stride", "layers", "connected"),
    [
        # paper: S asymmetric layers, then a connected one, repeated
        ("paper", 1, 6, [1, 3, 5]),
        ("paper", 2, 6, [2, 5]),
        ("paper", 3, 6, [3]),
        ("paper", 3, 8, [3, 7]),
        ("paper", 6, 6, []),
        ("paper", 6, 7, [6]),
        # released: k != 0 and k % S == 0
        ("released", 1, 6, [1, 2, 3, 4, 5]),
        ("released", 2, 6, [2, 4]),
        ("released", 3, 6, [3]),
        ("released", 3, 8, [3, 6]),
        ("released", 6, 6, []),
        ("released", 6, 7, [6]),
    ],
)
def test_connected_layers_of_the_skip_fusion(rule: str, stride: int, layers: int, connected: list[int]) -> None:
    assert small_config(rule=rule, stride=stride, fusion_layers=layers).connected_layers == connected


@pytest.mark.parametrize(
    ("fusion", "connected"), [("connected", [0, 1, 2, 3]), ("co", []), ("asymmetric", []), ("none", [])]
)
def test_connected_layers_of_the_other_fusions(fusion: str, connected: list[int]) -> None:
    assert small_config(fusion=fusion).connected_layers == connected


@pytest.mark.parametrize("size", size_table())
def test_named_sizes_are_complete(size: str) -> None:
    config = MplugConfig.named(size, dropout=0.25)
    assert config.size == size and config.dropout == 0.25


def test_unknown_size_names_the_nearest() -> None:
    with pytest.raises(RecipeError, match="no model size 'larg', did you mean 'large'"):
        MplugConfig.named("larg")


def test_paper_sizes() -> None:
    base, large = MplugConfig.named("base"), MplugConfig.named("large")
    assert (base.width, base.heads, base.text_layers, base.fusion_layers, base.decoder_layers) == (768, 12, 6, 6, 12)
    assert (base.stride, base.rule, base.embed_dim) == (3, "paper", 256)
    assert "base_patch16_clip_quickgelu" in base.vision.backbone and base.vision.image_size == 256
    assert "large_patch14_clip_quickgelu" in large.vision.backbone and large.vision.image_size == 224


def test_file_round_trip(tmp_path: Path) -> None:
    config = small_config(fusion="co", classifiers={"statement": {"images": 2, "labels": ["false", "true"]}})
    config.save(tmp_path / "config.json")
    assert MplugConfig.load(tmp_path / "config.json") == config


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot read .*config.json"),
        ("{", "is not JSON"),
        ("\x00\xff", "is not UTF-8"),
        ('{"width": 10, "heads": 3}', "not a multiple of heads"),
        ('{"wdth": 10}', "wdth"),
        ("[]", "config.json"),
    ],
)
def test_damaged_file(tmp_path: Path, content: str | None, said: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(CheckpointError, match=said):
        MplugConfig.load(tmp_path / "config.json")


def test_heads_divide_the_width() -> None:
    with pytest.raises(ValidationError, match="width 30 is not a multiple of heads 4"):
        small_config(width=30)
