"""Masked language modelling (MLM): which tokens to hide, and the loss on the hidden ones.

15 % of the words are picked; of these 80 % become [MASK], 10 % a random word, 10 % stay, so that the model can't rely
on [MASK] to know where it is asked. The fused text output predicts the picked tokens; a teacher's distribution may be
mixed into the target.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache

import torch
from torch import Tensor

from mplug_core.objectives.cross_entropy import Head, no_head, row_cross_entropy

IGNORED = -100
"""Label of a position that is not asked."""


def mask_tokens(
    ids: Tensor,
    attention: Tensor,
    mask_id: int,
    vocab_size: int,
    special_ids: Iterable[int],
    generator: torch.Generator | None = None,
    probability: float = 0.15,
) -> tuple[Tensor, Tensor]:
    """Hides words of a batch of texts.

    Args:
        ids: [B, T] token ids; not changed.
        attention: [B, T], 0 or False at padding.
        mask_id: id of [MASK].
        vocab_size: random words are drawn below it.
        special_ids: ids that are never hidden and never drawn ([PAD], [CLS], [SEP], [MASK], [UNK], box tokens, ...).
        generator: source of the draws, on any device; None is torch's global one.
        probability: chance of each word to be picked.

    Returns:
        (inputs [B, T], labels [B, T]): labels hold the original id where a word was picked, -100 elsewhere.
    """
    special = tuple(sorted({int(token) for token in special_ids} | {int(mask_id)}))
    words = _words(vocab_size, special)
    device = ids.device if generator is None else generator.device
    pick, way = torch.rand(2, *ids.shape, device=device, generator=generator).to(ids.device)
    drawn = torch.randint(len(words), ids.shape, device=device, generator=generator)
    drawn = words.to(device)[drawn].to(ids)

    maskable = attention.bool() & ~torch.isin(ids, torch.tensor(special, device=ids.device, dtype=ids.dtype))
    picked = maskable & (pick < probability)
    labels = ids.masked_fill(~picked, IGNORED)
    inputs = ids.masked_fill(picked & (way < 0.8), mask_id)
    inputs = torch.where(picked & (way >= 0.8) & (way < 0.9), drawn, inputs)
    return inputs, labels


@lru_cache(maxsize=8)
def _words(vocab_size: int, special: tuple[int, ...]) -> Tensor:
    """Ids below ``vocab_size`` that are not special, on the CPU."""
    keep = torch.ones(vocab_size, dtype=torch.bool)
    keep[[token for token in special if 0 <= token < vocab_size]] = False
    words = keep.nonzero().squeeze(1)
    if not len(words):
        raise ValueError("every id of the vocabulary is special: nothing to draw random words from")
    return words


def masked_language_loss(
    hidden: Tensor,
    labels: Tensor,
    teacher_hidden: Tensor | None = None,
    alpha: float = 0.0,
    *,
    head: Head = no_head,
    teacher_head: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Mean cross-entropy over the hidden tokens.

    Args:
        hidden: [M, W] at the labelled positions only, ``fused[labels != -100]``: the vocabulary head on every position
            would cost seven times as much for nothing. Without a ``head`` they are logits [M, V].
        labels: [M] original ids, ``labels[labels != -100]``. A -100 left among them is ignored.
        teacher_hidden: the teacher's at the same positions.
        alpha: weight of ``softmax(teacher)`` over the vocabulary against the hard target.
        head, teacher_head: as in :func:`row_cross_entropy`.

    Returns:
        Scalar; a zero that keeps the graph when nothing is labelled.
    """
    labelled = labels != IGNORED
    losses = row_cross_entropy(
        hidden, labels.masked_fill(~labelled, 0),
        head=head, teacher_rows=teacher_hidden, teacher_head=teacher_head, alpha=alpha,
    )  # fmt: skip
    return losses.masked_fill(~labelled, 0.0).sum() / labelled.sum().clamp(min=1)
