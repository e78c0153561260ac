"""The visual encoder: exactly CLIP, at any resolution, and convolutional grids as tokens."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch

from mplug_core.errors import CheckpointError
from mplug_core.model.mplug import MplugModel
from mplug_core.model.vision import PatchProjection, VisualEncoder, resize_positions
from tests.small import CNN, VIT, small_config, small_model


def load_clip(encoder: VisualEncoder, clip: torch.nn.Module) -> None:
    """Put the weights of transformers' CLIPVisionModel into the encoder."""
    theirs = {name.removeprefix("vision_model."): value for name, value in clip.state_dict().items()}
    ours = {
        "cls_token": theirs["embeddings.class_embedding"].view(1, 1, -1),
        "patch_embed.proj.weight": theirs["embeddings.patch_embedding.weight"],
        "pos_embed": theirs["embeddings.position_embedding.weight"][None],
    }
    pairs = {"norm_pre": "pre_layrnorm", "norm": "post_layernorm"}
    for k in range(len(encoder.backbone.blocks)):
        layer, block = f"encoder.layers.{k}", f"blocks.{k}"
        for kind in ("weight", "bias"):
            parts = [theirs[f"{layer}.self_attn.{p}_proj.{kind}"] for p in "qkv"]
            ours[f"{block}.attn.qkv.{kind}"] = torch.cat(parts)
        pairs |= {
            f"{block}.attn.proj": f"{layer}.self_attn.out_proj", f"{block}.norm1": f"{layer}.layer_norm1",
            f"{block}.norm2": f"{layer}.layer_norm2", f"{block}.mlp.fc1": f"{layer}.mlp.fc1",
            f"{block}.mlp.fc2": f"{layer}.mlp.fc2",
        }  # fmt: skip
    for our, their in pairs.items():
        for kind in ("weight", "bias"):
            ours[f"{our}.{kind}"] = theirs[f"{their}.{kind}"]
    encoder.backbone.load_state_dict(ours, strict=True)


@pytest.fixture(scope="module")
def clip() -> torch.nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8,
        hidden_act="quick_gelu",
    )  # fmt: skip
    model = transformers.CLIPVisionModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def test_equals_clip(clip: torch.nn.Module) -> None:
    encoder = VisualEncoder(small_config()).eval()
    load_clip(encoder, clip)
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        hidden = clip(pixels).last_hidden_state
        # transformers leaves the final norm off all tokens but the class token's; mPLUG has it on all
        want = encoder.backbone.norm(hidden)
        got = encoder(pixels)
    assert got.shape == (2, 1 + 4 * 4, 32)
    assert torch.allclose(got, want, atol=1e-5)


def test_equals_clip_at_another_size(clip: torch.nn.Module) -> None:
    encoder = VisualEncoder(small_config(vision={**VIT, "image_size": 48})).eval()
    small = VisualEncoder(small_config())
    load_clip(small, clip)
    state = small.backbone.state_dict()
    grown = resize_positions(state["pos_embed"][0], (6, 6))[None]
    encoder.backbone.load_state_dict({**state, "pos_embed": grown})
    pixels = torch.randn(1, 3, 48, 48)
    reference = type(clip)(type(clip.config)(**{**clip.config.to_dict(), "image_size": 48})).eval()
    theirs = clip.state_dict()
    key = next(name for name in theirs if name.endswith("position_embedding.weight"))
    reference.load_state_dict({**theirs, key: grown[0]}, strict=False)
    with torch.no_grad():
        want = encoder.backbone.norm(reference(pixels).last_hidden_state)
        got = encoder(pixels)
    assert got.shape == (1, 37, 32) and torch.allclose(got, want, atol=1e-5)


class TestResizePositions:
    def test_same_size_is_untouched(self) -> None:
        positions = torch.randn(17, 8)
        assert torch.equal(resize_positions(positions, (4, 4)), positions)

    def test_class_row_is_kept_and_a_constant_stays_one(self) -> None:
        positions = torch.cat([torch.full((1, 3), 7.0), torch.ones(4, 3)])
        grown = resize_positions(positions, (3, 5))
        assert grown.shape == (16, 3)
        assert (grown[0] == 7).all() and torch.allclose(grown[1:], torch.ones(15, 3))

    def test_by_hand(self) -> None:
        # 2 x 2 to 4 x 4, align_corners off: along an axis the weights of the second cell are 0, 1/4, 3/4, 1
        positions = torch.tensor([[0.0], [0.0], [4.0], [8.0], [12.0]])
        grown = resize_positions(positions, (4, 4))[1:, 0].view(4, 4)
        assert torch.allclose(grown[0], torch.tensor([0.0, 1, 3, 4]))
        assert torch.allclose(grown[:, 0], torch.tensor([0.0, 2, 6, 8]))

    def test_keeps_the_type(self) -> None:
        assert resize_positions(torch.randn(5, 4).bfloat16(), (3, 3)).dtype == torch.bfloat16

    def test_refuses_what_is_no_square(self) -> None:
        with pytest.raises(CheckpointError, match="7 cells is not a square"):
            resize_positions(torch.randn(8, 4), (3, 3))


