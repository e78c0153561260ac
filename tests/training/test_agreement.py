"""Engines and numbers of processes compute the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.training.agreement import differences


@pytest.mark.slow
def test_engines_and_processes_agree(tmp_path: Path) -> None:
    """ZeRO 2 stands for the stages, all of which ``python -m tests.training.agreement`` compares."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    found = dict(differences(tmp_path, ("fp32",), (2,)))
    assert len(found) == 3
    # a unit of the seventh digit, with which the log writes losses above 10, and what subtracting two such numbers adds
    assert max(found.values()) <= 1e-5 + 1e-9, found
