"""Visual grounding: the phrase is fused with the image, the decoder writes four box tokens (cx, cy, w, h).

The tokens are shares of the model's square, which the picture fills as its placement says; records and answers are in
shares of the picture.

A box is right if it overlaps the true one by half, so the best answer of a model that is not sure is not its most
probable sequence of tokens, which may be one of many small boxes, but the box that overlaps most of what it thinks
possible (minimum Bayes risk, Kumar and Byrne 2004). ``draws=0`` decodes greedily, as the released code does.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mplug_core.data.batches import Block, Drawn
from mplug_core.data.records import PhraseRecord, Records, read_phrases
from mplug_core.data.text import clean_question
from mplug_core.metrics.calibration import calibration_measures
from mplug_core.metrics.grounding import box_measures, right_boxes
from mplug_core.model.attention import DecoderCache
from mplug_core.model.mplug import ImageEncoding, MplugModel
from mplug_core.objectives.box import bins_to_box, box_iou, box_to_bins, box_token_loss
from mplug_core.recipe import DataSpec
from mplug_core.tasks.confidence import SHOWN, Evidence, certainty, log_odds
from mplug_core.tasks.evaluation import Evaluation
from mplug_core.tasks.task import Context, EvaluateOptions, Ready, Result, Scored, Texts, need, rows

DRAWS = 32
"""Boxes drawn from the model for each phrase, of which the safest is the answer."""


class GroundingTask:
    """Image and phrase to box.

    A phrase weighs ``base + l1 * L1 + giou * (1 - GIoU)`` in the loss, by how wrong its box is; without ``base`` one
    whose four tokens are right would no longer be learned.
    """

    name = "grounding"
    objectives = ("box",)
    options = ("draws",)
    identifier, text = "phrase_id", "phrase"
    base, l1, giou = 1.0, 1.0, 1.0

    def read(self, spec: DataSpec, text_only: bool = False) -> Records[Any]:
        return read_phrases(spec.path, spec.split, spec.format, spec.images)

    def encode(self, drawn: list[Drawn], rng: random.Random, texts: Texts) -> Block:
        """The records' boxes are shares of the model's square."""
        tokenizer = texts.tokenizer
        ids, mask = texts.read([clean_question(record.phrase) for _, record in drawn])
        bins = box_to_bins(torch.tensor([record.box for _, record in drawn]), tokenizer.bins)
        box_ids = torch.tensor([tokenizer.box_id(b) for b in range(tokenizer.bins)])
        start = torch.full((len(drawn), 1), tokenizer.cls_id)
        # the fourth token predicts nothing, so it is never read
        inputs = torch.cat([start, box_ids[bins[:, :3]]], 1)
        return {
            "image": rows(drawn), "ids": ids, "mask": mask, "inputs": inputs, "bins": bins, "box_ids": box_ids
        }  # fmt: skip

    def losses(self, model: MplugModel, images: ImageEncoding, block: Block, context: Context) -> dict[str, Tensor]:
        if not context.wants("box"):
            return {}
        text = model.encode_text(block["ids"], block["mask"])
        memory, mask = model.memory(images[block["image"]], text, block["mask"])
        logits = model.decode(block["inputs"], memory, mask)
        loss = box_token_loss(logits, block["bins"], block["box_ids"], base=self.base, l1=self.l1, giou=self.giou)
        return {"box": loss}

    def evaluate(self, ready: Ready, spec: DataSpec, options: EvaluateOptions = EvaluateOptions()) -> Result:
        """Accuracy at IoU 0.5, the calibration error against it, and the mean IoU, of boxes in the picture."""
        records = self.read(spec)
        evaluation = Evaluation(ready, records.records, options.batch_size, options.limit)
        draws = DRAWS if options.draws is None else options.draws
        predictions: list[dict[str, Any]] = []
        evidence = Evidence("grounding")
        for images, drawn in evaluation:
            where = [images[0] for images, _ in drawn]
            boxes, confidences = find_boxes(ready, images, where, [record.phrase for _, record in drawn], draws)
            found = zip(boxes.tolist(), confidences.tolist(), strict=True)
            for ((row,), record), (box, confidence) in evaluation.sound(drawn, list(found)):
                here = pixels(record, evaluation.as_stated(record, evaluation.placements[row].to_picture(box)))
                said = {"box": here, "confidence": round(confidence, SHOWN)}
                predictions.append(self.identity(record) | said | self.truth(record))
                evidence.add(confidence, [log_odds("grounding", confidence)])
        return evaluation.scored(self, records, predictions, evidence)

    def identity(self, record: PhraseRecord) -> dict[str, Any]:
        shown = {"phrase_id": record.phrase_id} if record.phrase_id else {}
        return shown | {"image": str(record.image), "phrase": record.phrase, "size": list(record.size or (1, 1))}

    def truth(self, record: PhraseRecord) -> dict[str, Any]:
        return {"truth": pixels(record, record.box)} | ({"kind": record.kind} if record.kind else {})

    def score(self, records: Sequence[PhraseRecord], predictions: Sequence[Mapping[str, Any]], source: Path) -> Scored:
        images, kinds = [record.image for record in records], [record.kind for record in records]
        sure, right = [prediction.get("confidence") for prediction in predictions], self.rightness(records, predictions)
        measures = box_measures(*_in_shares(records, predictions), images, kinds)
        return measures | calibration_measures(images, sure, right), []

    def rightness(self, records: Sequence[PhraseRecord], predictions: Sequence[Mapping[str, Any]]) -> list[bool]:
        """Whether each box overlaps the true one by half."""
        return right_boxes(*_in_shares(records, predictions))


def _in_shares(records: Sequence[PhraseRecord], predictions: Sequence[Mapping[str, Any]]) -> tuple[Tensor, Tensor]:
    """The boxes of predictions and those of their records, in shares of the pictures: [n, 4] each."""
    sizes = torch.tensor([prediction["size"] * 2 for prediction in predictions], dtype=torch.double)
    found = torch.tensor([prediction["box"] for prediction in predictions], dtype=torch.double) / sizes
    return found, torch.tensor([record.box for record in records], dtype=torch.double)


def pixels(record: PhraseRecord, box: Sequence[float]) -> list[float]:
    """A box in shares of the picture in pixels of the size that the record's file states, to a hundredth; in shares
    where it states none."""
    if record.size is None:
        return [round(value, 6) for value in box]
    return [round(value * side, 2) for value, side in zip(box, record.size * 2, strict=True)]


@torch.inference_mode()
def find_boxes(
    ready: Ready, images: ImageEncoding, rows: Sequence[int], phrases: Sequence[str], draws: int = DRAWS
) -> tuple[Tensor, Tensor]:
    """Where each phrase points in its image, row ``rows[i]`` of the encoding.

    Returns:
        Corner boxes [n, 4] as shares of the model's square (:meth:`Placement.to_picture` makes them the picture's),
        and confidences [n]: how probable an overlap of a half is, by the share of the drawn boxes that overlap so,
        calibrated as the model says; or without ``draws`` the geometric mean of the tokens' probabilities, which is
        not calibrated. Both float32 on the CPU, and NaN where the model computes what is not a number.
    """
    tokenizer, model = ready.tokenizer, ready.model
    need(model.decoder is not None, "decoder")
    need(tokenizer.bins, "box tokens")
    ids, mask = ready.texts.read([clean_question(phrase) for phrase in phrases])
    ids, mask = ids.to(ready.device), mask.to(ready.device)
    here = images[torch.tensor(list(rows), dtype=torch.long, device=ready.device)]
    memory, memory_mask = model.memory(here, model.encode_text(ids, mask), mask)
    box_ids = torch.tensor([tokenizer.box_id(b) for b in range(tokenizer.bins)], device=ready.device)
    bins, confidence = decode_bins(model, memory, memory_mask, box_ids, tokenizer.cls_id)
    # the middle of a bin is the best guess of what fell into it
    boxes = bins_to_box(bins, tokenizer.bins, 0.5).float()
    spoiled = ~confidence.isfinite()
    if draws:
        drawn = draw_bins(model, memory, memory_mask, box_ids, tokenizer.cls_id, draws)
        spoiled |= (drawn < 0).flatten(1).any(1)
        boxes, share = safest(boxes, bins_to_box(drawn, tokenizer.bins, 0.5).float())
        confidence = torch.tensor([certainty(ready.config, "grounding", value) for value in share.tolist()])
    boxes, confidence, spoiled = boxes.cpu(), confidence.float().cpu(), spoiled.cpu()
    return boxes.masked_fill(spoiled[:, None], torch.nan), confidence.masked_fill(spoiled, torch.nan)


def draw_bins(
    model: MplugModel, memory: Tensor, memory_mask: Tensor, box_ids: Tensor, start: int, draws: int
) -> Tensor:
    """Bins [n, ``draws``, 4] drawn from the model's distribution over box tokens; -1 where that is not one of numbers.

    The draws are spread evenly over the probability of each token (a Latin hypercube) and are the same for every
    phrase, so that an answer does not depend on chance or on what else is in the batch.
    """
    generator = torch.Generator().manual_seed(0)
    orders = torch.stack([torch.randperm(draws, generator=generator) for _ in range(4)])
    levels = ((orders + 0.5) / draws).to(memory.device)
    token = torch.full((len(memory) * draws, 1), start, device=memory.device)
    cache = DecoderCache(len(model.decoder.layers))
    bins = []
    for step in range(4):
        shares = model.decode(token, memory, memory_mask, cache)[:, -1, box_ids].float().softmax(-1)
        level = levels[step].repeat(len(memory))[:, None]
        drawn = (shares.cumsum(-1) < level).sum(-1).clamp(max=len(box_ids) - 1)
        bins.append(drawn.masked_fill(shares[:, 0].isnan(), -1))
        token = box_ids[drawn][:, None]
    return torch.stack(bins, 1).view(len(memory), draws, 4)


def safest(greedy: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor]:
    """Of the greedy box [n, 4] and the ``drawn`` ones [n, S, 4] the one that overlaps most of the drawn by half.

    Among equals the mean IoU decides. Returns the boxes [n, 4] and that share [n].
    """
    candidates = torch.cat([greedy[:, None], drawn], 1)
    overlap = box_iou(candidates[:, :, None], drawn[:, None])
    share, mean = (overlap >= 0.5).float().mean(-1), overlap.mean(-1)
    best = (share + 0.01 * mean).argmax(1)
    here = torch.arange(len(best), device=best.device)
    return candidates[here, best], share[here, best]


def decode_bins(
    model: MplugModel, memory: Tensor, memory_mask: Tensor, box_ids: Tensor, start: int
) -> tuple[Tensor, Tensor]:
    """Four greedy steps over the box tokens alone, behind the token ``start`` ([CLS] here; the released models have
    one of their own).

    Returns:
        Bins [n, 4] of cx, cy, w, h, and [n] the geometric mean of the four tokens' probabilities among box tokens.
    """
    token = torch.full((len(memory), 1), start, device=memory.device)
    cache = DecoderCache(len(model.decoder.layers))
    bins, logs = [], []
    for _ in range(4):
        scores = model.decode(token, memory, memory_mask, cache)[:, -1, box_ids].float().log_softmax(-1)
        log, best = scores.max(-1)
        bins.append(best)
        logs.append(log)
        token = box_ids[best][:, None]
    return torch.stack(bins, 1), torch.stack(logs, 1).mean(1).exp()
