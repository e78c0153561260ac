"""The steps of one stage: forward, backward, teacher, log, evaluation and checkpoints at their intervals."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mplug_core.data.batches import Batch, Block, Lots, Source, lost_worker
from mplug_core.errors import CheckpointError, DataError, Diverged, MplugError, Preempted, RecipeError
from mplug_core.json_text import to_json
from mplug_core.model.teacher import FeatureQueue, Teacher
from mplug_core.objectives.contrastive import alpha_ramp
from mplug_core.recipe import StageSection, nearest
from mplug_core.training.checkpoint import (
    checkpoint_name,
    latest_checkpoint,
    part_tensors,
    publish_model,
    save_parts,
    write_checkpoint,
)
from mplug_core.training.engine import Engine
from mplug_core.training.engine_state import is_finite, state_bytes, whole_state
from mplug_core.training.flops import peak_flops, training_flops_per_image
from mplug_core.training.guards import LossWatch, StallWatch, check_budget
from mplug_core.training.merging import merge
from mplug_core.training.optimizer import scheduled_lr
from mplug_core.training.outlook import Leg, seconds_left, with_work
from mplug_core.training.resume import save_random
from mplug_core.training.step import TrainStep, begin_lot, build_context, lot_of

if TYPE_CHECKING:
    from mplug_core.training.trainer import Trainer

NAMED = 20
"""Bad images that are named; further ones are counted."""
WORTH_COUNTING = 100
"""Steps from which on a second of counting FLOPs is worth its time."""
SEARCHED = 64
"""Lots that are searched for records of a task that some process's lot has none of."""
LOST = ("onnection closed by peer", "onnection reset", "Broken pipe", "gloo", "NCCL", "Socket")
"""Words of torch's errors about a lost process."""

Watch = Callable[[str, dict[str, Any]], None]
"""Called with the kind of event (start, step, evaluation, note, scores, end) and its figures, by the first process."""


