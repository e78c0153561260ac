"""Hard negatives: what may be drawn and how often; the matching loss against values from paper."""

from __future__ import annotations

from math import log

import pytest
import torch

from mplug_core.objectives.matching import hard_negatives, matching_loss

DRAWS = 6000


def frequencies(similarity: torch.Tensor, ids: torch.Tensor, **others) -> tuple[torch.Tensor, torch.Tensor]:
    """How often each partner was drawn: ([B, B] texts of images, [B, B] images of texts)."""
    size = len(ids)
    generator = torch.Generator().manual_seed(0)
    texts, images = torch.zeros(size, size), torch.zeros(size, size)
    rows = torch.arange(size)
    for _ in range(DRAWS):
        negatives = hard_negatives(similarity, ids, generator, **others)
        texts[rows, negatives.text_of_image] += 1
        images[rows, negatives.image_of_text] += 1
    return texts / DRAWS, images / DRAWS


def within(measured: torch.Tensor, expected: list[list[float]]) -> bool:
    """Within 4.5 standard deviations of a binomial share everywhere, exactly where the share is 0 or 1."""
    expected = torch.tensor(expected)
    bound = 4.5 * (expected * (1 - expected) / DRAWS).sqrt()
    return bool(((measured - expected).abs() <= bound + 1e-6).all())


def test_drawn_in_proportion_to_the_similarity():
    # weights exp(similarity): row 0: -, 1, 3, 4 -> 1/8, 3/8, 4/8; row 1: 2, -, 2, 4; row 2 and 3 are one image
    weights = torch.tensor([[9.0, 1, 3, 4], [2, 9, 2, 4], [1, 3, 9, 100], [1, 1, 100, 9]])
    texts, images = frequencies(weights.log(), torch.tensor([0, 1, 2, 2]))
    assert within(texts, [[0, 1 / 8, 3 / 8, 1 / 2], [1 / 4, 0, 1 / 4, 1 / 2], [1 / 4, 3 / 4, 0, 0], [0.5, 0.5, 0, 0]])
    # columns for the texts: text 0 over images 1, 2, 3 with weights 2, 1, 1; text 3 over images 0, 1 with 4, 4
    assert within(images, [[0, 1 / 2, 1 / 4, 1 / 4], [1 / 5, 0, 3 / 5, 1 / 5], [3 / 5, 2 / 5, 0, 0], [0.5, 0.5, 0, 0]])


def test_own_similarity_for_texts():
    zero = torch.zeros(3, 3)
    weights = torch.tensor([[9.0, 1, 4], [1, 9, 1], [3, 1, 9]])
    texts, images = frequencies(zero, torch.arange(3), text_to_image=weights.log())
    assert within(texts, [[0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]])
    assert within(images, [[0, 0.2, 0.8], [0.5, 0, 0.5], [0.75, 0.25, 0]])


def test_same_caption_text_is_no_negative():
    # images 0 and 1 differ, their captions do not
    texts, images = frequencies(torch.zeros(3, 3), torch.arange(3), text_groups=torch.tensor([5, 5, 6]))
    expected = [[0, 0, 1], [0, 0, 1], [0.5, 0.5, 0]]
    assert within(texts, expected) and within(images, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_extreme_similarities(dtype: torch.dtype):
    # exp(-1000) underflows and exp(1000) overflows; in log space the best allowed partner still wins
    similarity = torch.full((3, 3), -1000.0, dtype=dtype)
    similarity[0, 2], similarity[1, 0], similarity[2, 1] = 1000, -900, -900
    similarity.fill_diagonal_(3000)
    negatives = hard_negatives(similarity, torch.arange(3), torch.Generator().manual_seed(0))
    assert negatives.text_of_image.tolist() == [2, 0, 1]
    assert negatives.image_of_text.tolist() == [1, 2, 0]
    assert negatives.valid.all()


def test_rows_without_a_negative():
    generator = torch.Generator().manual_seed(0)
    same = hard_negatives(torch.zeros(3, 3), torch.full((3,), 4), generator)
    assert not same.valid.any() and same.text_of_image.tolist() == same.image_of_text.tolist() == [0, 1, 2]
    alone = hard_negatives(torch.zeros(1, 1), torch.tensor([4]), generator)
    assert alone.valid.tolist() == [False] and alone.text_of_image.tolist() == [0]
    nothing = hard_negatives(torch.zeros(0, 0), torch.zeros(0, dtype=torch.long), generator)
    assert [len(part) for part in nothing] == [0, 0, 0]
    # row 0 shares its image with row 1 and its caption with row 2; the other two have each other
    mixed = hard_negatives(torch.zeros(3, 3), torch.tensor([1, 1, 2]), generator, text_groups=torch.tensor([7, 8, 7]))
    assert mixed.valid.tolist() == [False, True, True]
    assert mixed.text_of_image.tolist() == mixed.image_of_text.tolist() == [0, 2, 1]


def test_same_seed_same_draw():
    similarity = torch.randn(16, 16, generator=torch.Generator().manual_seed(1))
    first, second = (hard_negatives(similarity, torch.arange(16), torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first.text_of_image, second.text_of_image)
    assert torch.equal(first.image_of_text, second.image_of_text)


# P(match) of the positives: 3/4, 1/2; of the wrong texts: 1/4, 1/2; of the wrong images: 2/3, 1/5
POSITIVE = torch.tensor([[1.0, 3.0], [1.0, 1.0]], dtype=torch.float64).log()
WRONG_TEXT = torch.tensor([[3.0, 1.0], [2.0, 2.0]], dtype=torch.float64).log()
WRONG_IMAGE = torch.tensor([[1.0, 2.0], [4.0, 1.0]], dtype=torch.float64).log()


def test_loss_by_hand():
    # row 0: ln 4/3 + ln 4/3 + ln 3; row 1: ln 2 + ln 2 + ln 5/4; mean over six
    first, second = 2 * log(4 / 3) + log(3), 2 * log(2) + log(5 / 4)
    both = matching_loss(POSITIVE, (WRONG_TEXT, WRONG_IMAGE), torch.tensor([True, True]))
    assert both.loss.item() == pytest.approx((first + second) / 6) and both.skipped.item() == 0
    # without a negative row 1 is left out whole
    one = matching_loss(POSITIVE, (WRONG_TEXT, WRONG_IMAGE), torch.tensor([True, False]))
    assert one.loss.item() == pytest.approx(first / 3) and one.skipped.item() == 0


def test_no_negative_skips_and_keeps_the_graph():
    logits = POSITIVE.clone().requires_grad_()
    loss, skipped = matching_loss(logits, (WRONG_TEXT, WRONG_IMAGE), torch.tensor([False, False]))
    loss.backward()
    assert loss.item() == 0 and skipped.item() == 1
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_gradient_and_precision():
    valid = torch.tensor([True, False])
    leaves = [part.clone().requires_grad_() for part in (POSITIVE, WRONG_TEXT, WRONG_IMAGE)]
    assert torch.autograd.gradcheck(lambda p, t, i: matching_loss(p, (t, i), valid).loss, leaves)
    half = matching_loss(POSITIVE.bfloat16(), (WRONG_TEXT.bfloat16(), WRONG_IMAGE.bfloat16()), valid)
    assert half.loss.dtype == torch.float32 and half.loss.isfinite()
