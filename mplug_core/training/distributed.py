"""The processes of a run: who we are, and joining rows of all of them."""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class World:
    """This process among all. Launchers (torchrun, DeepSpeed's, `mplug` itself, SLURM) set the variables read here."""

    rank: int
    size: int
    local_rank: int

    @classmethod
    def from_environment(cls) -> World:
        if launched_by_slurm(os.environ):
            os.environ.update(variables_of_slurm(os.environ))

        def number(name: str, default: int) -> int:
            return int(os.environ.get(name, default))

        if torch.cuda.device_count() == 1:  # a launcher that shows each process its own device alone
            os.environ["LOCAL_RANK"] = "0"
        return cls(number("RANK", 0), number("WORLD_SIZE", 1), number("LOCAL_RANK", 0))

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self.local_rank) if torch.cuda.is_available() else torch.device("cpu")

    def gather_rows(self, rows: Tensor) -> Tensor:
        """The rows [n, ...] of all processes, in order of rank; n may differ between them. No gradient."""
        return rows if self.size == 1 else self.gather(rows)[0]

    def gather(self, rows: Tensor) -> tuple[Tensor, slice]:
        """The rows of all of several processes, and where among them those of this one stand."""
        count = torch.tensor([len(rows)], device=rows.device)
        counts = [torch.zeros_like(count) for _ in range(self.size)]
        dist.all_gather(counts, count)
        lengths = [int(n) for n in counts]
        padded = rows.new_zeros((max(lengths), *rows.shape[1:]))
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded.contiguous())
        before = sum(lengths[: self.rank])
        joined = torch.cat([part[:n] for part, n in zip(parts, lengths, strict=True)])
        return joined, slice(before, before + len(rows))

    def gather_with_gradient(self, rows: Tensor) -> Tensor:
        """As :meth:`gather_rows`, but what the other processes' losses say of these rows comes back as gradient."""
        return rows if self.size == 1 else GatherWithGradient.apply(rows, self)

    def gather_own_gradient(self, rows: Tensor) -> Tensor:
        """As :meth:`gather_rows`, but this process's own rows keep their gradient: that of its own loss alone."""
        if self.size == 1:
            return rows
        others, own = self.gather(rows.detach())
        return torch.cat([others[: own.start], rows, others[own.stop :]])

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is set on any process."""
        return self.sum([float(flag)])[0] > 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """The sums of each of ``values`` over all processes."""
        if self.size == 1:
            return list(values)
        # NCCL knows the device's tensors alone
        tensor = torch.tensor(
            values, dtype=torch.float64, device=self.device if dist.get_backend() == "nccl" else "cpu"
        )
        dist.all_reduce(tensor)
        return tensor.tolist()

    def gather_objects(self, value: Any) -> list[Any]:
        """``value`` of each process, in order of rank."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


class GatherWithGradient(torch.autograd.Function):
    """Rows of all processes; backward adds up what each process's loss says of this one's.

    PyTorch's own (torch.distributed.nn.functional) is deprecated, and as its default arguments hold the process group
    of the moment of its import for good, the group's threads would outlive ``destroy_process_group``.
    """

    @staticmethod
    def forward(context: Any, rows: Tensor, world: World) -> Tensor:
        joined, context.own = world.gather(rows)
        return joined

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.contiguous().clone()  # other functions may be given the same gradient
        dist.all_reduce(total)
        return total[context.own], None


ALONE = World(0, 1, 0)
"""One process that knows of no other."""


def end_process(code: int) -> NoReturn:
    """Exit as ``sys.exit`` does, but without Python's own dismantling while processes are connected.

    A group's thread that has the tensors of its last exchange still to free when the interpreter goes aborts the
    process, which then seems to have failed. To destroy the group first is not enough: DeepSpeed's parameters hold it.
    """
    if dist.is_available() and dist.is_initialized():
        atexit._run_exitfuncs()  # workers of loaders are ended there, and trackers send what they have left
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(AttributeError, OSError, ValueError):  # none, a broken one, or a closed one
                stream.flush()
        os._exit(code)
    sys.exit(code)


def launched_by_slurm(environment: Any) -> bool:
    """Whether `srun` started this process as one of several, and no other launcher did."""
    return "RANK" not in environment and "SLURM_STEP_ID" in environment and int(environment.get("SLURM_NTASKS", 1)) > 1


def variables_of_slurm(environment: Any) -> dict[str, str]:
    """The variables that torch's launcher would set, from those of SLURM; what is set already stays."""
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "127.0.0.1")
    values = {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment["SLURM_NTASKS"],
        "LOCAL_RANK": environment.get("SLURM_LOCALID", "0"),
        "MASTER_ADDR": first_host(nodes),
        # the same for all processes of a job, and seldom that of another job on the node
        "MASTER_PORT": str(20_000 + int(environment.get("SLURM_JOB_ID", 0)) % 20_000),
    }
    return {name: environment.get(name, value) for name, value in values.items()}


def first_host(nodes: str) -> str:
    """The first host of a SLURM node list: ``gpu[03-05,9],cpu1`` is ``gpu03``."""
    first = re.match(r"([^\[,]+)(?:\[([^\],-]+)[^\]]*\])?([^,\[]*)", nodes)
    return nodes if first is None else first[1] + (first[2] or "") + first[3]
