"""Many captions or questions on one image: with the image shared among them, against each by itself."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mplug_core.bench.measure import Machine, Report, Timing, take_turns
from mplug_core.bench.opponents import RERANK as OPPONENTS
from mplug_core.bench.peers import blip_matching
from mplug_core.data.text import SPECIAL_TOKENS, Tokenizer
from mplug_core.errors import MplugError
from mplug_core.generation import Decoding
from mplug_core.model.config import MplugConfig
from mplug_core.model.mplug import MplugModel
from mplug_core.objectives.matching import MATCH
from mplug_core.tasks.ranking import encode_texts, match
from mplug_core.tasks.task import Ready
from mplug_core.tasks.vqa import answer_questions

LABELS = {
    "mplug": "mPLUG",
    "image-shared": "mPLUG, image encoded once, keys and values not shared",
    "plain": "mPLUG, nothing shared",
    "hf-blip": "HF BLIP's matching, nothing shared",
}


@dataclass(frozen=True)
class Amounts:
    """How much is measured. What is slow is measured on fewer, and its rate is what counts."""

    captions: int = 256
    questions: int = 32
    image_shared: int = 16
    alone: int = 4
    answer_tokens: int = 6


class Contest:
    """One model with random weights, an image, captions and questions, and the ways to score or answer them."""

    def __init__(self, config: MplugConfig, amounts: Amounts, against: Sequence[str], device: str) -> None:
        self.amounts, self.device = amounts, device
        torch.manual_seed(0)
        words = [f"w{n}" for n in range(config.vocab_size - len(SPECIAL_TOKENS))]
        self.ready = Ready(MplugModel(config).eval().to(device), Tokenizer([*SPECIAL_TOKENS, *words]))
        size = config.vision.image_size
        self.pixels = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1)).to(device)
        self.captions = texts(words, amounts.captions, 5, 20)
        self.questions = texts(words, amounts.questions, 4, 10)
        self.blip = blip_matching(self.ready.model).to(device) if "hf-blip" in against else None

    @torch.inference_mode()
    def shared(self, count: int) -> Tensor:
        """Match logits of the first ``count`` captions, as re-ranking computes them: image and texts encoded first."""
        images = self.ready.model.encode_image(self.pixels)
        encoded = encode_texts(self.ready, self.captions[:count])
        return match(self.ready, images, encoded, torch.tensor([(0, row) for row in range(count)]))

    @torch.inference_mode()
    def image_shared(self, count: int) -> Tensor:
        """The image is encoded once, and copied for every text; all texts are as long as the longest."""
        ids, mask = self._padded(count)
        model = self.ready.model
        images = model.encode_image(self.pixels)[torch.zeros(count, dtype=torch.long, device=self.device)]
        _, fused = model.fuse(images, model.encode_text(ids, mask), mask)
        return model.matching_logits(fused)[:, MATCH].cpu()

    @torch.inference_mode()
    def plain(self, count: int) -> Tensor:
        """Each pair of pixels and text goes through the whole model; all texts are as long as the longest."""
        ids, mask = self._padded(count)
        model = self.ready.model
        images = model.encode_image(self.pixels.expand(count, -1, -1, -1))
        _, fused = model.fuse(images, model.encode_text(ids, mask), mask)
        return model.matching_logits(fused)[:, MATCH].cpu()

    @torch.inference_mode()
    def hf_blip(self, count: int) -> Tensor:
        """``BlipForImageTextRetrieval`` on pixels and texts, as it is called for pairs."""
        ids, mask = self._padded(count)
        pixels = self.pixels.expand(count, -1, -1, -1)
        return self.blip(pixel_values=pixels, input_ids=ids, attention_mask=mask).itm_score[:, 1].cpu()

    def _padded(self, count: int) -> tuple[Tensor, Tensor]:
        """Ids and mask of the first captions, as long as the longest of all."""
        ids, mask = self.ready.texts.read(self.captions)
        return ids[:count].to(self.device), mask[:count].to(self.device)

    def answers(self, count: int) -> list[str]:
        """To the first ``count`` questions, all on the image, which is encoded once."""
        decoding = Decoding(
            strategy="greedy", min_tokens=self.amounts.answer_tokens, max_tokens=self.amounts.answer_tokens
        )
        with torch.inference_mode():
            images = self.ready.model.encode_image(self.pixels)
        found = answer_questions(self.ready, images, [0] * count, self.questions[:count], decoding)
        return [row[0].text for row in found]

    def answers_alone(self, count: int) -> list[str]:
        """Each question with its image by itself."""
        every, answered = self.questions, []
        try:
            for question in every[:count]:
                self.questions = [question]
                answered += self.answers(1)
        finally:
            self.questions = every
        return answered


def texts(words: Sequence[str], count: int, shortest: int, longest: int) -> list[str]:
    """Random texts of ``shortest`` to ``longest`` words."""
    drawn = random.Random(0)
    return [" ".join(drawn.choices(words, k=drawn.randint(shortest, longest))) for _ in range(count)]


def bench_rerank(
    config: MplugConfig,
    amounts: Amounts = Amounts(),
    against: Sequence[str] = OPPONENTS,
    repeats: int = 3,
    device: str = "cpu",
    advance: Callable[[str], None] = lambda name: None,
) -> Report:
    """Pairs a second of re-ranking captions on one image, and questions a second on one image.

    MplugError if sharing changes scores or answers.
    """
    contest = Contest(config, amounts, against, device)
    report = Report(
        "rerank",
        f"{amounts.captions} captions and {amounts.questions} questions on one image",
        ("work", "way", "measured", "s, median", "s, range", "a second", "mPLUG is faster"),
        Machine.here(device),
    )
    report.figures = {"width": config.width, "image_size": config.vision.image_size, "repeats": repeats, "rates": []}
    scoring: dict[str, tuple[Callable[[int], Tensor], int]] = {"mplug": (contest.shared, amounts.captions)}
    answering: dict[str, tuple[Callable[[int], list[str]], int]] = {"mplug": (contest.answers, amounts.questions)}
    if "plain" in against:
        scoring["image-shared"] = (contest.image_shared, min(amounts.image_shared, amounts.captions))
        scoring["plain"] = (contest.plain, min(amounts.alone, amounts.captions))
        answering["plain"] = (contest.answers_alone, min(amounts.alone, amounts.questions))
    if "hf-blip" in against:
        scoring["hf-blip"] = (contest.hf_blip, min(amounts.alone, amounts.captions))
    scores = _race(report, "match pairs", scoring, repeats, advance)
    answers = _race(report, "questions", answering, repeats, advance)
    for name in ("image-shared", "plain"):
        if name in scores and not torch.allclose(scores[name], scores["mplug"][: len(scores[name])], atol=1e-3):
            raise MplugError("sharing the image gave other match scores", "this is a fault: report it")
    if "plain" in answers and answers["plain"] != answers["mplug"][: len(answers["plain"])]:
        raise MplugError("sharing the image gave other answers", "this is a fault: report it")
    report.notes += [
        f"width {config.width}, {config.text_layers} text, {config.fusion_layers} fusion ({config.fusion}) and "
        f"{config.decoder_layers} decoder layers, images of {config.vision.image_size} pixels, random weights",
        "every way starts from pixels and texts: encoding them is part of it",
    ]
    if "plain" in against:
        report.notes.append("shared and not shared: the same scores and answers")
    report.notes.append(f"answers are {amounts.answer_tokens} tokens, greedy; slow ways are measured on fewer")
    if "hf-blip" in against:
        sides = contest.blip.config
        report.notes.append(
            f"HF BLIP: {sides.vision_config.num_hidden_layers} image layers, width {sides.vision_config.hidden_size}, "
            f"{sides.text_config.num_hidden_layers} text layers, all with cross-attention; its own random weights"
        )
    return report


class _Kept:
    """Does ``count`` of something, and keeps the outcome."""

    def __init__(self, way: Callable[[int], object], count: int) -> None:
        self.way, self.count = way, count
        self.outcome: object = None

    def __call__(self) -> None:
        # what comes out is on the CPU: nothing is still being computed
        self.outcome = self.way(self.count)


def _race(
    report: Report,
    work: str,
    ways: dict[str, tuple[Callable[[int], object], int]],
    repeats: int,
    advance: Callable[[str], None],
) -> dict:
    """Measure and add rows; returns what each way gave."""
    for way, count in ways.values():
        way(min(count, 2))  # enough to load and allocate what the first call does
    kept = {name: _Kept(way, count) for name, (way, count) in ways.items()}
    timings: dict[str, Timing] = take_turns(kept, repeats, warmup=0, advance=advance)
    rates = {name: kept[name].count / timing.median for name, timing in timings.items()}
    for name, timing in timings.items():
        ratio = rates["mplug"] / rates[name]
        label = "mPLUG, each question alone" if (work, name) == ("questions", "plain") else LABELS[name]
        report.rows.append((
            work, label, str(kept[name].count), f"{timing.median:.3g}", timing.spread, f"{rates[name]:.3g}",
            "" if name == "mplug" else f"{ratio:.2f}x",
        ))  # fmt: skip
        report.figures["rates"].append({
            "work": work, "way": name, "count": kept[name].count, "median": timing.median,
            "all": list(timing.seconds), "per_second": rates[name], "ratio": ratio,
        })  # fmt: skip
    return {name: action.outcome for name, action in kept.items()}
