"""Masked language modelling: shares of 80/10/10, what is never hidden or drawn, the loss from paper."""

from __future__ import annotations

from math import log

import pytest
import torch

from mplug_core.objectives.masked_language import mask_tokens, masked_language_loss

PAD, UNK, CLS, SEP, MASK, VOCAB = 0, 1, 2, 3, 4, 50
SPECIAL = (PAD, UNK, CLS, SEP, MASK, 49)


def batch(rows: int, words: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    """Captions [CLS] words [SEP] of random length, padded with words so that only the mask says what is padding."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 49, (rows, words + 2), generator=generator)
    lengths = torch.randint(3, words + 3, (rows,), generator=generator)
    ids[:, 0] = CLS
    ids[torch.arange(rows), lengths - 1] = SEP
    return ids, (torch.arange(words + 2) < lengths.unsqueeze(1)).long()


def test_shares_and_exclusions():
    ids, attention = batch(4000)
    before = ids.clone()
    inputs, labels = mask_tokens(ids, attention, MASK, VOCAB, SPECIAL, torch.Generator().manual_seed(0))
    assert torch.equal(ids, before)
    picked = labels != -100
    words = attention.bool() & (ids != CLS) & (ids != SEP)
    assert not (picked & ~words).any()
    assert torch.equal(labels[picked], ids[picked]) and torch.equal(inputs[~picked], ids[~picked])

    count = int(picked.sum())
    assert count / int(words.sum()) == pytest.approx(0.15, abs=4.5 * (0.15 * 0.85 / int(words.sum())) ** 0.5)
    hidden = inputs[picked] == MASK
    kept = inputs[picked] == ids[picked]
    drawn = ~hidden & ~kept
    bound = 4.5 * (0.8 * 0.2 / count) ** 0.5
    rare = 4.5 * (0.1 * 0.9 / count) ** 0.5
    # a random word is by chance the same word once in 44
    assert hidden.float().mean().item() == pytest.approx(0.8, abs=bound)
    assert drawn.float().mean().item() == pytest.approx(0.1 * 43 / 44, abs=rare)
    assert kept.float().mean().item() == pytest.approx(0.1 + 0.1 / 44, abs=rare)


def test_drawn_words_are_all_words_and_no_special():
    ids = torch.full((300, 300), 7)
    inputs, _ = mask_tokens(ids, torch.ones_like(ids), MASK, VOCAB, SPECIAL, torch.Generator().manual_seed(0), 1.0)
    drawn = inputs[(inputs != MASK) & (inputs != 7)]
    assert drawn.unique().tolist() == [word for word in range(5, 49) if word != 7]
    counts = drawn.bincount(minlength=VOCAB)[[word for word in range(5, 49) if word != 7]].float()
    assert ((counts - counts.mean()).abs() <= 4.5 * counts.mean().sqrt()).all()


def test_bounds_of_the_probability():
    ids, attention = batch(8)
    generator = torch.Generator().manual_seed(0)
    inputs, labels = mask_tokens(ids, attention, MASK, VOCAB, SPECIAL, generator, 0.0)
    assert torch.equal(inputs, ids) and (labels == -100).all()
    _, labels = mask_tokens(ids, attention, MASK, VOCAB, SPECIAL, generator, 1.0)
    assert torch.equal(labels != -100, attention.bool() & (ids != CLS) & (ids != SEP))


def test_same_seed_same_mask():
    ids, attention = batch(8)
    runs = [mask_tokens(ids, attention, MASK, VOCAB, SPECIAL, torch.Generator().manual_seed(5)) for _ in range(2)]
    assert torch.equal(runs[0][0], runs[1][0]) and torch.equal(runs[0][1], runs[1][1])


def test_nothing_to_draw():
    with pytest.raises(ValueError, match="special"):
        mask_tokens(torch.ones(1, 3, dtype=torch.long), torch.ones(1, 3), 0, 2, (0, 1))


# two labelled positions, three words: softmax (1/2, 1/4, 1/4) and (1/6, 2/6, 3/6);
# the teacher says (1/4, 1/2, 1/4) and (0, 1/2, 1/2)
LOGITS = torch.tensor([[2.0, 1.0, 1.0], [1.0, 2.0, 3.0]], dtype=torch.float64).log()
TEACHER = torch.tensor([[1.0, 2.0, 1.0], [1e-30, 1.0, 1.0]], dtype=torch.float64).log()
LABELS = torch.tensor([0, 1])


def test_loss_by_hand():
    assert masked_language_loss(LOGITS, LABELS).item() == pytest.approx((log(2) + log(3)) / 2)
    soft = (log(2) / 4 + 0.75 * log(4) + (log(3) + log(2)) / 2) / 2
    expected = 0.6 * (log(2) + log(3)) / 2 + 0.4 * soft
    assert masked_language_loss(LOGITS, LABELS, TEACHER, 0.4).item() == pytest.approx(expected)
    # the teacher without weight says nothing
    assert masked_language_loss(LOGITS, LABELS, TEACHER).item() == pytest.approx((log(2) + log(3)) / 2)


def test_ignored_labels():
    labels = torch.tensor([0, -100])
    assert masked_language_loss(LOGITS, labels).item() == pytest.approx(log(2))
    expected = 0.6 * log(2) + 0.4 * (log(2) / 4 + 0.75 * log(4))
    assert masked_language_loss(LOGITS, labels, TEACHER, 0.4).item() == pytest.approx(expected)


@pytest.mark.parametrize("labels", [[], [-100, -100]])
def test_nothing_labelled_keeps_the_graph(labels: list[int]):
    logits = torch.randn(len(labels), 3, requires_grad=True)
    loss = masked_language_loss(logits, torch.tensor(labels, dtype=torch.long))
    loss.backward()
    assert loss.item() == 0 and torch.equal(logits.grad, torch.zeros_like(logits))


def test_gradient_and_precision():
    logits = LOGITS.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: masked_language_loss(x, LABELS, TEACHER, 0.4), logits)
    half = masked_language_loss(LOGITS.bfloat16(), LABELS, TEACHER.bfloat16(), 0.4)
    assert half.dtype == torch.float32 and half.isfinite()
