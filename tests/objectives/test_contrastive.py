"""Contrastive loss against values from paper, masks, soft targets, gradients, precision."""

from __future__ import annotations

from math import log

import pytest
import torch
from torch.nn import functional as F

from mplug_core.objectives.contrastive import alpha_ramp, contrastive_loss

# With temperature 1/ln 2 a similarity s counts exp(s / T) = 2**s.
HALF = 1 / log(2)
E0, E1 = [1.0, 0.0], [0.0, 1.0]


def features(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def random_features(rows: int, dim: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, dim, generator=generator, dtype=torch.float64), dim=-1).to(dtype)


def test_two_by_three_hard_targets():
    """Two pairs, three keys; the third key is an older caption and photo of image 7.

    text keys e0, e1, e0. Image 0 = e0: similarities 1, 0, 1 -> weights 2, 1, 2 -> 2/5, 1/5, 2/5; target 1/2, 0, 1/2
        -> -(1/2 ln 2/5 + 1/2 ln 2/5) = ln 5/2.
    Image 1 = e1: similarities 0, 1, 0 -> 1/4, 1/2, 1/4; target 0, 1, 0 -> ln 2.
    image keys e0, e1, e1. Text 0 = e0: 1, 0, 0 -> 1/2, 1/4, 1/4; target 1/2, 0, 1/2 -> (ln 2 + ln 4) / 2.
    Text 1 = e1: 0, 1, 1 -> 1/5, 2/5, 2/5; target 0, 1, 0 -> ln 5/2.
    """
    loss, image_to_text, text_to_image = contrastive_loss(
        features(E0, E1),
        features(E0, E1),
        HALF,
        torch.tensor([7, 8]),
        image_keys=features(E0, E1, E1),
        text_keys=features(E0, E1, E0),
        key_ids=torch.tensor([7, 8, 7]),
    )
    image_loss = (log(5 / 2) + log(2)) / 2
    text_loss = ((log(2) + log(4)) / 2 + log(5 / 2)) / 2
    assert loss.item() == pytest.approx((image_loss + text_loss) / 2)
    assert image_to_text.flatten().tolist() == pytest.approx([log(2), 0, 0, log(2)])
    assert text_to_image.flatten().tolist() == pytest.approx([log(2), 0, 0, log(2)])


def test_two_by_three_soft_targets():
    """As above; the teacher sees image 0 as e1: its weights are 1, 2, 1 -> 1/4, 1/2, 1/4; with alpha 0.4 the target of
    image 0 is 0.3 + 0.1, 0.2, 0.3 + 0.1 and its loss 0.8 ln 5/2 + 0.2 ln 5. Image 1 (teacher agrees): 1/4, 1/2, 1/4
    -> target 0.1, 0.8, 0.1 -> 0.8 ln 2 + 0.2 ln 4. The texts' teacher is e0, e1 again:
    text 0: soft 1/2, 1/4, 1/4 -> target 0.5, 0.1, 0.4 -> 0.5 ln 2 + 0.5 ln 4;
    text 1: soft 1/5, 2/5, 2/5 -> target 0.08, 0.76, 0.16 -> 0.08 ln 5 + 0.92 ln 5/2."""
    output = contrastive_loss(
        features(E0, E1),
        features(E0, E1),
        torch.tensor([HALF], dtype=torch.float64),
        torch.tensor([7, 8]),
        image_keys=features(E0, E1, E1),
        text_keys=features(E0, E1, E0),
        key_ids=torch.tensor([7, 8, 7]),
        teacher_image=features(E1, E1),
        teacher_text=features(E0, E1),
        alpha=0.4,
    )
    image_loss = (0.8 * log(5 / 2) + 0.2 * log(5) + 0.8 * log(2) + 0.2 * log(4)) / 2
    text_loss = (0.5 * log(2) + 0.5 * log(4) + 0.08 * log(5) + 0.92 * log(5 / 2)) / 2
    assert output.loss.item() == pytest.approx((image_loss + text_loss) / 2)
    # texts meet the teacher's images, both e1
    assert output.text_to_image.flatten().tolist() == pytest.approx([0, 0, log(2), log(2)])


def test_no_keys_is_the_batch_itself():
    image, text, ids = random_features(4, 6, 0), random_features(4, 6, 1), torch.arange(4)
    logits = image @ text.T / 0.07
    expected = (F.cross_entropy(logits, ids) + F.cross_entropy(logits.T, ids)) / 2
    torch.testing.assert_close(contrastive_loss(image, text, 0.07, ids).loss, expected)


def test_empty_slots_count_nothing():
    image, text, ids = random_features(3, 6, 0), random_features(3, 6, 1), torch.tensor([4, 5, 4])
    keys = {"image_keys": random_features(9, 6, 2), "text_keys": random_features(9, 6, 3)}
    teacher = {"teacher_image": random_features(3, 6, 4), "teacher_text": random_features(3, 6, 5), "alpha": 0.4}
    key_ids = torch.tensor([4, -1, 5, -1, 4, 9, -1, 8, -1])
    full = key_ids != -1
    masked = contrastive_loss(image, text, 0.07, ids, **keys, key_ids=key_ids, **teacher)
    dropped = contrastive_loss(
        image, text, 0.07, ids, **{k: v[full] for k, v in keys.items()}, key_ids=key_ids[full], **teacher
    )
    torch.testing.assert_close(masked.loss, dropped.loss)
    # an empty queue behind the batch is as good as none
    queued = contrastive_loss(
        image,
        text,
        0.07,
        ids,
        image_keys=torch.cat([image, torch.zeros(5, 6)]),
        text_keys=torch.cat([text, torch.zeros(5, 6)]),
        key_ids=torch.cat([ids, torch.full((5,), -1)]),
    )
    torch.testing.assert_close(queued.loss, contrastive_loss(image, text, 0.07, ids).loss)


