"""Visual question answering: the question is fused with the image, the decoder writes the answer (paper section 4.2).

A question is trained on all of its answers, each with its share of the annotators. Where several answers are one set
(DAQUAR, see :mod:`mplug_core.metrics.vqa`) the target is all of them, joined by commas.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from math import exp
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mplug_core.data.batches import Block, Drawn
from mplug_core.data.records import QuestionRecord, Records, read_questions
from mplug_core.data.text import clean_question
from mplug_core.errors import DataError
from mplug_core.generation import Decoding, rank
from mplug_core.metrics.calibration import calibration_measures
from mplug_core.metrics.intervals import clusters_of
from mplug_core.metrics.vqa import accuracy, answer_measures
from mplug_core.model.mplug import ImageEncoding, MplugModel
from mplug_core.objectives.prefix_language import sequence_loss
from mplug_core.recipe import DataSpec
from mplug_core.tasks.caption import Answer, answers
from mplug_core.tasks.confidence import SHOWN, Evidence, certainty, log_odds, shares
from mplug_core.tasks.evaluation import Evaluation
from mplug_core.tasks.task import Context, EvaluateOptions, Ready, Result, Scored, Texts, need, rows

QUESTIONS_AT_ONCE = 128
"""Most questions that are fused and answered together, however many an image has."""

RANKED_FURTHER = 128
"""Candidates of a list, the best by their first token, of which the whole text is scored: as many as released."""


class VqaTask:
    """Image and question to answer."""

    name = "vqa"
    objectives = ("answer",)
    options = ("decoding", "answers")
    identifier, text = "question_id", "question"
    decoding = Decoding(strategy="greedy", min_tokens=1, max_tokens=10)

    def read(self, spec: DataSpec, text_only: bool = False) -> Records[Any]:
        return read_questions(spec.path, spec.split, spec.format, spec.images, text_only)

    def encode(self, drawn: list[Drawn], rng: random.Random, texts: Texts) -> Block:
        """Of Q questions with A answers in all: ``image`` [Q], ``ids`` and ``mask`` [Q, T]; ``target_ids`` and
        ``target_mask`` [A, L], ``question`` [A] (the row that an answer belongs to, ascending) and ``weights`` [A].

        Questions without an answer are left out. If none has one, a question with an empty answer of weight 0 stays,
        so that every process goes through the same parts of the model.
        """
        targets = [(item, weighted_answers(item[1], texts.answers)) for item in drawn if item[1].answers]
        targets = targets or [(drawn[0], [("", 0.0)])]
        ids, mask = texts.read([clean_question(record.question) for (_, record), _ in targets])
        listed = [(row, *pair) for row, (_, pairs) in enumerate(targets) for pair in pairs]
        target_ids, target_mask = texts.encode([answer for _, answer, _ in listed])
        return {
            "image": rows([item for item, _ in targets]), "ids": ids, "mask": mask,
            "target_ids": target_ids, "target_mask": target_mask,
            "question": torch.tensor([row for row, _, _ in listed]),
            "weights": torch.tensor([weight for _, _, weight in listed]),
        }  # fmt: skip

    def losses(self, model: MplugModel, images: ImageEncoding, block: Block, context: Context) -> dict[str, Tensor]:
        """``answer``: sum over answers of weight * (sum over its tokens), over the number of questions."""
        if not context.wants("answer"):
            return {}
        hidden, taught, teacher_head = self._hidden(model, images, block), None, None
        if context.teacher is not None and context.alpha > 0:
            teacher = context.teacher.model
            with torch.no_grad(), context.autocast():
                taught = self._hidden(teacher, context.teacher_images(), block)
            teacher_head = context.taught(teacher.decoder.logits)
        loss = sequence_loss(
            hidden, block["target_ids"], block["target_mask"], block["weights"], "sequence",
            head=model.decoder.logits, denominator=len(block["ids"]),
            teacher_hidden=taught, teacher_head=teacher_head,
            alpha=0.0 if taught is None else context.alpha, label_smoothing=context.label_smoothing,
        )  # fmt: skip
        return {"answer": loss}

    def _hidden(self, model: MplugModel, images: ImageEncoding, block: Block) -> Tensor:
        text = model.encode_text(block["ids"], block["mask"])
        memory, mask = model.memory(images[block["image"]], text, block["mask"])
        # the last token predicts nothing
        return decode_answers(model, memory, mask, block["target_ids"][:, :-1], block["question"])

    def evaluate(self, ready: Ready, spec: DataSpec, options: EvaluateOptions = EvaluateOptions()) -> Result:
        """Accuracies of :func:`mplug_core.metrics.vqa.score_answers`, and the calibration error against them. Answers
        are generated, or with ``options.answers`` chosen from that list. Questions without a known answer are answered,
        not scored."""
        records = self.read(spec)
        evaluation = Evaluation(ready, records.records, options.batch_size, options.limit)
        predictions: list[dict[str, Any]] = []
        evidence = Evidence("vqa" if options.answers is None else "choices")
        decoding = options.decoding and options.decoding.within(ready.room, self.decoding)
        decoding = decoding or ready.decoding("vqa", self.decoding)
        for images, drawn in evaluation:
            places, asked = [place for (place,), _ in drawn], [record.question for _, record in drawn]
            if options.answers is None:
                seeds = evaluation.seeds(decoding, options.seed, places, asked)
                found = answer_questions(ready, images, places, asked, decoding, seeds)
            else:
                found = rank_answers(ready, images, places, asked, options.answers)
            for (_, record), row in evaluation.sound(drawn, found):
                best = row[0]
                said = {"answer": best.text, "confidence": round(best.confidence, SHOWN)}
                predictions.append(self.identity(record) | said | self.truth(record))
                alone = options.answers is None
                evidence.add(
                    best.confidence,
                    [log_odds("vqa", exp(best.log_probability))] if alone else [a.log_probability for a in row],
                )
        return evaluation.scored(self, records, predictions, evidence)

    def identity(self, record: QuestionRecord) -> dict[str, Any]:
        return {"question_id": record.question_id, "image": str(record.image), "question": record.question}

    def truth(self, record: QuestionRecord) -> dict[str, Any]:
        """All known answers, the most frequent first; ``together`` where they are one set."""
        order = sorted(zip(record.weights, record.answers, strict=True), key=lambda pair: -pair[0])
        known = {"truth": [answer for _, answer in order]} if order else {}
        return known | ({"together": True} if record.together else {}) | ({"kind": record.kind} if record.kind else {})

    def score(
        self, records: Sequence[QuestionRecord], predictions: Sequence[Mapping[str, Any]], source: Path
    ) -> Scored:
        measures = answer_measures([prediction["answer"] for prediction in predictions], records)
        sure, right = [p.get("confidence") for p in predictions], self.rightness(records, predictions)
        return measures | calibration_measures(clusters_of([record.image for record in records]), sure, right), []

    def rightness(
        self, records: Sequence[QuestionRecord], predictions: Sequence[Mapping[str, Any]]
    ) -> list[float | None]:
        """The accuracy of each answer."""
        return [accuracy(p["answer"], record) for record, p in zip(records, predictions, strict=True)]

    def submission(self, predictions: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Predictions of :meth:`evaluate` as the VQA evaluation server takes them. DataError for an id that is no
        number."""
        without = [p["question"] for p in predictions if not str(p["question_id"]).isdecimal()]
        if without:
            raise DataError(
                f"{len(without)} of {len(predictions)} questions have no number as id, first: {without[0]!r}",
                "the format of the VQA evaluation server needs the question_id of every question",
            )
        return [{"question_id": int(p["question_id"]), "answer": p["answer"]} for p in predictions]


