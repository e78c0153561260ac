"""Generation on top of the model: greedy, beam and nucleus sampling, and the ranking of given answers, for a batch of
images at once.

The memory of an image (its encoding, and the keys and values made from it) is computed once and shared by all its
beams, samples or candidates; only the prefix caches are reordered.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from math import nan
from typing import Annotated, Any, Literal, NamedTuple, TypedDict

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor
from torch.nn import functional as F

from mplug_core.errors import UsageError
from mplug_core.limits import MOST_BEAMS, MOST_TEXTS
from mplug_core.model.attention import DecoderCache
from mplug_core.model.decoder import Decoder
from mplug_core.recipe import describe, nearest

_SEARCHES = ("beam", "released")
LOGITS_AT_ONCE = 1 << 26
"""Most logits that a search or a ranking holds at a time: 256 MB in fp32. Of more images than that fit, some wait."""


class Decoding(BaseModel):
    """How to generate. Lengths count new tokens: at least ``min_tokens`` before the end token, at most ``max_tokens``
    with it.

    ``strategy`` *beam* keeps the ``beams`` best live prefixes and a pool of finished ones until no live one can still
    win. *released* is the beam search of the authors' released code: a finished beam stays in the race as if it went
    on, an image ends when its best beam ends, and then all of its current beams are hypotheses. Scores are
    ``sum log p / ((5 + n) / 6) ** length_penalty``. ``no_repeat`` forbids to repeat any n-gram of that size. *sample*
    draws each token from the most probable ones that hold ``top_p`` of the probability, divided by ``temperature``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    strategy: Literal["greedy", "beam", "released", "sample"] = "beam"
    beams: Annotated[int, Field(gt=0, le=MOST_BEAMS)] = 5
    min_tokens: Annotated[int, Field(ge=0)] = 1
    max_tokens: Annotated[int, Field(gt=0)] = 25
    length_penalty: float = 0.6
    no_repeat: Annotated[int, Field(ge=0)] = 0
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.9
    temperature: Annotated[float, Field(gt=0)] = 1.0
    best: Annotated[int, Field(gt=0, le=MOST_TEXTS)] = 1
    use_cache: bool = True

    def asked(self, n: int, room: int | None = None, **options: Any) -> Decoding:
        """This with the ``options`` that are not None, for the ``n`` best texts.

        ``room`` is how many tokens the model has positions for (None: not known).

        Where no ``strategy`` is named, one beam is greedy, and several beams or texts are a search: the usual one, or a
        beam search where it is none. It has as many beams as are named, or at least ``n``. A ``max_tokens`` below the
        usual ``min_tokens`` lowers them. UsageError for options that contradict each other.
        """
        options = {name: value for name, value in options.items() if value is not None}
        for name in options.keys() - Decoding.model_fields:
            raise UsageError(f"no decoding option {name}{nearest(name, Decoding.model_fields)}")
        beams = options.get("beams")
        if isinstance(beams, int) and beams > MOST_BEAMS:
            raise UsageError(f"beams={beams} are too many", f"at most {MOST_BEAMS}")
        if isinstance(n, int) and n > MOST_TEXTS:
            raise UsageError(f"n={n} texts are too many", f"at most {MOST_TEXTS}")
        if "strategy" not in options and (beams is not None or n > 1):
            search = self.strategy if self.strategy in _SEARCHES else "beam"
            options["strategy"] = "greedy" if beams == 1 else search
        values = self.model_dump() | options | {"best": n}
        if values["strategy"] in _SEARCHES and beams is None:
            if n > MOST_BEAMS:
                hint = f"at most {MOST_BEAMS}; strategy='sample' draws up to {MOST_TEXTS}"
                raise UsageError(f"n={n} texts of a search need as many beams", hint)
            values["beams"] = max(n, self.beams)
        if "min_tokens" not in options:
            values["min_tokens"] = min(self.min_tokens, values["max_tokens"])
        try:
            decoding = Decoding(**values)
        except ValidationError as error:
            raise UsageError(f"wrong decoding options: {'; '.join(map(describe, error.errors()))}") from error
        if decoding.strategy == "sample" and beams is not None:
            raise UsageError("beams are for a search, and strategy='sample' draws", "leave one of them out")
        if decoding.strategy != "sample" and (drawing := options.keys() & {"top_p", "temperature"}):
            raise UsageError(f"{min(drawing)} is for drawing", "add strategy='sample'")
        if n > {"greedy": 1, "sample": n}.get(decoding.strategy, decoding.beams):
            raise UsageError(f"n={n} needs at least as many beams", f"beams={n}")
        if decoding.min_tokens > decoding.max_tokens:
            raise UsageError(f"min_tokens={decoding.min_tokens} is above max_tokens={decoding.max_tokens}")
        return decoding if room is None else decoding.within(room, self)

    def within(self, room: int, usual: Decoding | None = None) -> Decoding:
        """This for a model with positions for ``room`` tokens; UsageError for lengths that it can't hold.

        A length that is that of the ``usual`` decoding was not asked for: a model with less room just stops there.
        """
        for name in ("max_tokens", "min_tokens"):
            length = getattr(self, name)
            if length > room and (usual is None or name == "min_tokens" or length != usual.max_tokens):
                raise UsageError(f"{name}={length} is more than the model has positions for", f"at most {room}")
        return self


