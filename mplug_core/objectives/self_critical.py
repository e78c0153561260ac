"""Self-critical training (SCST): captions of the model's own, weighed by how much better than a baseline they are.

Rennie et al., CVPR 2017. Two variants: samples against the greedy caption, and, as mPLUG's captioner was trained, the
hypotheses of a beam search against their mean.

The loss is a mean over tokens: lengths divide once, and together. Each caption by its own length would no longer be the
gradient of the expected reward, as a baseline then weighs short captions more; with samples far below the greedy
caption it makes rewards fall. For the same reason a log-probability is among the tokens that may be written.

Captions are generated without a gradient and without dropout, so that what is rewarded is what the model says in use,
and so that the beams of an image are comparable; one pass over the finished captions then gives their log-probabilities
with a gradient, with dropout as in every other loss. The score of a generated caption is the sum of its tokens'
log-probabilities, whose gradient needs no more than that pass: keeping the graph of the search would cost a decoder
pass a token and give the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mplug_core.generation import Decoding, fresh_seeds, generate
from mplug_core.model.decoder import Decoder, Reduce
from mplug_core.objectives.prefix_language import counted, sequence_nll
from mplug_core.recipe import SelfCriticalSection

Ids = list[int]
Reward = Callable[[list[list[Ids]]], Sequence[Sequence[float]]]
"""New token ids of the captions of each image to a reward for each."""


class SelfCritical(NamedTuple):
    """``loss``: scalar. ``reward``: mean reward of the captions that the loss compares."""

    loss: Tensor
    reward: float


def self_critical(
    decoder: Decoder,
    memory: Tensor,
    memory_mask: Tensor,
    reward: Reward,
    settings: SelfCriticalSection,
    *,
    start: int,
    end: int,
    forbidden: Sequence[int] = (),
    generator: torch.Generator | None = None,
) -> SelfCritical:
    """The loss of ``settings.captions`` captions for each row of ``memory`` [B, N, W] (mask [B, N]).

    ``start`` and ``end`` are the decoder's first and last token, ``forbidden`` ids are never generated; ``generator``
    (on the CPU) decides the samples.
    """
    written, greedy = write_captions(
        decoder, memory, memory_mask, settings, start=start, end=end, forbidden=forbidden, generator=generator
    )
    rewards = torch.tensor(reward(written), dtype=torch.float64)
    if greedy is None:
        baseline = rewards.mean(1, keepdim=True)
    else:
        baseline = torch.tensor(reward([[ids] for ids in greedy]), dtype=torch.float64)
    scores, lengths = log_probabilities(
        decoder, memory, memory_mask, written, start=start, end=end, forbidden=forbidden,
        min_tokens=settings.min_tokens, temperature=settings.temperature if settings.variant == "sample" else 1.0,
    )  # fmt: skip
    return SelfCritical(advantage_loss(scores, lengths, rewards - baseline), float(rewards.mean()))


def advantage_loss(log_probabilities: Tensor, lengths: Tensor, advantages: Tensor) -> Tensor:
    """Sum of -advantage * log-probability by the number of tokens; all [B, K]. Zero, with zero gradient, where nothing
    is better."""
    return -(advantages.detach().to(log_probabilities) * log_probabilities).sum() / lengths.sum()


@torch.no_grad()
def write_captions(
    decoder: Decoder,
    memory: Tensor,
    memory_mask: Tensor,
    settings: SelfCriticalSection,
    *,
    start: int,
    end: int,
    forbidden: Sequence[int] = (),
    generator: torch.Generator | None = None,
) -> tuple[list[list[Ids]], list[Ids] | None]:
    """Ids of the captions to compare, [B][K], and of the greedy caption of each image where that is the baseline."""
    shared = {"min_tokens": settings.min_tokens, "max_tokens": settings.max_tokens, "best": settings.captions}
    baseline = None
    if settings.variant == "beam":
        decoding = Decoding(strategy="beam", beams=settings.captions, **shared)
    else:
        decoding = Decoding(strategy="sample", top_p=1.0, temperature=settings.temperature, **shared)
        baseline = Decoding(strategy="greedy", **(shared | {"best": 1}))

    seeds = fresh_seeds(len(memory), generator) if settings.variant == "sample" else None

    def search(decoding: Decoding) -> list[list[Ids]]:
        found = generate(
            decoder, memory.detach(), memory_mask, decoding,
            start=start, end=end, forbidden=list(forbidden), seeds=seeds,
        )  # fmt: skip
        return [[hypothesis.ids for hypothesis in row] for row in found]

    trains = decoder.training
    decoder.eval()
    try:
        # a vocabulary with fewer words than beams gives fewer captions: the last one stands in for them
        written = [row + row[-1:] * (settings.captions - len(row)) for row in search(decoding)]
        return written, None if baseline is None else [row[0] for row in search(baseline)]
    finally:
        decoder.train(trains)
        # in older versions of PyTorch autocast keeps the weights that it has cast here, without their gradient
        torch.clear_autocast_cache()


def log_probabilities(
    decoder: Decoder,
    memory: Tensor,
    memory_mask: Tensor | None,
    written: list[list[Ids]],
    *,
    start: int,
    end: int,
    forbidden: Sequence[int] = (),
    min_tokens: int = 0,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Of each of K captions of each image, the sum of its tokens' log-probabilities and their number: [B, K] both.

    ``forbidden`` tokens, and ``end`` before ``min_tokens``, have no probability. The K captions of an image share the
    keys and values of its memory.
    """
    captions = [ids for row in written for ids in row]
    lengths = torch.tensor([len(ids) for ids in captions])
    ids = torch.zeros(len(captions), 1 + int(lengths.max()), dtype=torch.int64)
    for row, caption in enumerate(captions):
        ids[row, : 1 + len(caption)] = torch.tensor([start, *caption])
    mask = (torch.arange(ids.shape[1]) <= lengths[:, None]).long()
    ids, mask, lengths = (tensor.to(memory.device) for tensor in (ids, mask, lengths))
    never = torch.tensor(list(forbidden), dtype=torch.int64, device=memory.device)
    early = counted(mask)[1] < min_tokens

    def head(rows: Tensor, losses: Reduce) -> Tensor:
        def allowed(logits: Tensor, part: slice) -> Tensor:
            logits = logits.index_fill(-1, never, -torch.inf)
            logits[:, end].masked_fill_(early[part], -torch.inf)
            return losses(logits if temperature == 1 else logits / temperature, part)

        return decoder.logits(rows, allowed)

    # the last token predicts nothing
    scores = -sequence_nll(decoder(ids[:, :-1], memory, memory_mask), ids, mask, head=head)
    return scores.view(len(written), -1), lengths.view(len(written), -1)
