"""Cheap dropout is dropout."""

from __future__ import annotations

import pytest
import torch

from mplug_core.model.dropout import Dropout, drop


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", [0.1, 0.3, 0.5])
def test_zeroes_a_share_and_keeps_the_mean(share: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.ones(300, 701, dtype=dtype)
    out = drop(x, share)
    assert out.dtype == dtype and out.shape == x.shape
    assert float((out == 0).float().mean()) == pytest.approx(share, abs=0.005)
    assert float(out.float().mean()) == pytest.approx(1, abs=0.01)
    # neighbours are dropped apart from each other, also within the eight of a number
    kept = (out != 0).float()
    both = (kept[:, 1:] * kept[:, :-1]).mean()
    assert float(both) == pytest.approx((1 - share) ** 2, abs=0.01)
    columns = kept.mean(0)
    assert float(columns.min()) > 1 - share - 0.15 and float(columns.max()) < 1 - share + 0.15


def test_gradient_goes_where_values_went() -> None:
    x = torch.randn(5, 7, 3, requires_grad=True)
    out = drop(x, 0.5)
    out.sum().backward()
    assert torch.allclose(x.grad * x, out)


def test_odd_sizes_and_strides() -> None:
    x = torch.randn(3, 5, 7).transpose(0, 2).requires_grad_()
    out = drop(x, 0.25)
    kept = out != 0
    assert torch.allclose(out[kept], x[kept] * 256 / (256 - 64))
    assert drop(torch.zeros(0, 4), 0.5).shape == (0, 4)


def test_shares_that_a_byte_cannot_tell_still_drop_something_and_not_all() -> None:
    torch.manual_seed(1)
    few, most = drop(torch.ones(100_000), 1e-4), drop(torch.ones(100_000), 0.9999)
    assert 0 < int((few == 0).sum()) < 1_000 and 0 < int((most != 0).sum()) < 1_000


def test_the_same_after_the_same_seed_and_nothing_in_evaluation() -> None:
    layer, x = Dropout(0.2), torch.randn(40, 40)
    torch.manual_seed(3)
    first = layer(x)
    second = layer(x)
    torch.manual_seed(3)
    assert torch.equal(layer(x), first) and not torch.equal(first, second)
    assert layer.eval()(x) is x and drop(x, 0) is x