class DecodingOptions(TypedDict, total=False):
    """What a call may change of a task's :class:`Decoding`, by the same names."""

    strategy: Literal["greedy", "beam", "released", "sample"] | None
    beams: int | None
    min_tokens: int | None
    max_tokens: int | None
    length_penalty: float | None
    no_repeat: int | None
    top_p: float | None
    temperature: float | None


@dataclass(frozen=True)
class Hypothesis:
    """A generated sequence: new token ids (with the end token, if it was reached), score, and log-probability."""

    ids: list[int]
    score: float
    log_probability: float

    @property
    def confidence(self) -> float:
        """Geometric mean of the token probabilities, 0 .. 1."""
        return float(torch.tensor(self.log_probability / max(len(self.ids), 1)).exp())


@dataclass(frozen=True)
class Answer:
    """A text, its score (see :class:`Decoding`), how sure the model is, and the log-probability of the whole text.

    The confidence is the geometric mean of the token probabilities, or where the model was calibrated for the task the
    probability that the answer is right. ``others`` are the next best texts where several were asked for at once.
    ``unknown`` is the share of the question's pieces that the vocabulary doesn't know; there is no confidence (None)
    where that is half or more.
    """

    text: str
    score: float
    confidence: float | None
    others: tuple[Answer, ...] = ()
    log_probability: float | None = None
    unknown: float = 0.0

    def __str__(self) -> str:
        return self.text


def seed_of(seed: int, *contents: str | bytes) -> int:
    """The seed of one image's (and question's) draws: of ``seed`` and what the draws are about, and of nothing else."""
    digest = blake2b(str(seed).encode(), digest_size=8)
    for content in contents:
        data = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
        digest.update(len(data).to_bytes(8, "little") + data)
    return int.from_bytes(digest.digest(), "little")


def fresh_seeds(count: int, generator: torch.Generator | None = None) -> list[int]:
    """Seeds for ``count`` images, drawn from a generator on the CPU (None: torch's global one)."""
    return torch.randint(2**62, (count,), generator=generator).tolist()


def room_of(decoder: Decoder, prompt: int = 0) -> int:
    """How many new tokens a decoder has positions for, behind the start token and a prompt."""
    return decoder.embeddings.positions.num_embeddings - 1 - prompt


