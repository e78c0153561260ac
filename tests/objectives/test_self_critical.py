"""Self-critical training: the right gradient, no gradient where nothing is better, and a reward that is learned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from mplug_core.generation import Decoding, generate
from mplug_core.model.mplug import MplugModel
from mplug_core.objectives.self_critical import advantage_loss, log_probabilities, self_critical, write_captions
from mplug_core.recipe import SelfCriticalSection
from tests.small import small_model

START, END = 1, 2
SPECIAL = {"start": START, "end": END, "forbidden": [0, START]}


def settings(variant: str = "beam", captions: int = 3, **fields: Any) -> SelfCriticalSection:
    return SelfCriticalSection(**{"variant": variant, "captions": captions, "min_tokens": 1, "max_tokens": 6, **fields})


def decoder(seed: int = 0, **fields: Any) -> Any:
    """A decoder that ends some captions before others."""
    model = small_model(seed, **fields).decoder
    with torch.no_grad():
        model.head.bias[END] += 0.5
    return model


def memory(images: int = 2, seed: int = 3) -> tuple[Tensor, Tensor]:
    """Something to look at, the last tokens of the second image hidden."""
    mask = torch.ones(images, 5, dtype=torch.bool)
    mask[1:, 3:] = False
    return torch.randn(images, 5, 32, generator=torch.Generator().manual_seed(seed)), mask


def marks(written: list[list[list[int]]]) -> list[list[float]]:
    """Any reward that tells captions apart."""
    return [[sum(ids) % 7 / 7 for ids in row] for row in written]


@pytest.mark.parametrize("variant", ["beam", "sample"])
def test_log_probabilities_are_those_of_the_search(variant: str) -> None:
    """One pass over finished captions gives each the sum that the search has added up token by token."""
    model, (seen, mask) = decoder(), memory()
    best = 3 if variant == "beam" else 40
    decoding = Decoding(strategy=variant, beams=3, best=best, top_p=1.0, min_tokens=0, max_tokens=6)
    found = generate(model, seen, mask, decoding, start=START, end=END, seeds=[10, 11, 12, 13][: len(seen)])
    assert len({len(h.ids) for row in found for h in row}) > 1  # so that there is padding
    scores, numbers = log_probabilities(
        model, seen, mask, [[h.ids for h in row] for row in found], start=START, end=END
    )
    expected = torch.tensor([[h.log_probability for h in row] for row in found])
    assert torch.allclose(scores, expected, atol=1e-4)
    assert numbers.tolist() == [[len(h.ids) for h in row] for row in found]


def test_beams_are_compared_with_their_mean() -> None:
    model, (seen, mask) = decoder(), memory()
    written, greedy = write_captions(model, seen, mask, settings(), **SPECIAL)
    assert greedy is None and [len({tuple(ids) for ids in row}) for row in written] == [3, 3]
    rewards = {tuple(ids): float(i % 4) for i, ids in enumerate(ids for row in written for ids in row)}
    found = self_critical(
        model, seen, mask, lambda w: [[rewards[tuple(i)] for i in row] for row in w], settings(), **SPECIAL
    )
    with torch.no_grad():
        scores, numbers = log_probabilities(model, seen, mask, written, **SPECIAL, min_tokens=1)
    expected = 0.0
    for image, given in enumerate(([0, 1, 2], [3, 0, 1])):
        for beam in range(3):
            advantage = given[beam] - sum(given) / 3
            expected -= advantage * float(scores[image, beam]) / int(numbers.sum())
    assert float(found.loss.detach()) == pytest.approx(expected, abs=1e-5)
    assert found.reward == pytest.approx(7 / 6)


def test_samples_are_compared_with_the_greedy_caption() -> None:
    model, (seen, mask) = decoder(), memory()
    chosen = settings("sample", 4, temperature=0.7)
    generator = lambda: torch.Generator().manual_seed(5)  # noqa: E731
    written, greedy = write_captions(model, seen, mask, chosen, **SPECIAL, generator=generator())
    direct = generate(
        model, seen, mask, Decoding(strategy="greedy", max_tokens=6), start=START, end=END, forbidden=[0, START]
    )
    assert greedy == [row[0].ids for row in direct]
    assert [len(row) for row in written] == [4, 4]
    found = self_critical(model, seen, mask, marks, chosen, **SPECIAL, generator=generator())
    with torch.no_grad():
        scores, numbers = log_probabilities(model, seen, mask, written, **SPECIAL, min_tokens=1, temperature=0.7)
    advantages = torch.tensor(marks(written)) - torch.tensor(marks([[ids] for ids in greedy]))
    assert float(found.loss.detach()) == pytest.approx(float(-(advantages * scores).sum() / numbers.sum()), abs=1e-5)


def test_the_estimated_gradient_is_that_of_the_expected_reward() -> None:
    """Captions of at most two tokens can all be listed: the gradient of their expected reward, by the mean length,
    against the estimate from many samples.

    The reward is far below that of the greedy caption, so that the baseline must cancel: it would not if each caption
    were divided by its own length, nor if tokens that are never written took part.
    """
    model, (seen, mask) = decoder(vocab_size=7), memory(1)
    with torch.no_grad():
        model.head.bias[0] += 2  # never written, and the likeliest
    writable = [END, 3, 4, 5, 6]
    _, (best,) = write_captions(model, seen, mask, settings("sample", 1, max_tokens=2, min_tokens=0), **SPECIAL)

    def worth(ids: list[int]) -> float:
        return 5.0 if ids == best else 0.3 * (ids[0] == 4) + 0.7 * (len(ids) == 1)

    rows, chosen = 250, settings("sample", 120, max_tokens=2, min_tokens=0)
    every = [[END], *([a, b] for a in writable[1:] for b in writable)]
    scores, numbers = log_probabilities(model, seen, mask, [every], **SPECIAL)
    chances = scores[0].exp()
    assert float(chances.detach().sum()) == pytest.approx(1, abs=1e-5)
    reward = (chances * torch.tensor([worth(ids) for ids in every])).sum()
    length = float((chances * numbers[0]).sum().detach())
    parts = [model.head.bias, model.layers[0].cross.kv.weight]
    expected = [-g / length for g in torch.autograd.grad(reward, parts)]
    found = self_critical(
        model, seen.expand(rows, -1, -1), mask.expand(rows, -1),
        lambda w: [[worth(ids) for ids in row] for row in w], chosen, **SPECIAL,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    for estimate, right in zip(torch.autograd.grad(found.loss, parts), expected, strict=True):
        assert float((estimate - right).norm() / right.norm()) < 0.15


@pytest.mark.parametrize("variant", ["beam", "sample"])
def test_nothing_is_learned_from_equal_rewards(variant: str) -> None:
    model, (seen, mask) = decoder(), memory()
    seen.requires_grad_()
    found = self_critical(model, seen, mask, lambda w: [[0.1] * len(row) for row in w], settings(variant), **SPECIAL)
    found.loss.backward()
    assert float(found.loss.detach()) == pytest.approx(0, abs=1e-12)
    gradients = [p.grad for p in model.parameters() if p.grad is not None] + [seen.grad]
    assert all(torch.isfinite(g).all() and float(g.abs().max()) < 1e-12 for g in gradients)


def test_the_gradient_reaches_the_memory_and_leaves_the_mode() -> None:
    model, (seen, mask) = decoder(dropout=0.1).train(), memory()
    seen.requires_grad_()
    self_critical(model, seen, mask, marks, settings(), **SPECIAL).loss.backward()
    assert float(seen.grad.abs().max()) > 0 and not seen.grad[1, 3:].any()
    assert all(module.training for module in model.modules())


def test_captions_do_not_depend_on_dropout() -> None:
    model, (seen, mask) = decoder(dropout=0.5), memory()
    quiet = write_captions(model.eval(), seen, mask, settings(), **SPECIAL)
    assert write_captions(model.train(), seen, mask, settings(), **SPECIAL) == quiet
    assert model.training


def test_fewer_words_than_beams() -> None:
    model, (seen, mask) = decoder(vocab_size=5), memory()
    written, _ = write_captions(
        model, seen, mask, settings(captions=5, max_tokens=1), start=START, end=END, forbidden=[0, START, 4]
    )
    assert [len(row) for row in written] == [5, 5]
    loss = self_critical(
        model, seen, mask, marks, settings(captions=5, max_tokens=1), start=START, end=END, forbidden=[0, START, 4]
    ).loss
    assert torch.isfinite(loss)


def test_autocast_keeps_the_gradient() -> None:
    """Autocast caches the weights that the search has cast, without a gradient; the loss must not meet them."""
    model, (seen, mask) = decoder(), memory()
    seen.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        found = self_critical(model, seen, mask, marks, settings(), **SPECIAL)
    found.loss.backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert {"layers.0.cross.kv.weight", "layers.1.feed_forward.up.weight", "head.dense.weight"} <= reached


def test_checkpointing_changes_nothing() -> None:
    gradients = []
    for checkpointing in (False, True):
        model, (seen, mask) = decoder(dropout=0.1).train(), memory()
        model.checkpointing = checkpointing
        torch.manual_seed(0)
        self_critical(model, seen, mask, marks, settings(), **SPECIAL).loss.backward()
        gradients.append(model.layers[0].cross.kv.weight.grad)
    assert torch.allclose(*gradients, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_model_of_any_precision(dtype: torch.dtype) -> None:
    model, (seen, mask) = decoder().to(dtype), memory()
    loss = self_critical(model, seen.to(dtype), mask, marks, settings(), **SPECIAL).loss
    assert loss.dtype == torch.float32 and torch.isfinite(loss)


def test_lengths_divide_once() -> None:
    """A mean over tokens: all captions twice as long, at the same probability of each token, weigh the same."""
    scores, numbers, advantages = torch.tensor([[-2.0, -3.0]]), torch.tensor([[3, 5]]), torch.tensor([[1.0, -0.5]])
    assert float(advantage_loss(scores, numbers, advantages)) == pytest.approx((2.0 - 1.5) / 8)
    assert float(advantage_loss(2 * scores, 2 * numbers, advantages)) == pytest.approx((2.0 - 1.5) / 8)


# -- learning ----------------------------------------------------------------------------------------------------------

WANTED = 6


def share_of_wanted(written: list[list[list[int]]]) -> list[list[float]]:
    return [[sum(token == WANTED for token in ids) / len(ids) for ids in row] for row in written]


def learn(variant: str, reward: Any, steps: int = 30) -> tuple[float, float]:
    """Share of the wanted token in greedy captions before and after training by a reward."""
    whole: MplugModel = small_model(3, vocab_size=12, decoder_layers=1)
    model = whole.decoder
    seen, mask = memory(8)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0)
    chosen = settings(variant, 5)

    def measured() -> float:
        decoding = Decoding(strategy="greedy", max_tokens=6)
        found = generate(model.eval(), seen, mask, decoding, start=START, end=END, forbidden=[0, START])
        return sum(row[0] for row in share_of_wanted([[h.ids for h in row] for row in found])) / len(seen)

    before = measured()
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        found = self_critical(model.train(), seen, mask, reward, chosen, **SPECIAL, generator=generator)
        optimizer.zero_grad()
        found.loss.backward()
        optimizer.step()
    return before, measured()


@pytest.mark.parametrize("variant", ["beam", "sample"])
def test_what_is_rewarded_is_learned(variant: str) -> None:
    before, after = learn(variant, share_of_wanted)
    assert after > before + 0.3


@pytest.mark.parametrize("variant", ["beam", "sample"])
def test_a_reward_with_the_wrong_sign_unteaches(variant: str) -> None:
    def wrong(written: list[list[list[int]]]) -> Sequence[Sequence[float]]:
        return [[-value for value in row] for row in share_of_wanted(written)]

    before, after = learn(variant, wrong)
    assert after < before


def test_rewards_of_other_captions_teach_nothing() -> None:
    shuffler = torch.Generator().manual_seed(0)

    def shuffled(written: list[list[list[int]]]) -> Sequence[Sequence[float]]:
        return [
            [row[place] for place in torch.randperm(len(row), generator=shuffler).tolist()]
            for row in share_of_wanted(written)
        ]

    before, after = learn("beam", shuffled)
    assert after < before + 0.15
