"""Prefix splits, and the next-token loss from paper, by finite differences and against the golden decoder."""

from __future__ import annotations

from math import log
from pathlib import Path

import pytest
import torch

from mplug_core.objectives.prefix_language import sequence_loss, sequence_nll, split_prefix

PAD, CLS, SEP = 0, 101, 102
GOLDEN = Path(__file__).resolve().parents[2].parent / "shared" / "parity"
CAPTIONS = [[CLS, 1, 2, 3, 4, SEP], [CLS, 5, SEP], [CLS, 6, 7, SEP], [CLS, 8, 9, 10], [CLS, SEP], [CLS]]


def padded(rows: list[list[int]], extra: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, rows)) + extra
    ids = torch.tensor([row + [PAD] * (width - len(row)) for row in rows])
    return ids, torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])


def unpadded(ids: torch.Tensor, mask: torch.Tensor) -> list[list[int]]:
    lengths = mask.sum(1)
    # right-padded: ones first
    assert torch.equal(mask, (torch.arange(ids.size(1)) < lengths.unsqueeze(1)).long())
    assert (ids[mask == 0] == PAD).all() and int(lengths.max()) == ids.size(1)
    return [row[:length].tolist() for row, length in zip(ids, lengths, strict=True)]


@pytest.mark.parametrize("seed", range(8))
def test_prefix_and_target_make_the_caption(seed: int):
    split = split_prefix(*padded(CAPTIONS), CLS, SEP, torch.Generator().manual_seed(seed))
    prefixes = unpadded(split.prefix_ids, split.prefix_mask)
    targets = unpadded(split.target_ids, split.target_mask)
    for caption, prefix, target in zip(CAPTIONS, prefixes, targets, strict=True):
        assert prefix[0] == CLS and target[0] == CLS
        assert prefix + target[1:] == caption
        assert SEP not in prefix
        words = [token for token in caption if token not in (CLS, SEP)]
        assert not words or target[1] in words


def test_lists_and_tensors_agree():
    as_list = split_prefix(CAPTIONS, None, CLS, SEP, torch.Generator().manual_seed(0))
    as_tensor = split_prefix(*padded(CAPTIONS), CLS, SEP, torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(as_list, as_tensor, strict=True))
    even = torch.tensor([[CLS, 1, 2, SEP]] * 3)
    no_mask = split_prefix(even, None, CLS, SEP, torch.Generator().manual_seed(0))
    masked = split_prefix(even, torch.ones_like(even), CLS, SEP, torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(no_mask, masked, strict=True))


def test_every_position_equally_often():
    rows = [[CLS, 1, 2, 3, 4, SEP]] * 4000
    split = split_prefix(rows, None, CLS, SEP, torch.Generator().manual_seed(0))
    words_before = split.prefix_mask.sum(1) - 1
    shares = words_before.bincount(minlength=4).float() / len(rows)
    assert len(shares) == 4
    assert ((shares - 0.25).abs() <= 4.5 * (0.25 * 0.75 / len(rows)) ** 0.5).all()


def test_highest_draw_leaves_a_word(monkeypatch: pytest.MonkeyPatch):
    # the highest float32 below 1, times the number of words, must not round up to it
    monkeypatch.setattr(torch, "rand", lambda *size, **_: torch.full(size, 1 - 2**-24))
    for words in range(1, 300):
        split = split_prefix([[CLS, *range(1000, 1000 + words), SEP]], None, CLS, SEP)
        assert split.target_ids.tolist() == [[CLS, 999 + words, SEP]]


@pytest.mark.parametrize("rows", [[], [[CLS, 1, SEP], []]])
def test_empty_captions_are_refused(rows: list[list[int]]):
    with pytest.raises(ValueError, match="caption"):
        split_prefix(torch.zeros(0, 3, dtype=torch.long) if not rows else rows, None, CLS, SEP)


# Two targets over a vocabulary of three, [CLS] = 0: (0, 1, 2) and (0, 2, pad). Predictions after each input:
# row 0: (2, 1, 1)/4 for label 1, (1, 2, 3)/6 for label 2; row 1: (1, 1, 2)/4 for label 2, then padding.
# The last position of each row predicts nothing; its logits are wild on purpose.
IDS = torch.tensor([[0, 1, 2], [0, 2, 1]])
KEEP = torch.tensor([[1, 1, 1], [1, 1, 0]])
LOGITS = torch.tensor(
    [[[2.0, 1, 1], [1, 2, 3], [900, 1, 1]], [[1, 1, 2], [800, 1, 1], [700, 1, 1]]], dtype=torch.float64
).log()
FIRST, SECOND = log(4) + log(2), log(2)


def test_loss_by_hand():
    assert sequence_loss(LOGITS, IDS, KEEP).item() == pytest.approx((FIRST + SECOND) / 3)
    assert sequence_loss(LOGITS, IDS, KEEP, reduction="sequence").item() == pytest.approx((FIRST + SECOND) / 2)
    assert sequence_nll(LOGITS, IDS, KEEP).tolist() == pytest.approx([FIRST, SECOND])


def test_weights_by_hand():
    weights = torch.tensor([0.3, 0.7])
    by_sequence = sequence_loss(LOGITS, IDS, KEEP, weights, "sequence")
    assert by_sequence.item() == pytest.approx((0.3 * FIRST + 0.7 * SECOND) / 2)
    # two answers to one question
    by_image = sequence_loss(LOGITS, IDS, KEEP, weights, "sequence", denominator=1)
    assert by_image.item() == pytest.approx(0.3 * FIRST + 0.7 * SECOND)
    by_token = sequence_loss(LOGITS, IDS, KEEP, weights)
    assert by_token.item() == pytest.approx((0.3 * FIRST + 0.7 * SECOND) / (0.3 * 2 + 0.7))


