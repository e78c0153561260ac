"""Generation against greedy loops, exhaustive search and recomputed probabilities."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import pytest
import torch

from mplug_core import generation
from mplug_core.errors import UsageError
from mplug_core.generation import Decoding, Hypothesis, generate, rank, seed_of
from mplug_core.model.decoder import Decoder
from tests.small import random_inputs, small_config, small_model

START, END = 2, 3
STRATEGIES: dict[str, dict[str, Any]] = {
    "greedy": {"strategy": "greedy"},
    "beam": {"strategy": "beam", "beams": 4, "best": 4},
    "released": {"strategy": "released", "beams": 4, "best": 4},
    "sample": {"strategy": "sample", "best": 3},
}


def memory(images: int = 3) -> tuple[Decoder, torch.Tensor, torch.Tensor]:
    """A decoder with a wide spread of probabilities, and memories with padding."""
    model = small_model(seed=3)
    encoding, ids, mask = random_inputs(model, images=images)
    with torch.no_grad():
        model.decoder.head.bias.copy_(torch.randn(64, generator=torch.Generator().manual_seed(0)) * 0.5)
        model.decoder.head.bias[END] = 2.0
        tokens, token_mask = model.memory(encoding, model.encode_text(ids, mask), mask)
    return model.decoder, tokens, token_mask


def toy(vocabulary: int = 5, seed: int = 0) -> tuple[Decoder, torch.Tensor]:
    """A decoder of few words, so that every sequence can be tried; id 0 is padding and never allowed."""
    torch.manual_seed(seed)
    decoder = Decoder(small_config(vocab_size=vocabulary)).eval()
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn_like(parameter) * 0.5)
    return decoder, torch.randn(2, 4, 32)


def run(
    decoder: Decoder, tokens: torch.Tensor, mask: torch.Tensor | None, *, seed: int = 0, **fields: Any
) -> list[list[Hypothesis]]:
    options = {k: fields.pop(k) for k in ("prompt", "forbidden") if k in fields}
    seeds = [seed_of(seed, str(row)) for row in range(len(tokens))]
    return generate(decoder, tokens, mask, Decoding(**fields), start=START, end=END, seeds=seeds, **options)


@torch.no_grad()
def log_probability(
    decoder: Decoder, tokens: torch.Tensor, mask: torch.Tensor | None, ids: list[int], first: list[int]
) -> float:
    """Sum of the log-probabilities of ``ids`` after ``first``, in one pass without a cache."""
    inputs = torch.tensor([[*first, *ids[:-1]]])
    logp = decoder.logits(decoder(inputs, tokens, mask)).log_softmax(-1)[0, len(first) - 1 :]
    return float(logp.gather(1, torch.tensor(ids)[:, None]).sum())


def plain(found: list[list[Hypothesis]]) -> list[list[list[int]]]:
    return [[h.ids for h in row] for row in found]


@torch.no_grad()
def greedy_by_hand(decoder: Decoder, tokens: torch.Tensor, mask: torch.Tensor, steps: int, least: int) -> list[int]:
    ids = [START]
    for step in range(steps):
        logits = decoder.logits(decoder(torch.tensor([ids]), tokens, mask))[0, -1]
        if step < least:
            logits[END] = -torch.inf
        ids.append(int(logits.argmax()))
        if ids[-1] == END:
            break
    return ids[1:]


def test_greedy_is_the_plain_loop() -> None:
    decoder, tokens, mask = memory()
    found = run(decoder, tokens, mask, strategy="greedy", max_tokens=12, min_tokens=2)
    for row in range(3):
        want = greedy_by_hand(decoder, tokens[row : row + 1], mask[row : row + 1], 12, 2)
        assert plain(found)[row] == [want]


@pytest.mark.parametrize("strategy", ["beam", "released"])
@pytest.mark.parametrize("length_penalty", [0.0, 0.6, 1.0])
def test_one_beam_is_greedy(strategy: str, length_penalty: float) -> None:
    decoder, tokens, mask = memory()
    greedy = run(decoder, tokens, mask, strategy="greedy", length_penalty=length_penalty)
    beam = run(decoder, tokens, mask, strategy=strategy, beams=1, length_penalty=length_penalty)
    assert plain(beam) == plain(greedy)
    for one, other in zip(beam, greedy, strict=True):
        assert one[0].score == pytest.approx(other[0].score, abs=1e-5)


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("no_repeat", [0, 2])
def test_cache_changes_nothing(name: str, no_repeat: int) -> None:
    decoder, tokens, mask = memory()
    settings = {**STRATEGIES[name], "max_tokens": 10, "no_repeat": no_repeat}
    cached = run(decoder, tokens, mask, **settings)
    whole = run(decoder, tokens, mask, use_cache=False, **settings)
    assert plain(cached) == plain(whole)
    for one, other in zip(itertools.chain(*cached), itertools.chain(*whole), strict=True):
        assert one.score == pytest.approx(other.score, abs=1e-4)


@pytest.mark.parametrize("name", STRATEGIES)
def test_what_sequences_start_with_is_computed_once_for_an_image(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, tokens, mask = memory()
    forward, seen = decoder.forward, []
    monkeypatch.setattr(decoder, "forward", lambda ids, *rest: seen.append(tuple(ids.shape)) or forward(ids, *rest))
    run(decoder, tokens, mask, prompt=[8, 9], max_tokens=2, min_tokens=2, **STRATEGIES[name])
    per_image = {"greedy": 1, "sample": 3}.get(name, 4)
    assert seen == [(3, 3), (3 * per_image, 1)]


@pytest.mark.parametrize("name", ["greedy", "beam", "released"])
def test_batch_equals_one_by_one(name: str) -> None:
    decoder, tokens, mask = memory()
    together = run(decoder, tokens, mask, max_tokens=12, **STRATEGIES[name])
    for row in range(3):
        alone = run(decoder, tokens[row : row + 1], mask[row : row + 1], max_tokens=12, **STRATEGIES[name])
        assert plain(alone)[0] == plain(together)[row]
        for one, other in zip(alone[0], together[row], strict=True):
            assert one.score == pytest.approx(other.score, abs=1e-4)


@pytest.mark.parametrize("name", STRATEGIES)
def test_scores_are_those_of_the_model(name: str) -> None:
    decoder, tokens, mask = memory()
    settings = {"length_penalty": 0.8, "max_tokens": 8, **STRATEGIES[name]}
    for row, hypotheses in enumerate(run(decoder, tokens, mask, **settings)):
        assert hypotheses
        for h in hypotheses:
            want = log_probability(decoder, tokens[row : row + 1], mask[row : row + 1], h.ids, [START])
            assert h.log_probability == pytest.approx(want, abs=1e-3)
            assert h.score == pytest.approx(want / ((5 + len(h.ids)) / 6) ** 0.8, abs=1e-3)
            assert h.confidence == pytest.approx(torch.tensor(want / len(h.ids)).exp().item(), abs=1e-3)


@pytest.mark.parametrize("length_penalty", [-0.5, 0.0, 0.6, 1.5])
@pytest.mark.parametrize("seed", range(4))
def test_wide_beam_finds_what_exhaustive_search_finds(length_penalty: float, seed: int) -> None:
    """Words 1, 2, 4 and the end; at most 4 tokens; unfinished sequences only where finished ones run out."""
    decoder, tokens = toy(seed=seed)
    words, steps = (1, 2, 4), 4
    finished = [[*body, END] for n in range(1, steps) for body in itertools.product(words, repeat=n)]
    beams = 3**steps
    found = run(
        decoder, tokens, None, beams=beams, best=10, max_tokens=steps, length_penalty=length_penalty, forbidden=[0]
    )  # fmt: skip
    for row in range(2):
        scored = []
        for ids in finished:
            # what is forbidden keeps its probability: scores are the model's own
            logp = log_probability(decoder, tokens[row : row + 1], None, ids, [START])
            scored.append((logp / ((5 + len(ids)) / 6) ** length_penalty, ids))
        scored.sort(key=lambda pair: -pair[0])
        assert plain(found)[row] == [ids for _, ids in scored[:10]]
        assert [h.score for h in found[row]] == pytest.approx([score for score, _ in scored[:10]], abs=1e-4)


def test_wider_beam_is_not_worse_here() -> None:
    decoder, tokens, mask = memory()
    best = [run(decoder, tokens, mask, beams=n, max_tokens=8, length_penalty=0.0) for n in (1, 8)]
    for narrow, wide in zip(*best, strict=True):
        assert wide[0].score >= narrow[0].score - 1e-5


@pytest.mark.parametrize("name", STRATEGIES)
def test_lengths(name: str) -> None:
    decoder, tokens, mask = memory()
    for least, most in ((0, 1), (1, 6), (4, 6), (6, 6), (9, 6)):
        found = run(decoder, tokens, mask, min_tokens=least, max_tokens=most, **STRATEGIES[name])
        for h in itertools.chain(*found):
            words = h.ids[:-1] if h.ids[-1] == END else h.ids
            if name != "released":  # whose finished beams go on
                assert END not in words
            elif END in words:
                words = words[: words.index(END)]
            assert min(least, most) <= len(words) and len(h.ids) <= most
            assert name == "released" or h.ids[-1] == END or len(h.ids) == most


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_no_ngram_is_repeated(name: str, size: int) -> None:
    decoder, tokens, mask = memory()
    with torch.no_grad():
        decoder.head.bias[10] += 6  # a word that wants to be said again and again
    settings = {"max_tokens": 12, "min_tokens": 12, **STRATEGIES[name]}
    grams = lambda ids: [tuple(ids[i : i + size]) for i in range(len(ids) - size + 1)]  # noqa: E731
    loose = [grams(h.ids) for h in itertools.chain(*run(decoder, tokens, mask, **settings))]
    assert any(len(set(g)) < len(g) for g in loose)
    for h in itertools.chain(*run(decoder, tokens, mask, no_repeat=size, **settings)):
        assert len(set(grams(h.ids))) == len(grams(h.ids))


@pytest.mark.parametrize("name", STRATEGIES)
def test_forbidden_words_are_never_said(name: str) -> None:
    decoder, tokens, mask = memory()
    said = {i for h in itertools.chain(*run(decoder, tokens, mask, **STRATEGIES[name])) for i in h.ids} - {END}
    found = run(decoder, tokens, mask, forbidden=sorted(said), **STRATEGIES[name])
    assert not said & {i for h in itertools.chain(*found) for i in h.ids}


@pytest.mark.parametrize("name", ["beam", "released"])
def test_best_are_sorted_and_distinct(name: str) -> None:
    decoder, tokens, mask = memory()
    for hypotheses in run(decoder, tokens, mask, strategy=name, beams=5, best=5, max_tokens=9):
        assert len(hypotheses) == 5
        # of the standard search those that reached no end come last, whatever their score
        ranks = [(name == "beam" and h.ids[-1] != END, -h.score) for h in hypotheses]
        assert ranks == sorted(ranks)
        assert len({tuple(h.ids) for h in hypotheses}) == 5


def test_samples_come_from_the_nucleus() -> None:
    decoder, tokens, mask = memory(1)
    settings = {"strategy": "sample", "best": 200, "max_tokens": 1, "min_tokens": 0}
    with torch.no_grad():
        p = decoder.logits(decoder(torch.tensor([[START]]), tokens, mask))[0, 0].softmax(-1)
    order = p.argsort(descending=True).tolist()
    for top_p in (0.05, 0.3, 0.8):
        nucleus, total = set(), 0.0
        for token in order:
            nucleus.add(token)
            total += float(p[token])
            if total >= top_p:
                break
        drawn = {h.ids[0] for h in run(decoder, tokens, mask, top_p=top_p, **settings)[0]}
        assert drawn <= nucleus
        assert order[0] in drawn
    # everything may be drawn, about as often as it is probable
    many = [run(decoder, tokens, mask, seed=seed, top_p=1.0, **{**settings, "best": 250})[0] for seed in range(12)]
    drawn = [h.ids[0] for h in itertools.chain(*many)]
    assert drawn.count(order[0]) / 3000 == pytest.approx(float(p[order[0]]), abs=0.04)


def test_cold_samples_are_greedy_and_seeds_reproduce() -> None:
    decoder, tokens, mask = memory()
    greedy = plain(run(decoder, tokens, mask, strategy="greedy"))
    cold = plain(run(decoder, tokens, mask, strategy="sample", temperature=1e-4))
    assert cold == greedy
    settings = {"strategy": "sample", "best": 3, "top_p": 1.0}
    first, again, other = (plain(run(decoder, tokens, mask, seed=s, **settings)) for s in (7, 7, 8))
    assert first == again != other


@pytest.mark.parametrize("name", STRATEGIES)
def test_position_table_is_the_limit(name: str) -> None:
    decoder, tokens, mask = memory()
    room = decoder.embeddings.positions.num_embeddings - 1
    found = run(decoder, tokens, mask, max_tokens=500, min_tokens=room, **STRATEGIES[name])
    assert all(len(h.ids) == room for h in itertools.chain(*found))
    # a prompt takes its share
    prompted = run(decoder, tokens, mask, max_tokens=500, min_tokens=9, prompt=[7] * 30, **STRATEGIES[name])
    assert all(len(h.ids) == room - 30 for h in itertools.chain(*prompted))
    for least, prompt in ((room + 1, []), (10, [7] * 30)):
        with pytest.raises(UsageError, match=rf"min_tokens={least} .*at most {room - len(prompt)}"):
            run(decoder, tokens, mask, max_tokens=500, min_tokens=least, prompt=prompt, **STRATEGIES[name])


@pytest.mark.parametrize("top_p", [0.9, 1.0])
def test_draws_of_a_row_are_its_own(top_p: float) -> None:
    """Whatever rows are beside it, how many samples, and how long they may become."""
    decoder, _, _ = memory()
    tokens, seeds = torch.randn(6, 4, 32, generator=torch.Generator().manual_seed(5)), [11, 22, 33, 44, 55, 66]

    def drawn(rows: list[int], best: int = 3, longest: int = 12) -> dict[int, set[tuple[int, ...]]]:
        decoding = Decoding(strategy="sample", best=best, top_p=top_p, max_tokens=longest)
        own = [seeds[row] for row in rows]
        found = generate(decoder, tokens[rows], None, decoding, start=START, end=END, seeds=own)
        return {row: {tuple(h.ids) for h in texts} for row, texts in zip(rows, found, strict=True)}

    whole = drawn([0, 1, 2, 3, 4, 5])
    assert len({frozenset(texts) for texts in whole.values()}) == 6
    for rows in ([0], [3], [5, 0], [2, 4, 1], [1, 2, 4], [5, 4, 3, 2, 1, 0]):
        assert drawn(rows) == {row: whole[row] for row in rows}
    assert all(one <= whole[row] for row, one in drawn([3, 1], best=1).items())
    shorter = drawn([0, 4], longest=6)
    assert all({ids[:6] for ids in whole[row]} == texts for row, texts in shorter.items())


def test_a_level_at_the_end_draws_what_can_be_drawn() -> None:
    class Last(random.Random):
        def random(self) -> float:
            return 1 - 2**-53  # rounded up to 1 in fp32

    logp = torch.tensor([[0.0, 0.0, -torch.inf, -torch.inf]]).log_softmax(-1)
    assert generation._drawn(logp, Decoding(strategy="sample", top_p=1.0), [Last()]).item() in (0, 1)


@pytest.mark.parametrize("name", STRATEGIES)
def test_numbers_that_are_none_spoil_their_row_alone(name: str) -> None:
    """NaN in the memory of a row makes its scores NaN, and the others are what they are without it."""
    decoder, tokens, mask = memory()
    alone = run(decoder, tokens, mask, **STRATEGIES[name])
    spoiled = torch.cat([tokens, tokens[:1]])
    spoiled[-1, 0, 0] = torch.nan
    both = run(decoder, spoiled, torch.cat([mask, mask[:1]]) if mask is not None else None, **STRATEGIES[name])
    assert plain(both[: len(tokens)]) == plain(alone)
    assert both[-1] and all(math.isnan(h.score) and math.isnan(h.log_probability) for h in both[-1])
    ids, counted = torch.tensor([[START, 7, END], [START, 8, END]]), torch.ones(2, 3)
    likely = rank(decoder, spoiled, None, ids, counted).log_likelihood
    assert likely[:-1].isfinite().all() and likely[-1].isnan().all()


def test_more_images_than_fit_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, tokens, mask = memory()
    many = torch.randn(5, *tokens.shape[1:], generator=torch.Generator().manual_seed(2))
    for name, fields in STRATEGIES.items():
        whole = plain(run(decoder, many, None, **fields))
        with monkeypatch.context() as patched:
            patched.setattr(generation, "LOGITS_AT_ONCE", 2 * 4 * 64)
            assert plain(run(decoder, many, None, **fields)) == whole, name


@pytest.mark.parametrize(
    ("n", "options", "said"),
    [
        (1, {"beams": 100_000}, "beams=100000 .*at most 128"),
        (300, {"strategy": "sample"}, "n=300 .*at most 256"),
        (129, {}, "n=129 .*at most 128"),
        (1, {"min_tokens": 600, "max_tokens": 5000}, "max_tokens=5000 .*at most 39"),
        (1, {"max_tokens": 40}, "max_tokens=40 .*at most 39"),
        (1, {"min_tokens": 9, "max_tokens": 8}, "min_tokens=9 is above max_tokens=8"),
        (1, {"min_tokens": 26}, "min_tokens=26 is above max_tokens=25"),
    ],
)
def test_what_a_model_cannot_hold_is_refused(n: int, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Decoding().asked(n, 39, **options)


def test_the_usual_lengths_are_cut_where_a_model_has_less_room() -> None:
    assert Decoding(max_tokens=25).asked(1, 15).max_tokens == 25
    assert Decoding().asked(128, 39).beams == 128 and Decoding().asked(1, 39, max_tokens=39).max_tokens == 39


def test_prompt_that_fills_the_position_table_is_refused() -> None:
    decoder, tokens, mask = memory()
    with pytest.raises(ValueError, match="40 positions"):
        run(decoder, tokens, mask, prompt=[7] * 40)


@pytest.mark.parametrize("name", STRATEGIES)
def test_prompt_is_continued(name: str) -> None:
    decoder, tokens, mask = memory()
    found = run(decoder, tokens, mask, prompt=[8, 9], max_tokens=6, **STRATEGIES[name])
    for row, hypotheses in enumerate(found):
        for h in hypotheses:
            want = log_probability(decoder, tokens[row : row + 1], mask[row : row + 1], h.ids, [START, 8, 9])
            assert h.log_probability == pytest.approx(want, abs=1e-3)


def test_sequences_without_an_end_only_fill_up() -> None:
    """A cut text is no answer as long as there is a finished one, also where it scores better."""
    decoder, tokens, mask = memory(1)
    better = 0
    for bias in torch.arange(0, 3, 0.25).tolist():
        with torch.no_grad():
            decoder.head.bias[END] = bias
        found = run(decoder, tokens, mask, beams=4, best=4, max_tokens=3)[0]
        ended = [h.ids[-1] == END for h in found]
        assert ended == sorted(ended, reverse=True)
        cut = [h.score for h, end in zip(found, ended, strict=True) if not end]
        better += any(ended) and bool(cut) and max(cut) > min(h.score for h in found[: sum(ended)])
    assert better, "no case in which it matters"


def test_released_rule_by_hand() -> None:
    """A finished beam stays in the race as if it went on; an image ends when its best beam ends."""
    decoder, tokens, mask = memory(1)
    width, steps = 3, 8
    beams: list[tuple[list[int], float]] = [([START], 0.0)]
    want: list[tuple[list[int], float]] = []
    for step in range(steps):
        candidates = []
        for ids, total in beams:
            with torch.no_grad():
                logp = decoder.logits(decoder(torch.tensor([ids]), tokens, mask))[0, -1].log_softmax(-1)
            if step < 1:
                logp[END] = -torch.inf
            candidates += [([*ids, token], total + float(value)) for token, value in enumerate(logp)]
        beams = sorted(candidates, key=lambda c: -c[1])[:width]
        over = beams[0][0][-1] == END or step + 1 == steps
        want += [beam for beam in beams if over or beam[0][-1] == END]
        if over:
            break
    scored = sorted(((t / ((5 + len(ids) - 1) / 6) ** 0.6, ids[1:]) for ids, t in want), key=lambda c: -c[0])
    found = run(decoder, tokens, mask, strategy="released", beams=width, best=width, max_tokens=steps)
    assert plain(found)[0] == [ids for _, ids in scored[:width]]


def test_decoding_refuses_unknown_and_impossible_settings() -> None:
    for fields in (
        {"beams": 0},
        {"max_tokens": 0},
        {"top_p": 0},
        {"temperature": 0},
        {"strategy": "best"},
        {"beam": 3},
    ):
        with pytest.raises(ValueError):
            Decoding(**fields)


class TestRank:
    # of 1, 2 and 4 tokens; the second and the third begin alike
    TEXTS = ((7, END), (9, 12, END), (9, 30, 31, 5, END), (END,), (20, 21, 22, 23, END), (7, 8))

    def padded(self) -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.zeros(len(self.TEXTS), 6, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, text in enumerate(self.TEXTS):
            ids[row, : len(text) + 1] = torch.tensor([START, *text])
            mask[row, : len(text) + 1] = 1
        return ids, mask

    def test_every_token_counts_once(self) -> None:
        decoder, tokens, mask = memory()
        found = rank(decoder, tokens, mask, *self.padded())
        for image in range(3):
            part = (tokens[image : image + 1], mask[image : image + 1])
            whole = [log_probability(decoder, *part, list(text), [START]) for text in self.TEXTS]
            begun = [log_probability(decoder, *part, [text[0]], [START]) for text in self.TEXTS]
            order = sorted(range(len(whole)), key=lambda i: -whole[i])
            assert found.candidates[image].tolist() == order
            assert found.log_likelihood[image].tolist() == pytest.approx([whole[i] for i in order], abs=1e-4)
            assert found.first[image].tolist() == pytest.approx([begun[i] for i in order], abs=1e-4)

    def test_only_the_best_by_their_first_token(self) -> None:
        decoder, tokens, mask = memory()
        ids, counted = self.padded()
        every = rank(decoder, tokens, mask, ids, counted)
        few = rank(decoder, tokens, mask, ids, counted, first=3)
        assert few.candidates.shape == (3, 3)
        for image in range(3):
            first = dict(zip(every.candidates[image].tolist(), every.first[image].tolist(), strict=True))
            kept = few.candidates[image].tolist()
            assert min(first[i] for i in kept) >= max(first[i] for i in first if i not in kept)
            assert kept == [i for i in every.candidates[image].tolist() if i in kept]
        assert rank(decoder, tokens, mask, ids, counted, first=100).candidates.shape == (3, len(ids))

    def test_parts_change_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        decoder, tokens, mask = memory()
        together = rank(decoder, tokens, mask, *self.padded())
        for most in (1, 3 * 4 * 64 * 4):
            monkeypatch.setattr(generation, "LOGITS_AT_ONCE", most)
            parts = rank(decoder, tokens, mask, *self.padded())
            assert torch.equal(parts.candidates, together.candidates)
            assert torch.allclose(parts.log_likelihood, together.log_likelihood, atol=1e-5)

    def test_the_memory_is_projected_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        decoder, tokens, mask = memory()
        cross = decoder.layers[0].cross
        project, seen = cross.keys_values, []
        monkeypatch.setattr(cross, "keys_values", lambda rows: seen.append(len(rows)) or project(rows))
        rank(decoder, tokens, mask, *self.padded())
        assert seen == [3]

    def test_all_texts_of_two_tokens_have_a_probability_of_one(self) -> None:
        decoder, tokens = toy()
        ids = torch.tensor([[START, a, b] for a in range(5) for b in range(5)])
        found = rank(decoder, tokens, None, ids, torch.ones_like(ids))
        assert found.log_likelihood.exp().sum(1).tolist() == pytest.approx([1.0, 1.0], abs=1e-4)

    def test_candidates_of_one_token(self) -> None:
        decoder, tokens = toy()
        ids = torch.tensor([[START, a] for a in range(5)])
        found = rank(decoder, tokens, None, ids, torch.ones_like(ids))
        assert torch.equal(found.first, found.log_likelihood)
        assert found.log_likelihood.exp().sum(1).tolist() == pytest.approx([1.0, 1.0], abs=1e-5)

    def test_no_candidates_and_empty_ones(self) -> None:
        decoder, tokens = toy()
        for ids, mask in (
            (torch.zeros(0, 3, dtype=torch.int64), torch.zeros(0, 3)),
            (torch.tensor([[START]]), torch.ones(1, 1)),
            (torch.tensor([[START, 1], [START, 0]]), torch.tensor([[1, 1], [1, 0]])),
        ):
            with pytest.raises(ValueError, match="a start token and at least one token more"):
                rank(decoder, tokens, None, ids, mask)
