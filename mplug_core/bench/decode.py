"""Beam-search captioning: the cached decoder against HF transformers' BLIP, and against recomputing every prefix."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from mplug_core import generation
from mplug_core.bench.allocations import peak_bytes
from mplug_core.bench.measure import Machine, Report, Timing, take_turns
from mplug_core.bench.opponents import DECODE as OPPONENTS
from mplug_core.bench.opponents import DECODE_ONCE
from mplug_core.bench.peers import blip_decoder
from mplug_core.errors import MplugError
from mplug_core.generation import Decoding, generate
from mplug_core.model.attention import DecoderCache
from mplug_core.model.config import MplugConfig
from mplug_core.model.decoder import Decoder
from mplug_core.model.mplug import initialise

OURS = "mPLUG"
START, END = 101, 102


@dataclass(frozen=True)
class Captioning:
    """What is decoded: ``beams`` of exactly ``tokens`` new tokens each, for images of ``image_tokens``."""

    image_tokens: int = 577
    beams: int = 5
    tokens: int = 20

    def decoding(self, **fields: Any) -> Decoding:
        """The search: the end is barred until the last token."""
        least = {"min_tokens": self.tokens, "max_tokens": self.tokens}
        return Decoding(**{"strategy": "beam", "beams": self.beams, **least, **fields})


class Contest:
    """One decoder's weights in each of the ways to write captions, with random image encodings as memory."""

    def __init__(self, config: MplugConfig, captioning: Captioning, against: Sequence[str], device: str) -> None:
        self.captioning = captioning
        torch.manual_seed(0)
        self.decoder = Decoder(config).eval()
        self.decoder.apply(initialise)
        self.decoder.to(device)
        self.width, self.device = config.width, device
        self.start, self.end = min(START, config.vocab_size - 2), min(END, config.vocab_size - 1)
        self.blip = blip_decoder(self.decoder, config) if "hf-blip" in against else None

    def memory(self, images: int) -> Tensor:
        """[images, N, W], normalised as an encoder's tokens are."""
        generator = torch.Generator().manual_seed(images)
        return torch.randn(images, self.captioning.image_tokens, self.width, generator=generator).to(self.device)

    def ours(self, memory: Tensor, **fields: Any) -> list[list[int]]:
        """New ids of each image's best caption; ``fields`` change the search."""
        mask = torch.ones(memory.shape[:2], dtype=torch.bool, device=memory.device)
        decoding = self.captioning.decoding(**fields)
        found = generate(self.decoder, memory, mask, decoding, start=self.start, end=self.end)
        return [row[0].ids for row in found]

    def no_cache(self, memory: Tensor) -> list[list[int]]:
        """Each step computes the whole prefix and the memory's keys and values again, these once for all beams."""
        return self.ours(memory, use_cache=False)

    def plain(self, memory: Tensor) -> list[list[int]]:
        """The same, and each beam has a copy of its image's tokens, as in the authors' released code."""
        shared = self.decoder.forward

        def unshared(ids: Tensor, memory: Tensor, mask: Tensor | None = None, *rest: Any) -> Tensor:
            beams = len(ids) // len(memory)
            mask = None if mask is None else mask.repeat_interleave(beams, 0)
            return shared(ids, memory.repeat_interleave(beams, 0), mask, *rest)

        with mock.patch.object(self.decoder, "forward", unshared):
            return self.no_cache(memory)

    @torch.inference_mode()
    def hf_blip(self, memory: Tensor) -> list[list[int]]:
        """As ``BlipForConditionalGeneration.generate`` calls its decoder: every beam has its image's tokens."""
        ids = self.blip.generate(
            torch.full((len(memory), 1), self.start, device=memory.device),
            encoder_hidden_states=memory,
            encoder_attention_mask=torch.ones(memory.shape[:2], dtype=torch.long, device=memory.device),
            eos_token_id=self.end, pad_token_id=0, bos_token_id=self.start, do_sample=False,
            num_beams=self.captioning.beams, min_new_tokens=self.captioning.tokens,
            max_new_tokens=self.captioning.tokens, length_penalty=self.captioning.decoding().length_penalty,
        )  # fmt: skip
        return ids[:, 1:].tolist()

    def ways(self, against: Sequence[str]) -> dict[str, Callable[[Tensor], list[list[int]]]]:
        """By their names in ``against``, ours first."""
        every = {"hf-blip": self.hf_blip, "plain": self.plain, "no-cache": self.no_cache}
        return {"mplug": self.ours, **{name: every[name] for name in against}}

    def weights(self) -> list[Tensor]:
        blip = [] if self.blip is None else [*self.blip.parameters(), *self.blip.buffers()]
        return [*self.decoder.parameters(), *blip]


