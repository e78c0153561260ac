"""Training runs that faults happen to: real processes of the real command, started in milliseconds.

A server (``python -m tests.faults.runs``) imports torch, DeepSpeed and the trainer once, with one thread and before any
parallel region, and forks a process for each rank of a run; the rank does what ``mplug pretrain`` does, with the
variables that a launcher sets. Commands come on stdin and answers go to stdout, a line of JSON each. What still runs
when its stdin closes is killed.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_STEP_ID")
CLOCKS = (
    "images_per_second", "tokens_per_second", "mfu", "memory_gb", "seconds", "eta_seconds", "evaluation_seconds",
)  # fmt: skip
"""Figures of the log that no two runs share."""
BOUND = 120.0
"""Seconds within which a run of these tests has ended, or hangs."""


class Hangs(AssertionError):
    """A run has not ended in time."""


@dataclass
class Run:
    """A started run: a process a rank, each the head of its process group, and what each has said."""

    runs: Runs
    pids: list[int]
    logs: list[Path]
    codes: dict[int, int] = field(default_factory=dict)

    def send(self, number: int, ranks: Sequence[int] | None = None) -> None:
        """Send a signal to the ranks (default: all) that still run."""
        for rank in range(len(self.pids)) if ranks is None else ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pids[rank], number)

    def kill(self, ranks: Sequence[int] | None = None) -> None:
        """SIGKILL, also to the processes that the ranks have started."""
        for rank in range(len(self.pids)) if ranks is None else ranks:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pids[rank], signal.SIGKILL)

    def runs_still(self) -> bool:
        return len(self._ended(0.0)) < len(self.pids)

    def wait(self, seconds: float = BOUND) -> list[int]:
        """Exit codes by rank, -9 for one that SIGKILL ended. :class:`Hangs` when not all have ended in time."""
        codes = self._ended(seconds)
        if len(codes) < len(self.pids):
            self.kill()
            self._ended(10.0)
            raise Hangs(f"not ended within {seconds:.0f} s\n" + "\n".join(map(self.said, range(len(self.pids)))))
        return [codes[rank] for rank in range(len(self.pids))]

    def _ended(self, seconds: float) -> dict[int, int]:
        until = time.monotonic() + seconds
        for rank, pid in enumerate(self.pids):
            if rank not in self.codes:
                left = max(0.0, until - time.monotonic())
                code = self.runs.ask({"do": "wait", "pid": pid, "seconds": left}, left)
                if code is not None:
                    self.codes[rank] = code
        return self.codes

    def said(self, rank: int = 0) -> str:
        """What a rank has written to stdout and stderr."""
        return self.logs[rank].read_text(encoding="utf-8", errors="replace")

    def errors(self, rank: int = 0) -> list[str]:
        """The lines of errors among it."""
        return [line for line in self.said(rank).splitlines() if line.startswith("error: ")]


class Runs:
    """Starts runs; a context, at whose end none of them is left."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.started = folder, 0
        folder.mkdir(parents=True, exist_ok=True)
        clean = {name: value for name, value in os.environ.items() if name not in LAUNCHED}
        threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}
        self.errors = open(folder / "server.log", "wb")  # noqa: SIM115
        self.server = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.runs"], cwd=ROOT, env={**clean, **threads},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors,
        )  # fmt: skip

    def __enter__(self) -> Runs:
        return self

    def __exit__(self, *error: Any) -> None:
        self.server.stdin.close()
        try:
            self.server.wait(20)
        except subprocess.TimeoutExpired:
            self.server.kill()
            self.server.wait(20)
        self.server.stdout.close()
        self.errors.close()

    def ask(self, command: dict[str, Any], seconds: float) -> Any:
        """The server's answer to a command that takes it so long."""
        self.server.stdin.write(json.dumps(command).encode() + b"\n")
        self.server.stdin.flush()
        ready, _, _ = select.select([self.server.stdout], [], [], seconds + BOUND)
        line = self.server.stdout.readline() if ready else b""
        if not line:
            raise Hangs("the server of runs is gone: " + (self.folder / "server.log").read_text()[-2000:])
        return json.loads(line)

    def start(
        self, recipe: Any, processes: int = 1, resume: str = "auto", faults: Sequence[dict[str, Any]] = (),
    ) -> Run:  # fmt: skip
        """Start a run. ``faults``: each the name of a function of :mod:`tests.faults.injected` under ``fault``, the
        ``ranks`` that it happens to (default: all), and its arguments."""
        self.started += 1
        file = self.folder / f"{self.started:03d}.yaml"
        file.write_text(recipe.model_dump_json(), encoding="utf-8")  # JSON is YAML
        master = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        run = Run(self, [], [])
        for rank in range(processes):
            place = {**master, "RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
            log = self.folder / f"{self.started:03d}-{rank}.log"
            mine = [fault for fault in faults if rank in fault.get("ranks", [rank])]
            arguments = ["pretrain", "--recipe", str(file), "--resume", resume]
            command = {"do": "start", "arguments": arguments, "environment": place, "faults": mine, "log": str(log)}
            run.pids.append(self.ask(command, BOUND))  # imports come before the first answer
            run.logs.append(log)
        return run

    def finish(self, recipe: Any, processes: int = 1, **how: Any) -> Run:
        """A run to its end, which has to be a good one."""
        run = self.start(recipe, processes, **how)
        codes = run.wait()
        assert codes == [0] * processes, (codes, *(run.said(rank)[-2000:] for rank in range(processes)))
        return run


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# -- what runs leave behind --------------------------------------------------------------------------------------------


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The log without what a clock says."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{name: value for name, value in line.items() if name not in CLOCKS} for line in lines]


def steps(folder: Path) -> list[dict[str, Any]]:
    """Its lines on steps alone."""
    return [line for line in metrics(folder) if "evaluation" not in line]


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").glob("step-*"))


def pointer(folder: Path) -> str:
    return (folder / "checkpoints" / "latest").read_text(encoding="utf-8").strip()


def final_tensors(folder: Path) -> dict[str, Any]:
    """Every tensor of the run's model, its best model and its last checkpoint, by file and name."""
    from safetensors.torch import load_file

    last = folder / "checkpoints" / pointer(folder)
    files = [*(folder / "model").glob("*.safetensors"), *(folder / "best").glob("*.safetensors")]
    files += sorted(last.rglob("*.safetensors"))
    return {f"{file.relative_to(folder)} {name}": tensor for file in files for name, tensor in load_file(file).items()}


def differences(one: Path, other: Path) -> list[str]:
    """What two runs have left that is not the same to the bit, clocks apart."""
    import torch

    found = [] if pointer(one) == pointer(other) else ["checkpoints/latest"]
    tensors, others = final_tensors(one), final_tensors(other)
    assert any("engine" in name for name in tensors) and any(name.startswith("model/") for name in tensors)
    found += sorted(tensors.keys() ^ others.keys())
    found += [name for name in tensors.keys() & others.keys() if not torch.equal(tensors[name], others[name])]
    if metrics(one) != metrics(other):
        found.append("metrics.jsonl")
    return found


# -- the server --------------------------------------------------------------------------------------------------------


def serve() -> int:
    """Answer commands until stdin closes; in a forked process, run what it asks for and return its exit code."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import deepspeed  # noqa: F401
    import torch

    import mplug_cli.app
    import mplug_core.training.trainer  # noqa: F401
    from tests.small import small_model

    torch.set_num_threads(1)
    small_model()  # what is imported only when it is first needed, for all at once
    with torch.device("meta"):
        small_model()
    children: set[int] = set()
    for line in sys.stdin:
        command = json.loads(line)
        if command["do"] == "start":
            pid = os.fork()
            if not pid:
                answers.close()
                return run_here(command, mplug_cli.app.main)
            children.add(pid)
            answer: Any = pid
        else:
            answer = code_of(command["pid"], command["seconds"])
            if answer is not None:
                children.discard(command["pid"])
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    for pid in children:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        code_of(pid, 10.0)
    return 0


def run_here(command: dict[str, Any], main: Any) -> int:
    """The command line in this process, which a fork has just made."""
    os.setsid()
    for target, flags, name in ((0, os.O_RDONLY, os.devnull), (1, os.O_WRONLY | os.O_CREAT, command["log"])):
        handle = os.open(name, flags, 0o644)
        os.dup2(handle, target)
        os.close(handle)
    os.dup2(1, 2)
    os.environ.update(command["environment"])
    for fault in command["faults"]:
        values = {name: value for name, value in fault.items() if name not in ("fault", "ranks")}
        getattr(importlib.import_module("tests.faults.injected"), fault["fault"])(**values)
    return main(command["arguments"])


def code_of(pid: int, seconds: float) -> int | None:
    """The exit code of a child, negative for a signal; None if it has not ended within ``seconds``."""
    until = time.monotonic() + seconds
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= until:
            return None
        time.sleep(0.01)


if __name__ == "__main__":
    sys.exit(serve())
