"""The benchmark of whole processes: what it reports, and that a failure is named."""

from __future__ import annotations

import sys

import pytest

from mplug_core.bench import start
from mplug_core.errors import MplugError


def test_report(monkeypatch: pytest.MonkeyPatch) -> None:
    busy = "import time; end = time.process_time() + 0.2\nwhile time.process_time() < end: pass"
    lines = {start.TORCH: [sys.executable, "-c", "pass"], "busy": [sys.executable, "-c", busy]}
    monkeypatch.setattr(start, "command_lines", lambda image, model: lines)
    told: list[str] = []
    report = start.bench_start(repeats=2, advance=told.append)
    found = report.figures["processes"]
    assert len(told) == 2 * 3 and [row[0] for row in report.rows] == list(lines)
    assert found["busy"]["cpu_median"] > 0.2 and found["busy"]["cpu_of_torch"] > 1
    assert found[start.TORCH]["cpu_of_torch"] == 1 and len(found["busy"]["cpu"]) == 2
    assert all(len(row) == len(report.columns) for row in report.rows)


def test_a_process_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = {start.TORCH: [sys.executable, "-c", "raise SystemExit('no such thing')"]}
    monkeypatch.setattr(start, "command_lines", lambda image, model: lines)
    with pytest.raises(MplugError, match="import torch failed: no such thing"):
        start.bench_start(repeats=1)
