"""Boxes to bins and back, overlaps, and the box loss from paper."""

from __future__ import annotations

from math import log
from pathlib import Path

import pytest
import torch

from mplug_core.objectives.box import bins_to_box, box_iou, box_to_bins, box_token_loss, generalized_box_iou

GOLDEN = Path(__file__).resolve().parents[2].parent / "shared" / "parity"


def test_bins_by_hand():
    # corners .25 .5 .75 1.0 -> cx .5, cy .75, w .5, h .5; of 9 bins: 4, 6, 4, 4
    box = torch.tensor([0.25, 0.5, 0.75, 1.0])
    assert box_to_bins(box, 9).tolist() == [4, 6, 4, 4]
    assert bins_to_box(torch.tensor([4, 6, 4, 4]), 9).tolist() == pytest.approx(box.tolist())
    # the whole image has the last bin as its size; outside is clamped
    assert box_to_bins(torch.tensor([0.0, 0.0, 1.0, 1.0]), 9).tolist() == [4, 4, 8, 8]
    assert box_to_bins(torch.tensor([1.5, 1.5, 3.0, 1.0]), 9).tolist() == [8, 8, 8, 0]


@pytest.mark.parametrize("offset", [0.0, 0.5])
def test_round_trip_is_within_a_bin(offset: float):
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(500, 2, 2, generator=generator).sort(1).values.flatten(1)
    bins = 65
    back = bins_to_box(box_to_bins(corners, bins), bins, offset)
    # a corner joins half a bin of size and a whole of centre
    assert (back - corners).abs().max() <= 1.5 / (bins - 1) + 1e-6
    middle = (back - corners).mean().abs()
    assert middle < 0.1 / (bins - 1) if offset else middle > 0.3 / (bins - 1)


def test_overlap_by_hand():
    a = torch.tensor([0.0, 0.0, 0.5, 0.5])
    # quarter image against the half image: 0.25 / 0.5, the hull is the half itself
    assert box_iou(a, torch.tensor([0.0, 0.0, 1.0, 0.5])).item() == pytest.approx(0.5)
    assert generalized_box_iou(a, torch.tensor([0.0, 0.0, 1.0, 0.5])).item() == pytest.approx(0.5)
    # opposite quarters: no overlap, hull 1, union .5
    assert box_iou(a, torch.tensor([0.5, 0.5, 1.0, 1.0])).item() == 0
    assert generalized_box_iou(a, torch.tensor([0.5, 0.5, 1.0, 1.0])).item() == pytest.approx(-0.5)
    # shifted by half: shared 1/8, union 3/8
    assert box_iou(a, torch.tensor([0.25, 0.0, 0.75, 0.5])).item() == pytest.approx(1 / 3)
    assert box_iou(a, a).item() == generalized_box_iou(a, a).item() == 1


def test_boxes_without_area():
    point, box = torch.tensor([0.5, 0.5, 0.5, 0.5]), torch.tensor([0.0, 0.0, 1.0, 1.0])
    for first, second in ((point, point), (point, box)):
        assert box_iou(first, second).item() == 0
        assert generalized_box_iou(first, second).isfinite()


# Two samples, bins 0, 1, 2 (values 0, 1/2, 1) as tokens 5, 2, 6 of a vocabulary of seven. The probabilities of the bins
# are (1/2, 1/4, 1/4) or a turn of it everywhere, so the NLL is ln 2 where the greedy bin is right, ln 4 elsewhere.
BOX_IDS = torch.tensor([5, 2, 6])


def logits_for(greedy: list[list[int]]) -> torch.Tensor:
    logits = torch.full((len(greedy), 4, 7), 50.0, dtype=torch.float64)
    logits[..., BOX_IDS] = (1 + torch.nn.functional.one_hot(torch.tensor(greedy), 3).double()).log()
    return logits


