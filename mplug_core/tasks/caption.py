"""Captioning: the decoder looks at the image's tokens alone (paper section 3.4).

A captioner learns the words of captions (``caption``), and then whole captions by their CIDEr (``self_critical``).
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mplug_core.data.batches import Block, Drawn
from mplug_core.data.records import Records, read_captions
from mplug_core.data.scenes import caption_correct, read_scenes
from mplug_core.data.text import Tokenizer, clean_caption
from mplug_core.errors import DataError
from mplug_core.generation import Answer, Decoding, generate
from mplug_core.metrics.caption import caption_measures
from mplug_core.metrics.cider import Cider, Tokens, caption_tokens
from mplug_core.metrics.intervals import Measure, mean
from mplug_core.model.mplug import ImageEncoding, MplugModel
from mplug_core.objectives.prefix_language import sequence_loss
from mplug_core.objectives.self_critical import self_critical
from mplug_core.recipe import DataSpec
from mplug_core.tasks.confidence import SHOWN
from mplug_core.tasks.evaluation import Evaluation
from mplug_core.tasks.task import Context, EvaluateOptions, Ready, Result, Scored, Texts, need, rows


def forbidden_tokens(tokenizer: Tokenizer) -> list[int]:
    """Ids that are never part of a text: padding, start, mask, unknown, boxes."""
    return sorted((tokenizer.special_ids | {tokenizer.unk_id}) - {tokenizer.sep_id})


@torch.inference_mode()
def describe(
    ready: Ready, images: ImageEncoding, decoding: Decoding, seeds: Sequence[int] | None = None
) -> list[list[Answer]]:
    """The ``decoding.best`` captions of each image, best first; ``seeds`` as of :func:`generate`."""
    memory, mask = ready.model.memory(images)
    return answers(ready, memory, mask, decoding, seeds)


def answers(
    ready: Ready, memory: Tensor, mask: Tensor, decoding: Decoding, seeds: Sequence[int] | None = None
) -> list[list[Answer]]:
    """Texts generated from a memory."""
    tokenizer = ready.tokenizer
    need(ready.model.decoder is not None, "decoder")
    found = generate(
        ready.model.decoder, memory, mask, decoding, start=tokenizer.cls_id, end=tokenizer.sep_id,
        forbidden=forbidden_tokens(tokenizer), seeds=seeds,
    )  # fmt: skip
    return [
        [Answer(tokenizer.decode(h.ids), h.score, h.confidence, log_probability=h.log_probability) for h in row]
        for row in found
    ]


def caption_images(
    ready: Ready, pixels: Tensor, decoding: Decoding, seeds: Sequence[int] | None = None
) -> list[list[Answer]]:
    """Captions of ``pixels`` [B, 3, S, S]."""
    with torch.inference_mode():
        images = ready.model.encode_image(pixels.to(ready.device, ready.dtype))
    return describe(ready, images, decoding, seeds)


class CaptionTask:
    """Image to caption."""

    name = "caption"
    objectives = ("caption", "self_critical")
    options = ("decoding",)
    identifier, text = "image_id", ""
    decoding = Decoding(strategy="beam", beams=6, min_tokens=5, max_tokens=25, length_penalty=1.0, no_repeat=3)

    def __init__(self) -> None:
        self.reward: CaptionReward | None = None

    def prepare(self, records: Sequence[Any], texts: Texts, objectives: Sequence[str]) -> None:
        """Before training, once for every source: count the words of its captions, if they will be rewarded.

        DataError where an image has no caption.
        """
        bare = [record for record in records if not record.captions]
        if bare:
            raise DataError(
                f"{len(bare)} of {len(records)} images have no caption to learn from; the first is {bare[0].image_id}",
                "train on a split with captions",
            )
        if "self_critical" not in objectives:
            return
        if self.reward is None:
            self.reward = CaptionReward(texts.tokenizer)
        self.reward.count(record.captions for record in records)

    def read(self, spec: DataSpec, text_only: bool = False) -> Records[Any]:
        return read_captions(spec.path, spec.split, spec.format, spec.images, text_only)

    def encode(self, drawn: list[Drawn], rng: random.Random, texts: Texts) -> Block:
        ids, mask = texts.encode([clean_caption(rng.choice(record.captions)) for _, record in drawn])
        block = {"image": rows(drawn), "target_ids": ids, "target_mask": mask}
        if self.reward is not None:
            block["references"] = [[caption_tokens(text) for text in record.captions] for _, record in drawn]
        return block

    def losses(self, model: MplugModel, images: ImageEncoding, block: Block, context: Context) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = {}
        if context.wants("caption") or context.wants("self_critical"):
            memory, mask = model.memory(images[block["image"]])
        if context.wants("caption"):
            ids = block["target_ids"]
            losses["caption"] = sequence_loss(
                model.hidden(ids, block["target_mask"], memory, mask), ids, block["target_mask"],
                head=model.decoder.logits, label_smoothing=context.label_smoothing,
            )  # fmt: skip
        if context.wants("self_critical"):
            losses["self_critical"] = self._self_critical(model, memory, mask, block["references"], context)
        return losses

    def _self_critical(
        self, model: MplugModel, memory: Tensor, mask: Tensor, references: list[list[Tokens]], context: Context
    ) -> Tensor:
        tokenizer, settings = self.reward.tokenizer, context.self_critical
        found = self_critical(
            model.decoder, memory, mask,
            lambda written: self.reward(written, references, settings.count_end),
            settings, start=tokenizer.cls_id, end=tokenizer.sep_id,
            forbidden=forbidden_tokens(tokenizer), generator=context.generator,
        )  # fmt: skip
        context.figures["reward"] = found.reward
        return found.loss

    def evaluate(self, ready: Ready, spec: DataSpec, options: EvaluateOptions = EvaluateOptions()) -> Result:
        """pycocoevalcap's metrics; on scenes also ``objects``, the share of captions with every object right.

        NoCaps' parts have ``cider_in``, ``cider_near`` and ``cider_out`` beside the whole's ``cider``. Images without a
        reference are captioned and not scored: on a test split there are predictions and no metrics.
        """
        records = self.read(spec)
        evaluation = Evaluation(ready, records.records, options.batch_size, options.limit)
        decoding = options.decoding
        if decoding is None:
            # the grammar of scenes repeats itself: "and a small" comes before every small object
            scenes = {"no_repeat": 0} if scene_graphs(records.source) else {}
            decoding = ready.decoding("caption", self.decoding).model_copy(update=scenes)
        else:
            decoding = decoding.within(ready.room, self.decoding)
        predictions = []
        for images, drawn in evaluation:
            seeds = evaluation.seeds(decoding, options.seed, [row for (row,), _ in drawn])
            found = describe(ready, images[rows(drawn)], decoding, seeds)
            for (_, record), (best, *_) in evaluation.sound(drawn, found):
                said = {"caption": best.text, "score": round(best.score, 4)}
                said["confidence"] = round(best.confidence, SHOWN)
                predictions.append(self.identity(record) | said | self.truth(record))
        return evaluation.scored(self, records, predictions)

    def identity(self, record: Any) -> dict[str, Any]:
        return {"image": str(record.image), "image_id": record.image_id}

    def truth(self, record: Any) -> dict[str, Any]:
        return {"truth": list(record.captions)} if record.captions else {}

    def score(self, records: Sequence[Any], predictions: Sequence[Mapping[str, Any]], source: Path) -> Scored:
        """The share of right captions on scenes, elsewhere the metrics of :func:`compare_captions`."""
        pairs = [(record, p["caption"]) for record, p in zip(records, predictions, strict=True)]
        measures = scene_measures(source, pairs)
        return compare_captions(pairs) if measures is None else (measures, [])

    def submission(self, predictions: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Predictions of :meth:`evaluate` in COCO's results format: one caption an image, ids as numbers where they are
        numbers."""
        captions: dict[int | str, str] = {}
        for prediction in predictions:
            name = str(prediction["image_id"])
            captions.setdefault(int(name) if name.isascii() and name.isdigit() else name, prediction["caption"])
        return [{"image_id": image_id, "caption": caption} for image_id, caption in captions.items()]


