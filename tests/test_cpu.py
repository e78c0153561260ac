"""Threads: what a process may use by affinity, quotas and cores, and who has the last word."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from mplug_core import cpu
from mplug_core.errors import UsageError


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Eight logical CPUs on four cores, no quota: ``cpus/``, ``groups/`` and ``own`` in the folder say so."""
    for number in range(8):
        topology = tmp_path / "cpus" / f"cpu{number}" / "topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(f"{number % 4},{number % 4 + 4}\n")
    (tmp_path / "groups").mkdir()
    (tmp_path / "own").write_text("0::/jobs/mine\n")
    monkeypatch.setattr(cpu, "CPUS", tmp_path / "cpus")
    monkeypatch.setattr(cpu, "CGROUPS", tmp_path / "groups")
    monkeypatch.setattr(cpu, "OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    for name in ("MPLUG_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture(autouse=True)
def same_threads_after():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def set_quota(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def test_two_hardware_threads_are_one_core(machine: Path) -> None:
    assert cpu.usable_cores() == 4


def test_of_what_is_not_described_each_is_a_core(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "CPUS", machine / "nowhere")
    assert cpu.usable_cores() == 8


@pytest.mark.parametrize(("allowed", "cores"), [({0}, 1), ({0, 4}, 1), ({0, 1, 5}, 2)])
def test_affinity(machine: Path, monkeypatch: pytest.MonkeyPatch, allowed: set[int], cores: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: allowed, raising=False)
    assert cpu.usable_cores() == cores


@pytest.mark.parametrize("group", [".", "jobs", "jobs/mine"])
@pytest.mark.parametrize(
    ("limit", "cores"), [("max 100000", 4), ("250000 100000", 2), ("50000 100000", 1), ("900000 100000", 4), ("?", 4)]
)
def test_quota_of_a_group_or_one_around_it(machine: Path, group: str, limit: str, cores: int) -> None:
    set_quota(machine / "groups" / group, cpu__max=limit + "\n")
    assert cpu.usable_cores() == cores


@pytest.mark.parametrize(("quota", "cores"), [("-1", 4), ("200000", 2), ("10000", 1)])
def test_quota_of_version_1(machine: Path, quota: str, cores: int) -> None:
    (machine / "own").write_text("5:cpu,cpuacct:/docker/x\n4:memory:/docker/x\n")
    set_quota(machine / "groups" / "cpu,cpuacct", cpu__cfs_quota_us=quota, cpu__cfs_period_us="100000")
    assert cpu.usable_cores() == cores


def test_no_group_is_no_quota(machine: Path) -> None:
    (machine / "own").unlink()
    assert cpu.usable_cores() == 4


def test_default_is_lowered_and_never_raised(machine: Path) -> None:
    torch.set_num_threads(6)
    assert (cpu.settle_threads(), torch.get_num_threads()) == (4, 4)
    assert cpu.settle_threads(processes=3) == 1
    assert cpu.settle_threads() == 1


def test_threads_are_set_even_if_they_are_as_many(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A forked process has to replace PyTorch's thread pool before two of its threads do so at once."""
    torch.set_num_threads(4)
    calls: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", calls.append)
    assert cpu.settle_threads() == 4
    assert calls == [4]


def test_who_asks_wins_in_this_order(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(6)
    monkeypatch.setenv("OMP_NUM_THREADS", "6")
    assert cpu.settle_threads() == 6
    monkeypatch.setenv("MPLUG_THREADS", "5")
    assert (cpu.settle_threads(), torch.get_num_threads()) == (5, 5)
    assert (cpu.settle_threads(3), torch.get_num_threads()) == (3, 3)


@pytest.mark.parametrize("value", ["0", "-1", "many", "1.5"])
def test_no_number_of_threads(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("MPLUG_THREADS", value)
    with pytest.raises(UsageError, match="MPLUG_THREADS"):
        cpu.asked_threads()


def test_denormal_numbers_are_flushed(machine: Path) -> None:
    torch.set_flush_denormal(False)
    try:
        cpu.settle_threads(1)
        assert (torch.tensor([1e-38]) * 1e-5).item() == 0
    finally:
        torch.set_flush_denormal(False)
