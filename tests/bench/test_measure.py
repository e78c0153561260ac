"""How things are measured: turns, medians, and what a report says."""

from __future__ import annotations

import json

from mplug_core.bench.measure import Machine, Report, Timing, take_turns


def test_every_round_has_all_in_another_order() -> None:
    done: list[str] = []
    actions = {name: (lambda name=name: done.append(name)) for name in "abc"}
    found = take_turns(actions, repeats=2, warmup=1)
    assert done == list("abc" "bca" "cab")
    assert {name: len(timing.seconds) for name, timing in found.items()} == {"a": 2, "b": 2, "c": 2}


def test_what_is_slow_has_one_turn_that_counts() -> None:
    done: list[str] = []
    actions = {name: (lambda name=name: done.append(name)) for name in ("quick", "slow")}
    found = take_turns(actions, repeats=3, warmup=2, once=("slow",))
    assert done.count("slow") == 1 and done.count("quick") == 5
    assert len(found["slow"].seconds) == 1 and len(found["quick"].seconds) == 3


def test_median_and_spread() -> None:
    timing = Timing((0.5, 9.0, 0.25))
    assert (timing.median, timing.low, timing.high, timing.spread) == (0.5, 0.25, 9.0, "0.25-9")


def test_report_as_markdown_and_json() -> None:
    report = Report("x", "A title", ("a", "b"), Machine.here(), [("1", "2")], {"ratio": 2.5}, ["a note"])
    assert report.markdown().splitlines()[:6] == ["### A title", "", "| a | b |", "|---|---|", "| 1 | 2 |", ""]
    assert "- a note" in report.markdown() and str(report.machine) in report.markdown()
    found = json.loads(report.json())
    assert found["benchmark"] == "x" and found["ratio"] == 2.5 and found["machine"]["packages"]["torch"]
