"""Image-text retrieval: ITC finds candidates, ITM re-ranks them (paper section 3.4)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mplug_core.data.records import read_captions
from mplug_core.data.text import clean_caption
from mplug_core.model.mplug import ImageEncoding
from mplug_core.recipe import DataSpec
from mplug_core.tasks.evaluation import Evaluation
from mplug_core.tasks.task import EvaluateOptions, Ready, Result, need, rows


class RetrievalTask:
    """Captions to images and images to captions."""

    name = "retrieval"
    objectives = ("itc", "itm")
    options = ("candidates", "rerank")

    @torch.inference_mode()
    def evaluate(self, ready: Ready, spec: DataSpec, options: EvaluateOptions = EvaluateOptions()) -> Result:
        """Recall at 1, 5, 10 both ways; the ``candidates`` best by ITC are re-ranked by ITM (0: ITC alone).

        Every caption of an image counts, and so does an image one of whose captions is the query, word for word.
        """
        records = read_captions(spec.path, spec.split, spec.format, spec.images)
        evaluation = Evaluation(ready, records.records, options.batch_size, options.limit)
        parts, kept = [], []
        for images, drawn in evaluation:
            parts.append(images[rows(drawn)])
            kept += [record for _, record in drawn]
        images = ImageEncoding.join(parts)
        captions = [[clean_caption(text) for text in record.captions] for record in kept]
        queries = [text for texts in captions for text in texts]
        relevant = torch.tensor([[text in texts for texts in captions] for text in queries])  # [texts, images]
        features, encoded = [], []
        for start in range(0, len(queries), 256):
            ids, mask = (t.to(ready.device) for t in ready.texts.encode(queries[start : start + 256]))
            text = ready.model.encode_text(ids, mask)
            features.append(ready.model.text_feature(text, mask))
            encoded += [(text[i], mask[i]) for i in range(len(text))]
        scores = (torch.cat(features) @ images.feature.T).float().cpu()
        t2i = i2t = scores
        candidates = options.candidates or 0
        if candidates:
            t2i = rerank(ready, scores, images, encoded, candidates)
            i2t = rerank(ready, scores.T, images, encoded, candidates, by_image=True).T
        metrics = {f"i2t_r{k}": recall(i2t.T, relevant.T, k) for k in (1, 5, 10)}
        metrics |= {f"t2i_r{k}": recall(t2i, relevant, k) for k in (1, 5, 10)}
        return evaluation.result(self.name, records, metrics, [])


def recall(scores: Tensor, relevant: Tensor, k: int) -> float:
    """Share of queries [Q, C] with a relevant candidate among their ``k`` best."""
    best = scores.topk(min(k, scores.shape[1]), -1).indices
    return relevant.gather(1, best).any(1).float().mean().item()


def rerank(
    ready: Ready, scores: Tensor, images: ImageEncoding, encoded: list[Any], candidates: int, by_image: bool = False
) -> Tensor:
    """``scores`` [Q, C] with the ``candidates`` best of each row replaced by their ITM log-odds, above all others."""
    need(ready.model.matching_head is not None, "matching head")
    scores = scores.clone()
    best = scores.topk(min(candidates, scores.shape[1]), -1).indices
    for query, chosen in enumerate(best):
        image_rows = torch.full_like(chosen, query) if by_image else chosen
        texts = [encoded[i] for i in (chosen.tolist() if by_image else [query] * len(chosen))]
        # padding never runs: the longest text of these sets the length
        length = max(int(mask.sum()) for _, mask in texts)
        text = torch.stack([torch.nn.functional.pad(t[:length], (0, 0, 0, length - len(t[:length]))) for t, _ in texts])
        mask = torch.stack([torch.nn.functional.pad(m[:length], (0, length - len(m[:length]))) for _, m in texts])
        _, fused = ready.model.fuse(images[image_rows.to(text.device)], text, mask)
        logits = ready.model.matching_logits(fused).float().cpu()
        scores[query, chosen] = 1000 + logits[:, 1] - logits[:, 0]
    return scores
