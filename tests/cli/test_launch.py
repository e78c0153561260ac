"""Starting a command once for each device."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mplug_cli import launch
from mplug_core.errors import UsageError
from mplug_core.training.distributed import first_host, launched_by_slurm, variables_of_slurm

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in launch.LAUNCHERS:
        monkeypatch.delenv(name, raising=False)


def test_processes_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert launch.processes_wanted("auto", "deepspeed") == 1
    assert launch.processes_wanted("2", "deepspeed") == 2
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert launch.processes_wanted("auto", "deepspeed") == 4
    assert launch.processes_wanted("auto", "plain") == 1
    for devices, engine in (("5", "deepspeed"), ("2", "plain"), ("0", "deepspeed"), ("all", "deepspeed")):
        with pytest.raises(UsageError):
            launch.processes_wanted(devices, engine)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert launch.processes_wanted("auto", "deepspeed") == 1
    with pytest.raises(UsageError, match="a launcher has started"):
        launch.processes_wanted("2", "deepspeed")


def test_a_shell_inside_of_a_slurm_job_is_no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    for name, value in (("SLURM_STEP_ID", "0"), ("SLURM_NTASKS", "1")):
        monkeypatch.setenv(name, value)
    assert launch.processes_wanted("auto", "deepspeed") == 4
    monkeypatch.setenv("SLURM_NTASKS", "4")
    assert launch.processes_wanted("auto", "deepspeed") == 1


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux alone tells a process of its parent's death")
def test_processes_end_with_the_one_that_started_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = """
    def stop(number, frame):
        open(f'stopped-{rank}', 'w').close()
        sys.exit(75)
    signal.signal(signal.SIGTERM, stop)
    open(f'ready-{rank}', 'w').close()
    time.sleep(100)
    """
    fake_app(tmp_path, monkeypatch, body)
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from mplug_cli.launch import *; run_in_processes(2, [])"
    launcher = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path)
    wait_for(lambda: all((tmp_path / f"ready-{rank}").exists() for rank in (0, 1)))
    launcher.kill()
    launcher.wait()
    wait_for(lambda: all((tmp_path / f"stopped-{rank}").exists() for rank in (0, 1)))


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def fake_app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    """A package mplug_cli whose app does ``body`` with ``rank``."""
    package = tmp_path / "mplug_cli"
    package.mkdir()
    (package / "__init__.py").touch()
    head = "import os, signal, sys, time\nrank = int(os.environ['RANK'])\n"
    (package / "app.py").write_text(head + textwrap.dedent(body))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def test_processes_know_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    fake_app(tmp_path, monkeypatch, "print(rank, os.environ['WORLD_SIZE'], os.environ['LOCAL_RANK'], *sys.argv[1:])")
    assert launch.run_in_processes(2, ["pretrain", "a b"]) == 0
    assert sorted(capfd.readouterr().out.splitlines()) == ["0 2 0 pretrain a b", "1 2 1 pretrain a b"]


@pytest.mark.parametrize(("end", "code"), [("sys.exit(3)", 3), ("os.kill(os.getpid(), 9)", 137)])
def test_one_failure_ends_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str, code: int) -> None:
    monkeypatch.setattr(launch, "GRACE", 0.2)
    fake_app(tmp_path, monkeypatch, f"if rank == 1: {end}\ntime.sleep(100)")
    assert launch.run_in_processes(2, []) == code


def test_signals_are_handed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = """
    def stop(number, frame):
        sys.exit(75)
    signal.signal(signal.SIGUSR1, stop)
    open(f'ready-{rank}', 'w').close()
    if rank == 0:
        while not os.path.exists('ready-1'): time.sleep(0.01)
        os.kill(os.getppid(), signal.SIGUSR1)
    time.sleep(100)
    """
    fake_app(tmp_path, monkeypatch, body)
    assert launch.run_in_processes(2, []) == 75


def test_slurm() -> None:
    srun = {
        "SLURM_STEP_ID": "0", "SLURM_NTASKS": "16", "SLURM_PROCID": "9", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "4321",
        "SLURM_STEP_NODELIST": "gpu[03-04]",
    }  # fmt: skip
    assert launched_by_slurm(srun)
    assert variables_of_slurm(srun) == {
        "RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "MASTER_ADDR": "gpu03", "MASTER_PORT": "24321",
    }  # fmt: skip
    assert variables_of_slurm({**srun, "MASTER_PORT": "1"})["MASTER_PORT"] == "1"
    assert not launched_by_slurm({**srun, "RANK": "0"})  # torchrun inside of a job
    assert not launched_by_slurm({**srun, "SLURM_NTASKS": "1"})
    assert not launched_by_slurm({k: v for k, v in srun.items() if k != "SLURM_STEP_ID"})  # sbatch without srun


@pytest.mark.parametrize(
    ("nodes", "host"),
    [("n1", "n1"), ("n1,n2", "n1"), ("gpu[03-05,9],cpu1", "gpu03"), ("a-[7,9]", "a-7"), ("r[1-2]n0", "r1n0")],
)
def test_first_host(nodes: str, host: str) -> None:
    assert first_host(nodes) == host
