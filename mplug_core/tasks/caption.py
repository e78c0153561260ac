"""Captioning: the decoder looks at the image's tokens alone (paper section 3.4)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mplug_core.data.batches import Block, Drawn
from mplug_core.data.records import Records, read_captions
from mplug_core.data.scenes import caption_correct, read_scenes
from mplug_core.data.text import clean_caption
from mplug_core.generation import Decoding, generate
from mplug_core.metrics.caption import score_captions
from mplug_core.model.mplug import ImageEncoding, Mplug
from mplug_core.objectives.prefix_language import sequence_loss
from mplug_core.recipe import DataSpec
from mplug_core.tasks.evaluation import Evaluation
from mplug_core.tasks.task import Context, EvaluateOptions, Ready, Result, Texts, need, rows


@dataclass(frozen=True)
class Answer:
    """A generated text, its score (see :class:`Decoding`) and the geometric mean of its token probabilities."""

    text: str
    score: float
    confidence: float


def forbidden_tokens(ready: Ready) -> list[int]:
    """Ids that are never part of a text: padding, start, mask, unknown, boxes."""
    tokenizer = ready.tokenizer
    return sorted((tokenizer.special_ids | {tokenizer.unk_id}) - {tokenizer.sep_id})


@torch.inference_mode()
def describe(
    ready: Ready, images: ImageEncoding, decoding: Decoding, generator: torch.Generator | None = None
) -> list[list[Answer]]:
    """The ``decoding.best`` captions of each image, best first."""
    memory, mask = ready.model.memory(images)
    return answers(ready, memory, mask, decoding, generator)


def answers(
    ready: Ready, memory: Tensor, mask: Tensor, decoding: Decoding, generator: torch.Generator | None = None
) -> list[list[Answer]]:
    """Texts generated from a memory."""
    tokenizer = ready.tokenizer
    need(ready.model.decoder is not None, "decoder")
    found = generate(
        ready.model.decoder, memory, mask, decoding, start=tokenizer.cls_id, end=tokenizer.sep_id,
        forbidden=forbidden_tokens(ready), generator=generator,
    )  # fmt: skip
    return [[Answer(tokenizer.decode(h.ids), h.score, h.confidence) for h in row] for row in found]


def caption_images(
    ready: Ready, pixels: Tensor, decoding: Decoding, generator: torch.Generator | None = None
) -> list[list[Answer]]:
    """Captions of ``pixels`` [B, 3, S, S]."""
    with torch.inference_mode():
        images = ready.model.encode_image(pixels.to(ready.device, ready.dtype))
    return describe(ready, images, decoding, generator)


class CaptionTask:
    """Image to caption."""

    name = "caption"
    objectives = ("caption",)
    options = ("decoding",)
    decoding = Decoding(strategy="beam", beams=6, min_tokens=5, max_tokens=25, length_penalty=1.0, no_repeat=3)

    def read(self, spec: DataSpec, text_only: bool = False) -> Records[Any]:
        return read_captions(spec.path, spec.split, spec.format, spec.images, text_only)

    def encode(self, drawn: list[Drawn], rng: random.Random, texts: Texts) -> Block:
        ids, mask = texts.encode([clean_caption(rng.choice(record.captions)) for _, record in drawn])
        return {"image": rows(drawn), "target_ids": ids, "target_mask": mask}

    def losses(self, model: Mplug, images: ImageEncoding, block: Block, context: Context) -> dict[str, Tensor]:
        if not context.wants("caption"):
            return {}
        memory, mask = model.memory(images[block["image"]])
        logits = model.decode(block["target_ids"], memory, mask)
        loss = sequence_loss(logits, block["target_ids"], block["target_mask"], label_smoothing=context.label_smoothing)
        return {"caption": loss}

    def evaluate(self, ready: Ready, spec: DataSpec, options: EvaluateOptions = EvaluateOptions()) -> Result:
        """pycocoevalcap's metrics; on scenes also ``objects``, the share of captions with every object right."""
        records = self.read(spec)
        evaluation = Evaluation(ready, records.records, options.batch_size, options.limit)
        decoding = options.decoding
        if decoding is None:
            # the grammar of scenes repeats itself: "and a small" comes before every small object
            decoding = self.decoding.model_copy(update={"no_repeat": 0} if scene_graphs(records.source) else {})
        predictions = []
        for images, drawn in evaluation:
            chosen = images[rows(drawn)]
            for (_, record), found in zip(drawn, describe(ready, chosen, decoding), strict=True):
                predictions.append((record, found[0]))
        captions = {record.image_id: answer.text for record, answer in predictions}
        references = {record.image_id: list(record.captions) for record, _ in predictions}
        metrics = scene_metrics(records.source, predictions) or score_captions(captions, references)
        listed = [{"image": str(r.image), "caption": a.text, "score": round(a.score, 4)} for r, a in predictions]
        return evaluation.result(self.name, records, metrics, listed)


def scene_graphs(source: Path) -> Path | None:
    """The scene graphs beside a file of captions, where there are some."""
    graphs = source.parent / "scenes.jsonl"
    return graphs if graphs.is_file() else None


def scene_metrics(source: Path, predictions: Sequence[tuple[Any, Answer]]) -> dict[str, float] | None:
    """The share of captions that name exactly the objects of their scene, where there are scene graphs."""
    graphs = scene_graphs(source)
    if graphs is None:
        return None
    scenes = {path: scene for path, scene in read_scenes(graphs)}
    right = [caption_correct(answer.text, scenes[record.image]) for record, answer in predictions]
    return {"objects": sum(right) / max(len(right), 1)}
