"""Visual grounding: the phrase is fused with the image, the decoder writes four box tokens (cx, cy, w, h)."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from mplug_core.data.batches import Block, Drawn
from mplug_core.data.records import Records, read_phrases
from mplug_core.data.text import clean_question
from mplug_core.model.attention import DecoderCache
from mplug_core.model.mplug import ImageEncoding, Mplug
from mplug_core.objectives.box import bins_to_box, box_iou, box_to_bins, box_token_loss
from mplug_core.recipe import DataSpec
from mplug_core.tasks.evaluation import Evaluation
from mplug_core.tasks.task import Context, EvaluateOptions, Ready, Result, Texts, need, rows


class GroundingTask:
    """Image and phrase to box."""

    name = "grounding"
    objectives = ("box",)
    options = ()

    def read(self, spec: DataSpec, text_only: bool = False) -> Records[Any]:
        return read_phrases(spec.path, spec.split)

    def encode(self, drawn: list[Drawn], rng: random.Random, texts: Texts) -> Block:
        tokenizer = texts.tokenizer
        ids, mask = texts.encode([clean_question(record.phrase) for _, record in drawn])
        bins = box_to_bins(torch.tensor([record.box for _, record in drawn]), tokenizer.bins)
        box_ids = torch.tensor([tokenizer.box_id(b) for b in range(tokenizer.bins)])
        start = torch.full((len(drawn), 1), tokenizer.cls_id)
        # the fourth token predicts nothing, so it is never read
        inputs = torch.cat([start, box_ids[bins[:, :3]]], 1)
        return {
            "image": rows(drawn), "ids": ids, "mask": mask, "inputs": inputs, "bins": bins, "box_ids": box_ids
        }  # fmt: skip

    def losses(self, model: Mplug, images: ImageEncoding, block: Block, context: Context) -> dict[str, Tensor]:
        if not context.wants("box"):
            return {}
        text = model.encode_text(block["ids"], block["mask"])
        memory, mask = model.memory(images[block["image"]], text, block["mask"])
        logits = model.decode(block["inputs"], memory, mask)
        return {"box": box_token_loss(logits, block["bins"], block["box_ids"], base=1.0)}

    def evaluate(self, ready: Ready, spec: DataSpec, options: EvaluateOptions = EvaluateOptions()) -> Result:
        """Accuracy at IoU 0.5, and the mean IoU."""
        records = self.read(spec)
        evaluation = Evaluation(ready, records.records, options.batch_size, options.limit)
        overlaps: list[float] = []
        predictions = []
        for images, drawn in evaluation:
            boxes = find_boxes(ready, images, drawn)
            truth = torch.tensor([record.box for _, record in drawn])
            overlaps += box_iou(boxes, truth).tolist()
            for (_, record), box in zip(drawn, boxes.tolist(), strict=True):
                shown = [round(v, 4) for v in box]
                predictions.append({"image": str(record.image), "phrase": record.phrase, "box": shown})
        metrics = {
            "accuracy_iou50": sum(o >= 0.5 for o in overlaps) / max(len(overlaps), 1),
            "iou": sum(overlaps) / max(len(overlaps), 1),
        }
        return evaluation.result(self.name, records, metrics, predictions)


@torch.inference_mode()
def find_boxes(ready: Ready, images: ImageEncoding, drawn: list[Drawn]) -> Tensor:
    """[n, 4] corner boxes in 0..1: four greedy steps over the box tokens alone."""
    tokenizer, model = ready.tokenizer, ready.model
    need(model.decoder is not None, "decoder")
    need(tokenizer.bins, "box tokens")
    ids, mask = ready.texts.encode([clean_question(record.phrase) for _, record in drawn])
    ids, mask = ids.to(ready.device), mask.to(ready.device)
    memory, memory_mask = model.memory(images[rows(drawn).to(ready.device)], model.encode_text(ids, mask), mask)
    box_ids = torch.tensor([tokenizer.box_id(b) for b in range(tokenizer.bins)], device=ready.device)
    token = torch.full((len(drawn), 1), tokenizer.cls_id, device=ready.device)
    cache = DecoderCache(len(model.decoder.layers))
    bins = []
    for _ in range(4):
        best = model.decode(token, memory, memory_mask, cache)[:, -1, box_ids].argmax(-1)
        bins.append(best)
        token = box_ids[best][:, None]
    # the middle of a bin is the best guess of what fell into it
    return bins_to_box(torch.stack(bins, 1), tokenizer.bins, 0.5).float().cpu()
