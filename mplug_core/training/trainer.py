"""The training loop: stages of steps over a mix of sources, with evaluation, checkpoints and a log."""

from __future__ import annotations

import gc
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import ValidationError

from mplug_core.allocator import keep_freed_memory
from mplug_core.atomic import replace_text
from mplug_core.cpu import settle_threads
from mplug_core.data.batches import Source
from mplug_core.data.records.types import KINDS, Records
from mplug_core.data.scenes import holds_scenes, split_sizes, write_scenes
from mplug_core.data.shards.reading import Pack
from mplug_core.data.shards.remote import locate
from mplug_core.data.shards.source import ShardSource, text_records
from mplug_core.data.text import Tokenizer, texts_of
from mplug_core.device import multiplies_bf16
from mplug_core.errors import CheckpointError, DataError, MplugError, Preempted, RecipeError
from mplug_core.model.config import MplugConfig
from mplug_core.model.hollow import hollow
from mplug_core.model.kernels import keep_kernels
from mplug_core.model.mplug import MplugModel
from mplug_core.model.teacher import Teacher, build_teacher
from mplug_core.recipe import ModelSection, Recipe, SourceSection, StageSection
from mplug_core.tasks.caption import CaptionTask
from mplug_core.tasks.patches import PatchTask
from mplug_core.tasks.registry import TASKS, evaluated_task
from mplug_core.tasks.task import EvaluateOptions, Ready, Texts
from mplug_core.training.agreement import together
from mplug_core.training.alignment import Alignment
from mplug_core.training.checkpoint import (
    ANEW,
    latest_checkpoint,
    load_parts,
    publish_model,
    read_meta,
    require_sound,
    sweep_checkpoints,
)
from mplug_core.training.data_fingerprint import Fingerprint, changed_data, of_pack, of_records
from mplug_core.training.distributed import World
from mplug_core.training.engine import Engine, build_engine, import_deepspeed
from mplug_core.training.engine_state import whole_state
from mplug_core.training.features import FeatureCache
from mplug_core.training.journal import Journal
from mplug_core.training.loop import Progress, StageLoop, Watch
from mplug_core.training.optimizer import for_stage
from mplug_core.training.precision import settled
from mplug_core.training.resume import forget_later_metrics, refuse_other_recipe, restore_random, share_lots
from mplug_core.training.run_folder import RUN, check_run_folder, claim, refuse_own_start
from mplug_core.training.stage_checks import require_captions, stage_faults
from mplug_core.training.stand_in import StandIn
from mplug_core.training.start import changed_config, fill_from, grown_vocabulary, new_vocabulary, words_without_piece
from mplug_core.training.step import TrainStep
from mplug_core.training.trackers import Followers, check_trackers
from mplug_core.weights.bert import class_name_features, load_language
from mplug_core.weights.card import model_card
from mplug_core.weights.folder import Stored, fill_buffers, read_model, save_model
from mplug_core.weights.pretrained import Origin
from mplug_core.weights.visual import load_visual

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""On which a run saves and ends with code 75; schedulers send the first and the last before they take a machine."""


def train(
    recipe: Recipe,
    resume: str = "auto",
    watch: Watch = lambda kind, figures: None,
    allow_changed_data: bool = False,
) -> Path:
    """Run a recipe to its end; returns the run folder: ``model/`` is the last model, ``best/`` the one with the best
    score where the recipe names ``run.best``.

    ``resume``: ``auto`` continues the run folder's last checkpoint if there is one, ``never`` starts anew. Raises
    UsageError where the run folder is of something else, DataError where a source has other records than the checkpoint
    was trained on, unless ``allow_changed_data``, and Preempted (exit code 75) with everything saved when told to stop
    by SIGTERM, SIGINT or SIGUSR1.
    """
    trainer = Trainer(recipe, watch, resume, allow_changed_data)
    with trainer.followers:
        return trainer.run()


class Trainer:
    """Everything of a run that outlives a stage."""

    kind = RUN
    """What the run folder is of."""

    def __init__(
        self, recipe: Recipe, watch: Watch, resume: str = "auto", allow_changed_data: bool = False
    ) -> None:
        self.recipe = recipe
        check_trackers(recipe)
        self.world = World.from_environment()
        if self.world.size > 1:
            import_deepspeed()  # connects the processes, which wait for each other from here on
        self.folder = recipe.run_folder
        with together(self.world):
            if self.world.is_first:
                check_run_folder(self.folder, self.kind)
        self.followers = Followers(recipe, self.folder, watch)
        self.watch = self.followers if self.world.is_first else lambda kind, figures: None
        self.checkpoint = self._find_checkpoint(resume)
        if self.checkpoint is None:
            refuse_own_start(self.folder, recipe.start.model)
        self.meta = read_meta(self.checkpoint) if self.checkpoint is not None else {}
        self.pieces = 1
        self.recipe = recipe = self._same_batch(self._same_precision(recipe))
        self.stop_signal: int | None = None
        self.aligning = False
        settle_threads(recipe.engine.threads, self.world.size if self.world.device.type == "cpu" else 1)
        if self.world.device.type == "cpu":
            keep_freed_memory()
            keep_kernels()
        torch.manual_seed(recipe.seed)
        self._render_scenes()
        self.stages = recipe.stages or [StageSection(name="train")]
        self.fingerprints: dict[str, Fingerprint] = {}
        """Of each source, on the first process."""
        with together(self.world):
            self._set_up(recipe)
        self._compare_with_checkpoint(allow_changed_data)
        self._cache_features()
        self.stand_in: StandIn | None = None
        self.progress = Progress()
        self.average: Teacher | None = None
        if recipe.run.average:
            self.average = Teacher(self.model, recipe.run.average).to(self.world.device)

    # -- preparation -------------------------------------------------------------------------------------------------

    def _set_up(self, recipe: Recipe) -> None:
        """Vocabulary, model, tasks and sources. No meeting of the processes."""
        start = read_model(recipe.start.model) if recipe.start.model else None
        self.tokenizer = self._tokenizer(start)
        self.config = self._config(start)
        longest = min(recipe.data.max_text, self.config.max_positions)
        self.texts = Texts(
            self.tokenizer, longest, recipe.data.max_answers, self.config.text_end, recipe.data.fused_share
        )
        self.model = MplugModel(self.config)
        self.model.set_checkpointing(recipe.engine.checkpointing)
        self._start_weights(start)
        self.tasks = self._all_tasks()
        if faults := stage_faults(self.recipe, self.tasks, self.model.parts):
            raise RecipeError("; ".join(faults))
        self._check_evaluations()
        self.sources = {name: self._source(name) for name in recipe.data.sources}
        require_captions(self.recipe, self.sources)
        for name, source in self.sources.items():
            if not source.can_be_cut(self.pieces):
                raise CheckpointError(
                    f"{self.world.size} processes can't share the batches of {name}, whose images belong together",
                    f"start {self.meta['world']} processes, or fewer",
                )

    def _render_scenes(self) -> None:
        scenes, folder = self.recipe.data.scenes, self.folder / "scenes"
        if scenes is None or not self.recipe.renders_scenes():
            return
        with together(self.world):
            # with a checkpoint other scenes are another recipe, which is refused when all of it is known
            known = holds_scenes(folder, scenes.n, scenes.seed, scenes.size) or (self.checkpoint and folder.exists())
            if self.world.is_first and not known:
                self.watch("note", {"text": f"rendering {scenes.n} scenes"})
                claim(self.folder, self.kind)
                total, done = sum(split_sizes(scenes.n).values()), 0

                def advance(more: int) -> None:
                    nonlocal done
                    done += more
                    self.watch("scenes", {"done": done, "total": total})

                write_scenes(folder, scenes.n, scenes.seed, scenes.size, progress=advance)

    def _tokenizer(self, start: Stored | None) -> Tokenizer:
        if self.checkpoint is not None:
            return Tokenizer.load(self.checkpoint / "model" / "vocab.txt")
        data, bins = self.recipe.data, self.recipe.model.box_bins
        texts = (text for name in data.sources for text in self._all_texts(name))
        if start is not None:
            words: list[str] = []
            if data.vocabulary == "extend":
                words = words_without_piece(start.tokenizer, texts, data.vocabulary_min_count)
            wanted = bins if "box_bins" in self.recipe.model.model_fields_set else None
            return grown_vocabulary(start.tokenizer, wanted, words)
        return new_vocabulary(self.recipe, texts)

    def _config(self, start: Stored | None) -> MplugConfig:
        """The architecture, with which the recipe from here on is complete; RecipeError for what it lacks."""
        recipe, tokenizer = self.recipe, self.tokenizer
        if start is None:
            values = recipe.model.model_dump() | {"vocab_size": tokenizer.vocab_size, "box_bins": tokenizer.bins}
            return MplugConfig(**values)
        config = changed_config(start.config, recipe.model, tokenizer)
        if faults := recipe.lacks(config):
            raise RecipeError(
                f"{recipe.start.model} can't be trained as {recipe.name} says: {'; '.join(faults)}",
                "add to the recipe's model section what it needs",
            )
        self.recipe = recipe.model_copy(update={"model": ModelSection(**config.architecture())})
        return config

    def _all_texts(self, name: str) -> Iterator[str]:
        section = self.recipe.data.sources[name]
        pack = self._pack(name)
        for task in section.tasks:
            if task == "patches":
                continue
            if pack is None:
                records = iter(TASKS[task].read(self.recipe.placed(section), section.text_only))
            else:
                records = pack.records(KINDS[task])
            for record in records:
                yield from texts_of(record)

    def _pack(self, name: str) -> Pack | None:
        """The pack that a source streams from, if its path is one."""
        section, data = self.recipe.data.sources[name], self.recipe.data
        placed = self.recipe.placed(section)
        folder = locate(placed.path, placed.split, placed.format, data.cache, data.cache_gb)
        return None if folder is None else Pack(folder, section.limit)

    def _start_weights(self, stored: Stored | None) -> None:
        start = self.recipe.start
        if stored is not None:
            given = self.config.temperature != stored.config.temperature
            temperature = self.config.temperature if given else None
            self.watch("note", {"text": fill_from(self.model, self.tokenizer, stored, temperature)})
        if start.visual:
            self._tell_origin(load_visual(self.model, start.visual))
        for origin in load_language(self.model, start, self.tokenizer):
            self._tell_origin(origin)
        if start.text and self.config.image_head is not None and self.config.image_head.classes:
            names = class_name_features(self.config, start.text)
            self.model.image_projection.class_names.weight.data.copy_(names.T)

    def _tell_origin(self, origin: Origin) -> None:
        self.watch("note", {"text": origin.text})
        for warning in origin.warnings:
            self.watch("note", {"level": "warning", "text": warning})

    def _source(self, name: str) -> Source:
        section = self.recipe.data.sources[name]
        pack = self._pack(name)

        def encoder(task: str) -> Any:
            return lambda drawn, rng: self.tasks[task].encode(drawn, rng, self.texts)

        encoders = {task: encoder(task) for task in section.tasks}
        if pack is not None and self.world.is_first:
            self.fingerprints[name] = of_pack(pack)
        if pack is not None and not section.text_only:
            return self._streamed(name, section, pack, encoders)
        records: dict[str, Any] = {}
        for task in section.tasks:
            if pack is None:
                found = self.tasks[task].read(self.recipe.placed(section), section.text_only)
            else:  # stand-ins need the features of all texts before the first step
                found = Records(text_records(pack, KINDS.get(task, task)), Path(pack.name), "shards")
            bad = len(found.missing) + len(found.broken)
            if bad:
                self.watch("note", {"text": found.report()})
            if bad > self.recipe.data.max_bad_fraction * (bad + len(found)):
                raise DataError(f"source {name}: {found.report()}", "repair it or raise data.max_bad_fraction")
            records[task] = found.records
            if prepare := getattr(self.tasks[task], "prepare", None):
                prepare(found.records[: section.limit], self.texts, self.recipe.wanted())
        if pack is None and self.world.is_first:
            self.fingerprints[name] = of_records(records, section.limit)
        return Source(name, section, records, self.config.vision, encoders)

    def _cache_features(self) -> None:
        """Features of the sources that want them, made by all processes together."""
        with together(self.world):
            sources = [self.sources[name] for name in self.recipe.cached_sources()]
            if sources and self.world.is_first:
                claim(self.folder, self.kind)
            cache = FeatureCache(self.model.visual, sources, self.folder / "features")
            cache.compute(self.watch, self.world)
        with together(self.world):
            # what another process has computed is there, if they share the folder
            cache.refresh()
            cache.compute(self.watch, World(0, 1, self.world.local_rank))
            cache.give()

    def _streamed(self, name: str, section: SourceSection, pack: Pack, encoders: dict[str, Any]) -> ShardSource:
        """A source whose records stay in its pack; RecipeError for what needs all of them at once."""
        if section.cached_views:
            raise RecipeError(
                f"data.sources.{name}: cached_views holds the features of every image, a pack is streamed",
                "set cached_views: 0, or train on the data set itself",
            )
        lots = self.world.size * self.recipe.engine.accumulate
        limit = self.recipe.data.max_bad_fraction
        source = ShardSource(name, section, pack, self.config.vision, encoders, lots, limit)
        if "caption" in section.tasks and "self_critical" in self.recipe.wanted():
            self.tasks["caption"].prepare(text_records(pack, "captions"), self.texts, self.recipe.wanted())
        return source

    def _check_evaluations(self) -> None:
        """DataError or RecipeError now, not after hours of training, where nothing can be evaluated."""
        self.evaluated_records: dict[tuple[str, str], int] = {}
        if self.world.is_first:
            for name, section in self.recipe.evaluate.items():
                self._evaluation_options(name)
                for task in section.tasks:
                    try:
                        found = self.tasks[task].read(self.recipe.placed(section))
                        kinds = found if isinstance(found, list) else [(task, found)]
                        self.evaluated_records[name, task] = sum(len(records) for _, records in kinds)
                    except DataError as error:
                        raise DataError(f"evaluate.{name}: {error.message}", error.hint) from error

    def _evaluation_options(self, name: str) -> EvaluateOptions:
        """How ``evaluate.NAME`` is evaluated; RecipeError where its options are none."""
        section = self.recipe.evaluate[name]
        try:
            return EvaluateOptions(**{"limit": section.limit, **section.options})
        except ValidationError as error:
            faults = "; ".join(".".join(map(str, fault["loc"])) + f": {fault['msg']}" for fault in error.errors())
            known = ", ".join(EvaluateOptions.model_fields)
            raise RecipeError(f"evaluate.{name}.options: {faults}", f"options: {known}") from error

    def steps_of(self, stage: StageSection) -> int:
        """Optimizer steps of a stage: its own, else the recipe's steps or epochs."""
        return self.planned_steps(stage, self.recipe)

    def planned_steps(self, stage: StageSection, recipe: Recipe) -> int:
        """The steps that ``recipe`` has for a stage of it, on the data of this run."""
        if stage.steps or recipe.steps:
            return stage.steps or recipe.steps
        sources = [self.sources[name] for name in recipe.sources_of(stage)]
        if not sources:
            raise RecipeError("data.sources is empty", "name at least one data set")
        # of the global batch alone: the same when a run goes on on another number of processes
        lots = self.world.size * self.recipe.engine.accumulate
        return max(source.steps_per_epoch(lots) for source in sources) * (recipe.epochs or 1)

    @staticmethod
    def align_steps(stage: StageSection) -> int:
        """Steps of each fold of an aligning stage."""
        return stage.steps or 600

    # -- the run -----------------------------------------------------------------------------------------------------

    def run(self) -> Path:
        checkpoint = self.checkpoint
        self._prepare_folder()
        # what is drawn outside of lots, which have seeds of their own
        torch.manual_seed(self.recipe.seed * 1009 + self.world.rank)
        if checkpoint is not None:
            try:
                self.progress = Progress.read(self.meta["progress"])
            except TypeError as error:
                raise CheckpointError(f"{checkpoint} is of another version: {error}", ANEW) from error
            with together(self.world):
                if self.world.is_first:
                    forget_later_metrics(self.folder / "metrics.jsonl", self.progress.total, self.progress.scores_at)
            # a kill may have come between the checkpoint and the run's own model folder
            publish_model(self.folder, checkpoint, self.world)
            self.watch("note", {"text": f"resumed {checkpoint} at step {self.progress.total}"})
        if self.world.is_first:
            planned = sum(self.steps_of(stage) for stage in self.stages if stage.align is None)
            self.followers.begin(self.progress.total, checkpoint is not None, planned)
        self._listen()
        try:
            for number, stage in enumerate(self.stages):
                if stage.align is not None:
                    # quick, and what it found is kept in the run folder: also on the way to a later stage
                    self._align(stage)
                if number < self.progress.stage or stage.align is not None:
                    continue
                self.progress.stage = number
                self._run_stage(stage, checkpoint)
                checkpoint = None
                self.progress.step = 0
        finally:
            self._unlisten()
        kept = self.folder / ("best" if self.progress.best else "model")
        if self.progress.scores:
            at = {"last": self.progress.scores_at, "best": self.progress.best_at}
            self.watch("scores", {"last": self.progress.scores, "best": self.progress.best, "at": at})
        self.watch("end", {"folder": str(kept), "seconds": self.progress.seconds})
        return self.folder

    def _find_checkpoint(self, resume: str) -> Path | None:
        """The checkpoint to continue, if any: a sound one, the same on all processes."""
        if resume == "never":
            return None
        if resume == "auto":
            warn = lambda text: self.watch("note", {"level": "warning", "text": text})  # noqa: E731
            return latest_checkpoint(self.folder, self.world, warn)
        return require_sound(Path(resume), self.world)

    def _same_precision(self, recipe: Recipe) -> Recipe:
        """The recipe with the precision that a run began with, or that these processes compute well in."""
        engine, before = recipe.engine, self.meta.get("recipe", {}).get("engine", {}).get("precision")
        if engine.precision == "auto" and before in ("fp32", "bf16"):
            engine = engine.model_copy(update={"precision": before})
        engine = settled(engine, self.world.device, self.world)
        if engine.precision == "bf16" and not multiplies_bf16(self.world.device):
            text = "this device has no units for bf16: engine.precision=fp32 would be many times faster"
            self.watch("note", {"level": "warning", "text": text})
        return recipe.model_copy(update={"engine": engine})

    def _same_batch(self, recipe: Recipe) -> Recipe:
        """The recipe with the steps' global batch shared among these processes as it was among those before."""
        if self.checkpoint is None:
            return recipe
        lots = self.meta["world"] * self.meta["accumulate"] // self.meta["pieces"]
        sources = recipe.data.sources
        accumulate, self.pieces = share_lots(lots, self.world.size, [s.batch_size for s in sources.values()])
        if self.meta["world"] != self.world.size:
            parts = f"{accumulate} parts of 1/{self.pieces} of batch_size" if self.pieces > 1 else f"{accumulate} parts"
            text = f"{self.meta['world']} processes before, {self.world.size} now: each computes {parts} of a step"
            self.watch("note", {"text": f"{text}, which learns from as much as before"})
        smaller = {
            name: section.model_copy(update={"batch_size": section.batch_size // self.pieces})
            for name, section in sources.items()
        }
        return recipe.model_copy(
            update={
                "engine": recipe.engine.model_copy(update={"accumulate": accumulate}),
                "data": recipe.data.model_copy(update={"sources": smaller}),
            }
        )

    def recipe_values(self) -> dict[str, Any]:
        """The recipe as it was given, for files: batches that are cut into pieces for these processes are whole."""
        values = self.recipe.model_dump(mode="json")
        for section in values["data"]["sources"].values():
            section["batch_size"] *= self.pieces
        return values

    def _compare_with_checkpoint(self, allow_changed_data: bool) -> None:
        """CheckpointError where the checkpoint is of another recipe, DataError where it is of other data."""
        if self.checkpoint is None:
            return
        for difference in refuse_other_recipe(self.meta["recipe"], self.recipe_values(), self.checkpoint):
            self.watch("note", {"text": f"other than before: {difference}"})
        before = self.meta.get("data")
        if not isinstance(before, dict):
            text = f"{self.checkpoint} doesn't tell which data it was trained on: it isn't compared"
            self.watch("note", {"text": text})
            return
        with together(self.world):
            changes = changed_data(before, self.fingerprints) if self.world.is_first else []
            if changes and not allow_changed_data:
                raise DataError("; ".join(changes), "put the data back, or --allow-changed-data goes on with it")
        for change in changes:
            self.watch("note", {"level": "warning", "text": change})

    def _prepare_folder(self) -> None:
        """Create the run folder with recipe and vocabulary."""
        with together(self.world):
            if self.world.is_first:
                self._write_folder(self.recipe_values(), anew=self.checkpoint is None)

    def _write_folder(self, values: dict[str, Any], anew: bool) -> None:
        holder = Journal(self.folder).holder()
        if holder is not None:
            raise MplugError(f"process {holder} is running in {self.folder}", "stop it, wait for it, or set run.folder")
        try:
            claim(self.folder, self.kind)
            sweep_checkpoints(self.folder)
            replace_text(self.folder / "recipe.yaml", yaml.safe_dump(values, sort_keys=False))
            self.tokenizer.save(self.folder / "vocab.txt")
            if anew:
                for stage in self.stages:  # what an aligning stage has found
                    (self.folder / f"{stage.name}.safetensors").unlink(missing_ok=True)
                (self.folder / "metrics.jsonl").unlink(missing_ok=True)
                shutil.rmtree(self.folder / "best", ignore_errors=True)
        except OSError as error:
            raise MplugError(f"cannot write {self.folder}: {error.strerror}", "set run.folder") from error

    def _listen(self) -> None:
        """Ask to be stopped between steps on SIGTERM, SIGINT and SIGUSR1; a second signal stops at once, and so does
        the first while an aligning stage computes, which has nothing to save."""

        asked = 0.0

        def note(number: int, frame: Any) -> None:
            nonlocal asked
            if self.aligning:
                raise Preempted("stopped while aligning: features of images are kept", "run it again to go on")
            if self.stop_signal is None:
                self.stop_signal, asked = number, time.monotonic()
            # a terminal signals the launcher and its processes at once, and the launcher hands it on: that is one wish
            elif time.monotonic() - asked > 1:
                raise KeyboardInterrupt

        self._previous = {}
        for number in STOP_SIGNALS:
            try:
                self._previous[number] = signal.signal(number, note)
            except ValueError:  # not the main thread: whoever owns it handles signals
                return

    def _unlisten(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _freeze(self, stage: StageSection) -> None:
        self.model.freeze(self.recipe.frozen(stage))
        self.model.pooling = stage.pool
        self.model.by_length = self.world.size == 1

    def _align(self, stage: StageSection) -> None:
        """The aligning stage; every process computes the same unless the file is there."""
        optimizer = for_stage(self.recipe.optimizer, stage)
        sources = [self.sources[name] for name in stage.sources or self.sources]
        steps = self.align_steps(stage)
        others = [source for source in self.sources.values() if source not in sources]
        alignment = Alignment(
            self.model, self.texts, sources, stage.align, optimizer, steps, self.recipe.seed, self.watch, others
        )
        file = self.folder / f"{stage.name}.safetensors"
        self.aligning = True
        try:
            with together(self.world):
                if self.world.is_first:
                    self.stand_in = alignment.run(file)
                    if alignment.figures:
                        self.watch("align", {"stage": stage.name, **alignment.figures})
            with together(self.world):
                if self.stand_in is None:
                    self.stand_in = alignment.run(file)
        finally:
            self.aligning = False
        if self.average is not None:
            self.average.reset(self.model)

    def _run_stage(self, stage: StageSection, checkpoint: Path | None) -> None:
        recipe = self.recipe
        objectives = stage.objectives or recipe.objectives
        optimizer = for_stage(recipe.optimizer, stage)
        sources = [self.sources[name] for name in stage.sources or self.sources]
        steps = self.steps_of(stage)
        teacher, queue = build_teacher(self.model, recipe.teacher, objectives)
        for part in (teacher, queue):
            if part is not None:
                part.to(self.world.device)
        module = TrainStep(self.model, self.tasks, self.stand_in)
        self._freeze(stage)
        cached = recipe.encoder_stays(self.stages[: self.progress.stage + 1])
        for source in sources:
            source.cached = cached
        batch_size = sum(source.section.batch_size for source in sources)
        engine = build_engine(module, recipe.engine, optimizer, self.world, batch_size)
        if checkpoint is not None:
            engine.load(checkpoint)
            parts = {"teacher": teacher, "queue": queue, "average": self.average}
            with together(self.world):
                unknown = load_parts(checkpoint, parts)
            if self.average is not None and "average" in unknown:  # wanted only now
                self.average.reset(module.model, engine.whole)
            # last, since what was built on the way has drawn from it
            with together(self.world):
                restore_random(checkpoint, self.world, recipe.seed, self.progress.total)
        elif teacher is not None:
            teacher.reset(module.model, engine.whole)
        loop = StageLoop(self, stage, engine, module, objectives, optimizer, sources, steps, teacher, queue)
        loop.run()
        self._take_back(engine, module)
        engine.close()
        del loop, engine, module
        gc.collect()
        if self.world.device.type == "cuda":
            torch.cuda.empty_cache()

    def _take_back(self, engine: Engine, module: TrainStep) -> None:
        """A fresh fp32 model and fresh heads with the trained weights, free of what the engine did to the old ones."""
        state = whole_state(module, engine)
        self.model = MplugModel(self.config)
        self.model.set_checkpointing(self.recipe.engine.checkpointing)
        # what a task has prepared for the run stays
        self.tasks = self._all_tasks() | {"caption": self.tasks["caption"]}
        if self.stand_in is not None:
            self.stand_in = StandIn(self.config.embed_dim)
        TrainStep(self.model, self.tasks, self.stand_in).load_state_dict(state)

    def _all_tasks(self) -> dict[str, Any]:
        return {**TASKS, "caption": CaptionTask(), "patches": PatchTask(self.config, self.model.visual.token_grid[0])}

    def export(self, state: dict[str, torch.Tensor], name: str, folder: Path | None = None) -> None:
        """Write the model folder ``name`` of the run, or of ``folder``, on the first process.

        Its weights are the average if one is kept, else ``state``.
        """
        if self.average is not None:
            state = self.average.model.state_dict()
        if self.world.is_first:
            progress = self.progress
            scores = progress.scores if progress.scores_at == progress.total else None
            card = model_card(self.recipe.name, self.config, self.recipe, progress.total, scores)
            save_model((folder or self.folder) / name, self.model, self.tokenizer, self.recipe, card, state=state)

    def evaluates(self, task: str) -> bool:
        """Whether a task is evaluated in the stage that runs now."""
        now = self.progress.stage
        return now >= len(self.stages) or self.recipe.evaluates_in(self.stages[now], task)

    def evaluate(self, state: dict[str, torch.Tensor]) -> dict[str, float]:
        """The recipe's evaluations, on the first process: metrics by ``name/task/metric``.

        Tasks of which nothing has been trained yet are left out.
        """
        if self.average is not None:
            state = self.average.model.state_dict()
        with hollow():
            model = MplugModel(self.config)
        model.load_state_dict({k: v.detach().float() for k, v in state.items()}, assign=True)
        fill_buffers(model)
        model.pooling = self.model.pooling
        ready = Ready(model.eval().to(self.world.device), self.tokenizer)
        metrics: dict[str, float] = {}
        for name, section in self.recipe.evaluate.items():
            options = self._evaluation_options(name)
            for task in filter(self.evaluates, section.tasks):
                result = evaluated_task(task).evaluate(ready, self.recipe.placed(section), options)
                metrics |= {f"{name}/{task}/{metric}": value for metric, value in result.metrics.items()}
        return metrics
