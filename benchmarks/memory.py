"""Measured against estimated memory of training steps on this CPU: ``python benchmarks/memory.py``.

Each row is one or two processes of their own that build a model and take steps on random pixels and invented texts.
Measured is the peak of the resident set over whole steps (``VmHWM``, set back after the first step, in which the
optimizer makes its states), less what was resident before the model was built. glibc is told to give large blocks
back to the system at once (MALLOC_MMAP_THRESHOLD_, MALLOC_TRIM_THRESHOLD_), or the peak would be that of the heap.
Rows in bf16 take minutes each on a CPU without units for it: ``--only fp32`` leaves them out.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).parent.parent
MODEL = {
    "size": "base",
    "width": 512, "heads": 8, "intermediate": 2048, "text_layers": 4, "fusion_layers": 4, "decoder_layers": 4,
    "vocab_size": 8000, "embed_dim": 128,
    "vision": {
        "backbone": "vit_base_patch16_clip_quickgelu_224", "image_size": 160,
        "options": {"embed_dim": 512, "depth": 6, "num_heads": 8},
    },
}  # fmt: skip
TOWERS = ["visual", "text", "fusion", "decoder"]
RECIPE: dict[str, Any] = {
    "name": "memory",
    "steps": 4,
    "model": MODEL,
    "data": {"sources": {"pairs": {"path": "nowhere", "batch_size": 8}}},
    "teacher": {"alpha": 0.4, "queue_size": 4096},
}
ROWS: dict[str, dict[str, Any]] = {
    "plain fp32": {"engine": {"name": "plain", "precision": "fp32"}},
    "plain fp32, batch 16": {"engine": {"name": "plain", "precision": "fp32"}, "batch": 16},
    "plain fp32, checkpointing": {"engine": {"name": "plain", "precision": "fp32", "checkpointing": TOWERS}},
    "plain bf16": {"engine": {"name": "plain", "precision": "bf16"}},
    **{f"zero {z} fp32": {"engine": {"zero_stage": z, "precision": "fp32"}} for z in (0, 1, 2, 3)},
    "zero 2 fp32, no teacher": {
        "engine": {"zero_stage": 2, "precision": "fp32"}, "teacher": {"alpha": 0, "queue_size": 0},
    },
    "zero 2 fp32, frozen visual": {"engine": {"zero_stage": 2, "precision": "fp32"}, "freeze": ["visual"]},
    **{
        f"zero {z} fp32, 2 processes": {"engine": {"zero_stage": z, "precision": "fp32"}, "processes": 2}
        for z in (1, 2, 3)
    },
    **{f"zero {z} bf16": {"engine": {"zero_stage": z, "precision": "bf16"}} for z in (1, 2, 3)},
    **{f"zero {z} bf16, batch 24": {"engine": {"zero_stage": z, "precision": "bf16"}, "batch": 24} for z in (1, 2)},
    "zero 2 bf16, checkpointing": {"engine": {"zero_stage": 2, "precision": "bf16", "checkpointing": TOWERS}},
    "zero 2 bf16, checkpointing, batch 24": {
        "engine": {"zero_stage": 2, "precision": "bf16", "checkpointing": TOWERS}, "batch": 24,
    },
    "zero 1 bf16, no teacher": {
        "engine": {"zero_stage": 1, "precision": "bf16"}, "teacher": {"alpha": 0, "queue_size": 0},
    },
    "zero 2 bf16, accumulate 2": {"engine": {"zero_stage": 2, "precision": "bf16", "accumulate": 2}},
    "zero 2 bf16, frozen visual": {"engine": {"zero_stage": 2, "precision": "bf16"}, "freeze": ["visual"]},
    **{
        f"zero {z} bf16, 2 processes": {"engine": {"zero_stage": z, "precision": "bf16"}, "processes": 2}
        for z in (1, 2, 3)
    },
}  # fmt: skip


def recipe_of(row: dict[str, Any]) -> Any:
    """The recipe of a row."""
    from mplug_core.recipe import check_recipe

    values = RECIPE | {name: row[name] for name in ("engine", "teacher", "freeze") if name in row}
    return check_recipe(values, [f"data.sources.pairs.batch_size={row.get('batch', 8)}"])


def status(name: str) -> int:
    """A figure of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


def work(row: dict[str, Any]) -> NoReturn:
    """Take steps, print what they took, and exit; runs in a process of its own."""
    import torch

    from mplug_core.bench.step import RealStep
    from mplug_core.model.config import MplugConfig
    from mplug_core.training.distributed import World, end_process
    from mplug_core.training.engine import build_engine, import_deepspeed
    from mplug_core.training.workload import Workbench

    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    recipe = recipe_of(row)
    world = World.from_environment()
    if recipe.engine.name == "deepspeed":
        import_deepspeed()
    bench = Workbench.of(recipe, MplugConfig(**recipe.model.model_dump()))
    # libraries are loaded and thread pools started before the count begins
    torch.nn.functional.linear(torch.randn(64, 64, requires_grad=True), torch.randn(64, 64)).sum().backward()
    before = status("VmRSS")
    step = RealStep(bench, bench.stages[0])
    engine = build_engine(step.module, recipe.engine, recipe.optimizer, world, step.batch_size)
    step.compute(engine)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    for _ in range(2):
        step.compute(engine)
    found = {"peak": status("VmHWM") - before, "resting": status("VmRSS") - before}
    if world.is_first:
        print("RESULT " + json.dumps(found), flush=True)
    end_process(0)


def measure(row: dict[str, Any]) -> dict[str, int]:
    """Run a row in processes of its own; what the first one found."""
    count = row.get("processes", 1)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    quiet = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "TOKENIZERS_PARALLELISM": "0"}
    heap = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "2"}
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = [
        subprocess.Popen(
            [sys.executable, __file__, "--work", json.dumps(row)],
            env={**os.environ, **quiet, **heap, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    ended = [process.communicate() for process in started]
    for process, (_, errors) in zip(started, ended, strict=True):
        if process.returncode:
            raise RuntimeError(errors[-2000:])
    line = next(line for line in ended[0][0].splitlines() if line.startswith("RESULT "))
    return json.loads(line.removeprefix("RESULT "))


def estimate(row: dict[str, Any]) -> dict[str, float]:
    """What the pre-flight check says of a row."""
    from mplug_core.model.config import MplugConfig
    from mplug_core.training.memory import estimate_memory
    from mplug_core.training.workload import Workbench

    recipe = recipe_of(row)
    bench = Workbench.of(recipe, MplugConfig(**recipe.model.model_dump()))
    return estimate_memory(bench, bench.stages[0], recipe.engine, row.get("processes", 1), "cpu").as_object()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object a row")
    parser.add_argument("--only", help="rows whose name contains this")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(json.loads(arguments.work))
    for name, row in ROWS.items():
        if arguments.only and arguments.only not in name:
            continue
        guess, found = estimate(row), measure(row)
        ratio = guess["total"] / found["peak"]
        if arguments.json:
            print(
                json.dumps({"row": name, "estimated": guess, "measured": found, "ratio": round(ratio, 3)}), flush=True
            )
        else:
            print(f"{name:40}  {guess['total'] / 1e6:7.0f} MB  {found['peak'] / 1e6:7.0f} MB  {ratio:.2f}", flush=True)


if __name__ == "__main__":
    main()
