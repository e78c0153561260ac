"""Prefix language modelling (PrefixLM), and the loss of every text that the decoder writes.

A caption is split at a random position: the prefix goes to the text encoder and is fused with the image, the decoder
writes the rest. The same shifted next-token loss trains captions, answers and any other generated text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mplug_core.objectives.cross_entropy import Head, no_head, row_cross_entropy


class PrefixSplit(NamedTuple):
    """``prefix_ids`` [B, P] = [CLS] w1..wk; ``target_ids`` [B, L] = [CLS] w(k+1)..wn [SEP]; right-padded, int64."""

    prefix_ids: Tensor
    prefix_mask: Tensor
    target_ids: Tensor
    target_mask: Tensor


def split_prefix(
    ids: Tensor | Sequence[Sequence[int]],
    attention: Tensor | None,
    cls_id: int,
    sep_id: int,
    generator: torch.Generator | None = None,
    pad_id: int = 0,
) -> PrefixSplit:
    """Splits each caption [CLS] w1..wn [SEP] after a random word k, uniform over 0..n-1.

    The prefix may be [CLS] alone (plain captioning); the target always has at least one word, unless the caption has
    none (then it is [CLS] [SEP]). A caption without [SEP] keeps being without: no end is invented for a cut text.

    Args:
        ids: [B, T] right-padded ids, or a list of B lists of ids.
        attention: [B, T], 0 at padding; None: everything counts (always for lists, which bring their own lengths).
        cls_id, sep_id, pad_id: special ids; the target starts with ``cls_id``, the decoder's start token.
        generator: source of the draws, on any device; None is torch's global one.

    Raises:
        ValueError: an empty caption (not even [CLS]).
    """
    if not isinstance(ids, Tensor):
        rows = [torch.as_tensor(row, dtype=torch.long) for row in ids]
        lengths = torch.tensor([len(row) for row in rows], dtype=torch.long)
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_id)
    elif attention is None:
        lengths = torch.full((len(ids),), ids.size(1), device=ids.device)
    else:
        lengths = attention.long().sum(1)
    if not len(ids) or int(lengths.min()) < 1:
        raise ValueError("split_prefix needs at least one caption, each with at least [CLS]")
    ended = (ids.gather(1, lengths.unsqueeze(1) - 1).squeeze(1) == sep_id) & (lengths > 1)
    words = lengths - 1 - ended.long()

    device = ids.device if generator is None else generator.device
    draw = torch.rand(len(ids), device=device, generator=generator).to(ids.device)
    split = (draw * words).long()

    prefix_lengths, target_lengths = split + 1, lengths - split
    columns = torch.arange(int(prefix_lengths.max()), device=ids.device)
    prefix_mask = columns < prefix_lengths.unsqueeze(1)
    prefix_ids = ids[:, : len(columns)].masked_fill(~prefix_mask, pad_id)

    columns = torch.arange(int(target_lengths.max()), device=ids.device)
    target_mask = columns < target_lengths.unsqueeze(1)
    source = (columns + split.unsqueeze(1)).clamp(max=ids.size(1) - 1)
    target_ids = ids.gather(1, source).masked_fill(~target_mask, pad_id)
    target_ids[:, 0] = cls_id
    return PrefixSplit(prefix_ids, prefix_mask.long(), target_ids, target_mask.long())


def sequence_loss(
    hidden: Tensor,
    target_ids: Tensor,
    target_mask: Tensor,
    weights: Tensor | None = None,
    reduction: Literal["token", "sequence"] = "token",
    *,
    head: Head = no_head,
    denominator: float | None = None,
    teacher_hidden: Tensor | None = None,
    teacher_head: Callable[[Tensor], Tensor] | None = None,
    alpha: float = 0.0,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Next-token loss: position t of ``hidden`` predicts token t + 1 of ``target_ids``.

    Args:
        hidden: [B, T - 1, W] of the decoder for the inputs ``target_ids[:, :-1]``; without a ``head`` they are logits
            [B, T - 1, V]. A last position that predicts nothing may be there, too.
        target_ids: [B, T], starting with the decoder's start token, which is never a label.
        target_mask: [B, T], nonzero at tokens that count as labels; zero at padding (and at a prompt that is given).
        weights: [B], weight of each sequence; None is one each.
        reduction: "token": sum over all counted tokens of w * nll / sum of w (the mean over tokens when unweighted).
            "sequence": sum over the sequences of w * (sum over its tokens) / ``denominator``.
        denominator: for "sequence"; None is B. VQA, with several answers to an image, gives the number of images.
        teacher_hidden: the teacher's, of the shape of ``hidden``.
        head, teacher_head, alpha, label_smoothing: as in :func:`row_cross_entropy`.

    Returns:
        Scalar; a zero that keeps the graph when no token counts.
    """
    losses, rows = _token_losses(
        hidden, target_ids, target_mask,
        head=head, teacher=teacher_hidden, teacher_head=teacher_head, alpha=alpha, label_smoothing=label_smoothing,
    )  # fmt: skip
    scale = torch.ones_like(losses) if weights is None else weights.to(losses)[rows]
    total = (losses * scale).sum()
    if reduction == "sequence":
        return total / (max(len(target_ids), 1) if denominator is None else denominator)
    if reduction == "token":
        mass = scale.sum()
        return total / torch.where(mass > 0, mass, torch.ones_like(mass))
    raise ValueError(f"reduction is 'token' or 'sequence', not {reduction!r}")


def sequence_nll(
    hidden: Tensor,
    target_ids: Tensor,
    target_mask: Tensor,
    *,
    head: Head = no_head,
    teacher_hidden: Tensor | None = None,
    teacher_head: Callable[[Tensor], Tensor] | None = None,
    alpha: float = 0.0,
    label_smoothing: float = 0.0,
) -> Tensor:
    """[B] sum of the next-token losses of each sequence; arguments as in :func:`sequence_loss`."""
    losses, rows = _token_losses(
        hidden, target_ids, target_mask,
        head=head, teacher=teacher_hidden, teacher_head=teacher_head, alpha=alpha, label_smoothing=label_smoothing,
    )  # fmt: skip
    return losses.new_zeros(len(target_ids)).index_add(0, rows, losses)


def counted(target_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Sequence and position [M] of each prediction that counts, in the order that a head is given them."""
    return target_mask[:, 1:].nonzero(as_tuple=True)


def _token_losses(
    hidden: Tensor,
    target_ids: Tensor,
    target_mask: Tensor,
    *,
    head: Head,
    teacher: Tensor | None,
    teacher_head: Callable[[Tensor], Tensor] | None,
    alpha: float,
    label_smoothing: float,
) -> tuple[Tensor, Tensor]:
    """Loss of each counted token [M] and the sequence [M] that it belongs to.

    The rows are gathered before the head, so padding costs no product with a vocabulary.
    """
    rows, columns = counted(target_mask)
    losses = row_cross_entropy(
        hidden[rows, columns], target_ids[rows, columns + 1],
        head=head, teacher_rows=None if teacher is None else teacher[rows, columns], teacher_head=teacher_head,
        alpha=alpha, label_smoothing=label_smoothing,
    )  # fmt: skip
    return losses, rows
