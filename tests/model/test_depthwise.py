"""Grouped convolutions have the outputs of PyTorch's and gradients at least as exact, in every type and geometry."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mplug_core.model.depthwise import convolve

GEOMETRIES = [
    # channels, out, side, kernel, stride, padding, dilation, groups
    (8, 8, 9, 3, 1, 1, 1, 8),
    (8, 8, 11, 5, 2, 0, 1, 8),
    (6, 12, 8, 3, 2, 1, 1, 6),
    (8, 16, 9, 3, 1, 2, 2, 2),
    (8, 4, 7, 1, 1, 0, 1, 1),
]


def both(dtype: torch.dtype, geometry: tuple[int, ...], ours: bool, wanted: tuple[bool, ...] = (True, True, True)):
    """Output and the gradients that are wanted."""
    channels, out, side, kernel, stride, padding, dilation, groups = geometry
    drawn = torch.Generator().manual_seed(0)
    shapes = (2, channels, side, side), (out, channels // groups, kernel, kernel), (out,)
    inputs = [torch.randn(shape, generator=drawn).to(torch.bfloat16).to(dtype) for shape in shapes]
    for part, learns in zip(inputs, wanted, strict=True):
        part.requires_grad_(learns)
    convolution = convolve if ours else F.conv2d
    result = convolution(*inputs, (stride,) * 2, (padding,) * 2, (dilation,) * 2, groups)
    result.float().square().sum().backward()
    return result.detach(), [part.grad for part in inputs]


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_pytorch(dtype, geometry):
    (output, gradients), (theirs, their_gradients) = both(dtype, geometry, True), both(dtype, geometry, False)
    assert torch.equal(output, theirs) and output.dtype == dtype
    exact = [gradient.double() for gradient in both(torch.float32, geometry, False)[1]]
    for ours, pytorch, right in zip(gradients, their_gradients, exact, strict=True):
        assert ours.dtype == pytorch.dtype == dtype and ours.shape == pytorch.shape
        # rounded outputs are what gradients start from: neither type can be nearer than that
        torch.testing.assert_close(ours.double(), right, rtol=0, atol=0.02 * float(right.abs().max()))


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, True, True)])
def test_only_what_is_wanted(wanted):
    gradients = both(torch.bfloat16, GEOMETRIES[0], True, wanted)[1]
    assert tuple(gradient is not None for gradient in gradients) == wanted


def test_under_autocast_and_without_gradients():
    x, weight = torch.randn(1, 4, 6, 6), torch.randn(4, 1, 3, 3, requires_grad=True)
    geometry = (1, 1), (1, 1), (1, 1), 4
    with torch.autocast("cpu", torch.bfloat16):
        before = F.conv2d(x, weight, None, *geometry)
        result = convolve(before, weight, torch.zeros(4), *geometry)
    assert result.dtype == torch.bfloat16
    result.float().sum().backward()
    assert weight.grad.dtype == torch.float32
    with torch.no_grad():
        assert not convolve(before, weight.to(torch.bfloat16), None, *geometry).requires_grad