class TestSubcells:
    VISION = {"backbone": "tf_efficientnet_lite0", "image_size": 64, "levels": [2, 3]}

    @pytest.mark.parametrize("subcells", [1, 2])
    def test_levels_lie_where_their_pixels_lie(self, subcells: int) -> None:
        encoder = VisualEncoder(small_config(vision={**self.VISION, "subcells": subcells})).eval()
        pixels = torch.randn(2, 3, 64, 64)
        with torch.no_grad():
            last, levels = encoder.split_levels(encoder(pixels))
            _, raw = encoder.backbone.forward_intermediates(pixels, indices=[2, 3])
        assert encoder.grid == (2, 2) and encoder.token_grid == (2 * subcells, 2 * subcells)
        assert last.shape == (2, 4, 1280)
        for level, grid in zip(levels, raw, strict=True):
            side = grid.shape[-1] // (2 * subcells)
            want = torch.nn.functional.pixel_unshuffle(grid, side).flatten(2).transpose(1, 2)
            torch.testing.assert_close(level, want, rtol=1e-3, atol=1e-4)

    def test_tokens_of_a_model(self) -> None:
        model = MplugModel(small_config(vision={**self.VISION, "subcells": 2})).eval()
        pixels = torch.randn(1, 3, 64, 64)
        with torch.no_grad():
            fine = model.encode_image(pixels).tokens
            model.pooling = 2
            coarse = model.encode_image(pixels).tokens
        assert fine.shape == (1, 16, 32) and coarse.shape == (1, 4, 32)
        torch.testing.assert_close(coarse[0, 3], fine[0, [10, 11, 14, 15]].mean(0))

    @pytest.mark.parametrize(("levels", "subcells"), [([3], 4), ([], 2)])
    def test_levels_that_are_too_coarse_are_named(self, levels: list[int], subcells: int) -> None:
        with pytest.raises(CheckpointError, match="times as fine"):
            VisualEncoder(small_config(vision={**self.VISION, "levels": levels, "subcells": subcells}))

    @pytest.mark.parametrize("vision", [VISION, {**CNN, "levels": [1, 2]}, {**CNN, "levels": []}, VIT])
    def test_the_stem_is_the_beginning_of_the_network(self, vision: dict) -> None:
        model = MplugModel(small_config(vision=vision))
        model.freeze(["stem"])
        learned = [name for name, p in model.visual.named_parameters() if p.requires_grad]
        frozen = [name for name, p in model.visual.named_parameters() if not p.requires_grad]
        assert learned and frozen
        order = [name for name, _ in model.visual.named_parameters()]
        if vision is not VIT:
            assert order[: len(frozen)] == frozen
        assert all(p.requires_grad for p in model.decoder.parameters())


class TestConvolutional:
    def test_grid_cells_are_tokens_row_by_row(self) -> None:
        encoder = VisualEncoder(small_config(vision=CNN)).eval()
        pixels = torch.randn(2, 3, 32, 32)
        with torch.no_grad():
            grid = encoder.backbone.forward_features(pixels)
            tokens = encoder(pixels)
        assert tuple(encoder.grid) == (2, 2) and encoder.width == 16
        assert tokens.shape == (2, 4, 16)
        # the encoder lays memory out differently, so sums are rounded differently
        torch.testing.assert_close(tokens[:, 1], grid[:, :, 0, 1])
        torch.testing.assert_close(tokens[:, 2], grid[:, :, 1, 0])

    def test_pool_is_mean_and_maximum(self) -> None:
        encoder = VisualEncoder(small_config(vision=CNN))
        tokens = torch.randn(2, 4, 16)
        assert torch.equal(encoder.pool(tokens), torch.cat([tokens.mean(1), tokens.max(1).values], -1))

    def test_channels_last_backbones(self) -> None:
        options = {
            "embed_dim": 16,
            "depths": [1, 1],
            "num_heads": [1, 2],
            "img_size": 32,
            "patch_size": 4,
            "window_size": 4,
        }
        vision = {"backbone": "swin_tiny_patch4_window7_224", "image_size": 32, "options": options}
        model = small_model(vision=vision)
        encoding = model.encode_image(torch.randn(2, 3, 32, 32))
        assert encoding.tokens.shape == (2, 16, 32) and encoding.feature.shape == (2, 16)

    def test_positions_tell_cells_apart(self) -> None:
        model = small_model(vision=CNN)
        # the same everywhere, so that only the position differs
        tokens = model.encode_features(torch.ones(1, 4, 16)).tokens
        assert not torch.allclose(tokens[0, 0], tokens[0, 3])