def bench_decode(
    config: MplugConfig,
    captioning: Captioning = Captioning(),
    against: Sequence[str] = tuple(OPPONENTS),
    images: Sequence[int] = (1, 4),
    repeats: int = 5,
    device: str = "cpu",
    advance: Callable[[str], None] = lambda name: None,
) -> Report:
    """Seconds of captioning 1 and 4 images, and the memory that it takes.

    MplugError if decoding with the cache and without it give different ids.
    """
    contest = Contest(config, captioning, against, device)
    report = Report(
        "decode",
        f"Beam search: {captioning.beams} beams, {captioning.tokens} tokens, {captioning.image_tokens} image tokens",
        ("images", "decoder", "s, median", "s, range", "ms a token", "mPLUG is faster"),
        Machine.here(device),
    )
    report.figures = {
        "width": config.width, "layers": config.decoder_layers, "vocabulary": config.vocab_size,
        "image_tokens": captioning.image_tokens, "beams": captioning.beams, "tokens": captioning.tokens,
        "repeats": repeats, "seconds": [],
    }  # fmt: skip
    same = {name: True for name in against}
    for count in images:
        memory = contest.memory(count)
        ways = {name: _Written(way, memory) for name, way in contest.ways(against).items()}
        timings = take_turns(ways, repeats, advance=advance, once=DECODE_ONCE)
        for name in against:
            same[name] &= ways[name].ids == ways["mplug"].ids
        _add(report, count, captioning.tokens, timings)
    if not all(same.get(name, True) for name in DECODE_ONCE):
        raise MplugError("decoding with the cache and without it gave different ids", "this is a fault: report it")
    _notes(report, contest, same, config)
    _memory(report, contest, max(images), against)
    return report


class _Written:
    """Captions the images of a memory, and keeps the ids."""

    def __init__(self, way: Callable[[Tensor], list[list[int]]], memory: Tensor) -> None:
        self.way, self.memory = way, memory
        self.ids: list[list[int]] = []

    def __call__(self) -> None:
        # lists of numbers: nothing is still being computed when they are there
        self.ids = self.way(self.memory)


def _add(report: Report, images: int, tokens: int, timings: dict[str, Timing]) -> None:
    ours = timings["mplug"].median
    for name, timing in timings.items():
        ratio = timing.median / ours
        report.rows.append((
            str(images), OPPONENTS.get(name, OURS), f"{timing.median:.3g}", timing.spread,
            f"{1000 * timing.median / tokens:.3g}", "" if name == "mplug" else f"{ratio:.2f}x",
        ))  # fmt: skip
        report.figures["seconds"].append(
            {"images": images, "decoder": name, "median": timing.median, "all": list(timing.seconds), "ratio": ratio}
        )


def _notes(report: Report, contest: Contest, same: dict[str, bool], config: MplugConfig) -> None:
    report.notes.append(
        f"width {config.width}, {config.decoder_layers} layers, {config.vocab_size} words, random weights; the image "
        "encoder is not part of it: it is the same work on every side"
    )
    if any(name in same for name in DECODE_ONCE):
        report.notes.append("with the cache and without it: the same ids; without it is measured once")
    if "hf-blip" in same:
        ids = "the same ids" if same["hf-blip"] else "other ids"
        report.notes.append(f"HF BLIP has the same weights and writes {ids}")
    report.figures["same_ids"] = same


def _memory(report: Report, contest: Contest, images: int, against: Sequence[str]) -> None:
    """What the caches hold, counted from those that a search filled, and the peak of all that it makes."""
    memory, beams = contest.memory(images), contest.captioning.beams
    held = {width: _cross_bytes(contest, memory, width) for width in (1, beams)}
    ratio = held[beams] / held[1]
    report.figures["cross_bytes"] = {"images": images, "beams": held[beams], "one_beam": held[1], "ratio": ratio}
    report.notes.append(
        f"cross-attention keys and values held for {images} images: {_mb(held[beams])} with {beams} beams, "
        f"{_mb(held[1])} with 1: {ratio:.2f}x"
    )
    if contest.device != "cpu":
        return
    ways, weights = contest.ways([name for name in against if name not in DECODE_ONCE]), contest.weights()
    peaks = {name: peak_bytes(partial(way, memory), [*weights, memory]) for name, way in ways.items()}
    report.figures["peak_bytes"] = {"images": images, **peaks}
    shown = ", ".join(f"{OPPONENTS.get(name, OURS)} {_mb(size)}" for name, size in peaks.items())
    report.notes.append(f"peak of the tensors made for {images} images, weights not counted: {shown}")


def _mb(size: int) -> str:
    return f"{size / 1e6:.3g} MB"


def _cross_bytes(contest: Contest, memory: Tensor, beams: int) -> int:
    """Bytes of the memory's keys and values that a search with so many beams holds."""
    with _caches() as made:
        contest.ours(memory, strategy="beam" if beams > 1 else "greedy", beams=beams)
    return sum(cache.memory_bytes for cache in made)


@contextmanager
def _caches() -> Iterator[list[DecoderCache]]:
    """The caches that searches make within."""
    made: list[DecoderCache] = []

    def kept(*arguments: Any, **options: Any) -> DecoderCache:
        made.append(DecoderCache(*arguments, **options))
        return made[-1]

    with mock.patch.object(generation, "DecoderCache", kept):
        yield made