def weighted_answers(record: QuestionRecord, most: int | None = None) -> list[tuple[str, float]]:
    """What a question is trained on: its answers and their weights, which sum to 1; a set is one text.

    Of more than ``most`` answers the most frequent stay, of equally frequent ones the first, and their weights are
    scaled to sum to 1 again.
    """
    if record.together:
        return [(", ".join(record.answers), 1.0)]
    pairs = list(zip(record.answers, record.weights, strict=True))
    if most is None or len(pairs) <= most:
        return pairs
    kept = sorted(pairs, key=lambda pair: -pair[1])[:most]
    mass = sum(weight for _, weight in kept)
    return [(answer, weight / mass) for answer, weight in kept]


def decode_answers(model: MplugModel, memory: Tensor, mask: Tensor, ids: Tensor, question: Tensor) -> Tensor:
    """The decoder's hidden states [A, L, W] of answers ``ids`` [A, L] to the questions of ``memory`` [Q, N, W] (mask
    [Q, N]).

    ``question`` [A] is each answer's row of the memory, ascending. The answers of a question share its keys and values:
    the decoder gets as many slots for each as the question with the most answers has, and empty ones end there. That is
    cheaper than projecting the hundreds of tokens of a memory again for every answer.
    """
    counts = torch.bincount(question, minlength=len(memory))
    most = int(counts.max())
    place = torch.arange(len(ids), device=ids.device) - (counts.cumsum(0) - counts)[question]
    slots = question * most + place
    grid = ids.new_zeros(len(memory) * most, ids.shape[1])
    grid[slots] = ids
    return model.decoder(grid, memory, mask)[slots]


