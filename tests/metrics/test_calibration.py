"""The calibration error and the fitted parameters, where both are known."""

from __future__ import annotations

import math

import pytest
import torch

from mplug_core.metrics.calibration import (
    BINS,
    EXTREME,
    bins_of,
    calibration_measures,
    expected_calibration_error,
    fit_logistic,
    fit_temperature,
)
from mplug_core.metrics.intervals import differences, intervals


def drawn(probability: torch.Tensor, seed: int = 0) -> list[float]:
    """Right or wrong with these probabilities."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(len(probability), generator=generator, dtype=torch.float64) < probability).double().tolist()


def normal(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class TestError:
    def test_of_confidences_that_are_right(self) -> None:
        truth = normal(20_000).sigmoid()
        assert expected_calibration_error(truth.tolist(), drawn(truth)) < 0.02

    def test_of_confidences_that_are_too_high(self) -> None:
        assert expected_calibration_error([0.9] * 10, [1.0] * 6 + [0.0] * 4) == pytest.approx(0.3)

    def test_is_a_mean_over_bins_of_equal_mass(self) -> None:
        said, right = torch.rand(10 * BINS).sort().values.tolist(), drawn(torch.full((10 * BINS,), 0.4))
        assert bins_of(said).tolist() == [bin for bin in range(BINS) for _ in range(10)]
        pairs = list(zip(said, right, strict=True))
        parts = [pairs[start : start + 10] for start in range(0, len(pairs), 10)]
        expected = sum(abs(sum(s - r for s, r in part) / 10) for part in parts) / BINS
        assert expected_calibration_error(said, right) == pytest.approx(expected)
        mixed = list(reversed(said)), list(reversed(right))
        assert expected_calibration_error(*mixed) == pytest.approx(expected)

    def test_equal_confidences_share_a_bin(self) -> None:
        said, right = [0.5] * 40, [1.0] * 20 + [0.0] * 20
        assert expected_calibration_error(said, right) == 0
        assert expected_calibration_error(said, right[::-1]) == 0

    def test_of_answers_that_are_partly_right(self) -> None:
        assert expected_calibration_error([0.3] * 5, [0.3] * 5) == pytest.approx(0)

    def test_of_one_answer(self) -> None:
        assert expected_calibration_error([0.9], [1.0]) == pytest.approx(0.1)

    def test_of_none(self) -> None:
        with pytest.raises(ValueError):
            expected_calibration_error([], [])


def test_the_interval_holds_the_error() -> None:
    """Resampled distances are larger than those of the sample, and the interval is moved back by that."""
    truth = (2 * normal(600)).sigmoid()
    for said in (truth, truth.sqrt()):
        measures = calibration_measures([f"photo {k // 3}" for k in range(600)], said.tolist(), drawn(truth))
        ((low, high),) = intervals(measures).values()
        value = measures["ece"].value()
        assert 0 <= low < value < high < value + 0.06
        assert value == pytest.approx(expected_calibration_error(said.tolist(), drawn(truth)))


def test_the_better_calibrated_of_two_is_found() -> None:
    truth = (2 * normal(600)).sigmoid()
    right, clusters = drawn(truth), list(range(600))
    good, bad = (calibration_measures(clusters, said.tolist(), right) for said in (truth, truth.sqrt()))
    difference, low, high = differences(bad, good)["ece"]
    assert 0 < low < difference < high


def test_no_error_without_confidences_or_truth() -> None:
    assert calibration_measures([1, 2], [0.5, None], [1.0, 0.0]) == {}
    assert calibration_measures([1, 2], [0.5, 0.5], [None, None]) == {}
    assert calibration_measures([1, 2], [0.5, None], [1.0, None])["ece"].value() == 0.5


@pytest.mark.parametrize("factor", [0.4, 1.0, 3.0])
@pytest.mark.parametrize("candidates", [2, 5])
def test_a_temperature_is_found_again(factor: float, candidates: int) -> None:
    logits = 2 * normal(20_000, candidates)
    right = drawn(logits.softmax(1).amax(1))
    assert fit_temperature((logits * factor).tolist(), right) == pytest.approx(factor, rel=0.07)


def test_lists_of_scores_may_have_different_lengths() -> None:
    logits = 2 * normal(10_000, 4)
    lists = [row[: 2 + place % 3] for place, row in enumerate(logits.tolist())]
    right = drawn(torch.tensor([max(torch.tensor(row).double().softmax(0)) for row in lists]))
    assert fit_temperature([[2 * value for value in row] for row in lists], right) == pytest.approx(2, rel=0.07)


@pytest.mark.parametrize(("temperature", "bias"), [(1.0, 0.0), (2.5, -0.7), (0.5, 1.0)])
def test_a_logistic_map_is_found_again(temperature: float, bias: float) -> None:
    odds = 2 * normal(20_000)
    right = drawn((odds / temperature + bias).sigmoid())
    assert fit_logistic(odds.tolist(), right) == (pytest.approx(temperature, rel=0.07), pytest.approx(bias, abs=0.07))


def test_targets_that_are_partly_right() -> None:
    odds = 2 * normal(5_000)
    found = fit_logistic(odds.tolist(), (odds / 2 + 0.5).sigmoid().tolist())
    assert found == (pytest.approx(2, rel=0.01), pytest.approx(0.5, abs=0.01))


def test_confidences_that_say_nothing_become_the_share_of_right_answers() -> None:
    odds = [-2.0, 2.0] * 100
    for right in ([1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0] * 25, [1.0, 0.0] * 75 + [0.0, 0.0] * 25):
        temperature, bias = fit_logistic(odds, right)
        assert 10 < temperature <= EXTREME
        assert 1 / (1 + math.exp(-bias)) == pytest.approx(0.375, abs=0.01)


def test_a_perfect_order_has_finite_parameters() -> None:
    odds = [-1.0] * 30 + [1.0] * 30
    temperature, bias = fit_logistic(odds, [0.0] * 30 + [1.0] * 30)
    assert 1 / EXTREME <= temperature < 1 and abs(bias) < 1
    # Platt's targets: as sure as thirty of thirty allow
    assert 1 / (1 + math.exp(-1 / temperature - bias)) == pytest.approx(31 / 32, abs=1e-4)


def test_choices_that_are_worse_than_chance_have_the_highest_temperature() -> None:
    assert fit_temperature([[2.0, 0.0]] * 100, [1.0] * 10 + [0.0] * 90) == pytest.approx(EXTREME, rel=0.2)


def test_the_minimum_is_the_least_of_a_grid() -> None:
    logits = 3 * normal(500, 3)
    right = drawn((logits / 2).softmax(1).amax(1), seed=5)
    found = fit_temperature(logits.tolist(), right)

    def loss(temperature: float) -> float:
        were = torch.tensor(right, dtype=torch.float64)
        high, low = (were.sum() + 1) / (were.sum() + 2), 1 / ((1 - were).sum() + 2)
        share = (logits / temperature).softmax(1).amax(1)
        return float(torch.nn.functional.binary_cross_entropy(share, low + were * (high - low)))

    assert loss(found) <= min(loss(math.exp(k / 50)) for k in range(-200, 200)) + 1e-9