class TestLevels:
    def test_finer_stages_stand_behind_the_last(self) -> None:
        plain = VisualEncoder(small_config(vision=CNN)).eval()
        rich = VisualEncoder(small_config(vision={**CNN, "levels": [1, 2]})).eval()
        rich.backbone.load_state_dict(plain.backbone.state_dict())
        pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            last, both = plain(pixels), rich(pixels)
            _, levels = plain.backbone.forward_intermediates(pixels, indices=[1, 2])
        assert rich.grid == plain.grid and both.shape == (2, last.shape[1], rich.width)
        assert torch.allclose(both[..., : plain.width], last, atol=1e-5)
        # the pixels under a cell are side by side: a cell of the first row and column has the first of the level's
        sides = [level.shape[-1] // plain.grid[1] for level in levels]
        assert rich.width == plain.width + sum(
            level.shape[1] * side**2 for level, side in zip(levels, sides, strict=True)
        )
        corner = levels[0][:, :, : sides[0], : sides[0]].flatten(1)
        start = plain.width
        assert torch.allclose(both[:, 0, start : start + corner.shape[1]], corner, atol=1e-5)
        assert torch.equal(rich.pool(both), plain.pool(both[..., : plain.width]))

    def test_building_leaves_the_statistics_of_batch_norms_alone(self) -> None:
        vision = {"backbone": "resnet10t", "image_size": 32, "levels": [1, 2]}
        buffers = dict(VisualEncoder(small_config(vision=vision)).backbone.named_buffers())
        means = [value for name, value in buffers.items() if name.endswith("running_mean")]
        assert means and not any(value.any() for value in means)

    def test_a_stage_that_is_not_there(self) -> None:
        with pytest.raises(CheckpointError, match="levels"):
            VisualEncoder(small_config(vision={**CNN, "levels": [9]}))

    def test_a_transformer_has_none(self) -> None:
        with pytest.raises(CheckpointError, match="has no levels"):
            VisualEncoder(small_config(vision={**VIT, "levels": [1]}))


def test_unknown_backbone_names_the_nearest() -> None:
    with pytest.raises(CheckpointError, match="no backbone 'resnet1O', did you mean 'resnet"):
        VisualEncoder(small_config(vision={"backbone": "resnet1O"}))


def test_option_that_the_backbone_lacks_is_a_fault_of_the_configuration() -> None:
    with pytest.raises(CheckpointError, match="resnet10t"):
        VisualEncoder(small_config(vision={**CNN, "options": {"embed_dim": 32}}))


def test_backbone_that_gives_no_grid_is_refused() -> None:
    # a sequence, but no vision transformer of the kind whose positions we know
    vision = {"backbone": "mixer_s32_224", "image_size": 224}
    with pytest.raises(CheckpointError, match="mixer_s32_224"):
        VisualEncoder(small_config(vision=vision))


@pytest.mark.parametrize("size", [32, 37])
def test_patch_projection_is_the_convolution(size: int) -> None:
    made = PatchProjection(3, 16, 8, 8)
    pixels = torch.randn(2, 3, size, size, requires_grad=True)
    gradients = []
    for found in (made(pixels), torch.nn.Conv2d.forward(made, pixels)):
        made.zero_grad()
        gradients.append((found.detach(), *torch.autograd.grad(found.square().sum(), (pixels, *made.parameters()))))
    for got, want in zip(*gradients, strict=True):
        assert torch.allclose(got, want, atol=1e-5, rtol=1e-4)


def test_transformers_project_patches_under_the_names_of_timm() -> None:
    encoder = VisualEncoder(small_config())
    assert type(encoder.backbone.patch_embed.proj) is PatchProjection
    assert "patch_embed.proj.weight" in encoder.backbone.state_dict()


def test_attention_is_fused_unless_bf16_is_trained_on_a_cpu() -> None:
    encoder, other = VisualEncoder(small_config()), VisualEncoder(small_config())
    blocks, pixels = encoder.backbone.blocks, torch.randn(1, 3, 32, 32)
    encoder(pixels)
    assert all(block.attn.fused_attn for block in blocks)
    encoder.bfloat16()
    half = encoder(pixels.bfloat16())
    assert not any(block.attn.fused_attn for block in blocks)
    with torch.no_grad():
        assert torch.allclose(encoder(pixels.bfloat16()).float(), half.detach().float(), atol=0.1)
    assert all(block.attn.fused_attn for block in [*blocks, *other.backbone.blocks])


def test_a_copy_chooses_its_own_attention() -> None:
    encoder = VisualEncoder(small_config())
    copied = deepcopy(encoder)
    copied.bfloat16()(torch.randn(1, 3, 32, 32).bfloat16())
    assert all(block.attn.fused_attn for block in encoder.backbone.blocks)
    assert not any(block.attn.fused_attn for block in copied.backbone.blocks)