class CaptionReward:
    """CIDEr of generated captions against all captions of their image, with words weighed by the training captions."""

    END = "[SEP]"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.cider = tokenizer, Cider()

    def count(self, images: Iterable[Sequence[str]]) -> None:
        """Add the captions of further images to those that weigh the words."""
        self.cider.count([(*caption_tokens(text), self.END) for text in captions] for captions in images)

    def __call__(
        self, written: list[list[list[int]]], references: list[list[Tokens]], count_end: bool = True
    ) -> list[list[float]]:
        """Of ids [images][captions] the CIDEr against tokens [images][references], 0 .. 10.

        ``count_end`` makes the end a word: a caption that breaks off lacks it, and one that stops after "with a" has
        the end where no reference does.
        """
        end = (self.END,) if count_end else ()
        return [
            self.cider.scores([self.tokens(ids, end) for ids in row], [(*tokens, *end) for tokens in known])
            for row, known in zip(written, references, strict=True)
        ]

    def tokens(self, ids: list[int], end: tuple[str, ...]) -> tuple[str, ...]:
        """The tokens that a caption is compared by; with ``end`` if it has reached its end."""
        tokens = caption_tokens(self.tokenizer.decode(ids))
        return (*tokens, *end) if ids and ids[-1] == self.tokenizer.sep_id else tokens


def compare_captions(predictions: Sequence[tuple[Any, str]]) -> Scored:
    """Metrics of (record, caption) pairs, none where no record has a caption; and a line on each thing left out."""
    notes: list[str] = []
    # by number: images of different folders may have the same id
    known = {str(number): (r, text) for number, (r, text) in enumerate(predictions) if r.captions}
    if len(known) < len(predictions):
        notes.append(f"{len(predictions) - len(known)} images have no captions to compare with")
    if not known:
        return {}, notes
    measures = caption_measures(
        {key: text for key, (_, text) in known.items()},
        {key: list(record.captions) for key, (record, _) in known.items()},
        note=notes.append,
        # NoCaps writes in-domain, near-domain, out-domain
        parts={key: record.domain.split("-")[0] for key, (record, _) in known.items() if record.domain},
    )
    return measures, notes


def scene_graphs(source: Path) -> Path | None:
    """The scene graphs beside a file of captions, where there are some."""
    graphs = source.parent / "scenes.jsonl"
    return graphs if graphs.is_file() else None


def scene_measures(source: Path, predictions: Sequence[tuple[Any, str]]) -> dict[str, Measure] | None:
    """The share of captions that name exactly the objects of their scene, where there are scene graphs."""
    graphs = scene_graphs(source)
    if graphs is None:
        return None
    scenes = {path: scene for path, scene in read_scenes(graphs)}
    right = [caption_correct(text, scenes[record.image]) for record, text in predictions]
    return {"objects": mean([record.image for record, _ in predictions], right)}
