"""The pre-training step with its choices, and without them: one at a time, and all together."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from mplug_core.bench.allocations import peak_bytes
from mplug_core.bench.measure import Machine, Report, Timing, take_turns
from mplug_core.bench.naive import Undo, undone
from mplug_core.bench.opponents import SWITCHES, TOGETHER
from mplug_core.bench.opponents import TRAIN as OPPONENTS
from mplug_core.bench.step import RealStep
from mplug_core.data.batches import Source
from mplug_core.data.records.types import CaptionRecord
from mplug_core.model.config import MplugConfig
from mplug_core.model.mplug import MplugModel
from mplug_core.model.teacher import Teacher
from mplug_core.recipe import OptimizerSection, Recipe, check_recipe
from mplug_core.training.compilation import compile_layers
from mplug_core.training.distributed import ALONE
from mplug_core.training.engine import build_engine
from mplug_core.training.workload import Workbench, encoders_of

TOWERS = ("visual", "text", "fusion", "decoder")
WORDS = (5, 25)
"""Fewest and most words of a caption, equally often."""


@dataclass(frozen=True)
class Pretraining:
    """What a step is taken on: ``batch`` pairs, texts of at most ``max_text`` tokens."""

    batch: int = 8
    max_text: int = 30

    def recipe(self, config: MplugConfig) -> Recipe:
        """The four losses without distillation, by the plain engine in fp32."""
        return check_recipe({
            "name": "bench",
            "steps": 1000,
            "model": config.architecture(),
            "data": {
                "max_text": self.max_text,
                "sources": {"pairs": {"path": "nowhere", "batch_size": self.batch, "tasks": {"pretrain": 1}}},
            },
            "objectives": {"itc": 1, "itm": 1, "mlm": 1, "prefix_lm": 1},
            "teacher": {"alpha": 0, "queue_size": 0},
            "engine": {"name": "plain", "precision": "fp32"},
        })  # fmt: skip

    def workbench(self, config: MplugConfig) -> Workbench:
        """The recipe on invented captions of :data:`WORDS`, each of another picture."""
        recipe = self.recipe(config)
        bench = Workbench.of(recipe, config)
        rng, section = random.Random(0), recipe.data.sources["pairs"]
        words = [piece for piece in bench.tokenizer.pieces if piece.startswith("w")]
        captions = [" ".join(rng.choices(words, k=rng.randint(*WORDS))) for _ in range(self.batch)]
        records = {"pretrain": [CaptionRecord(Path(f"{k}.jpg"), (text,), str(k)) for k, text in enumerate(captions)]}
        encoders = encoders_of(section, bench.tasks, bench.texts)
        return Workbench.of(
            recipe, config, bench.tokenizer, [Source("pairs", section, records, config.vision, encoders)]
        )


class Trial:
    """One model, its optimizer and a batch, which every way to take a step shares."""

    def __init__(self, config: MplugConfig, pretraining: Pretraining) -> None:
        bench = pretraining.workbench(config)
        torch.manual_seed(0)
        self.step = RealStep(bench, bench.stages[0])
        self.model: MplugModel = self.step.module.model
        optimizer = OptimizerSection(lr=1e-6, warmup_steps=0)  # weights stay near where they are: the work is the same
        self.engine = build_engine(self.step.module, bench.recipe.engine, optimizer, ALONE, pretraining.batch)
        parts = ("visual", "visual_projection", "image_projection", "text", "text_projection", "fusion", "masked_head")
        self.teacher = Teacher(self.model, parts=parts)
        self.undone = undone(self.teacher, min(pretraining.max_text, config.max_positions))

    def way(self, name: str) -> Undo:
        """A context in which steps are taken the way of this name; ours is ``mplug``."""
        if name == "mplug":
            return ExitStack
        if name == "checkpointing":
            return self._checkpointed
        if name == "compile":
            return self._compiled
        # the second of the two teachers does what the first does, and more
        names = [n for n in TOGETHER.get(name, (name,)) if name not in TOGETHER or n != "teacher"]

        @contextmanager
        def together() -> Iterator[None]:
            with ExitStack() as stack:
                for each in names:
                    stack.enter_context(self.undone[each][1]())
                yield

        return together

    def label(self, name: str) -> str:
        """What a way is called in the table."""
        if name in TOGETHER:
            return "all of these" if name == "naive" else "all but ITM's negatives"
        return {"mplug": "mPLUG", **SWITCHES}.get(name) or self.undone[name][0]

    def take(self, name: str) -> Callable[[], float]:
        """Takes a step: losses, gradients, update."""

        def taken() -> float:
            with self.way(name)():
                return self.step.compute(self.engine)

        return taken

    @contextmanager
    def _checkpointed(self) -> Iterator[None]:
        self.model.set_checkpointing(TOWERS)
        try:
            yield
        finally:
            self.model.set_checkpointing(())

    @contextmanager
    def _compiled(self) -> Iterator[None]:
        compile_layers(self.step.module, torch.device("cpu"))
        try:
            yield
        finally:
            for layer in self.model.layers:
                layer._compiled_call_impl = None  # there is no call that takes compile() back


def bench_train(
    config: MplugConfig,
    pretraining: Pretraining = Pretraining(),
    against: Sequence[str] = OPPONENTS,
    repeats: int = 3,
    advance: Callable[[str], None] = lambda name: None,
) -> Report:
    """Seconds of a step of each way, and the most memory that its tensors take at once, gradients among them."""
    trial = Trial(config, pretraining)
    names = ["mplug", *against]
    actions = {name: trial.take(name) for name in names}
    actions["mplug"]()  # the optimizer's moments are there from the first step on
    held = [*trial.step.module.parameters(), *trial.teacher.parameters()]
    held += [t for state in trial.engine.optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
    peaks = {}
    for name in names:
        peaks[name] = peak_bytes(actions[name], held)
        advance(name)
    timings = take_turns(actions, repeats, warmup=0, advance=advance)
    tokens = math.prod(trial.model.visual.token_grid) + int(trial.model.visual.is_transformer)
    report = Report(
        "train",
        f"A pre-training step: {pretraining.batch} pairs, {tokens} image tokens, four losses and the update",
        ("step", "s, median", "s, range", "mPLUG is faster", "peak MB", "of mPLUG's"),
        Machine.here(),
    )
    report.figures = {
        "width": config.width, "parameters": sum(p.numel() for p in trial.model.parameters()),
        "batch": pretraining.batch, "image_tokens": tokens, "repeats": repeats, "steps": [],
    }  # fmt: skip
    for name in names:
        _add(report, trial.label(name), name, timings, peaks)
    report.notes = [
        f"captions of {WORDS[0]}-{WORDS[1]} words, random pixels and weights, {config.vocab_size} words, dropout "
        f"{config.dropout}, distillation off, plain engine",
        "each row undoes one choice in the same step, which computes the same loss; the peak is of the tensors that a "
        "step makes, gradients among them, weights and optimizer not",
    ]
    return report


def _add(report: Report, label: str, name: str, timings: dict[str, Timing], peaks: dict[str, int]) -> None:
    ours, timing = timings["mplug"].median, timings[name]
    ratio, share = timing.median / ours, peaks[name] / peaks["mplug"]
    report.rows.append((
        label, f"{timing.median:.3g}", timing.spread, "" if name == "mplug" else f"{ratio:.2f}x",
        f"{peaks[name] / 1e6:.0f}", "" if name == "mplug" else f"{share:.2f}x",
    ))  # fmt: skip
    report.figures["steps"].append({
        "step": name, "median": timing.median, "all": list(timing.seconds), "ratio": ratio,
        "peak_bytes": peaks[name], "peak_ratio": share,
    })  # fmt: skip
