"""How much faster a small model's step is than its sources computed one by one.

    python -m benchmarks.small_step RECIPE.yaml --data DATA [--stage NAME] [--steps N] [--threads N]

Both take the same batches of the recipe's real records; images are features or pixels of noise. "One by one": a pass
for each source, texts padded to the longest of their batch, PyTorch's dropout, which draws a number for each element on
one thread, and dropout in frozen parts, too. They take turns; figures are medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F

from mplug_core.allocator import keep_freed_memory
from mplug_core.cpu import settle_threads
from mplug_core.data.batches import Batch, Source
from mplug_core.data.text import texts_of
from mplug_core.model import attention, dropout
from mplug_core.model.config import MplugConfig
from mplug_core.model.kernels import keep_kernels
from mplug_core.recipe import Recipe, load_recipe
from mplug_core.tasks.registry import TASKS
from mplug_core.training.distributed import ALONE
from mplug_core.training.engine import Engine, build_engine
from mplug_core.training.flops import compute_type, measured_flops, step_flops
from mplug_core.training.merging import merge
from mplug_core.training.optimizer import for_stage
from mplug_core.training.precision import settled
from mplug_core.training.start import new_vocabulary
from mplug_core.training.workload import StepParts, Workbench, build_parts, encoders_of


def bench_of(recipe: Recipe) -> Workbench:
    """The recipe's model and vocabulary, and its real records but those of scenes yet to be rendered."""
    sections = {n: s for n, s in recipe.data.sources.items() if "{run}" not in s.path}
    records = {
        name: {task: TASKS[task].read(recipe.placed(section), section.text_only).records for task in section.tasks}
        for name, section in sections.items()
    }
    texts = (text for tasks in records.values() for found in tasks.values() for r in found for text in texts_of(r))
    tokenizer = new_vocabulary(recipe, texts)
    values = recipe.model.model_dump() | {"vocab_size": tokenizer.vocab_size, "box_bins": tokenizer.bins}
    config = MplugConfig(**values)
    bench = Workbench.of(recipe, config, tokenizer)
    for name, section in sections.items():
        encoders = encoders_of(section, bench.tasks, bench.texts)
        bench.sources[name] = Source(name, section, records[name], config.vision, encoders)
        bench.known |= {name}
    return bench


@contextmanager
def one_by_one(parts: StepParts) -> Iterator[None]:
    """Texts padded, dropout drawn element by element, also in frozen parts."""
    drawn, model = dropout.drop, parts.step.model
    modes = {module: module.training for module in model.modules()}
    for place in (dropout, attention):
        place.drop = lambda x, share: F.dropout(x, share) if share else x
    model.by_length = False
    model.train()
    model.visual.eval()
    try:
        yield
    finally:
        for place in (dropout, attention):
            place.drop = drawn
        model.by_length = True
        for module, mode in modes.items():
            module.training = mode


def step(bench: Workbench, parts: StepParts, engine: Engine, batches: list[Batch], weights: dict[str, float]) -> None:
    autocast = lambda: torch.autocast("cpu", engine.dtype, enabled=engine.dtype != torch.float32)  # noqa: E731
    moved = [batch.to(torch.device("cpu"), engine.dtype) for batch in batches]
    contexts = [parts.context(bench.recipe, batch, weights, autocast) for batch in moved]
    loss, _ = engine.forward(moved, contexts, weights)
    engine.backward(loss)
    engine.step(0, 1000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--stage", help="default: the first that is no align stage")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", type=int)
    given = parser.parse_args()
    settle_threads(given.threads)
    keep_freed_memory()
    keep_kernels()
    recipe = load_recipe(str(given.recipe), [f"data.root={given.data}", "engine={name: plain}"])
    engine_section = settled(recipe.engine, torch.device("cpu"))
    recipe = recipe.model_copy(update={"engine": engine_section})
    bench = bench_of(recipe)
    stage = next(s for s in bench.stages if s.align is None and given.stage in (None, s.name))
    weights = bench.objectives_of(stage)
    parts = build_parts(bench, stage, weights)
    engine = build_engine(parts.step, engine_section, for_stage(recipe.optimizer, stage), ALONE, 1)
    names = bench.sources_of(stage)
    sizes = {name: recipe.data.sources[name].batch_size for name in names}
    images = sum(sizes.values())
    unread = {name: bench.unread(name, stage) for name in names}
    times: dict[str, list[float]] = {"one by one": [], "merged": []}
    for number in range(given.steps + 1):
        for way, seconds in times.items():
            batches = [unread[name].batch(size, seed=number) for name, size in sizes.items()]
            for batch in batches:
                if batch.pixels is not None:
                    batch.pixels = torch.randn(batch.pixels.shape)
                batch.alone = way == "one by one"
            batches = merge(batches, list(recipe.data.sources))
            with one_by_one(parts) if way == "one by one" else nullcontext():
                began = time.perf_counter()
                step(bench, parts, engine, batches, weights)
                seconds.append(time.perf_counter() - began)
    medians = {way: statistics.median(seconds[1:]) for way, seconds in times.items()}
    flops = step_flops(bench, stage).useful_per_image * images
    peak = measured_flops(engine_section.precision)
    threads = torch.get_num_threads()
    print(f"{recipe.name}, stage {stage.name}: {images} records a step, {compute_type(recipe)}, {threads} threads")
    for way, seconds in medians.items():
        share = flops / seconds / peak
        print(f"{way:<12} {seconds:6.2f} s a step  {images / seconds:6.1f} records/s  {share:5.1%} of the matmul rate")
    print(f"ratio        {medians['one by one'] / medians['merged']:6.2f}")


if __name__ == "__main__":
    main()
