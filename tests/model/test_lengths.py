"""Texts in pieces of like length give what they give in one pass."""

from __future__ import annotations

import pytest
import torch

from mplug_core.model.lengths import in_pieces, pieces_by_length
from mplug_core.model.mplug import MplugModel
from tests.small import small_config

LENGTHS = [3, 20, 4, 5, 6, 3, 18, 7, 4, 4] * 4


def texts(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 60, (len(lengths), max(lengths)), generator=generator)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return ids * mask, mask


def test_every_row_is_in_one_piece_long_enough() -> None:
    _, mask = texts(LENGTHS)
    pieces = pieces_by_length(mask)
    assert sorted(row for rows, _ in pieces for row in rows.tolist()) == list(range(len(LENGTHS)))
    assert all(max(LENGTHS[row] for row in rows.tolist()) == longest for rows, longest in pieces)
    assert sum(len(rows) * longest for rows, longest in pieces) < 0.85 * mask.numel()


@pytest.mark.parametrize("lengths", [[5] * 64, [5, 9] * 8, [3] * 60 + [20]])
def test_like_lengths_and_small_batches_are_one_pass(lengths: list[int]) -> None:
    _, mask = texts(lengths)
    pieces = pieces_by_length(mask)
    assert (pieces is None) == (len(set(lengths)) == 1 or len(lengths) < 32)


def test_a_mask_with_holes_counts_to_its_last_token() -> None:
    _, mask = texts(LENGTHS)
    mask[1, 2] = 0
    assert any(1 in rows.tolist() and longest == 20 for rows, longest in pieces_by_length(mask))


def test_put_together_in_order() -> None:
    _, mask = texts(LENGTHS)
    values = torch.randn(len(LENGTHS), max(LENGTHS), 3)
    got = in_pieces(pieces_by_length(mask), max(LENGTHS), lambda rows, n: values[rows, :n])
    assert torch.equal(got * mask[..., None], values * mask[..., None])


@pytest.mark.parametrize("fusion", ["skip", "asymmetric", "connected", "co", "none"])
def test_a_model_computes_and_learns_the_same(fusion: str) -> None:
    torch.manual_seed(0)
    model = MplugModel(small_config(fusion=fusion)).train()
    ids, mask = texts(LENGTHS)
    pixels = torch.randn(len(LENGTHS), 3, 32, 32)

    def compute(by_length: bool) -> list[torch.Tensor]:
        model.by_length = by_length
        model.zero_grad()
        images = model.encode_image(pixels)
        text = model.encode_text(ids, mask)
        fused_image, fused = model.fuse(images, text, mask)
        memory, memory_mask = model.memory(images, text, mask)
        hidden = model.hidden(ids, mask, memory, memory_mask)
        real, read = mask[..., None], mask[:, 1:, None]
        outputs = [text * real, fused_image, fused * real, hidden * read]
        sum(output.square().mean() for output in outputs).backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        return [output.detach() for output in outputs] + [gradient.clone() for gradient in gradients]

    for whole, parts in zip(compute(False), compute(True), strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-3, atol=1e-5)
