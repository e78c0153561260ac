"""Image-text matching (ITM): hard negatives by contrastive similarity, and the binary loss on the fused [CLS].

Each pair brings one positive and two negatives: its image with a wrong text, its text with a wrong image. Wrong means:
of another image, and, where text ids are given, not word for word the same caption. The more similar a wrong partner
looks to the contrastive head, the more often it is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mplug_core.objectives.cross_entropy import full_precision

NO_MATCH, MATCH = 0, 1
"""Classes of the matching head."""


class HardNegatives(NamedTuple):
    """``text_of_image`` [B]: for image b the row of a wrong text. ``image_of_text`` [B]: for text b the row of a wrong
    image. ``valid`` [B] bool: False where the batch holds no wrong partner for b (both indices are then b itself)."""

    text_of_image: Tensor
    image_of_text: Tensor
    valid: Tensor


class MatchingOutput(NamedTuple):
    """``loss``: scalar. ``skipped``: int64 scalar, 1 when no row had a negative and the term was left out, else 0."""

    loss: Tensor
    skipped: Tensor


@torch.no_grad()
def hard_negatives(
    image_to_text: Tensor,
    image_ids: Tensor,
    generator: torch.Generator | None = None,
    *,
    text_to_image: Tensor | None = None,
    text_groups: Tensor | None = None,
) -> HardNegatives:
    """Draws a wrong text for each image and a wrong image for each text, in proportion to exp(similarity).

    The draw is made in log space (largest of similarity + Gumbel noise), so that no similarity under- or overflows and
    no row can end without weights while it has an allowed partner.

    Args:
        image_to_text: [B, B] similarity over temperature, rows are images.
        image_ids: [B]; partners of equal id are captions of the same image and never drawn, b itself among them.
        generator: source of the draws, on any device; None is torch's global one.
        text_to_image: [B, B], rows are texts; None is the transpose of ``image_to_text``.
        text_groups: [B]; partners of equal group have the same caption text and are not drawn either.
    """
    wrong = image_ids.unsqueeze(1) != image_ids.unsqueeze(0)
    if text_groups is not None:
        wrong = wrong & (text_groups.unsqueeze(1) != text_groups.unsqueeze(0))
    valid = wrong.any(1)
    itself = torch.arange(len(image_ids), device=image_to_text.device)

    def draw(similarity: Tensor) -> Tensor:
        similarity = full_precision(similarity)
        device = similarity.device if generator is None else generator.device
        noise = torch.empty(similarity.shape, device=device).exponential_(generator=generator)
        gumbel = -noise.clamp(min=torch.finfo(noise.dtype).tiny).log().to(similarity)
        choice = (similarity + gumbel).masked_fill(~wrong, float("-inf")).argmax(1)
        return torch.where(valid, choice, itself)

    if not len(image_ids):
        return HardNegatives(itself, itself, valid)
    return HardNegatives(draw(image_to_text), draw(image_to_text.T if text_to_image is None else text_to_image), valid)


def matching_loss(positive: Tensor, negatives: Sequence[Tensor], valid: Tensor) -> MatchingOutput:
    """Binary cross-entropy, mean over the positive and the negatives of the rows that have negatives.

    A row without a negative is left out whole: keeping its positive would shift the share of matches from one in three
    towards "always match". A batch of only such rows gives a zero that keeps the graph (each rank of a sharded run then
    still uses the same parameters) and is counted. Nothing here waits for the device.

    Args:
        positive: [B, 2] logits of the true pairs, class 1 = match.
        negatives: any number of [B, 2] logits of wrong pairs, usually (wrong text, wrong image).
        valid: [B] bool from :func:`hard_negatives`.
    """
    logits = full_precision(torch.cat([positive, *negatives]))
    labels = torch.full((len(logits),), NO_MATCH, dtype=torch.long, device=logits.device)
    labels[: len(positive)] = MATCH
    counted = valid.repeat(1 + len(negatives))
    losses = F.cross_entropy(logits, labels, reduction="none").masked_fill(~counted, 0.0)
    return MatchingOutput(losses.sum() / counted.sum().clamp(min=1), (~valid.any()).long())
