"""Prove that the model learns: train on a small world of scenes for some minutes, and pass thresholds.

    python -m tests.learning                  # the proof: about four minutes; ends with 1 if it fails
    python -m tests.learning --control NAME   # the same with one thing broken: it must miss at least one threshold

A loss that falls proves little: a decoder that sees its own answer has the lowest of all. So what is measured is what
the trained model says about scenes that it has not seen. ``docs/learning.md`` has the scores of the proof and of each
control. A last part trains on two processes with ZeRO-2 and checks that its losses go on from there. All of it computes
in bf16 where the processor has units for that, else in fp32, which takes some times longer.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import torch

from mplug_core.data.batches import Batch, Source
from mplug_core.data.scenes import SMALL_WORLD, write_scenes
from mplug_core.model import decoder as decoder_module
from mplug_core.model.attention import CrossAttention
from mplug_core.model.fusion import ConnectedLayer
from mplug_core.recipe import check_recipe, find_recipe, read_yaml
from mplug_core.training.trainer import Trainer

SCENES = 4000
CHANGES = [
    "engine.name=plain",
    "stages.see.steps=350",
    "stages.learn.steps=560",
    "stages.all.steps=20",
    "run.log_every=50",
    "run.save_every=100000",
    "run.evaluate_every=0",
    "evaluate.val.limit=300",
]
# Well below what the proof reaches, well above what the controls do (docs/learning.md).
THRESHOLDS: dict[str, float] = {
    "val/vqa/accuracy": 0.52,
    "val/vqa/accuracy_color": 0.70,
    "val/vqa/accuracy_size": 0.68,
    "val/caption/objects": 0.08,
    "val_100/retrieval/t2i_r1": 0.40,
}


def shuffled_images() -> None:
    """Texts meet the image of another scene."""
    draw = Source.batch

    def batch(self: Source, images: list[int], rng: object) -> Batch:
        drawn = draw(self, images, rng)
        drawn.pixels = drawn.pixels.roll(1, 0)
        return drawn

    Source.batch = batch


def blind() -> None:
    """Cross-attention gives nothing."""
    CrossAttention.forward = lambda self, x, *rest, **options: torch.zeros_like(x)


def sees_its_answer() -> None:
    """The decoder's self-attention is not causal."""
    causal = decoder_module.causal_mask
    decoder_module.causal_mask = lambda *shape, **options: torch.ones_like(causal(*shape, **options))


def bypassed() -> None:
    """Connected layers pass both streams through unchanged."""
    ConnectedLayer.forward = lambda self, image, text, *masks: (image, text)


CONTROLS: dict[str, tuple[Callable[[], None] | None, list[str]]] = {
    "shuffled_images": (shuffled_images, []),
    "blind": (blind, []),
    "sees_its_answer": (sees_its_answer, []),
    "bypassed": (bypassed, []),
    "no_contrast": (None, ["objectives.itc=0"]),
    "no_box_loss": (None, ["objectives.box=0"]),
}


def train(folder: Path, data: Path, changes: list[str], seed: int) -> dict[str, float]:
    """Run recipe tiny on ``data`` and return the metrics of its last evaluation."""
    values = read_yaml(find_recipe("tiny"))
    recipe = check_recipe(
        values, [*CHANGES, f"data.root={data}", f"run.folder={folder}", f"seed={seed}", *changes], "tiny"
    )
    metrics: dict[str, float] = {}

    def watch(kind: str, figures: dict) -> None:
        if kind == "evaluation":
            metrics.update(figures["evaluation"])
        elif kind == "step":
            print(
                f"{figures['stage']} {figures['stage_step']}/{figures['stage_steps']} loss {figures['loss']:.3f}",
                flush=True,
            )

    Trainer(recipe, watch, "never").run()
    return metrics


def two_processes(folder: Path, data: Path, start: Path) -> float:
    """The mean loss of some steps from the trained model on two processes with ZeRO-2."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "mplug_cli.app", "pretrain",
        "--recipe", "tiny", f"run.folder={folder}", *CHANGES, f"data.root={data}", "engine.name=deepspeed",
        "engine.zero_stage=2", "engine.threads=1", f"start.model={start}", 'stages=[{name: more, steps: 30}]',
        "optimizer.lr=1e-4", "run.log_every=30", "evaluate={}", "data.sources.scenes.batch_size=16",
    ]  # fmt: skip
    command = [part for part in command if not part.startswith(("stages.", "evaluate."))]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return last_loss(folder)


def last_loss(folder: Path) -> float:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return next(line["loss"] for line in reversed(lines) if "loss" in line)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.learning", description=__doc__.splitlines()[0])
    parser.add_argument("--control", choices=CONTROLS, help="break one thing")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    changes: list[str] = []
    if arguments.control:
        break_it, changes = CONTROLS[arguments.control]
        if break_it is not None:
            break_it()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_scenes(folder / "scenes", SCENES, seed=0, workers=2, world=SMALL_WORLD)
        metrics = train(folder / "run", folder / "scenes", changes, arguments.seed)
        failed = [key for key, least in THRESHOLDS.items() if metrics[key] < least]
        for key, value in metrics.items():
            least = THRESHOLDS.get(key)
            verdict = "" if least is None else f"  at least {least:.2f}  {'FAIL' if key in failed else 'pass'}"
            print(f"{key:36} {value:.3f}{verdict}")
        print(f"trained and evaluated in {time.perf_counter() - began:.0f} s")
        if not arguments.control:
            before = last_loss(folder / "run")
            after = two_processes(folder / "two", folder / "scenes", folder / "run" / "model")
            goes_on = after < 1.15 * before
            print(f"two processes, ZeRO-2: loss {before:.3f} -> {after:.3f}  {'pass' if goes_on else 'FAIL'}")
            failed += [] if goes_on else ["two processes"]
    if arguments.control:
        print(f"control {arguments.control}: misses {', '.join(failed) or 'NOTHING'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
