"""The steps of one stage: forward, backward, teacher, log, evaluation and checkpoints at their intervals."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mplug_core.data.batches import Batch, Source, Steps
from mplug_core.errors import DataError, MplugError, Preempted, RecipeError
from mplug_core.model.teacher import FeatureQueue, Teacher
from mplug_core.objectives.contrastive import alpha_ramp
from mplug_core.recipe import StageSection, nearest
from mplug_core.tasks.task import Context
from mplug_core.training.checkpoint import write_checkpoint
from mplug_core.training.engine import Engine
from mplug_core.training.optimizer import scheduled_lr
from mplug_core.training.step import TrainStep

if TYPE_CHECKING:
    from mplug_core.training.trainer import Trainer

Watch = Callable[[str, dict[str, Any]], None]
"""Called with the kind of event (start, step, evaluation, note, scores, end) and its figures, by the first process."""


@dataclass
class Progress:
    """Where a run is, and what its last and its best evaluation gave (``stale``: evaluations since then)."""

    stage: int = 0
    step: int = 0
    total: int = 0
    seconds: float = 0.0
    counts: dict[str, int] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)
    scores_at: int = 0
    best: dict[str, float] = field(default_factory=dict)
    best_at: int = 0
    stale: int = 0

    def note_scores(self, scores: dict[str, float], metric: str | None) -> bool:
        """Keep an evaluation; whether it is the best by ``metric`` (see ``run.best``). RecipeError without that."""
        self.scores, self.scores_at = scores, self.total
        if metric is None:
            return False
        name, sign = metric.removeprefix("-"), -1 if metric.startswith("-") else 1
        if name not in scores:
            raise RecipeError(f"run.best: no metric {name!r}{nearest(name, scores)}", f"metrics: {', '.join(scores)}")
        # a score that is no number is never better
        better = math.isfinite(scores[name]) and (not self.best or sign * scores[name] > sign * self.best[name])
        if better:
            self.best, self.best_at = scores, self.total
        self.stale = 0 if better else self.stale + 1
        return better


class StageLoop:
    """The steps of one stage."""

    def __init__(
        self, trainer: Trainer, stage: StageSection, engine: Engine, module: TrainStep, objectives: dict[str, float],
        optimizer: Any, sources: list[Source], steps: int, teacher: Teacher | None, queue: FeatureQueue | None,
    ) -> None:  # fmt: skip
        self.trainer, self.stage, self.engine, self.module = trainer, stage, engine, module
        self.objectives, self.optimizer, self.sources, self.steps = objectives, optimizer, sources, steps
        self.teacher, self.queue = teacher, queue
        self.recipe, self.world, self.progress = trainer.recipe, trainer.world, trainer.progress
        teacher_settings = self.recipe.teacher
        epoch = max(source.steps_per_epoch(self.world.size) for source in sources) // self.recipe.engine.accumulate
        self.ramp_steps = teacher_settings.ramp_steps or max(1, epoch)
        self.log: dict[str, list[float]] = {}

    def run(self) -> None:
        accumulate = self.recipe.engine.accumulate
        data = Steps(self.sources, self.recipe.seed + 7919 * self.progress.stage, self.world.rank, self.world.size)
        first, last = self.progress.step, self.steps
        if first == 0:
            self.progress.stale = 0
        loader = data.loader(first * accumulate, last * accumulate, self.recipe.data.workers)
        self.trainer.watch(
            "start", {"stage": self.stage.name, "step": first, "steps": last, "total": self.progress.total}
        )
        every = self.recipe.run.evaluate_every
        if every and 0 < first < last and first % every == 0 and self.progress.scores_at < self.progress.total:
            # the run was told to stop before this evaluation, on which best and patience depend
            self._evaluate()
            if self._out_of_patience(first):
                self.progress.step = last
                self._save()
                return
        began, images = time.perf_counter(), 0
        for step in range(first, last):
            for micro in range(accumulate):
                batches = self._next(loader, micro)
                images += sum(len(batch.image_ids) for batch in batches)
                self._forward_backward(step, micro, batches)
                norm = self.engine.step(step, last)
            self._note("grad_norm", norm or 0.0)
            if self.teacher is not None:
                self.teacher.update(self.module.model, self.engine.whole)
            if self.trainer.average is not None:
                # a young average would remember the untrained weights
                total = self.progress.total
                self.trainer.average.momentum = min(self.recipe.run.average, (total + 1) / (total + 20))
                self.trainer.average.update(self.module.model, self.engine.whole)
            self.progress.step, self.progress.total = step + 1, self.progress.total + 1
            ended = step + 1 == last
            if (step + 1) % self.recipe.run.log_every == 0 or ended:
                now = time.perf_counter()
                self.progress.seconds += now - began
                self._write_log(step, images * self.world.size / (now - began))
                began, images = now, 0
            stopping = self.world.any(self.trainer.stop_signal is not None)
            if ended or (every and (step + 1) % every == 0 and not stopping):
                self._evaluate()
                began = time.perf_counter()
                if not ended and self._out_of_patience(step + 1):
                    ended, self.progress.step = True, last
            if ended or stopping or (step + 1) % self.recipe.run.save_every == 0:
                self._save()
                began = time.perf_counter()
            if stopping and not ended:
                raise Preempted(
                    f"stopped at step {self.progress.total}, saved in {self.trainer.folder}", "run it again to go on"
                )
            if ended:
                break

    def _next(self, loader: Iterator[list[Batch]], micro: int) -> list[Batch]:
        """The next batches; what has been learned is saved before an end for want of data."""
        try:
            return next(loader)
        except DataError:
            # alone: the other processes would not come to the same place
            if self.world.size == 1 and micro == 0 and self.progress.step:
                self._save()
            raise

    def _forward_backward(self, step: int, micro: int, batches: list[Batch]) -> None:
        settings = self.recipe.teacher
        alpha = alpha_ramp(step, self.ramp_steps, settings.alpha) if self.teacher is not None else 0.0
        draw = self.progress.total * self.recipe.engine.accumulate + micro
        generator = torch.Generator().manual_seed((self.recipe.seed * 1_000_003 + draw) * 1024 + self.world.rank)
        contexts, moved = [], []
        for batch in batches:
            for bad in batch.bad:
                self.trainer.watch("note", {"text": f"skipped image {bad}"})
                self._count("bad_images", 1)
            batch = batch.to(self.world.device, self.engine.dtype)
            moved.append(batch)
            contexts.append(self._context(batch, alpha, generator))
        loss, parts = self.engine.forward(moved, contexts, self.objectives)
        if loss is None:
            raise RecipeError(f"stage {self.stage.name}: no source gives any of {', '.join(self.objectives)}")
        if self.world.any(not bool(torch.isfinite(loss))):
            raise MplugError(f"the loss is not finite at step {self.progress.total}", "lower optimizer.lr")
        self.engine.backward(loss)
        self._note("loss", float(loss.detach()))
        for name, value in parts.items():
            self._note(name, float(value))
        for context in contexts:
            for name, value in context.counts.items():
                self._count(name, int(value))
            for name, value in context.figures.items():
                self._note(name, value)

    def _context(self, batch: Batch, alpha: float, generator: torch.Generator) -> Context:
        source = self.recipe.data.sources[batch.source]
        encoded: list[Any] = []

        def teacher_images() -> Any:
            if not encoded:
                with torch.no_grad(), self._autocast():
                    model = self.teacher.model
                    if batch.pixels is not None:
                        encoded.append(model.encode_image(batch.pixels))
                    else:
                        encoded.append(model.encode_features(batch.features, batch.aligned))
            return encoded[0]

        imagined = batch.stand_in is not None
        # image ids of different sources must differ
        offset = list(self.recipe.data.sources).index(batch.source) * 10_000_000
        return Context(
            alpha=0.0 if imagined else alpha,
            label_smoothing=self.recipe.label_smoothing,
            weights=self.objectives,
            source_weight=source.weight,
            grid_dropout=source.grid_dropout,
            teacher=None if imagined else self.teacher,
            teacher_images=teacher_images,
            queue=self.queue,
            gather=self.world.gather_rows,
            gather_with_gradient=self.world.gather_with_gradient,
            image_ids=None if imagined else batch.image_ids + offset,
            generator=generator,
            autocast=self._autocast,
            self_critical=self.recipe.self_critical,
        )

    def _autocast(self) -> Any:
        return torch.autocast(self.world.device.type, self.engine.dtype, enabled=self.engine.dtype != torch.float32)

    def _note(self, name: str, value: float) -> None:
        self.log.setdefault(name, []).append(value)

    def _count(self, name: str, value: int) -> None:
        self.progress.counts[name] = self.progress.counts.get(name, 0) + value

    def _write_log(self, step: int, speed: float) -> None:
        figures: dict[str, Any] = {
            "stage": self.stage.name,
            "step": self.progress.total,
            "stage_step": step + 1,
            "stage_steps": self.steps,
            **{name: sum(values) / len(values) for name, values in self.log.items()},
            "lr": scheduled_lr(step, self.steps, self.optimizer.lr, self.optimizer),
            "images_per_second": speed,
            "seconds": self.progress.seconds,
            **self.progress.counts,
        }
        self.log.clear()
        self._append(figures)
        self.trainer.watch("step", figures)

    def _append(self, figures: dict[str, Any]) -> None:
        if self.world.is_first:
            with open(self.trainer.folder / "metrics.jsonl", "a", encoding="utf-8") as stream:
                stream.write(
                    json.dumps({k: round(v, 6) if isinstance(v, float) else v for k, v in figures.items()}) + "\n"
                )

    def _evaluate(self) -> None:
        state = whole_state(self.module.model, self.engine)
        if self.world.is_first and self.recipe.evaluate:
            began = time.perf_counter()
            metrics = self.trainer.evaluate(state)
            better = self.progress.note_scores(metrics, self.recipe.run.best)
            figures = {"stage": self.stage.name, "step": self.progress.total, "evaluation": metrics,
                       "evaluation_seconds": time.perf_counter() - began}  # fmt: skip
            self._append(figures)
            self.trainer.watch("evaluation", figures)
            if better:
                self.trainer.export(state, "best")
        self.world.barrier()

    def _out_of_patience(self, step: int) -> bool:
        """Whether the stage ends at this step, as too many evaluations have brought no new best."""
        if not self.world.any(0 < self.recipe.run.patience <= self.progress.stale):
            return False
        best = f"{self.recipe.run.best} was best at step {self.progress.best_at}"
        self.trainer.watch("note", {"text": f"stage {self.stage.name} ends at step {step}: {best}"})
        return True

    def _save(self) -> None:
        state = {
            name: part.state_dict() if part is not None else None
            for name, part in (("teacher", self.teacher), ("queue", self.queue), ("average", self.trainer.average))
        }
        meta = {"progress": vars(self.progress), "world": self.world.size, "stage": self.stage.name}
        name = f"step-{self.progress.total:08d}"
        write_checkpoint(self.trainer.folder, name, self.world, self.engine.save, state, meta, self.recipe.run.keep)
        self.trainer.export(whole_state(self.module.model, self.engine), "model")


def whole_state(model: nn.Module, engine: Engine) -> dict[str, torch.Tensor]:
    """The model's state on the CPU in fp32, whole whatever the engine sharded."""
    with engine.whole(list(model.parameters())):
        return {
            name: (value.detach().float() if value.is_floating_point() else value.detach()).cpu().clone()
            for name, value in model.state_dict().items()
        }