def test_loss_by_hand():
    """Sample 0: truth bins 1 1 2 2 (the whole image), greedy 1 1 1 2: w 1/2 for 1, so L1 = 1/2; the greedy box is
    .25 0 .75 1: IoU = GIoU = 1/2, so the weight is 1/2 + 1/2 = 1 and the mean NLL (3 ln 2 + ln 4) / 4.
    Sample 1: truth 1 1 1 1, greedy the same: weight 0 (base 0), NLL ln 2."""
    truth = torch.tensor([[1, 1, 2, 2], [1, 1, 1, 1]])
    logits = logits_for([[1, 1, 1, 2], [1, 1, 1, 1]])
    nll = (3 * log(2) + log(4)) / 4
    assert box_token_loss(logits, truth, BOX_IDS).item() == pytest.approx(nll / 2)
    assert box_token_loss(logits, truth, BOX_IDS, base=1).item() == pytest.approx((2 * nll + log(2)) / 2)
    assert box_token_loss(logits, truth, BOX_IDS, l1=3, giou=0).item() == pytest.approx(1.5 * nll / 2)
    assert box_token_loss(logits, truth, BOX_IDS, l1=0, giou=3).item() == pytest.approx(1.5 * nll / 2)


def test_samples_do_not_mix():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 4, 7, generator=generator)
    truth = torch.randint(3, (4, 4), generator=generator)
    alone = [box_token_loss(logits[i : i + 1], truth[i : i + 1], BOX_IDS) for i in range(4)]
    torch.testing.assert_close(box_token_loss(logits, truth, BOX_IDS), sum(alone) / 4)


def test_gradient_precision_and_empty():
    truth = torch.tensor([[1, 1, 2, 2], [1, 0, 1, 1]])
    logits = logits_for([[1, 1, 1, 2], [1, 1, 1, 1]]).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: box_token_loss(x, truth, BOX_IDS, base=1), logits)
    box_token_loss(logits, truth, BOX_IDS).backward()
    others = [token for token in range(7) if token not in BOX_IDS.tolist()]
    assert logits.grad[..., others].abs().sum() == 0 and logits.grad.abs().sum() > 0
    half = box_token_loss(logits.detach().bfloat16(), truth, BOX_IDS)
    assert half.dtype == torch.float32 and half.isfinite()
    nothing = torch.zeros(0, 4, 7, requires_grad=True)
    loss = box_token_loss(nothing, torch.zeros(0, 4, dtype=torch.long), BOX_IDS)
    loss.backward()
    assert loss.item() == 0


@pytest.mark.skipif(not (GOLDEN / "f07_grounding_stride3.safetensors").exists(), reason="no golden tensors beside")
@pytest.mark.parametrize("stride", [3, 6])
def test_golden_token_losses(stride: int):
    """The golden grounding logits hold tokens 340..689; bin b is token 345 + b of 337 bins."""
    from safetensors.torch import load_file

    golden = load_file(GOLDEN / f"f07_grounding_stride{stride}.safetensors")
    cx, cy, w, h = golden["in.targets_cxcywh"].unbind(-1)
    bins = golden["out.target_token_ids"] - 345
    inside = (cx <= 1).nonzero().squeeze(1)  # one golden centre lies outside: corners can't carry it through a clamp
    corners = torch.stack([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], -1)
    assert torch.equal(box_to_bins(corners[inside], 337), bins[inside])

    box_ids = torch.arange(337) + 5
    losses = box_token_loss(golden["out.logits"][:1, :4], bins[:1], box_ids, base=1, l1=0, giou=0)
    assert losses.item() == pytest.approx(golden["out.token_ce"][:4].mean().item(), abs=1e-4)
    predicted = golden["out.pred_box"]
    cx, cy, w, h = predicted.unbind(-1)
    expected = torch.stack([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], -1).clamp(0, 1)
    torch.testing.assert_close(bins_to_box(golden["out.pred_token_ids"] - 345, 337), expected)