def test_prompt_positions_do_not_count():
    keep = torch.tensor([[0, 0, 1], [0, 1, 0]])
    assert sequence_nll(LOGITS, IDS, keep).tolist() == pytest.approx([log(2), log(2)])
    # whether [CLS] itself is marked makes no difference
    assert torch.equal(
        sequence_loss(LOGITS, IDS, KEEP), sequence_loss(LOGITS, IDS, torch.tensor([[0, 1, 1], [0, 1, 0]]))
    )


def test_distillation_and_smoothing_by_hand():
    teacher = torch.zeros_like(LOGITS)  # uniform everywhere
    # against a uniform target a row costs the mean of -ln p: (ln2 + 2 ln4)/3, (ln6 + ln3 + ln2)/3, (2 ln4 + ln2)/3
    soft = [(log(2) + 2 * log(4) + log(6) + log(3) + log(2)) / 3, (2 * log(4) + log(2)) / 3]
    losses = sequence_nll(LOGITS, IDS, KEEP, teacher_hidden=teacher, alpha=0.4)
    assert losses.tolist() == pytest.approx([0.6 * FIRST + 0.4 * soft[0], 0.6 * SECOND + 0.4 * soft[1]])
    # smoothing is distillation from a teacher that knows nothing
    torch.testing.assert_close(sequence_nll(LOGITS, IDS, KEEP, label_smoothing=0.4), losses)


@pytest.mark.parametrize("reduction", ["token", "sequence"])
@pytest.mark.parametrize("alpha", [0.0, 0.4])
def test_gradient(reduction: str, alpha: float):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(LOGITS.shape, generator=generator, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(LOGITS.shape, generator=generator, dtype=torch.float64)
    weights = torch.tensor([0.3, 0.7])

    def loss(x):
        return sequence_loss(x, IDS, KEEP, weights, reduction, teacher_hidden=teacher, alpha=alpha, label_smoothing=0.1)

    assert torch.autograd.gradcheck(loss, logits)
    loss(logits).backward()
    # neither padding nor the last position is trained
    assert logits.grad[:, -1].abs().sum() == 0 and logits.grad[1, 1].abs().sum() == 0


@pytest.mark.parametrize("reduction", ["token", "sequence"])
def test_nothing_to_predict_keeps_the_graph(reduction: str):
    logits = torch.randn(2, 3, 5, requires_grad=True)
    loss = sequence_loss(logits, IDS, torch.tensor([[1, 0, 0], [1, 0, 0]]), torch.ones(2), reduction)
    loss.backward()
    assert loss.item() == 0 and torch.equal(logits.grad, torch.zeros_like(logits))


def test_bfloat16_in_float32_out():
    loss = sequence_loss(LOGITS.bfloat16(), IDS, KEEP, teacher_hidden=LOGITS.bfloat16(), alpha=0.4)
    assert loss.dtype == torch.float32 and loss.isfinite()


def test_unknown_reduction():
    with pytest.raises(ValueError, match="reduction"):
        sequence_loss(LOGITS, IDS, KEEP, reduction="mean")  # type: ignore[arg-type]


@pytest.mark.skipif(
    not (GOLDEN / "f04a_decoder.safetensors").exists(), reason="no golden tensors beside the repository"
)
def test_golden_decoder_losses():
    from safetensors.torch import load_file

    golden = load_file(GOLDEN / "f04a_decoder.safetensors")
    logits, ids, mask = golden["out.logits"], golden["in.input_ids"], golden["in.attention_mask"]
    torch.testing.assert_close(sequence_loss(logits, ids, mask), golden["out.prefix_loss_mean"], atol=1e-4, rtol=0)
    torch.testing.assert_close(sequence_nll(logits, ids, mask), golden["out.lm_loss_per_sequence"], atol=1e-4, rtol=0)
    # the golden soft labels are the teacher's probabilities for the predicting positions
    teacher = torch.nn.functional.pad(golden["in.soft_labels"].log(), (0, 0, 0, 1))
    soft = {"teacher_hidden": teacher, "alpha": 0.4}
    torch.testing.assert_close(
        sequence_nll(logits, ids, mask, **soft), golden["out.lm_loss_soft_alpha0.4_vocabdim"], atol=1e-4, rtol=0
    )
    torch.testing.assert_close(
        sequence_loss(logits, ids, mask, **soft), golden["out.prefix_loss_soft_alpha0.4_vocabdim"], atol=1e-4, rtol=0
    )


@pytest.mark.skipif(
    not (GOLDEN / "f04d_vqa_loss.safetensors").exists(), reason="no golden tensors beside the repository"
)
def test_golden_weighting_of_answers():
    """Logits made so that each answer has the golden loss: weighting and division are then the golden ones."""
    from safetensors.torch import load_file

    golden = load_file(GOLDEN / "f04d_vqa_loss.safetensors")
    ids = torch.tensor([[0, 1]] * 6)
    chance = (-golden["out.answer_losses_plain"].double()).exp()
    logits = torch.stack([(1 - chance).log(), chance.log()], -1)[:, None].expand(6, 2, 2)
    loss = sequence_loss(
        logits, ids, torch.ones_like(ids), golden["in.weights"], "sequence", denominator=len(golden["in.k"])
    )
    assert loss.item() == pytest.approx(golden["out.loss_plain"].item(), abs=1e-4)