def answer_questions(
    ready: Ready,
    images: ImageEncoding,
    rows: Sequence[int],
    questions: Sequence[str],
    decoding: Decoding,
    seeds: Sequence[int] | None = None,
) -> list[list[Answer]]:
    """The ``decoding.best`` answers to each question, best first; ``rows`` are the rows of ``images`` they are about.

    An image is encoded once however many questions it has. Confidences are calibrated as the model says. ``seeds`` are
    those of the questions, see :func:`~mplug_core.generation.generate`.
    """

    def write(memory: Tensor, mask: Tensor, chosen: Sequence[int]) -> list[list[Answer]]:
        own = None if seeds is None else [seeds[question] for question in chosen]
        return [
            [replace(a, confidence=certainty(ready.config, "vqa", exp(a.log_probability), a.confidence)) for a in row]
            for row in answers(ready, memory, mask, decoding, own)
        ]

    return _in_parts(ready, images, rows, questions, write)


def rank_answers(
    ready: Ready, images: ImageEncoding, rows: Sequence[int], questions: Sequence[str], answers: Sequence[str]
) -> list[list[Answer]]:
    """For each question the given answers, the likeliest first: all, or of a long list the best
    :data:`RANKED_FURTHER`.

    An answer's score is its log-likelihood, its confidence the probability among those that are listed, calibrated as
    the model says. DataError for an empty list.
    """
    listed = list(dict.fromkeys(answers))
    if not listed:
        raise DataError("no answers to choose from", "give at least one")
    ids, mask = (tensor.to(ready.device) for tensor in ready.texts.encode(listed))

    def choose(memory: Tensor, memory_mask: Tensor, _: Sequence[int]) -> list[list[Answer]]:
        need(ready.model.decoder is not None, "decoder")
        ranking = rank(ready.model.decoder, memory, memory_mask, ids, mask, first=RANKED_FURTHER)
        confidence = shares(ready.config, "choices", ranking.log_likelihood)
        columns = (tensor.tolist() for tensor in (ranking.candidates, ranking.log_likelihood, confidence))
        return [
            [Answer(listed[i], score, sure, log_probability=score) for i, score, sure in zip(*row, strict=True)]
            for row in zip(*columns, strict=True)
        ]

    return _in_parts(ready, images, rows, questions, choose)


@torch.inference_mode()
def _in_parts(
    ready: Ready,
    images: ImageEncoding,
    rows: Sequence[int],
    questions: Sequence[str],
    answer: Callable[[Tensor, Tensor, Sequence[int]], list[list[Answer]]],
) -> list[list[Answer]]:
    """``answer`` of the memory and mask of so many questions at a time and their numbers, in the order of
    ``questions``.

    Questions on the same image are fused together, those of like length next to each other.
    """
    if not len(questions):
        return []
    ids, mask = ready.texts.read([clean_question(question) for question in questions])
    lengths = mask.sum(1).tolist()
    order = sorted(range(len(questions)), key=lambda question: (rows[question], lengths[question]))
    found: dict[int, list[Answer]] = {}
    for start in range(0, len(order), QUESTIONS_AT_ONCE):
        chosen, memories, masks = [], [], []
        for alike in _by_image(order[start : start + QUESTIONS_AT_ONCE], rows):
            some = [question for group in alike for question in group]
            longest = max(lengths[question] for question in some)
            text, text_mask = (part[some, :longest].to(ready.device) for part in (ids, mask))
            seen = images[torch.tensor([rows[group[0]] for group in alike], device=ready.device)]
            memory, memory_mask = ready.model.memory(seen, ready.model.encode_text(text, text_mask), text_mask)
            chosen += some
            memories.append(memory)
            masks.append(memory_mask)
        longest = max(memory.shape[1] for memory in memories)
        memory = torch.cat([F.pad(part, (0, 0, 0, longest - part.shape[1])) for part in memories])
        memory_mask = torch.cat([F.pad(part, (0, longest - part.shape[1])) for part in masks])
        found.update(zip(chosen, answer(memory, memory_mask, chosen), strict=True))
    return [found[question] for question in range(len(questions))]


def _by_image(questions: Sequence[int], rows: Sequence[int]) -> list[list[list[int]]]:
    """``questions``, sorted by their image, in groups on one image; groups of the same size are together, so that they
    can be fused at once without copies."""
    alike: dict[int, list[list[int]]] = {}
    for _, group in groupby(questions, key=lambda question: rows[question]):
        members = list(group)
        alike.setdefault(len(members), []).append(members)
    return list(alike.values())
