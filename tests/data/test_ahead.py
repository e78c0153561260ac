"""Work ahead: order, errors, backpressure, slow sources."""

from __future__ import annotations

import itertools
import random
import threading
import time

import pytest

from mplug_core.data.ahead import batches_ahead
from mplug_core.errors import MplugError


@pytest.mark.parametrize(("count", "size"), [(0, 4), (1, 4), (4, 4), (5, 4), (50, 7), (3, 1)])
def test_order_is_kept(count, size):
    def work(item):
        time.sleep(random.random() / 500)
        return item * item

    batches = list(batches_ahead(range(count), work, size))
    assert [pair for batch in batches for pair in batch] == [(i, i * i) for i in range(count)]
    assert all(1 <= len(batch) <= size for batch in batches)


def test_quick_sources_fill_their_batches():
    assert [len(batch) for batch in batches_ahead(range(10), abs, 4)] == [4, 4, 2]


def test_known_errors_take_the_place_of_results():
    def work(item):
        if item == 1:
            raise MplugError("bad")
        return item

    (batch,) = batches_ahead(range(3), work, 8)
    assert [type(result) for _, result in batch] == [int, MplugError, int]


@pytest.mark.parametrize("error", [ValueError("bug"), TimeoutError("late")])
def test_other_errors_are_raised(error):
    def work(item):
        raise error

    with pytest.raises(type(error)):
        list(batches_ahead(range(3), work, 8))


def test_an_error_of_the_source_comes_after_what_was_before_it():
    def items():
        yield 1
        raise ValueError("broken pipe of paths")

    batches = batches_ahead(items(), abs, 8)
    assert next(batches) == [(1, 1)]
    with pytest.raises(ValueError, match="broken pipe"):
        next(batches)


def test_a_slow_source_is_answered_at_once():
    gate = threading.Event()

    def items():
        yield 1
        gate.wait(10)
        yield 2

    batches = batches_ahead(items(), abs, 8)
    assert next(batches) == [(1, 1)]
    gate.set()
    assert list(batches) == [[(2, 2)]]


def test_slow_work_holds_up_what_is_behind_it_alone():
    gate = threading.Event()
    batches = batches_ahead([1, 2], lambda item: item if item == 1 else gate.wait(10) and item, 8, threads=2)
    assert next(batches) == [(1, 1)]
    gate.set()
    assert list(batches) == [[(2, 2)]]


def test_little_is_held_and_nothing_is_left_running():
    taken = itertools.count()
    threads = threading.active_count()
    batches = batches_ahead(taken, lambda item: item, 2, threads=2)
    next(batches)
    time.sleep(0.1)
    assert next(taken) < 12
    batches.close()
    for _ in range(100):
        if threading.active_count() == threads:
            break
        time.sleep(0.02)
    assert threading.active_count() == threads
