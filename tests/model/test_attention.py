"""Masks, the two attention paths, and the memory that sequences of one image share."""

from __future__ import annotations

import pytest
import torch

from mplug_core.model.attention import (
    CrossAttention,
    DecoderCache,
    LayerCache,
    SelfAttention,
    additive_mask,
    attend,
    causal_mask,
    key_mask,
)


def test_causal_mask_sees_the_past_and_itself() -> None:
    assert causal_mask(3)[0, 0].tolist() == [[True, False, False], [True, True, False], [True, True, True]]
    assert causal_mask(2, past=1)[0, 0].tolist() == [[True, True, False], [True, True, True]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_additive_mask_is_finite(dtype: torch.dtype) -> None:
    mask = additive_mask(torch.tensor([True, False]), dtype)
    assert mask[0] == 0 and mask[1] < -9e3 and mask.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grad", [False, True])
def test_query_without_any_key_gives_the_mean_and_no_nan(dtype: torch.dtype, grad: bool) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 2, 3, 8, dtype=dtype, requires_grad=grad) for _ in range(3))
    allowed = torch.ones(2, 1, 1, 3, dtype=torch.bool)
    allowed[1] = False
    with torch.set_grad_enabled(grad):
        mixed = attend(query, key, value, allowed)
    assert mixed.isfinite().all()
    mean = value[1].float().mean(1, keepdim=True).expand(-1, 3, -1)
    assert torch.allclose(mixed[1].float(), mean, atol=0.02)
    if grad:
        mixed.float().sum().backward()
        assert all(t.grad.isfinite().all() for t in (query, key, value))


def test_path_of_reduced_precision_training_equals_the_fused_one() -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 4, 5, 16).bfloat16().requires_grad_() for _ in range(3))
    allowed = torch.rand(2, 1, 5, 5) > 0.3
    allowed[..., 0] = True
    explicit = attend(query, key, value, allowed)
    with torch.no_grad():
        fused = attend(query, key, value, allowed)
    exact = attend(query.float(), key.float(), value.float(), allowed)
    assert torch.allclose(explicit.float(), exact, atol=0.03)
    assert torch.allclose(fused.float(), exact, atol=0.03)
    gradients = torch.autograd.grad(explicit.float().square().sum(), (query, key, value))
    wanted = torch.autograd.grad(exact.square().sum(), (query, key, value))
    for got, want in zip(gradients, wanted, strict=True):
        assert torch.allclose(got.float(), want.float(), atol=0.15, rtol=0.05)


def test_dropout_of_both_paths_keeps_the_mean() -> None:
    torch.manual_seed(0)
    query, key = torch.zeros(1, 1, 400, 8), torch.zeros(1, 1, 100, 8)
    value = torch.ones(1, 1, 100, 8)
    for dtype in (torch.float32, torch.bfloat16):
        inputs = [t.to(dtype).requires_grad_() for t in (query, key, value)]
        mixed = attend(*inputs, None, dropout=0.5).detach().float()
        assert abs(float(mixed.mean()) - 1) < 0.05
        assert float(mixed.std()) > 0.02


def test_self_attention_equals_pytorchs() -> None:
    torch.manual_seed(0)
    ours = SelfAttention(16, 4)
    theirs = torch.nn.MultiheadAttention(16, 4, batch_first=True)
    theirs.in_proj_weight.data, theirs.in_proj_bias.data = ours.qkv.weight.data, ours.qkv.bias.data
    theirs.out_proj.load_state_dict(ours.out.state_dict())
    x, mask = torch.randn(2, 5, 16), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    want, _ = theirs(x, x, x, key_padding_mask=mask == 0)
    assert torch.allclose(ours(x, key_mask(mask)), want, atol=1e-6)


def test_sequences_of_one_image_share_its_memory() -> None:
    torch.manual_seed(0)
    cross = CrossAttention(16, 2)
    memory, mask = torch.randn(2, 7, 16), torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    x = torch.randn(6, 3, 16)
    shared = cross(x, memory, mask)
    repeated = cross(x, memory.repeat_interleave(3, 0), mask.repeat_interleave(3, 0))
    assert torch.allclose(shared, repeated, atol=1e-6)


def test_memory_is_read_once() -> None:
    torch.manual_seed(0)
    cross, cache = CrossAttention(16, 2), LayerCache()
    memory, x = torch.randn(2, 7, 16), torch.randn(2, 1, 16)
    first = cross(x, memory, None, cache)
    again = cross(x, torch.full_like(memory, float("nan")), None, cache)
    assert torch.equal(first, again)


def test_cache_follows_its_sequences() -> None:
    cache = DecoderCache(1)
    assert cache.length == 0
    keys = torch.arange(4.0).view(4, 1, 1, 1)
    cache.layers[0].extend(keys, keys)
    cache.layers[0].memory = (torch.arange(2.0).view(2, 1, 1, 1),) * 2
    cache.reorder(torch.tensor([3, 3]), torch.tensor([1]))
    assert cache.layers[0].prefix[0].flatten().tolist() == [3, 3]
    assert cache.layers[0].memory[1].flatten().tolist() == [1]
    assert cache.length == 1


def test_an_order_holds_until_the_next_tokens() -> None:
    cache = LayerCache()
    keys = torch.arange(8.0).view(4, 1, 2, 1)
    cache.extend(keys, -keys)
    cache.reorder(torch.tensor([3, 0, 0]))
    cache.reorder(torch.tensor([1, 0]))
    key, value = cache.extend(torch.full((2, 1, 1, 1), 9.0), torch.full((2, 1, 1, 1), -9.0))
    assert key.flatten(1).tolist() == [[0, 1, 9], [6, 7, 9]] and torch.equal(value, -key)
    assert cache.length == 3 and torch.equal(cache.prefix[0], key)


def test_bytes_of_the_memory() -> None:
    cross, cache = CrossAttention(16, 2), DecoderCache(2)
    assert cache.memory_bytes == 0
    for sequences in (2, 10):  # which share it
        cross(torch.randn(sequences, 1, 16), torch.randn(2, 7, 16), None, cache.layers[0])
        assert cache.memory_bytes == 2 * 2 * 7 * 16 * 4


def test_memory_may_have_another_width() -> None:
    cross = CrossAttention(16, 2, memory_width=24)
    assert cross(torch.randn(2, 3, 16), torch.randn(2, 5, 24)).shape == (2, 3, 16)
