"""Image-text retrieval: ITC finds candidates, ITM re-ranks them (paper section 3.4)."""

from __future__ import annotations

import random
import time
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mplug_core.data.batches import Block, Drawn
from mplug_core.data.records import Records, read_captions
from mplug_core.data.text import clean_caption
from mplug_core.errors import DataError, NotFiniteError
from mplug_core.metrics.retrieval import first_ranks, found_at, recall_measures
from mplug_core.model.mplug import ImageEncoding, MplugModel
from mplug_core.recipe import DataSpec
from mplug_core.tasks.caption import scene_graphs
from mplug_core.tasks.evaluation import Evaluation
from mplug_core.tasks.pairs import caption_groups, pair_losses
from mplug_core.tasks.ranking import (
    EncodedTexts,
    Rerank,
    default_candidates,
    encode_texts,
    match,
    order_by_match,
    to_cpu,
)
from mplug_core.tasks.task import Context, EvaluateOptions, Ready, Result, Scored, Texts, need, rows

SHOWN = 10
"""How many of the best a prediction lists."""

QUERIES = 1024
"""Queries whose scores with all candidates are in memory at once."""


class RetrievalTask:
    """Captions to images and images to captions."""

    name = "retrieval"
    objectives = ("itc", "itm")
    options = ("candidates", "rerank")
    identifier, text = "", ""

    def read(self, spec: DataSpec, text_only: bool = False) -> Records[Any]:
        return read_captions(spec.path, spec.split, spec.format, spec.images, text_only)

    def encode(self, drawn: list[Drawn], rng: random.Random, texts: Texts) -> Block:
        """Each image with one of its captions at random."""
        captions = [clean_caption(rng.choice(record.captions)) for _, record in drawn]
        ids, mask = texts.read(captions)
        return {"image": rows(drawn), "ids": ids, "mask": mask, "group": caption_groups(captions)}

    def losses(self, model: MplugModel, images: ImageEncoding, block: Block, context: Context) -> dict[str, Tensor]:
        return pair_losses(model, images[block["image"]], block, context)

    @torch.inference_mode()
    def evaluate(self, ready: Ready, spec: DataSpec, options: EvaluateOptions = EvaluateOptions()) -> Result:
        """Recall at 1, 5 and 10 both ways, and their mean.

        The ``candidates`` best by ITC, or all if there are fewer, are re-ranked by ITM: by default as many as the
        model's configuration says (256 as in the paper; 0 where the matching head was hardly trained), and none for a
        dual encoder; 0 is ITC alone.

        Every caption of an image is right for it, and that image alone for its caption, as in the benchmarks. Only of
        generated scenes, whose grammar says the same of many, a caption is right for every image that has it word for
        word. Predictions have a line a query, images first, with its ten best and the place of the first right one; the
        ``truth`` of a caption begins with its own image.
        """
        candidates = default_candidates(ready) if options.candidates is None else options.candidates
        need(not candidates or ready.model.matching_head is not None, "matching head")
        began = time.perf_counter()
        records = self.read(spec)
        evaluation = Evaluation(ready, records.records, options.batch_size, options.limit)
        parts, kept = [], []
        for encoded, drawn in evaluation:
            features = encoded.feature[rows(drawn).to(ready.device)]
            drawn = [pair for pair, _ in evaluation.sound(drawn, features.unbind())]
            if drawn:
                parts.append(to_cpu(encoded[rows(drawn).to(ready.device)], keep_tokens=candidates > 0))
            kept += [record for _, record in drawn]
        images = ImageEncoding.join(parts)
        shown = [text for record in kept for text in record.captions]
        if not shown:
            raise DataError("nothing to evaluate: no captions")
        cleaned = [clean_caption(text) for text in shown]
        right_texts, right_images = right_answers(
            cleaned, [len(record.captions) for record in kept], by_words=scene_graphs(records.source) is not None
        )
        texts = encode_texts(ready, cleaned, keep_tokens=candidates > 0)
        if not texts.feature.isfinite().all():
            raise NotFiniteError.of("the feature of a caption")
        i2t_best = nearest(images.feature, texts.feature, min(candidates, len(texts)))
        t2i_best = nearest(texts.feature, images.feature, min(candidates, len(images)))
        i2t_match, t2i_match = match_both_ways(ready, images, texts, i2t_best, t2i_best)
        if not (i2t_match.isfinite().all() and t2i_match.isfinite().all()):
            raise NotFiniteError.of("the match of an image and a caption")

        names = [str(record.image) for record in kept]
        i2t, i2t_top, i2t_scores = rank(images.feature, texts.feature, i2t_best, i2t_match, right_texts, options.rerank)
        t2i, t2i_top, t2i_scores = rank(
            texts.feature, images.feature, t2i_best, t2i_match, right_images, options.rerank
        )
        owners = [image for image, record in enumerate(kept) for _ in record.captions]
        predictions = [
            self.identity(record)
            | {"rank": place, "texts": [shown[i] for i in top], "scores": scores}
            | self.truth(record)
            for record, place, top, scores in zip(kept, i2t.tolist(), i2t_top, i2t_scores, strict=True)
        ]
        for text, place, top, scores, owner, right in zip(
            shown, t2i.tolist(), t2i_top, t2i_scores, owners, right_images, strict=True
        ):
            truth = [names[owner], *(names[i] for i in right if i != owner)]
            found = {"rank": place, "images": [names[i] for i in top], "scores": scores}
            predictions.append({"text": text} | found | {"truth": truth})
        evaluation.seconds = time.perf_counter() - began  # matching, too
        return evaluation.scored(self, records, predictions)

    def identity(self, record: Any) -> dict[str, Any]:
        return {"image": str(record.image)}

    def truth(self, record: Any) -> dict[str, Any]:
        return {"truth": list(record.captions)}

    def score(self, records: Sequence[Any], predictions: Sequence[Mapping[str, Any]], source: Path) -> Scored:
        """Of predictions a line for each image, and then a line for each of their captions."""
        ranks = [prediction["rank"] for prediction in predictions]
        i2t, t2i = found_at(ranks[: len(records)]), found_at(ranks[len(records) :])
        return recall_measures(i2t, t2i, *owners_of(records)), []


