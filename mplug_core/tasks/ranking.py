"""Two-stage ranking of images for texts and of texts for images: ITC finds candidates, ITM orders them.

The contrastive features are compared all with all, which is one product of matrices. Matching has to fuse each pair, so
only the best by ITC get it. A pair has one match score whichever of its sides asks, so pairs that are candidates both
ways are fused once.

What is kept is small and on the CPU: features in float32, image tokens and encoded texts in the model's own type, texts
only as long as they are. Only the pairs that are being fused are on the model's device, grouped so that texts on the
same image share its keys and values, and texts of like length lie together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mplug_core.model.mplug import ImageEncoding
from mplug_core.objectives.matching import MATCH
from mplug_core.tasks.task import Ready, need

Rerank = Literal["itm", "itm+itc"]

PAIRS = 256
"""Pairs that are fused at once."""

SHARED = 16
"""At most so many texts of a group share an image: more would fill groups up with copies."""


@dataclass
class EncodedTexts:
    """``feature`` [n, E] float32, contrastive; ``tokens``: of each text [t, W] without padding, or nothing where only
    the features were asked for. All on the CPU."""

    feature: Tensor
    tokens: list[Tensor]

    def __len__(self) -> int:
        return len(self.feature)


def default_candidates(ready: Ready) -> int:
    """What the model's configuration says (the paper's 256), 0 for a dual encoder, which has nothing to match by."""
    return ready.config.candidates if ready.model.matching_head is not None else 0


@torch.inference_mode()
def encode_texts(ready: Ready, texts: Sequence[str], keep_tokens: bool = True, batch_size: int = 256) -> EncodedTexts:
    """Encode cleaned texts, equal ones once and those of like length together; the result is in their order."""
    if not len(texts):
        return EncodedTexts(torch.empty(0, ready.config.embed_dim), [])
    places = {text: place for place, text in enumerate(dict.fromkeys(texts))}
    if len(places) < len(texts):
        distinct = encode_texts(ready, list(places), keep_tokens, batch_size)
        order = [places[text] for text in texts]
        return EncodedTexts(distinct.feature[order], [distinct.tokens[i] for i in order] if keep_tokens else [])
    ids, mask = ready.texts.read(texts)
    lengths = mask.sum(1)
    order = lengths.argsort(stable=True)
    features = torch.empty(len(texts), ready.config.embed_dim)
    tokens: list[Tensor] = [features] * len(texts) if keep_tokens else []
    for rows in order.split(batch_size):
        longest = int(lengths[rows].max())
        some, some_mask = (part[rows, :longest].to(ready.device) for part in (ids, mask))
        encoded = ready.model.encode_text(some, some_mask)
        features[rows] = ready.model.text_feature(encoded, some_mask).float().cpu()
        if keep_tokens:
            encoded = encoded.cpu()
            for place, row in enumerate(rows.tolist()):
                # a copy: a view would keep the padding of its whole batch
                tokens[row] = encoded[place, : int(lengths[row])].clone()
    return EncodedTexts(features, tokens)


def to_cpu(images: ImageEncoding, keep_tokens: bool = True) -> ImageEncoding:
    """What ranking needs of an encoding later: its feature in float32, and where they are asked for its tokens."""
    tokens, mask = (images.tokens, images.mask) if keep_tokens else (images.tokens[:, :0], images.mask[:, :0])
    return ImageEncoding(tokens.cpu(), images.feature.float().cpu(), mask.cpu())


@torch.inference_mode()
def match(ready: Ready, images: ImageEncoding, texts: EncodedTexts, pairs: Tensor, batch_size: int = PAIRS) -> Tensor:
    """The matching head's logit "match" of ``pairs`` [P, 2] (row of the image, row of the text): float32 [P], CPU.

    It is the raw logit, as the released code ranks by. CheckpointError if the model has no matching head.
    """
    need(ready.model.matching_head is not None, "matching head")
    scores = torch.empty(len(pairs))
    for rows in groups(pairs, [len(tokens) for tokens in texts.tokens], batch_size):
        # rows [G, S]: G images with S texts each, neighbours of the same image side by side
        chosen = pairs[rows]
        ragged = [texts.tokens[row] for row in chosen[..., 1].flatten().tolist()]
        lengths = torch.tensor([len(tokens) for tokens in ragged])
        text = pad_sequence(ragged, batch_first=True).to(ready.device)
        mask = (torch.arange(text.shape[1]) < lengths[:, None]).to(ready.device)
        own = images[chosen[:, 0, 0]]
        own = ImageEncoding(own.tokens.to(ready.device), own.feature, own.mask.to(ready.device))
        _, fused = ready.model.fuse(own, text, mask)
        scores[rows.flatten()] = ready.model.matching_logits(fused)[:, MATCH].float().cpu()
    return scores


def groups(pairs: Tensor, lengths: Sequence[int], batch_size: int) -> Iterator[Tensor]:
    """Rows of ``pairs`` [P, 2] in batches [G, S] of at most ``batch_size``.

    Each group of S has one image, and groups of texts of like length come together. A group that is not full repeats
    its last pair.
    """
    if not len(pairs):
        return
    length = torch.as_tensor(lengths)[pairs[:, 1]]
    # by image, and within an image by length
    order = (pairs[:, 0] * (int(length.max()) + 1) + length).argsort(stable=True)
    _, counts = pairs[order, 0].unique_consecutive(return_counts=True)
    size = max(1, min(SHARED, batch_size, int(counts.float().mean())))
    per_image = (counts + size - 1) // size
    starts = counts.cumsum(0) - counts
    first = starts.repeat_interleave(per_image)
    number = torch.arange(len(first)) - (per_image.cumsum(0) - per_image).repeat_interleave(per_image)
    last = (starts + counts - 1).repeat_interleave(per_image)
    places = (first + number * size)[:, None] + torch.arange(size)
    filled = order[places.minimum(last[:, None])]
    filled = filled[length[filled].amax(1).argsort(stable=True)]
    yield from filled.split(max(1, batch_size // size))


def order_by_match(similarity: Tensor, best: Tensor, matches: Tensor, how: Rerank = "itm") -> Tensor:
    """Scores [Q, C] by which candidates are ranked: ``best`` [Q, k] by their match, behind them the others by ITC.

    Args:
        similarity: [Q, C] cosine similarities.
        best: [Q, k] columns that were matched; ``matches`` [Q, k]: the logits "match" of these.
        how: ``itm`` ranks by the logit; ``itm+itc`` by the sum of logit and cosine similarity, neither scaled, as the
            released code ranks videos.
    """
    if not best.shape[1]:
        return similarity
    scores = matches + similarity.gather(1, best) if how == "itm+itc" else matches
    # cosines are within -1..1, so that these are below the worst candidate by at least 1, in the order they had
    return (similarity - 2 + scores.amin(1, keepdim=True)).scatter(1, best, scores)