@torch.inference_mode()
def generate(
    decoder: Decoder,
    memory: Tensor,
    memory_mask: Tensor | None,
    decoding: Decoding,
    *,
    start: int,
    end: int,
    prompt: list[int] | None = None,
    forbidden: list[int] | None = None,
    seeds: Sequence[int] | None = None,
) -> list[list[Hypothesis]]:
    """The ``decoding.best`` hypotheses of each row of ``memory`` [B, N, W] (mask [B, N]), best first.

    Samples are independent draws, so that some may be equal; of a beam search all are distinct, and those that reached
    no end come last. ``prompt`` are ids between the start token and the generated ones; ``forbidden`` ids are never
    generated. ``seeds`` [B] decide the draws of each row (None: :func:`fresh_seeds`): its k-th sample depends on its
    memory, its seed and k, not on the other rows. Where the decoder computes what is not a number, the scores of the
    row's hypotheses are NaN. ValueError for a prompt that fills the decoder's table of positions; UsageError for more
    ``min_tokens`` than fit behind it.
    """
    first = [start, *(prompt or [])]
    room = room_of(decoder, len(first) - 1)
    if room < 1:
        positions = decoder.embeddings.positions.num_embeddings
        raise ValueError(f"a prompt of {len(first)} tokens leaves nothing of the decoder's {positions} positions")
    decoding.within(room, decoding)
    samples = decoding.strategy == "sample"
    if samples and seeds is None:
        seeds = fresh_seeds(len(memory))
    width = decoding.best if samples else 1 if decoding.strategy == "greedy" else decoding.beams
    at_once = max(1, LOGITS_AT_ONCE // (width * decoder.embeddings.words.num_embeddings))
    if len(memory) > at_once:
        found = []
        for begin in range(0, len(memory), at_once):
            rows = slice(begin, begin + at_once)
            found += generate(
                decoder, memory[rows], None if memory_mask is None else memory_mask[rows], decoding, start=start,
                end=end, prompt=prompt, forbidden=forbidden, seeds=seeds and seeds[rows],
            )  # fmt: skip
        return found
    if memory_mask is not None and bool(memory_mask.all()):
        memory_mask = None
    state = _Search(decoder, memory, memory_mask, decoding, first, end, forbidden or [], min(decoding.max_tokens, room))
    if decoding.strategy == "released":
        found = _released_beam(state)
    elif decoding.strategy == "beam" and decoding.beams > 1:
        found = _beam(state)
    elif decoding.strategy in ("greedy", "beam"):  # a single beam that stops at its end is greedy
        found = _step_by_step(state, 1, lambda logp: logp.argmax(-1))
    else:
        chances = [random.Random(f"{seed}/{number}") for seed in seeds or () for number in range(decoding.best)]
        found = _step_by_step(state, decoding.best, lambda logp: _drawn(logp, decoding, chances))

    def rank(hypothesis: Hypothesis) -> tuple[bool, float]:
        # of the standard search a text without an end is no answer where there is one with it
        return decoding.strategy == "beam" and hypothesis.ids[-1] != end, -hypothesis.score

    best = [sorted(hypotheses, key=rank)[: decoding.best] for hypotheses in found]
    for image in state.broken.nonzero()[:, 0].tolist():
        best[image] = [replace(hypothesis, score=nan, log_probability=nan) for hypothesis in best[image]]
    return best


class _Search:
    """The live sequences of a search: ``per_image`` next to each other for every image that is not finished."""

    def __init__(
        self,
        decoder: Decoder,
        memory: Tensor,
        memory_mask: Tensor | None,
        decoding: Decoding,
        first: list[int],
        end: int,
        forbidden: list[int],
        steps: int,
    ) -> None:
        self.decoder, self.decoding = decoder, decoding
        self.memory, self.memory_mask = memory, memory_mask
        self.first, self.end, self.forbidden, self.steps = first, end, forbidden, steps
        self.images = len(memory)
        # of the live images: their numbers; of all images: whether the decoder gave what is not a number
        self.owners = torch.arange(self.images, device=memory.device)
        self.broken = torch.zeros(self.images, dtype=torch.bool, device=memory.device)
        self.cache = DecoderCache(len(decoder.layers)) if decoding.use_cache else None

    def begin(self, per_image: int) -> None:
        """Start ``per_image`` equal sequences for every image. What they start with is computed once for an image."""
        start = torch.tensor(self.first, device=self.memory.device)
        self.ids = start.repeat(self.images * per_image, 1)
        self.unseen = start.repeat(self.images, 1)

    def log_probabilities(self, step: int) -> Tensor:
        """[sequences, V] of the next token in fp32, with what is not allowed at -inf."""
        if self.cache is None:
            hidden = self.decoder(self.ids, self.memory, self.memory_mask)
        else:
            hidden = self.decoder(self.unseen, self.memory, self.memory_mask, self.cache)
        logp = self.decoder.logits(hidden[:, -1]).float().log_softmax(-1)
        if len(logp) < len(self.ids):
            images = torch.arange(len(logp), device=logp.device).repeat_interleave(len(self.ids) // len(logp))
            logp = logp.index_select(0, images)
            self.cache.reorder(images)
        # softmax makes one number that is none spoil its row
        if bool((spoiled := logp[:, 0].isnan()).any()):
            self.broken[self.owners] |= spoiled.view(len(self.owners), -1).any(1)
            logp = logp.masked_fill(spoiled[:, None], 0.0)
        if step < self.decoding.min_tokens:
            logp[:, self.end] = -torch.inf
        if self.forbidden:
            logp[:, self.forbidden] = -torch.inf
        if self.decoding.no_repeat:
            self._forbid_repeats(logp)
        return logp

    def _forbid_repeats(self, logp: Tensor) -> None:
        """-inf for each token that would complete an n-gram which the sequence has already."""
        n = self.decoding.no_repeat
        new = self.ids[:, len(self.first) :]
        if new.shape[1] < n:
            return
        grams = new.unfold(1, n, 1)
        tail = new[:, new.shape[1] - n + 1 :]
        seen = (grams[:, :, :-1] == tail[:, None]).all(-1)
        rows, places = seen.nonzero(as_tuple=True)
        logp[rows, grams[rows, places, -1]] = -torch.inf

    def advance(self, sequences: Tensor | None, tokens: Tensor, images: Tensor | None = None) -> None:
        """Row i continues old row ``sequences[i]`` with ``tokens[i]``; ``images`` are those that stay (None: all)."""
        if sequences is not None:
            self.ids = self.ids.index_select(0, sequences)
            if self.cache is not None:
                self.cache.reorder(sequences, images)
        if images is not None:
            self.owners = self.owners.index_select(0, images)
            self.memory = self.memory.index_select(0, images)
            if self.memory_mask is not None:
                self.memory_mask = self.memory_mask.index_select(0, images)
        self.unseen = tokens[:, None]
        self.ids = torch.cat([self.ids, self.unseen], 1)

    def penalty(self, length: int) -> float:
        return ((5 + length) / 6) ** self.decoding.length_penalty

    def hypothesis(self, ids: Tensor, log_probability: float) -> Hypothesis:
        new = ids[len(self.first) :].tolist()
        return Hypothesis(new, log_probability / self.penalty(len(new)), log_probability)


def _step_by_step(state: _Search, per_image: int, choose) -> list[list[Hypothesis]]:
    """Greedy and sampling: each sequence goes on by itself until its end token."""
    state.begin(per_image)
    rows = len(state.ids)
    found: list[list[Hypothesis]] = [[] for _ in range(state.images)]
    total = torch.zeros(rows, device=state.ids.device)
    done = torch.zeros(rows, dtype=torch.bool, device=state.ids.device)
    for step in range(state.steps):
        logp = state.log_probabilities(step)
        tokens = choose(logp)
        total = torch.where(done, total, total + logp.gather(1, tokens[:, None])[:, 0])
        state.advance(None, tokens)
        last = step + 1 == state.steps
        for row in (~done & ((tokens == state.end) | last)).nonzero()[:, 0].tolist():
            found[row // per_image].append(state.hypothesis(state.ids[row], float(total[row])))
        done |= tokens == state.end
        if bool(done.all()):
            break
    return found


def _drawn(logp: Tensor, decoding: Decoding, chances: Sequence[random.Random]) -> Tensor:
    """One token per row, from the most probable ones that hold ``top_p`` of the probability.

    Each row has a source of chance of its own. What is drawn is where that falls in the cumulative distribution over
    the vocabulary: rounding, which differs between batches, moves its steps by little, and hardly ever across a draw.
    """
    shares = (logp / decoding.temperature).softmax(-1)
    if decoding.top_p < 1:
        ordered = shares.sort(-1, descending=True).values
        outside = ordered.cumsum(-1) - ordered >= decoding.top_p
        least = ordered.masked_fill(outside, torch.inf).amin(-1, keepdim=True)
        shares = shares.masked_fill(shares < least, 0)
    cumulative = shares.cumsum(-1)
    level = torch.tensor([[chance.random()] for chance in chances], device=logp.device) * cumulative[:, -1:]
    chosen = torch.searchsorted(cumulative, level, right=True).clamp(max=logp.shape[1] - 1)
    # a level that was rounded up to the end may lie behind the last token that can be drawn
    return torch.where(shares.gather(1, chosen) > 0, chosen, shares.argmax(-1, keepdim=True))[:, 0]


def _top(state: _Search, logp: Tensor, total: Tensor, width: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The ``count`` best continuations of each image: log-probabilities, their beam, their token ([B, count] each)."""
    sums = (total[:, None] + logp).view(-1, width * logp.shape[-1])
    best, places = sums.topk(count, -1)
    return best, places.div(logp.shape[-1], rounding_mode="floor"), places % logp.shape[-1]


def _first_totals(images: int, width: int, device: torch.device) -> Tensor:
    """All beams start equal: only the first of each image may be continued in the first step."""
    total = torch.full((images, width), -torch.inf, device=device)
    total[:, 0] = 0
    return total.view(-1)


def _released_beam(state: _Search) -> list[list[Hypothesis]]:
    """The released rule (see :class:`Decoding`)."""
    width = state.decoding.beams
    state.begin(width)
    found: list[list[Hypothesis]] = [[] for _ in range(state.images)]
    alive = torch.arange(state.images, device=state.ids.device)
    total = _first_totals(state.images, width, state.ids.device)
    for step in range(state.steps):
        best, beams, tokens = _top(state, state.log_probabilities(step), total, width, width)
        finished = tokens == state.end
        ends = finished[:, 0] | (step + 1 == state.steps)
        finished = finished | ends[:, None]
        rows = torch.arange(len(alive), device=alive.device)[:, None] * width + beams
        for image, beam in finished.nonzero().tolist():
            ids = torch.cat([state.ids[rows[image, beam]], tokens[image, beam : beam + 1]])
            found[int(alive[image])].append(state.hypothesis(ids, float(best[image, beam])))
        stay = (~ends).nonzero()[:, 0]
        if not len(stay):
            break
        total = best[stay].view(-1)
        state.advance(rows[stay].view(-1), tokens[stay].view(-1), None if len(stay) == len(alive) else stay)
        alive = alive[stay]
    return found


def _beam(state: _Search) -> list[list[Hypothesis]]:
    """Standard beam search: finished hypotheses leave the beam; an image ends when no live beam can beat its worst."""
    width = state.decoding.beams
    state.begin(width)
    found: list[list[Hypothesis]] = [[] for _ in range(state.images)]
    alive = torch.arange(state.images, device=state.ids.device)
    total = _first_totals(state.images, width, state.ids.device)
    for step in range(state.steps):
        best, beams, tokens = _top(state, state.log_probabilities(step), total, width, 2 * width)
        rows = torch.arange(len(alive), device=alive.device)[:, None] * width + beams
        ended = (tokens == state.end) & best.isfinite()
        # a candidate beyond the width counts as finished only if it would have stayed in the beam
        ended_inside = ended.clone()
        ended_inside[:, width:] = False
        for image, beam in ended_inside.nonzero().tolist():
            ids = torch.cat([state.ids[rows[image, beam]], tokens[image, beam : beam + 1]])
            found[int(alive[image])].append(state.hypothesis(ids, float(best[image, beam])))
        # the live ones: the best `width` that did not end; 2 * width candidates always hold that many
        live = (ended.int() * 2 * width + torch.arange(2 * width, device=ended.device)).argsort(-1)[:, :width]
        best, rows, tokens = best.gather(1, live), rows.gather(1, live), tokens.gather(1, live)
        last = step + 1 == state.steps
        stay = []
        for image, owner in enumerate(alive.tolist()):
            hypotheses = sorted(found[owner], key=lambda h: -h.score)[:width]
            if last:
                unfinished = [
                    state.hypothesis(
                        torch.cat([state.ids[rows[image, b]], tokens[image, b : b + 1]]), float(best[image, b])
                    )
                    for b in range(width)
                    if best[image, b].isfinite()
                ]
                # sequences without an end only fill up what finished ones leave open
                hypotheses += sorted(unfinished, key=lambda h: -h.score)[: width - len(hypotheses)]
            found[owner] = hypotheses
            # log-probabilities only fall, so a live beam's bound is its present sum at the longest length
            bound = float(best[image, 0]) / state.penalty(
                state.steps if state.decoding.length_penalty > 0 else step + 1
            )
            if not last and (len(hypotheses) < width or hypotheses[-1].score < bound):
                stay.append(image)
        if not stay:
            break
        kept = torch.tensor(stay, device=alive.device)
        total = best[kept].view(-1)
        state.advance(rows[kept].view(-1), tokens[kept].view(-1), None if len(stay) == len(alive) else kept)
        alive = alive[kept]
    return found


class Ranking(NamedTuple):
    """Candidates of each row of a memory, the likeliest first. All are [B, K].

    ``candidates`` are numbers in the list, ``log_likelihood`` is the natural logarithm of the probability of the whole
    text, ``first`` that of its first token alone.
    """

    candidates: Tensor
    log_likelihood: Tensor
    first: Tensor


@torch.inference_mode()
def rank(
    decoder: Decoder, memory: Tensor, memory_mask: Tensor | None, ids: Tensor, mask: Tensor, first: int | None = None
) -> Ranking:
    """How likely the decoder is to write each of C candidates, for each row of ``memory`` [B, N, W] (mask [B, N]).

    ``ids`` and ``mask`` [C, T] are the candidates, right-padded, all with the same start token. Only the ``first``
    candidates by the probability of their first token are looked at further (None: all of them); the others are not in
    the outcome. Every token counts once, an end token among the ids too.

    ValueError if there are no candidates or one has no token after the start.
    """
    if not len(ids) or ids.shape[1] < 2 or not bool(mask[:, 1].all()):
        raise ValueError("each candidate is a start token and at least one token more")
    cache = DecoderCache(len(decoder.layers))
    hidden = decoder(ids[:1, :1].expand(len(memory), 1), memory, memory_mask, cache)
    start = decoder.logits(hidden[:, -1]).float().log_softmax(-1)
    begins, chosen = start[:, ids[:, 1]].topk(min(first or len(ids), len(ids)))
    room = LOGITS_AT_ONCE // (len(memory) * max(ids.shape[1] - 2, 1) * start.shape[1])
    total = torch.cat(
        [
            begun + _continuations(decoder, memory, memory_mask, cache, ids[some], mask[some])
            for begun, some in zip(begins.split(max(room, 1), 1), chosen.split(max(room, 1), 1), strict=True)
        ],
        1,
    )
    total, order = total.sort(1, descending=True)
    return Ranking(chosen.gather(1, order), total, begins.gather(1, order))


def _continuations(
    decoder: Decoder, memory: Tensor, memory_mask: Tensor | None, cache: DecoderCache, ids: Tensor, mask: Tensor
) -> Tensor:
    """[B, K] log-probability of what follows the first token of ``ids`` [B, K, T]; ``cache`` has seen the start."""
    rows, count, length = ids.shape
    total = torch.zeros(rows * count, device=ids.device)
    if length == 2:
        return total.view(rows, count)
    ids, counted = ids.flatten(0, 1), mask.flatten(0, 1)[:, 2:].bool()
    branches = DecoderCache(len(cache.layers))
    for branch, layer in zip(branches.layers, cache.layers, strict=True):
        branch.memory = layer.memory
        branch.prefix = tuple(t.repeat_interleave(count, 0) for t in layer.prefix)
    hidden = decoder(ids[:, 1:-1], memory, memory_mask, branches)
    # padding is left out before the vocabulary comes in
    losses = F.cross_entropy(decoder.logits(hidden[counted]).float(), ids[:, 2:][counted], reduction="none")
    return total.index_add(0, counted.nonzero()[:, 0], -losses).view(rows, count)