def owners_of(records: Sequence[Any]) -> tuple[list[Hashable], list[Hashable]]:
    """The images, and the image of each of their captions."""
    return [record.image for record in records], [record.image for record in records for _ in record.captions]


def right_answers(
    cleaned: Sequence[str], counts: Sequence[int], by_words: bool
) -> tuple[list[list[int]], list[list[int]]]:
    """The right texts of each image and the right images of each text, as numbers.

    ``cleaned``: the captions of all images one after the other, ``counts`` of each. With ``by_words`` equal captions
    share their images, else each is its own image's alone, as the benchmarks have it.
    """
    owners = [image for image, count in enumerate(counts) for _ in range(count)]
    if not by_words:
        mine: list[list[int]] = [[] for _ in counts]
        for text, image in enumerate(owners):
            mine[image].append(text)
        return mine, [[image] for image in owners]
    images_of: dict[str, set[int]] = defaultdict(set)
    texts_of: dict[str, list[int]] = defaultdict(list)
    for text, (caption, image) in enumerate(zip(cleaned, owners, strict=True)):
        images_of[caption].add(image)
        texts_of[caption].append(text)
    right_texts: list[set[int]] = [set() for _ in counts]
    for caption, image in zip(cleaned, owners, strict=True):
        right_texts[image].update(texts_of[caption])
    return [sorted(texts) for texts in right_texts], [sorted(images_of[caption]) for caption in cleaned]


def nearest(queries: Tensor, features: Tensor, k: int) -> Tensor:
    """Rows of the ``k`` features [C, E] most similar to each query [Q, E], best first: int64 [Q, k]."""
    return torch.cat([(part @ features.T).topk(k, 1).indices for part in queries.split(QUERIES)])


def match_both_ways(
    ready: Ready, images: ImageEncoding, texts: EncodedTexts, i2t_best: Tensor, t2i_best: Tensor
) -> tuple[Tensor, Tensor]:
    """The match logits of the candidate texts of images [I, k] and of the candidate images of texts [T, l]."""
    of_images = torch.arange(len(images))[:, None] * len(texts) + i2t_best
    of_texts = t2i_best * len(texts) + torch.arange(len(texts))[:, None]
    # a pair that is a candidate both ways is fused once
    pairs, places = torch.cat([of_images.flatten(), of_texts.flatten()]).unique(return_inverse=True)
    if not len(pairs):
        return i2t_best.float(), t2i_best.float()
    found = match(ready, images, texts, torch.stack([pairs // len(texts), pairs % len(texts)], 1))[places]
    of_images, of_texts = found.split([i2t_best.numel(), t2i_best.numel()])
    return of_images.view(i2t_best.shape), of_texts.view(t2i_best.shape)


def rank(
    queries: Tensor, features: Tensor, best: Tensor, matches: Tensor, right: Sequence[Sequence[int]], how: Rerank
) -> tuple[Tensor, list[list[int]], list[list[float]]]:
    """Of each query the place of its first right answer, its ten best candidates, and their scores."""
    ranks, tops, scores = [], [], []
    for start in range(0, len(queries), QUERIES):
        part = slice(start, start + QUERIES)
        ordered = order_by_match(queries[part] @ features.T, best[part], matches[part], how)
        relevant = torch.zeros(ordered.shape, dtype=torch.bool)
        for row, answers in enumerate(right[part]):
            relevant[row, answers] = True
        ranks.append(first_ranks(ordered, relevant))
        top = ordered.topk(min(SHOWN, ordered.shape[1]), 1)
        tops += top.indices.tolist()
        scores += [[round(score, 4) for score in row] for row in top.values.tolist()]
    return torch.cat(ranks), tops, scores
