"""Batch norms with fixed statistics compute what they compute in evaluation, in every precision, and keep them."""

from __future__ import annotations

from copy import deepcopy

import pytest
import timm
import torch

from mplug_core.model.batch_norm import FixedBatchNorm, FixedBatchNormAct, FoldedConv, FoldedConvSame, fix_statistics
from mplug_core.model.mplug import MplugModel
from mplug_core.model.vision import VisualEncoder
from tests.small import small_config

BACKBONES = ["tf_efficientnet_lite0", "mobilenetv3_small_050", "resnet10t", "resnet26", "regnetx_002", "densenet121"]
"""Folded into same-padded and other convolutions, with and without activations; the last two for the most part not."""
RESNET = {"backbone": "resnet10t", "image_size": 64, "options": {"channels": [8, 8, 16, 16], "stem_width": 8}}


def trained(name: str) -> torch.nn.Module:
    """A backbone whose norms have something to do."""
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=0)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
            for values in (module.running_mean, module.weight.data, module.bias.data):
                values.add_(torch.randn_like(values) * 0.1)
    return network.eval()


@pytest.mark.parametrize("name", BACKBONES)
def test_equals_evaluation(name: str) -> None:
    network = trained(name)
    fixed = deepcopy(network)
    fix_statistics(fixed)
    assert fixed.state_dict().keys() == network.state_dict().keys()
    pixels = torch.randn(2, 3, 64, 64)
    want, got = network.forward_features(pixels), fixed.train().forward_features(pixels)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4 * float(want.detach().abs().max()))
    for output in (want, got):
        output.square().mean().backward()
    for (key, theirs), ours in zip(network.named_parameters(), fixed.parameters(), strict=True):
        if theirs.grad is None:  # of a head behind the features
            continue
        # in the norm: where an activation is nearly 0 a rounding decides whether single elements have a gradient
        error, size = float((ours.grad - theirs.grad).norm()), float(theirs.grad.norm())
        assert error <= 1e-2 * size + 1e-7, (key, error, size)


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "resnet26"])
def test_folded_where_a_norm_follows_a_convolution(name: str) -> None:
    network = trained(name)
    fix_statistics(network)
    norms = [m for m in network.modules() if isinstance(m, FixedBatchNorm | FixedBatchNormAct)]
    convolutions = [m for m in network.modules() if isinstance(m, FoldedConv | FoldedConvSame)]
    assert norms and len(convolutions) == len(norms) and all(norm.in_convolution for norm in norms)
    copied = deepcopy(network)
    own = {id(module) for module in copied.modules()}
    assert all(id(m.norm[0]) in own for m in copied.modules() if hasattr(m, "norm") and isinstance(m.norm, tuple))


def test_statistics_stay_in_training() -> None:
    encoder = VisualEncoder(small_config(vision=RESNET)).train()
    before = {name: value.clone() for name, value in encoder.named_buffers()}
    assert any("running_mean" in name for name in before)
    encoder(torch.randn(3, 3, 64, 64)).sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in encoder.named_buffers())
    alone = encoder(torch.ones(1, 3, 64, 64))
    together = encoder(torch.cat([torch.ones(1, 3, 64, 64), torch.randn(2, 3, 64, 64)]))
    assert torch.allclose(alone[0], together[0], atol=1e-5)


@pytest.mark.parametrize("buffers", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "resnet10t", "densenet121"])
def test_learns_in_bf16_whatever_the_engine_does_with_buffers(name: str, buffers: torch.dtype) -> None:
    network = trained(name)
    fix_statistics(network)
    pixels = torch.randn(2, 3, 64, 64)
    want = network.forward_features(pixels)
    for parameter in network.parameters():
        parameter.data = parameter.data.bfloat16()
    for module in network.modules():
        for key, value in module._buffers.items():
            if value is not None and value.is_floating_point():
                module._buffers[key] = value.to(buffers)
    got = network.train().forward_features(pixels.bfloat16())
    assert got.dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(got.float().flatten(), want.flatten(), dim=0) > 0.97
    got.float().square().mean().backward()
    learned = [p.grad for p in network.parameters() if p.grad is not None]
    assert len(learned) > 30 and all(gradient.isfinite().all() for gradient in learned)


@pytest.mark.parametrize("levels", [[], [1, 2]])
def test_a_model_with_batch_norms_encodes_in_bf16(levels: list[int]) -> None:
    vision = {**RESNET, "levels": levels, "subcells": 2 if levels else 1}
    model = MplugModel(small_config(vision=vision)).bfloat16().train()
    images = model.encode_image(torch.randn(2, 3, 64, 64).bfloat16())
    images.tokens.float().square().mean().backward()
    assert model.visual.backbone.conv1[0].weight.grad.isfinite().all()
