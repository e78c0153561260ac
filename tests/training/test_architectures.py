"""The size of a start model that is not at hand, by its name."""

from __future__ import annotations

import pytest

from mplug_core.recipe import load_recipe, named_size, shipped_recipes
from mplug_core.training.architectures import start_architecture


@pytest.mark.parametrize("name", [name for name in shipped_recipes() if name.endswith(("_base", "_large"))])
def test_recipes_of_the_paper_have_the_papers_sizes(name):
    recipe = load_recipe(name)
    architecture, origin = start_architecture(recipe)
    size = name.rpartition("_")[2]
    assert architecture.vision.backbone == named_size(size)["vision"]["backbone"] and size in origin
    # what the recipe changes is changed, and each box token is a row
    assert architecture.vision.image_size == recipe.model.vision.image_size
    assert architecture.vocab_size == 30522 + architecture.box_bins
    assert architecture.classifiers == recipe.model.classifiers


@pytest.mark.parametrize(
    ("start", "backbone"),
    [
        ("weights/mplug_large_v2.pth", "vit_large_patch14_clip_quickgelu_224"),
        ("mplug-base", "vit_base_patch16_clip_quickgelu_224"),
        ("ms:damo/mplug_visual-question-answering_coco_large_en", "vit_large_patch14_clip_quickgelu_224"),
        ("runs/caption_large", "vit_large_patch14_clip_quickgelu_224"),
        ("runs/pretrained/large/", "vit_large_patch14_clip_quickgelu_224"),
        ("runs/mini", "tf_efficientnet_lite0"),
        ("runs/small", "vit_small_patch16_224"),
    ],
)
def test_names_that_tell_a_size(start, backbone):
    recipe = load_recipe("caption_base", [f"start.model={start}"])
    architecture, origin = start_architecture(recipe)
    assert architecture.vision.backbone == backbone and origin
    assert architecture.vision.image_size == recipe.model.vision.image_size


@pytest.mark.parametrize("start", ["runs/mine", "org/model", "mplug.pth", "mplug_base_or_large.pth", "/x/large.pth"])
def test_names_that_tell_none(start):
    found = start_architecture(load_recipe("caption_base", [f"start.model={start}"]))
    assert found is None or start == "/x/large.pth"


def test_a_size_in_the_recipe_itself():
    recipe = load_recipe("caption_base", ["start.model=runs/mine", "model.size=small"])
    assert start_architecture(recipe)[0].width == 384


def test_a_recipe_that_starts_from_itself(monkeypatch, tmp_path):
    recipe = load_recipe("caption_base", ["start.model=runs/caption_base"])
    assert start_architecture(recipe)[1] == "the paper's mPLUG-base"
    (tmp_path / "round.yaml").write_text("name: round\nstart: {model: round.yaml}\n")
    monkeypatch.chdir(tmp_path)
    assert start_architecture(load_recipe("round.yaml")) is None
