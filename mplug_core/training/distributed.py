"""The processes of a run: who we are, and joining rows of all of them."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class World:
    """This process among all. Launchers (torchrun, DeepSpeed's, SLURM's through them) set the variables read here."""

    rank: int
    size: int
    local_rank: int

    @classmethod
    def from_environment(cls) -> World:
        def number(name: str, default: int) -> int:
            return int(os.environ.get(name, default))

        return cls(number("RANK", 0), number("WORLD_SIZE", 1), number("LOCAL_RANK", 0))

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self.local_rank) if torch.cuda.is_available() else torch.device("cpu")

    def gather_rows(self, rows: Tensor) -> Tensor:
        """The rows [n, ...] of all processes, in order of rank; n may differ between them. No gradient."""
        if self.size == 1:
            return rows
        count = torch.tensor([len(rows)], device=rows.device)
        counts = [torch.zeros_like(count) for _ in range(self.size)]
        dist.all_gather(counts, count)
        longest = int(max(counts))
        padded = rows.new_zeros((longest, *rows.shape[1:]))
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded.contiguous())
        return torch.cat([part[: int(n)] for part, n in zip(parts, counts, strict=True)])

    def gather_with_gradient(self, rows: Tensor) -> Tensor:
        """As :meth:`gather_rows`, but what the other processes' losses say of these rows comes back as gradient."""
        if self.size == 1:
            return rows
        from torch.distributed.nn.functional import all_gather

        counts = self.gather_rows(torch.tensor([len(rows)], device=rows.device)).tolist()
        padded = torch.nn.functional.pad(rows, (0, 0) * (rows.dim() - 1) + (0, max(counts) - len(rows)))
        parts = all_gather(padded.contiguous())
        return torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)])

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is set on any process."""
        if self.size == 1:
            return flag
        device = torch.device("cuda", self.local_rank) if dist.get_backend() == "nccl" else "cpu"
        value = torch.tensor([int(flag)], device=device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return bool(value)

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()