def test_one_image_in_the_whole_batch():
    # all keys are right: the target is uniform, and equal features reach its entropy
    row = random_features(1, 6, 0).expand(3, 6)
    assert contrastive_loss(row, row, 0.07, torch.full((3,), 2)).loss.item() == pytest.approx(log(3))


def test_batch_of_one_and_of_none():
    row = random_features(1, 6, 0).requires_grad_()
    output = contrastive_loss(row, random_features(1, 6, 1), 0.07, torch.tensor([3]))
    output.loss.backward()
    assert output.loss.item() == 0 and row.grad.abs().sum() == 0
    nothing = torch.zeros(0, 6, requires_grad=True)
    loss = contrastive_loss(nothing, nothing, 0.07, torch.zeros(0, dtype=torch.long)).loss
    loss.backward()
    assert loss.item() == 0


@pytest.mark.parametrize("alpha", [0.0, 0.4])
def test_gradient(alpha: float):
    ids = torch.tensor([7, 8, 7])
    key_ids = torch.tensor([7, 8, 7, -1, 5])
    image_keys, text_keys = random_features(5, 4, 2), random_features(5, 4, 3)
    teacher_image, teacher_text = random_features(3, 4, 4), random_features(3, 4, 5)

    def loss(image, text, temperature):
        # the teacher's targets depend on the temperature without gradient: a difference quotient would see them move
        return contrastive_loss(
            image,
            text,
            temperature,
            ids,
            image_keys=image_keys,
            text_keys=text_keys,
            key_ids=key_ids,
            teacher_image=teacher_image,
            teacher_text=teacher_text,
            alpha=alpha,
        ).loss

    temperature = torch.tensor([0.3], dtype=torch.float64, requires_grad=alpha == 0)
    image, text = random_features(3, 4, 0).requires_grad_(), random_features(3, 4, 1).requires_grad_()
    assert torch.autograd.gradcheck(loss, (image, text, temperature))


def test_gradient_of_own_keys():
    image, text = random_features(3, 4, 0).requires_grad_(), random_features(3, 4, 1).requires_grad_()
    temperature = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([7, 8, 7])
    assert torch.autograd.gradcheck(lambda i, t, T: contrastive_loss(i, t, T, ids).loss, (image, text, temperature))


def test_teacher_gets_no_gradient_and_hands_out_detached_similarities():
    image, text = random_features(3, 4, 0).requires_grad_(), random_features(3, 4, 1).requires_grad_()
    teacher = random_features(3, 4, 2).requires_grad_()
    output = contrastive_loss(
        image, text, 0.07, torch.arange(3), teacher_image=teacher, teacher_text=teacher, alpha=0.4
    )
    output.loss.backward()
    assert teacher.grad is None
    assert not output.image_to_text.requires_grad and not output.text_to_image.requires_grad


def test_shares_of_a_gathered_batch_average_to_the_whole():
    """Two processes with two pairs each against all four keys: the mean of their losses is the loss of one process."""
    image, text, ids = random_features(4, 6, 0), random_features(4, 6, 1), torch.tensor([1, 2, 1, 3])
    keys = {"image_keys": image, "text_keys": text, "key_ids": ids}
    shares = [contrastive_loss(image[s], text[s], 0.07, ids[s], **keys).loss for s in (slice(0, 2), slice(2, 4))]
    torch.testing.assert_close(sum(shares) / 2, contrastive_loss(image, text, 0.07, ids).loss)


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_in_float32_out(autocast: bool):
    image, text = random_features(8, 32, 0, torch.bfloat16), random_features(8, 32, 1, torch.bfloat16)
    ids = torch.arange(8)
    temperature = torch.tensor([0.01])
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        output = contrastive_loss(
            image, text, temperature, ids, teacher_image=image.float(), teacher_text=text.float(), alpha=0.4
        )
    exact = contrastive_loss(
        image.double(), text.double(), 0.01, ids, teacher_image=image, teacher_text=text, alpha=0.4
    )
    assert output.loss.dtype == torch.float32
    assert output.loss.item() == pytest.approx(exact.loss.item(), rel=1e-4)


def test_wrong_calls():
    row, ids = random_features(2, 4, 0), torch.arange(2)
    with pytest.raises(ValueError, match="together"):
        contrastive_loss(row, row, 0.07, ids, image_keys=row)
    with pytest.raises(ValueError, match="teacher"):
        contrastive_loss(row, row, 0.07, ids, alpha=0.4)


def test_alpha_ramp():
    assert [alpha_ramp(step, 4, 0.4) for step in (0, 1, 2, 4, 9)] == pytest.approx([0, 0.1, 0.2, 0.4, 0.4])
    assert alpha_ramp(0, 0, 0.4) == 0.4
