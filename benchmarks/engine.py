"""What DeepSpeed costs over a bare PyTorch loop: ``python benchmarks/engine.py``.

One process holds both, each with its own copy of the same model, losses and batch, and takes turns: some steps of one,
some of the other. The bare loop is :class:`PlainEngine`: in bf16 its weights are bf16 with fp32 copies in AdamW, which
is what DeepSpeed does in bf16, too. The ratio is that of the medians over turns, once of wall-clock time and once of
the process' own CPU time, which neighbours on the machine disturb less. The spread is between the quartiles.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from typing import Any

# before torch
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import torch

from mplug_core.allocator import keep_freed_memory
from mplug_core.bench.step import RealStep
from mplug_core.model.config import MplugConfig
from mplug_core.recipe import EngineSection, Recipe, check_recipe, load_recipe
from mplug_core.training.distributed import World
from mplug_core.training.engine import Engine, build_engine
from mplug_core.training.workload import Workbench

MEDIUM: dict[str, Any] = {
    "name": "medium",
    "steps": 4,
    "model": {
        "size": "base", "width": 384, "heads": 6, "intermediate": 1536, "text_layers": 4, "fusion_layers": 4,
        "decoder_layers": 4, "vocab_size": 8000,
        "vision": {
            "backbone": "vit_base_patch16_clip_quickgelu_224", "image_size": 128,
            "options": {"embed_dim": 384, "depth": 6, "num_heads": 6},
        },
    },
    "data": {"sources": {"pairs": {"path": "nowhere", "batch_size": 8}}},
    "teacher": {"alpha": 0, "queue_size": 0},
}  # fmt: skip
ENGINES = {
    ("bf16", "zero 1"): {"zero_stage": 1, "precision": "bf16"},
    ("bf16", "zero 2"): {"zero_stage": 2, "precision": "bf16"},
    ("fp32", "zero 1"): {"zero_stage": 1, "precision": "fp32"},
    ("fp32", "zero 2"): {"zero_stage": 2, "precision": "fp32"},
}


def recipe_of(size: str) -> Recipe:
    """Recipe ``tiny`` with all its losses, or a model of 40M parameters with those of pre-training."""
    return load_recipe("tiny", ["stages=[]", "steps=4"]) if size == "tiny" else check_recipe(MEDIUM)


class Loop:
    """An engine with a step of its own, and the time of each turn."""

    def __init__(self, recipe: Recipe, engine: EngineSection) -> None:
        recipe = recipe.model_copy(update={"engine": engine})
        bench = Workbench.of(recipe, MplugConfig(**recipe.model.model_dump()))
        torch.manual_seed(0)
        self.step = RealStep(bench, bench.stages[0])
        self.parameters = sum(p.numel() for p in self.step.module.parameters())
        self.engine: Engine = build_engine(
            self.step.module, engine, recipe.optimizer, World(0, 1, 0), self.step.batch_size
        )
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def turn(self, steps: int) -> float:
        """Take some steps; the last loss."""
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(steps):
            loss = self.step.compute(self.engine)
        self.wall.append((time.perf_counter() - wall) / steps)
        self.cpu.append((time.process_time() - cpu) / steps)
        return loss


def compare(size: str, precision: str, name: str, turns: int, steps: int) -> dict[str, Any]:
    """DeepSpeed against the bare loop."""
    recipe = recipe_of(size)
    loops = {
        "bare": Loop(recipe, EngineSection(name="plain", precision=precision)),
        "deepspeed": Loop(recipe, EngineSection(**ENGINES[precision, name])),
    }
    for loop in loops.values():
        loop.turn(2)
        loop.wall.clear(), loop.cpu.clear()
    for turn in range(turns):
        # who goes first changes, as what one leaves in the caches helps or hurts the other
        for loop in list(loops.values())[:: 1 if turn % 2 else -1]:
            loop.turn(steps)
    row: dict[str, Any] = {
        "model": size,
        "parameters": loops["bare"].parameters,
        "precision": precision,
        "engine": name,
    }
    for clock in ("wall", "cpu"):
        medians = {key: statistics.median(getattr(loop, clock)) for key, loop in loops.items()}
        row[clock] = {f"{key}_ms": round(value * 1e3, 1) for key, value in medians.items()}
        row[clock]["ratio"] = round(medians["deepspeed"] / medians["bare"], 3)
        ratios = [b / a for a, b in zip(getattr(loops["bare"], clock), getattr(loops["deepspeed"], clock), strict=True)]
        first, _, third = statistics.quantiles(ratios, n=4)
        row[clock]["quartiles"] = [round(first, 3), round(third, 3)]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["tiny", "medium"], choices=["tiny", "medium"])
    parser.add_argument("--engines", nargs="+", default=[f"{p} {n}" for p, n in ENGINES])
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--steps", type=int, default=2, help="steps of a turn")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="one JSON object a row")
    parser.add_argument("--markdown", action="store_true", help="a table for a README")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    # as the trainer does
    torch.set_flush_denormal(True)
    keep_freed_memory()
    import deepspeed

    where = {"torch": torch.__version__, "deepspeed": deepspeed.__version__, "threads": arguments.threads}
    where["turns"] = f"{arguments.turns} x {arguments.steps} steps"
    if not arguments.json:
        print(", ".join(f"{key} {value}" for key, value in where.items()))
    if arguments.markdown:
        print("| model | engine | bare, DeepSpeed: CPU ms a step | ratio (quartiles) | ratio of wall time |")
        print("|---|---|---|---|---|")
    for size in arguments.sizes:
        for precision, name in ENGINES:
            if f"{precision} {name}" not in arguments.engines:
                continue
            row = compare(size, precision, name, arguments.turns, arguments.steps)
            show(row | where, arguments)


def show(row: dict[str, Any], arguments: argparse.Namespace) -> None:
    """One row, in the form that was asked for."""
    if arguments.json:
        print(json.dumps(row), flush=True)
        return
    cpu, wall = row["cpu"], row["wall"]
    low, high = cpu["quartiles"]
    cells = [
        f"{row['model']} ({row['parameters'] / 1e6:.1f}M)", f"{row['precision']} {row['engine']}",
        f"{cpu['bare_ms']}, {cpu['deepspeed_ms']}", f"{cpu['ratio']:.2f} ({low:.2f}-{high:.2f})",
        f"{wall['ratio']:.2f}",
    ]  # fmt: skip
    print("| " + " | ".join(cells) + " |" if arguments.markdown else "  ".join(cells), flush=True)


if __name__ == "__main__":
    main()
