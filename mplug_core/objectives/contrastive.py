"""Image-text contrastive loss (ITC) over the batch and a queue, with soft targets from a momentum teacher.

Each image is compared with a set of text keys and each text with a set of image keys. The keys are the teacher's
features of the (gathered) batch followed by the queue; without a teacher they are the student's own features, with
gradient. All keys of the same image share the hard target's mass, since each of them is a right answer; the teacher's
own distribution, which knows about near matches, is mixed in with weight alpha.

Everything runs in float32, also under autocast: similarities are divided by a temperature of about 0.07 (or less), and
the rounding of bfloat16 would be amplified with them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mplug_core.objectives.cross_entropy import full_precision

EMPTY = -1
"""Id of a queue slot that holds nothing yet."""


class ContrastiveOutput(NamedTuple):
    """``loss``: scalar. ``image_to_text``, ``text_to_image``: [B, B] in-batch similarities over temperature, detached,
    rows are the queries; they are what hard negatives are sampled by."""

    loss: Tensor
    image_to_text: Tensor
    text_to_image: Tensor


def contrastive_loss(
    image: Tensor,
    text: Tensor,
    temperature: Tensor | float,
    image_ids: Tensor,
    *,
    image_keys: Tensor | None = None,
    text_keys: Tensor | None = None,
    key_ids: Tensor | None = None,
    teacher_image: Tensor | None = None,
    teacher_text: Tensor | None = None,
    alpha: float = 0.0,
) -> ContrastiveOutput:
    """Mean of the image-to-text and the text-to-image cross-entropy.

    Args:
        image, text: [B, E] L2-normalised features of the student; row b of both belongs to the same pair.
        temperature: scalar or shape (1,); its gradient is kept. Keeping it positive is the caller's work.
        image_ids: [B] integers, equal for captions of the same image. Two images that should count as each other's
            positives (say, the same caption) get the same id.
        image_keys, text_keys, key_ids: [K, E], [K, E], [K]: what to compare with, in any order, all three or none.
            Ids equal to -1 are empty queue slots and leave the softmax. Every id of ``image_ids`` must occur. Left out:
            ``image``, ``text`` and ``image_ids`` themselves. Gradient flows into keys that require it, so that
            student features gathered with gradient can be given; the teacher's should come detached.
        teacher_image, teacher_text: [B, E] features of the teacher for these same pairs; they make the soft targets
            and, where given, stand on the key side of the in-batch similarities.
        alpha: weight of the soft targets ``softmax(teacher similarity / temperature)`` against the hard ones.

    Raises:
        ValueError: keys given in part, or ``alpha`` > 0 without the teacher's features.
    """
    given = [part is not None for part in (image_keys, text_keys, key_ids)]
    if any(given) and not all(given):
        raise ValueError("image_keys, text_keys and key_ids come together or not at all")
    if alpha > 0 and (teacher_image is None or teacher_text is None):
        raise ValueError("alpha > 0 needs teacher_image and teacher_text")
    with torch.autocast(device_type=image.device.type, enabled=False):
        image, text = full_precision(image), full_precision(text)
        if isinstance(temperature, Tensor):
            temperature = full_precision(temperature)
        if key_ids is None:
            image_keys, text_keys, key_ids = image, text, image_ids
        image_keys, text_keys = image_keys.to(image.dtype), text_keys.to(text.dtype)
        empty = (key_ids == EMPTY).unsqueeze(0)
        same = (image_ids.unsqueeze(1) == key_ids.unsqueeze(0)).to(image.dtype)
        hard = same / same.sum(1, keepdim=True).clamp(min=1)
        image_loss = one_way(image, text_keys, teacher_image, temperature, hard, empty, alpha)
        text_loss = one_way(text, image_keys, teacher_text, temperature, hard, empty, alpha)
        with torch.no_grad():
            near_text = text if teacher_text is None else teacher_text.to(text.dtype)
            near_image = image if teacher_image is None else teacher_image.to(image.dtype)
            image_to_text = image @ near_text.T / temperature
            text_to_image = text @ near_image.T / temperature
    return ContrastiveOutput((image_loss + text_loss) / 2, image_to_text, text_to_image)


def one_way(
    queries: Tensor,
    keys: Tensor,
    teacher_queries: Tensor | None,
    temperature: Tensor | float,
    hard: Tensor,
    empty: Tensor,
    alpha: float,
) -> Tensor:
    """Mean cross-entropy of queries [B, E] against keys [K, E] with the hard target [B, K] and the teacher's."""
    logits = (queries @ keys.T / temperature).masked_fill(empty, float("-inf"))
    # the empty slots' log-probability is -inf; 0 * -inf would be NaN, so it is set to zero before the product
    log_probabilities = logits.log_softmax(1).masked_fill(empty, 0.0)
    target = hard
    if alpha > 0:
        with torch.no_grad():
            soft = teacher_queries.to(keys.dtype) @ keys.T / temperature
            soft = soft.masked_fill(empty, float("-inf")).softmax(1)
            target = alpha * soft + (1 - alpha) * hard
    return -(target * log_probabilities).sum() / max(len(queries), 1)


def alpha_ramp(step: int, ramp_steps: int, alpha: float) -> float:
    """Weight of the soft targets at ``step`` (0-based): linear from 0 to ``alpha`` over ``ramp_steps``, then constant.

    A young teacher knows no more than chance; its word counts only as it learns. ``ramp_steps`` <= 0: no ramp.
    """
    if ramp_steps <= 0:
        return alpha
    return alpha * min(1.0, max(step, 0) / ramp_steps)
