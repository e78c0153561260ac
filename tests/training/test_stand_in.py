"""Stand-ins recover a known linear map and noise."""

from __future__ import annotations

import pytest
import torch

from mplug_core.training.stand_in import StandIn, ridge_map

DIM, PAIRS = 6, 4000


@pytest.fixture(scope="module")
def world() -> tuple[torch.Tensor, ...]:
    """A map, an offset, a noise factor, texts, and the images that follow from them."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(DIM, DIM, generator=generator)
    offset = torch.randn(DIM, generator=generator)
    noise = torch.randn(DIM, DIM, generator=generator) * 0.2
    text = torch.randn(PAIRS, DIM, generator=generator)
    image = text @ matrix + offset + torch.randn(PAIRS, DIM, generator=generator) @ noise.T
    return matrix, offset, noise, text, image


def test_ridge_map_recovers_a_linear_map(world: tuple[torch.Tensor, ...]) -> None:
    matrix, offset, _, text, _ = world
    found, shift = ridge_map(text, text @ matrix + offset, 1e-6)
    assert torch.allclose(found, matrix, atol=1e-3) and torch.allclose(shift, offset, atol=1e-3)


def test_ridge_shrinks(world: tuple[torch.Tensor, ...]) -> None:
    matrix, offset, _, text, _ = world
    strong, _ = ridge_map(text, text @ matrix + offset, 10.0)
    assert torch.allclose(strong, matrix / 11, atol=0.03)


def test_fit_recovers_map_and_noise(world: tuple[torch.Tensor, ...]) -> None:
    matrix, offset, noise, text, image = world
    stand_in = StandIn(DIM)
    explained = stand_in.fit(text, image, ridge=1e-4)
    assert torch.allclose(stand_in.matrix, matrix, atol=0.05) and torch.allclose(stand_in.offset, offset, atol=0.05)
    covariance, found = noise @ noise.T, stand_in.noise @ stand_in.noise.T
    assert torch.allclose(found.diagonal(), covariance.diagonal(), rtol=0.1)
    assert torch.allclose(found, 0.9 * covariance + 0.1 * torch.diag(covariance.diagonal()), atol=0.03)
    want = 1 - covariance.diagonal().sum() / image.var(0).sum()
    assert explained == pytest.approx(float(want), abs=0.01)


def test_few_pairs_do_not_hide_their_noise() -> None:
    """With as many pairs as dimensions a fit explains all of what it has seen; left-out pairs tell the truth."""
    generator = torch.Generator().manual_seed(1)
    text, image = torch.randn(30, 25, generator=generator), torch.randn(30, 25, generator=generator)
    stand_in = StandIn(25)
    assert stand_in.fit(text, image, ridge=0.1) < 0.1
    assert float(stand_in.noise.square().sum()) > 0.8 * float(image.var(0).sum())


def test_stand_ins_are_of_unit_length_reproducible_and_varied(world: tuple[torch.Tensor, ...]) -> None:
    matrix, offset, _, text, image = world
    stand_in = StandIn(DIM)
    stand_in.fit(text, image)
    made = [stand_in(text[:5], torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.allclose(made[0].norm(dim=-1), torch.ones(5))
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])
    stand_in.noise.zero_()
    mean = torch.nn.functional.normalize(text[:5] @ stand_in.matrix + stand_in.offset, dim=-1)
    assert torch.allclose(stand_in(text[:5]), mean, atol=1e-5)


def test_bf16(world: tuple[torch.Tensor, ...]) -> None:
    stand_in = StandIn(DIM)
    stand_in.fit(world[3], world[4])
    made = stand_in.bfloat16()(world[3][:4].bfloat16())
    assert made.dtype == torch.bfloat16 and made.isfinite().all()


def test_state_round_trip(world: tuple[torch.Tensor, ...]) -> None:
    stand_in, other = StandIn(DIM), StandIn(DIM)
    stand_in.fit(world[3], world[4])
    other.load_state_dict(stand_in.state_dict())
    made = [s(world[3][:3], torch.Generator().manual_seed(0)) for s in (stand_in, other)]
    assert torch.equal(*made)