@dataclass
class Progress:
    """Where a run is, and what its last and its best evaluation gave (``stale``: evaluations since then).

    ``counts`` are those of all processes; ``unwritten`` are figures since the last line of the log: sum and number.
    ``paces`` are seconds of a step by stage, ``evaluation_seconds`` those of the last evaluation.
    """

    stage: int = 0
    step: int = 0
    total: int = 0
    seconds: float = 0.0
    images: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    unwritten: dict[str, list[float]] = field(default_factory=dict)
    highest_norm: float = 0.0
    skipped_in_a_row: int = 0
    loss: dict[str, float] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)
    scores_at: int = 0
    best: dict[str, float] = field(default_factory=dict)
    best_at: int = 0
    stale: int = 0
    paces: dict[str, float] = field(default_factory=dict)
    evaluation_seconds: float = 0.0

    @classmethod
    def read(cls, values: dict[str, Any]) -> Progress:
        """What a checkpoint says, where null is a number that was not finite. TypeError for what it lacks or has more
        of than this version."""

        def number(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: number(item) for key, item in value.items()}
            return [number(item) for item in value] if isinstance(value, list) else math.nan if value is None else value

        return cls(**number(values))

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
        self.accumulate = self.recipe.engine.accumulate
        teacher_settings = self.recipe.teacher
        epoch = max(source.steps_per_epoch(self.world.size * self.accumulate) for source in sources)
        self.ramp_steps = teacher_settings.ramp_steps or epoch
        self.loss_watch = LossWatch(**self.progress.loss)
        self.stall = StallWatch(self.recipe.run.stall_seconds, "run it again to go on from the last checkpoint")
        # since the last line of the log: this process's figures (sum, number) and counts, the images and tokens of all
        self.log: dict[str, list[float]] = {}
        self.counts: dict[str, int] = {}
        self.images = self.tokens = 0.0
        self.examples: dict[tuple[str, str], Block | None] = {}
        self.flops_per_image: float | None = None
        self.peak_flops: float | None = None
        later = [one for one in trainer.stages[self.progress.stage + 1 :] if one.align is None]
        self.legs = [Leg(stage, steps), *(Leg(one, trainer.steps_of(one)) for one in later)]

    # -- steps -------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Run the stage from where the progress says to its end.

        Raises Preempted when told to stop, DataError when data fails beyond its budget, MplugError when the loss stays
        no number or another process is lost.
        """
        first, last = self.progress.step, self.steps
        if first == 0:
            self.progress.stale = 0
            self.loss_watch = LossWatch()  # another mix of losses
        self.trainer.watch(
            "start", {"stage": self.stage.name, "step": first, "steps": last, "total": self.progress.total}
        )
        every = self.recipe.run.evaluate_every
        try:
            with self.stall.watching():
                if every and 0 < first < last and first % every == 0 and self.progress.scores_at < self.progress.total:
                    # the run was told to stop before this evaluation, on which best and patience depend
                    self._evaluate()
                    if self._out_of_patience(first):
                        self.progress.step = last
                        self._save()
                        return
                self._run_steps(first, last)
        except RuntimeError as error:
            raise self._explained(error) from error

    def _run_steps(self, first: int, last: int) -> None:
        settings = self.recipe.run
        lots = Lots(self.sources, self.recipe.seed + 7919 * self.progress.stage, self.world.rank, self.world.size)
        loader = lots.loader(
            first * self.accumulate, last * self.accumulate, self.recipe.data.workers, settings.stall_seconds
        )
        if self.world.is_first and last - first >= WORTH_COUNTING:
            self._count_flops()
        began = self.began = time.perf_counter()
        for step in range(first, last):
            self._step(step, last, loader)
            self.stall.beat(self.progress.total)
            ended = step + 1 == last
            if (step + 1) % settings.log_every == 0 or ended:
                now = time.perf_counter()
                self.progress.seconds += now - began
                self._write_log(step, now - began, (now - self.began) / (step + 1 - first))
                began = now
            stopping = self.world.any(self.trainer.stop_signal is not None)
            if ended or (settings.evaluate_every and (step + 1) % settings.evaluate_every == 0 and not stopping):
                paused = time.perf_counter()
                self._evaluate()
                if not ended and self._out_of_patience(step + 1):
                    ended, self.progress.step = True, last
                began, self.began = (t + time.perf_counter() - paused for t in (began, self.began))
            if ended or stopping or (step + 1) % settings.save_every == 0:
                paused = time.perf_counter()
                self._save()
                began, self.began = (t + time.perf_counter() - paused for t in (began, self.began))
            if stopping and not ended:
                raise Preempted(
                    f"stopped at step {self.progress.total}, saved in {self.trainer.folder}", "run it again to go on"
                )
            if ended:
                break

    def _count_flops(self) -> None:
        """What utilisation is measured by, and how much more later stages compute; None where it can't be told."""
        recipe, trainer = self.recipe, self.trainer

        def of_an_image(stage: StageSection) -> float | None:
            return training_flops_per_image(recipe, trainer.config, stage, trainer.tokenizer, trainer.sources)

        def of_a_step(stage: StageSection) -> float | None:
            images = sum(recipe.data.sources[name].batch_size for name in recipe.sources_of(stage))
            flops = self.flops_per_image if stage is self.stage else of_an_image(stage)
            return flops and flops * images

        self.flops_per_image = of_an_image(self.stage)
        self.peak_flops = peak_flops(self.world.device, recipe.engine.precision)
        self.legs = with_work(self.legs, of_a_step)

    def _step(self, step: int, last: int, loader: Iterator[list[Batch]]) -> None:
        """One optimizer step: on all processes, or on none where a loss or a gradient is not finite."""
        loss = 0.0
        for micro in range(self.accumulate):
            loss += self._forward_backward(step, micro, self._next(loader, micro)) / self.accumulate
            norm = self.engine.step(step, last)
        self.progress.step, self.progress.total = step + 1, self.progress.total + 1
        if norm is None or not math.isfinite(norm):
            self._skipped()
            return
        self.progress.skipped_in_a_row = 0
        self._note("grad_norm", norm)
        self.progress.highest_norm = max(self.progress.highest_norm, norm)
        if self.loss_watch.jumped(loss):
            self._count("loss_spikes", 1 if self.world.is_first else 0)
        self.progress.loss = vars(self.loss_watch)
        if self.teacher is not None:
            self.teacher.update(self.module.model, self.engine.whole)
        if self.trainer.average is not None:
            # a young average would remember the untrained weights
            total = self.progress.total - 1
            self.trainer.average.momentum = min(self.recipe.run.average, (total + 1) / (total + 20))
            self.trainer.average.update(self.module.model, self.engine.whole)

    def _skipped(self) -> None:
        """Count a step whose update was left out; MplugError when there were too many in a row."""
        self._count("skipped_steps", 1 if self.world.is_first else 0)
        self.progress.skipped_in_a_row += 1
        row, most = self.progress.skipped_in_a_row, self.recipe.run.max_skipped
        total = self.progress.total
        self.trainer.watch(
            "note", {"level": "warning", "text": f"step {total} left out: its loss or gradient is not finite"}
        )
        if row >= most:
            raise MplugError(
                f"the loss is not finite: {row} steps in a row, the last of them {total}",
                f"{self._last_checkpoint()}; look at the data, or start anew from its model with a lower optimizer.lr",
            )

    def _diverged(self, what: str) -> Diverged:
        """The error that ends a run whose weights no step can mend."""
        return Diverged(
            f"training has diverged by step {self.progress.total}: {what}",
            f"{self._last_checkpoint()}; start anew, or from its model, with a lower optimizer.lr",
        )

    def _last_checkpoint(self) -> str:
        try:
            found = latest_checkpoint(self.trainer.folder)
        except CheckpointError:
            found = None
        return f"the last good checkpoint is {found}" if found is not None else "there is no checkpoint"

    def _next(self, loader: Iterator[list[Batch]], micro: int) -> list[Batch]:
        """The next batches, with blocks of the same tasks on all processes.

        Every process has to run the same modules in each step, or they would wait for each other: where one drew no
        records of a task that another has, some stand in for them, with no weight. What has been learned is saved
        before an end for want of data.
        """
        failure: DataError | None = None
        batches: list[Batch] = []
        try:
            batches = next(loader)
        except DataError as error:
            failure = error
        slots = [(source.name, task) for source in self.sources for task in source.section.tasks]
        here = {(batch.source, task) for batch in batches for task in batch.blocks}
        figures = [
            float(failure is not None),
            float(sum(len(batch.bad) for batch in batches)),
            float(sum(len(batch.image_ids) for batch in batches)),
            float(sum(int(b["mask"].sum()) for batch in batches for b in batch.blocks.values() if "mask" in b)),
        ]
        failed, bad, images, tokens, *present = self.world.sum([*figures, *(float(slot in here) for slot in slots)])
        if failed:
            if micro == 0 and self.progress.step:
                self._save()
            raise failure or DataError("the data of another process failed", "its message says why")
        self.images, self.tokens = self.images + images, self.tokens + tokens
        before = self.progress.images, dict(self.progress.counts)
        self.progress.images += int(images)
        try:
            self._note_bad(batches, int(bad))
        except DataError:
            # a run that goes on draws these batches again
            self.progress.images, self.progress.counts = before
            if micro == 0 and self.progress.step:
                self._save()
            raise
        for slot, number in zip(slots, present, strict=True):
            if 0 < number < self.world.size:
                self._level(batches, *slot)
                for batch in batches:
                    batch.alone |= batch.source == slot[0]  # on all processes, which compute the same passes
        return [batch for batch in batches if batch.blocks]

    def _level(self, batches: list[Batch], name: str, task: str) -> None:
        """Give the processes that have no block of a source's task one that stands in; where none is found, no process
        keeps its own (``left_out_blocks``)."""
        example = self._example(name, task)
        for batch in batches:
            if batch.source == name and example is None and task in batch.blocks:
                del batch.blocks[task]
                self._count("left_out_blocks", 1)
            elif batch.source == name and example is not None and task not in batch.blocks:
                batch.add_weightless(task, example, list(self.recipe.data.sources[name].tasks))

    def _example(self, name: str, task: str) -> Block | None:
        """A block of a source's task, the same on all processes, which ask together; None if it is hard to find."""
        if (name, task) not in self.examples:
            found: Block | None = None
            source = next(source for source in self.sources if source.name == name)
            for lot in range(SEARCHED):
                try:
                    found = found or source.draw(self.recipe.seed, lot).blocks.get(task)
                except DataError:
                    continue
                if found:
                    break
            everywhere = not self.world.any(found is None)
            self.examples[name, task] = found if everywhere else None
        return self.examples[name, task]

    def _note_bad(self, batches: list[Batch], bad: int) -> None:
        """Name what could not be read, at a bounded rate, and hold it against the budget."""
        if not bad:
            return
        known = self.progress.counts.get("bad_images", 0)
        self.progress.counts["bad_images"] = known + bad
        for line in [line for batch in batches for line in batch.bad][: max(0, NAMED - known)]:
            self.trainer.watch("note", {"level": "warning", "text": f"skipped image {line}"})
        # the images of the progress are those that could be read
        check_budget(known + bad, self.progress.images + known + bad, self.recipe.data.max_bad_fraction)

    def _forward_backward(self, step: int, micro: int, batches: list[Batch]) -> float:
        """One part of a step; returns its loss, on this process."""
        settings = self.recipe.teacher
        alpha = alpha_ramp(step, self.ramp_steps, settings.alpha) if self.teacher is not None else 0.0
        lot = lot_of(self.progress.total * self.accumulate + micro, self.world.rank, self.world.size)
        generator = begin_lot(self.recipe.seed, lot)
        merged = merge(batches, list(self.recipe.data.sources))
        moved = [batch.to(self.world.device, self.engine.dtype) for batch in merged]
        contexts = [
            build_context(
                self.recipe,
                batch,
                self.objectives,
                alpha,
                self.teacher,
                self.queue,
                self._autocast,
                generator,
                self.world,
            )
            for batch in moved
        ]
        loss, parts = self.engine.forward(moved, contexts, self.objectives)
        if loss is None:
            raise RecipeError(f"stage {self.stage.name}: no source gives any of {', '.join(self.objectives)}")
        value = float(loss.detach())
        if self.world.any(not math.isfinite(value)):
            # no number on any process: none on all, so that the engine leaves the step out everywhere
            loss = loss * math.nan
        else:
            self._note("loss", value)
            for name, part in parts.items():
                self._note(name, float(part))
        self.engine.backward(loss)
        for context in contexts:
            for name, count in context.counts.items():
                self._count(name, int(count))
            for name, figure in context.figures.items():
                self._note(name, figure)
        return value

    def _autocast(self) -> Any:
        return torch.autocast(self.world.device.type, self.engine.dtype, enabled=self.engine.dtype != torch.float32)

    # -- figures -----------------------------------------------------------------------------------------------------

    def _note(self, name: str, value: float) -> None:
        noted = self.log.setdefault(name, [0.0, 0])
        noted[0] += value
        noted[1] += 1

    def _count(self, name: str, value: int) -> None:
        self.counts[name] = self.counts.get(name, 0) + value

    def _merge(self) -> None:
        """Bring what each process has noted and counted together, in the progress, which is saved."""
        for log, counts in self.world.gather_objects((self.log, self.counts)):
            for name, (total, number) in log.items():
                merged = self.progress.unwritten.setdefault(name, [0.0, 0])
                merged[0] += total
                merged[1] += number
            for name, count in counts.items():
                self.progress.counts[name] = self.progress.counts.get(name, 0) + count
        self.log, self.counts = {}, {}

    def _write_log(self, step: int, seconds: float, seconds_per_step: float) -> None:
        """A line of the log on the ``seconds`` since the last one."""
        self._merge()
        progress, optimizer = self.progress, self.optimizer
        progress.paces[self.stage.name] = seconds_per_step
        left = seconds_left(self.recipe, self.legs, step + 1, progress.paces, progress.evaluation_seconds)
        figures: dict[str, Any] = {
            "stage": self.stage.name,
            "step": progress.total,
            "stage_step": step + 1,
            "stage_steps": self.steps,
            **{name: total / number for name, (total, number) in progress.unwritten.items()},
            "grad_norm_max": progress.highest_norm,
            "lr": scheduled_lr(step, self.steps, optimizer.lr, optimizer),
            "visual_lr": scheduled_lr(step, self.steps, optimizer.visual_lr or optimizer.lr, optimizer),
            "images_per_second": self.images / seconds,
            "tokens_per_second": self.tokens / seconds,
            "memory_gb": peak_memory(self.world.device),
            "seconds": progress.seconds,
            "eta_seconds": left,
            **progress.counts,
        }
        if self.flops_per_image and self.peak_flops:
            figures["mfu"] = self.flops_per_image * figures["images_per_second"] / (self.peak_flops * self.world.size)
        progress.unwritten, progress.highest_norm = {}, 0.0
        self.images = self.tokens = 0.0
        self._append(figures)
        self.trainer.watch("step", figures)

    def _append(self, figures: dict[str, Any]) -> None:
        if not self.world.is_first:
            return
        line = to_json({k: float(f"{v:.7g}") if isinstance(v, float) else v for k, v in figures.items()}) + "\n"
        try:
            with open(self.trainer.folder / "metrics.jsonl", "a", encoding="utf-8") as stream:
                stream.write(line)
        except OSError as error:  # a full disk shows when a checkpoint is due, which then keeps the old ones
            text = f"metrics.jsonl can't be written: {error.strerror}"
            self.trainer.watch("note", {"level": "warning", "text": text})

    # -- evaluation and checkpoints ----------------------------------------------------------------------------------

    def _evaluate(self) -> None:
        tasks = [task for section in self.recipe.evaluate.values() for task in section.tasks]
        if not any(map(self.trainer.evaluates, tasks)):
            return
        with self.stall.paused():
            state = whole_state(self.module.model, self.engine, keep=self.world.is_first)
            error: BaseException | None = None
            if self.world.is_first:
                try:
                    self._evaluate_here(state)
                except Exception as raised:  # the others wait: they have to hear of it
                    error = raised
            if self.world.any(error is not None):
                raise error or MplugError("the evaluation failed on the first process", "its message says why")

    def _evaluate_here(self, state: dict[str, torch.Tensor]) -> None:
        for name, _ in self.module.model.named_parameters():
            if not is_finite(state[name]):  # it would give scores all the same, and perhaps the best
                raise self._diverged(f"the weight {name} is not finite")
        began = time.perf_counter()
        metrics = self.trainer.evaluate(state)
        best = self.recipe.run.best
        if best is not None and not self.trainer.evaluates(best.split("/")[-2]):
            best = None  # its first score comes in a later stage
        better = self.progress.note_scores(metrics, best)
        self.progress.evaluation_seconds = time.perf_counter() - began
        figures = {"stage": self.stage.name, "step": self.progress.total, "evaluation": metrics,
                   "evaluation_seconds": self.progress.evaluation_seconds}  # fmt: skip
        self._append(figures)
        self.trainer.watch("evaluation", figures)
        if better:
            self.trainer.export(state, "best")

    def _explained(self, error: RuntimeError) -> Exception:
        """What an error of torch means to the user, or itself."""
        text = str(error)
        if isinstance(error, torch.OutOfMemoryError):
            return MplugError(
                f"out of memory at step {self.progress.total}",
                "lower batch_size, or set engine.checkpointing or a higher engine.zero_stage",
            )
        if lost := lost_worker(error):
            return DataError(lost, f"{self._last_checkpoint()}; lower data.workers, and run it again to go on")
        if self.world.size > 1 and any(word in text for word in LOST):
            return MplugError(
                "another process of the run has ended", f"{self._last_checkpoint()}; run it again to go on"
            )
        return error

    def _out_of_patience(self, step: int) -> bool:
        """Whether the stage ends at this step, as too many evaluations have brought no new best."""
        if not self.world.any(0 < self.recipe.run.patience <= self.progress.stale):
            return False
        best = f"{self.recipe.run.best} was best at step {self.progress.best_at}"
        self.trainer.watch("note", {"text": f"stage {self.stage.name} ends at step {step}: {best}"})
        return True

    def _save(self) -> None:
        with self.stall.paused():
            self._merge()
            self._write_checkpoint()

    def _write_checkpoint(self) -> None:
        trainer, world = self.trainer, self.world
        parts = {"teacher": self.teacher, "queue": self.queue, "average": trainer.average}
        model = whole_state(self.module.model, self.engine, keep=world.is_first)

        def write(folder: Path) -> None:
            self.engine.save(folder)  # the processes meet in here alone
            save_random(folder, world)
            if world.is_first:
                save_parts(folder, parts)
                trainer.export(model, "model", folder)

        need = state_bytes(self.engine) + sum(value.nbytes for _, value in part_tensors(parts))
        need += sum(value.numel() * 2 for value in model.values())
        meta = {
            "progress": vars(self.progress),
            "stage": self.stage.name,
            "accumulate": self.accumulate,
            "pieces": trainer.pieces,
            "recipe": trainer.recipe_values(),
            "data": trainer.fingerprints,
        }
        name, best = checkpoint_name(self.progress.total), None
        if self.progress.best:
            best = checkpoint_name(self.progress.best_at)
        try:
            folder = write_checkpoint(trainer.folder, name, world, write, meta, self.recipe.run.keep, best, need)
        except Diverged as error:
            raise self._diverged(error.message) from error
        publish_model(trainer.folder, folder, world)


def peak_memory(device: torch.device) -> float:
    """The most memory that this process has held so far, in GB: of the device, or of the machine on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
