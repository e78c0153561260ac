"""Texts in pieces of like length give what they give in one pass."""

from __future__ import annotations

import pytest
import torch

from mplug_core.model.kernels import rounded
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
    assert sorted(row for piece in pieces for row in piece.rows.tolist()) == list(range(len(LENGTHS)))
    assert all(max(LENGTHS[row] for row in piece.rows.tolist()) == piece.length for piece in pieces)
    assert all(piece.real == len(piece.rows) for piece in pieces)
    assert sum(len(piece.rows) * piece.length for piece in pieces) < 0.85 * mask.numel()


@pytest.mark.parametrize("lengths", [LENGTHS, LENGTHS[:23], [5] * 64, [7], [3] * 60 + [20]])
@pytest.mark.parametrize("longest", [64, 21])
def test_rounded_pieces_have_few_shapes(lengths: list[int], longest: int) -> None:
    _, mask = texts(lengths)
    pieces = pieces_by_length(mask, True, longest)
    real = [row for piece in pieces for row in piece.rows[: piece.real].tolist()]
    assert sorted(real) == list(range(len(lengths)))
    for piece in pieces:
        assert len(piece.rows) % 16 == 0 or len(piece.rows) in (1, 2, 4, 8)
        assert piece.length % 4 == 0 or piece.length == longest
        assert piece.length >= max(lengths[row] for row in piece.rows.tolist())
    values = torch.randn(len(lengths), max(lengths), 3)
    got = in_pieces(pieces, max(lengths), lambda piece: piece.of(values))
    assert torch.equal(got * mask[..., None], values * mask[..., None])


@pytest.mark.parametrize(("number", "up"), [(1, 1), (3, 4), (16, 16), (17, 32), (120, 128)])
def test_rounded(number: int, up: int) -> None:
    assert rounded(number, 16) == up


@pytest.mark.parametrize("lengths", [[5] * 64, [5, 9] * 8, [3] * 60 + [20]])
def test_like_lengths_and_small_batches_are_one_pass(lengths: list[int]) -> None:
    _, mask = texts(lengths)
    pieces = pieces_by_length(mask)
    assert (pieces is None) == (len(set(lengths)) == 1 or len(lengths) < 32)


def test_a_mask_with_holes_counts_to_its_last_token() -> None:
    _, mask = texts(LENGTHS)
    mask[1, 2] = 0
    assert any(1 in piece.rows.tolist() and piece.length == 20 for piece in pieces_by_length(mask))


def test_put_together_in_order() -> None:
    _, mask = texts(LENGTHS)
    values = torch.randn(len(LENGTHS), max(LENGTHS), 3)
    got = in_pieces(pieces_by_length(mask), max(LENGTHS), lambda piece: piece.of(values))
    assert torch.equal(got * mask[..., None], values * mask[..., None])


@pytest.mark.parametrize("fusion", ["skip", "asymmetric", "connected", "co", "none"])
def test_a_model_computes_and_learns_the_same(fusion: str, monkeypatch) -> None:
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

    whole, parts = compute(False), compute(True)
    monkeypatch.setattr("mplug_core.model.mplug.made_for_shapes", lambda weight: True)
    for found in (parts, compute(True)):
        for ours, right in zip(found, whole, strict=True):
            torch.testing.assert_close(ours, right, rtol=1e-3, atol=1e-5)


def test_a_language_head_reduces_the_rows_that_it_is_given(monkeypatch) -> None:
    model = MplugModel(small_config())
    hidden = torch.randn(21, model.decoder.embeddings.words.weight.shape[1])

    def reduced() -> torch.Tensor:
        return model.decoder.logits(hidden, lambda logits, rows: logits.logsumexp(-1) + rows.start)

    whole = reduced()
    monkeypatch.setattr("mplug_core.model.decoder.made_for_shapes", lambda weight: True)
    for chunk in (8, 1000):
        model.decoder.head.chunk = chunk
        starts = torch.arange(21) // chunk * chunk
        torch.testing.assert_close(reduced() - starts, whole)
