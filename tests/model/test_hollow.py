"""Models without weights: the shapes of a model that is built, and nothing that only a compiler needs."""

from __future__ import annotations

import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from mplug_core.errors import CheckpointError
from mplug_core.model.hollow import hollow
from mplug_core.model.mplug import MplugModel
from mplug_core.model.vision import VisualEncoder
from tests.small import small_config


@pytest.mark.parametrize(
    "vision",
    [
        {"backbone": "resnet10t", "image_size": 32},
        {"backbone": "tf_efficientnet_lite0", "image_size": 96, "levels": [2, 3]},
        {"backbone": "vit_tiny_patch16_224", "image_size": 32},
    ],
)
def test_shapes_are_those_of_a_built_model(vision):
    config = small_config(vision=vision)
    built = MplugModel(config)
    with hollow():
        empty = MplugModel(config)
    assert all(value.is_meta for value in empty.state_dict().values())
    shapes = {name: value.shape for name, value in built.state_dict().items()}
    assert shapes == {name: value.shape for name, value in empty.state_dict().items()}
    assert (empty.visual.grid, empty.visual.width) == (built.visual.grid, built.visual.width)


def test_a_probe_leaves_the_backbone_as_it_was():
    torch.manual_seed(0)
    config = small_config(vision={"backbone": "resnet10t", "image_size": 64})
    visual = VisualEncoder(config)
    assert visual.training and visual.backbone.training
    norm = next(part for part in visual.modules() if isinstance(part, nn.BatchNorm2d))
    assert norm.running_mean.eq(0).all() and norm.running_var.eq(1).all()
    assert next(visual.parameters()).std() > 0
    seen = visual.eval()(torch.randn(2, 3, 64, 64))
    assert tuple(seen.shape) == (2, visual.grid[0] * visual.grid[1], visual.width) and seen.isfinite().all()


def test_layers_outside_are_initialised():
    with hollow():
        inside = nn.Linear(4, 4)
    assert inside.weight.is_meta
    layer = nn.Linear(4, 4)
    nn.init.constant_(layer.weight, 3.0)
    assert layer.weight.eq(3).all()


def test_a_caption_takes_neither_compiler_nor_algebra():
    code = (
        "import sys, mplug_core\n"
        "from PIL import Image\n"
        "mplug_core.load().caption(Image.new('RGB', (64, 64)), strategy='greedy', max_tokens=5)\n"
        "print(*({'torch._dynamo', 'torch._inductor', 'sympy', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("build", [nullcontext, hollow])
def test_levels_that_do_not_fold_into_cells_are_named(build):
    config = small_config(vision={"backbone": "tf_efficientnet_lite0", "image_size": 100, "levels": [2, 3]})
    with build(), pytest.raises(CheckpointError, match="levels"):
        MplugModel(config)
