"""Visual question answering: the question is fused with the image, the decoder writes the answer."""

from __future__ import annotations

import random
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from mplug_core.data.batches import Block, Drawn
from mplug_core.data.records import Records, read_questions
from mplug_core.data.text import clean_caption, clean_question
from mplug_core.generation import Decoding
from mplug_core.model.mplug import ImageEncoding, Mplug
from mplug_core.objectives.prefix_language import sequence_loss
from mplug_core.recipe import DataSpec
from mplug_core.tasks.caption import answers
from mplug_core.tasks.evaluation import Evaluation
from mplug_core.tasks.task import Context, EvaluateOptions, Ready, Result, Texts, rows


class VqaTask:
    """Image and question to answer."""

    name = "vqa"
    objectives = ("answer",)
    options = ("decoding",)
    decoding = Decoding(strategy="greedy", min_tokens=1, max_tokens=10)

    def read(self, spec: DataSpec, text_only: bool = False) -> Records[Any]:
        return read_questions(spec.path, spec.split)

    def encode(self, drawn: list[Drawn], rng: random.Random, texts: Texts) -> Block:
        ids, mask = texts.encode([clean_question(record.question) for _, record in drawn])
        chosen = [rng.choices(record.answers, record.weights)[0] for _, record in drawn]
        target_ids, target_mask = texts.encode([clean_caption(answer) for answer in chosen])
        return {
            "image": rows(drawn), "ids": ids, "mask": mask, "target_ids": target_ids, "target_mask": target_mask
        }  # fmt: skip

    def losses(self, model: Mplug, images: ImageEncoding, block: Block, context: Context) -> dict[str, Tensor]:
        if not context.wants("answer"):
            return {}
        text = model.encode_text(block["ids"], block["mask"])
        memory, mask = model.memory(images[block["image"]], text, block["mask"])
        logits = model.decode(block["target_ids"], memory, mask)
        return {"answer": sequence_loss(logits, block["target_ids"], block["target_mask"])}

    def evaluate(self, ready: Ready, spec: DataSpec, options: EvaluateOptions = EvaluateOptions()) -> Result:
        """Accuracy of the exact answer, also by kind of question: right if three of ten annotators gave it, in parts
        if fewer."""
        records = self.read(spec)
        evaluation = Evaluation(ready, records.records, options.batch_size, options.limit)
        right: dict[str, list[float]] = defaultdict(list)
        predictions = []
        for images, drawn in evaluation:
            found = answer_questions(ready, images, drawn, options.decoding or self.decoding)
            for (_, record), answer in zip(drawn, found, strict=True):
                share = sum(
                    w for a, w in zip(record.answers, record.weights, strict=True) if clean_caption(a) == answer
                )
                # three of ten annotators make an answer right; a single given answer has the whole share
                score = min(1.0, share * 10 / 3)
                right["accuracy"].append(score)
                if record.kind:
                    right[f"accuracy_{record.kind}"].append(score)
                predictions.append({"image": str(record.image), "question": record.question, "answer": answer})
        metrics = {name: sum(values) / len(values) for name, values in sorted(right.items())}
        return evaluation.result(self.name, records, metrics, predictions)


@torch.inference_mode()
def answer_questions(ready: Ready, images: ImageEncoding, drawn: list[Drawn], decoding: Decoding) -> list[str]:
    """An answer to each question; images are encoded once however many questions they have."""
    ids, mask = ready.texts.encode([clean_question(record.question) for _, record in drawn])
    ids, mask = ids.to(ready.device), mask.to(ready.device)
    text = ready.model.encode_text(ids, mask)
    memory, memory_mask = ready.model.memory(images[rows(drawn).to(ready.device)], text, mask)
    return [found[0].text for found in answers(ready, memory, memory_mask, decoding)]
