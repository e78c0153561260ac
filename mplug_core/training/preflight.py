"""The check before a run: what a recipe trains, what it costs, whether its data and its disk are there.

Nothing is trained or written, and no weights are allocated; a start model that is only a name is downloaded. What can't
be known without the data is assumed, and said to be (:attr:`Preflight.notes`); what is wrong is found, not raised
(:attr:`Preflight.faults`).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from mplug_core.data.batches import Source
from mplug_core.data.records.types import KINDS
from mplug_core.data.scenes import holds_scenes
from mplug_core.data.shards.reading import Pack
from mplug_core.data.shards.remote import locate
from mplug_core.data.shards.source import ShardSource
from mplug_core.data.text import Tokenizer, texts_of
from mplug_core.errors import CheckpointError, DataError, MplugError, RecipeError, values_without_secrets
from mplug_core.model.config import MplugConfig
from mplug_core.model.hollow import hollow
from mplug_core.recipe import DataSpec, Recipe, SourceSection, StageSection
from mplug_core.tasks.registry import evaluated_task
from mplug_core.training.architectures import start_architecture
from mplug_core.training.features import FeatureCache
from mplug_core.training.flops import DEVICE_FLOPS, UTILISATION, StepFlops, peak_flops, step_flops
from mplug_core.training.memory import Activations, count_sizes, estimate_memory
from mplug_core.training.precision import encoder_fault, settled
from mplug_core.training.run_folder import check_run_folder
from mplug_core.training.stage_checks import stage_faults
from mplug_core.training.start import changed_config, grown_vocabulary, new_vocabulary
from mplug_core.training.workload import WORDS, Workbench, build_parts, encoders_of
from mplug_core.weights.bert import language_starts
from mplug_core.weights.folder import read_model
from mplug_core.weights.pretrained import Origin, is_here
from mplug_core.weights.visual import is_downloaded, visual_start

PARTS = ("visual", "text", "fusion", "decoder")
"""Parts that have a row of their own; all others are heads."""
VISUAL = ("visual", "visual_projection", "grid_positions")
CPU_UTILISATION = 0.5
"""Share of a CPU's speed in large matrix products that a step reaches on it."""


@dataclass
class Fault:
    """Something that would stop the run: what is shown, and the exit code."""

    message: str
    hint: str | None
    exit_code: int

    @classmethod
    def of(cls, error: MplugError, where: str = "") -> Fault:
        return cls(f"{where}{error.message}", error.hint, error.exit_code)

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


@dataclass
class SourceCheck:
    """One data set of the mix or of an evaluation: what was found of each task, or what is wrong with it."""

    name: str
    path: str
    found: dict[str, dict[str, int]] = field(default_factory=dict)
    images: int | None = None
    fault: str | None = None
    note: str | None = None


@dataclass
class StageCost:
    """What a stage takes.

    ``steps`` is None, and ``hours`` are empty, where only the data could tell; ``parameters`` are empty, and all that
    follows from them, where the model's size is not known.
    """

    stage: str
    steps: int | None
    images_per_step: int
    parameters: dict[str, dict[str, int]]
    flops: StepFlops | None
    memory: list[dict[str, Any]] = field(default_factory=list)
    step_seconds: dict[str, float] = field(default_factory=dict)
    hours: dict[str, float] = field(default_factory=dict)


@dataclass
class Preflight:
    """The whole report; ``as_object`` for JSON. ``vocabulary`` is None where the model's size is not known."""

    recipe: Recipe
    processes: int
    vocabulary: int | None
    stages: list[StageCost]
    sources: list[SourceCheck]
    evaluations: list[SourceCheck]
    disk: dict[str, Any]
    devices: dict[str, dict[str, Any]]
    notes: list[str]
    faults: list[Fault]

    @property
    def exit_code(self) -> int:
        """That of the first fault; 0 without any."""
        return self.faults[0].exit_code if self.faults else 0

    @property
    def steps(self) -> int | None:
        """Of all stages."""
        counts = [cost.steps for cost in self.stages]
        return None if None in counts else sum(counts)

    @property
    def hours(self) -> dict[str, float]:
        """Of all stages by device; empty where the steps aren't known."""
        if self.steps is None:
            return {}
        return {name: sum(cost.hours.get(name, 0.0) for cost in self.stages) for name in self.devices}

    def as_object(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {
            "recipe": values_without_secrets(self.recipe.model_dump(mode="json")),
            "processes": self.processes,
            "vocabulary": self.vocabulary,
            "stages": [_stage_object(cost) for cost in self.stages],
            "steps": self.steps,
            "hours": self.hours,
            "devices": self.devices,
            "sources": [asdict(check) for check in self.sources],
            "evaluations": [asdict(check) for check in self.evaluations],
            "disk": self.disk,
            "notes": self.notes,
            "faults": [asdict(fault) for fault in self.faults],
        }


def _stage_object(cost: StageCost) -> dict[str, Any]:
    flops = cost.flops
    shown = None
    if flops is not None:
        shown = {"per_image": flops.per_image, "useful_per_image": flops.useful_per_image, **asdict(flops)}
    return {**asdict(cost), "flops": shown}


def check_run(
    recipe: Recipe,
    processes: int = 1,
    devices: Iterable[str] = ("a100", "h100", "cpu"),
    advance: Callable[[int], None] = lambda done: None,
) -> Preflight:
    """Check a recipe that is to run in ``processes`` processes, a device each. Never raises MplugError.

    ``advance`` is called with 1 after each of :func:`parts_of_check`.
    """
    check = _Check(recipe, processes, advance)
    bench = check.workbench()
    if check.size_known:
        faults = stage_faults(check.recipe, bench.tasks, bench.model.parts)
        check.faults += [Fault(fault, None, RecipeError.exit_code) for fault in faults]
        check.starts(bench)
        check.encoder(bench)
    speeds = check.speeds(devices)
    stages = [check.stage(bench, stage, speeds) for stage in bench.stages]
    evaluations = check.evaluations()
    disk = check.disk(bench)
    vocabulary = bench.config.vocab_size if check.size_known else None
    return Preflight(
        check.recipe, processes, vocabulary, stages, check.checked, evaluations, disk, speeds, check.notes,
        check.faults,
    )  # fmt: skip


def parts_of_check(recipe: Recipe) -> int:
    """How many parts a check has: data sets to read, and stages to count."""
    return len(recipe.data.sources) + len(recipe.evaluate) + max(1, len(recipe.stages))


class _Check:
    """Collects notes and faults on the way."""

    def __init__(self, recipe: Recipe, processes: int, advance: Callable[[int], None]) -> None:
        self.given, self.processes, self.advance = recipe.engine, processes, advance
        self.size_known = True
        precision = recipe.engine.precision
        if precision == "auto":  # costs are those of GPUs
            precision = "bf16" if recipe.engine.name == "plain" or recipe.engine.zero_stage else "fp32"
        engine = recipe.engine.model_copy(update={"precision": precision})
        self.recipe = recipe.model_copy(update={"engine": engine})
        self.folder = recipe.run_folder
        self.notes: list[str] = []
        self.faults: list[Fault] = []
        self.checked: list[SourceCheck] = []
        self.epochs: dict[str, Callable[[int], int]] = {}
        """Of each source whose size is known, steps of an epoch by the number of lots of a step."""
        self.tokenizer: Tokenizer | None = None
        """The vocabulary, if it is known."""

    # -- data and model ----------------------------------------------------------------------------------------------

    def workbench(self) -> Workbench:
        """The model and what of the sources is there."""
        records = {name: self._records(name, section) for name, section in self.recipe.data.sources.items()}
        there = {name: found for name, found in records.items() if found}
        config, tokenizer = self._architecture(there)
        self.tokenizer = tokenizer
        bench = Workbench.of(self.recipe, config, tokenizer)
        for name, found in there.items():
            section = self.recipe.data.sources[name]
            source = Source(name, section, found, config.vision, encoders_of(section, bench.tasks, bench.texts))
            try:
                bench.unread(name, bench.stages[0])  # the invented one: the real one must give a batch, too
                bench.sources[name] = source
                bench.unread(name, bench.stages[0]).batch(1)
            except (MplugError, ValueError, AttributeError) as error:
                self.faults.append(Fault(f"data.sources.{name}: {error}", None, DataError.exit_code))
                bench = Workbench.of(
                    self.recipe, config, tokenizer, {k: v for k, v in bench.sources.items() if k in bench.known}
                )
                continue
            bench.known |= {name}
            self.epochs[name] = source.steps_per_epoch
        missing = [name for name in self.recipe.data.sources if name not in bench.known]
        if missing:
            words = ", ".join(f"{kind} {count}" for kind, count in WORDS.items())
            self.notes.append(f"texts of {', '.join(missing)} are not at hand; lengths assumed, in words: {words}")
        return bench

    def encoder(self, bench: Workbench) -> None:
        """The visual encoder can be computed as the run will do it, which on GPUs all of them can."""
        if torch.cuda.is_available():
            return
        learns = not bench.recipe.encoder_stays(bench.stages)
        if fault := encoder_fault(bench.config, settled(self.given, torch.device("cpu")), learns):
            self.faults.append(Fault(fault, "set engine.precision=fp32", RecipeError.exit_code))

    def _to_render(self, path: str) -> bool:
        """Whether a path is of scenes that the run will render first."""
        scenes, folder = self.recipe.data.scenes, self.folder / "scenes"
        inside = Path(path) == folder or folder in Path(path).parents
        return scenes is not None and inside and not holds_scenes(folder, scenes.n, scenes.seed, scenes.size)

    def _records(self, name: str, section: SourceSection) -> dict[str, list[Any]] | None:
        """The records of a source by task; None where they can't be had, which is noted."""
        spec = self.recipe.placed(section)
        check = SourceCheck(name, spec.path)
        self.checked.append(check)
        self.advance(1)
        if self._to_render(spec.path):
            check.note = f"{self.recipe.data.scenes.n} scenes will be rendered"
            return None
        try:
            if self._is_pack(name, section, spec, check):
                return None
            return self._read(section.tasks, spec, section, check)
        except MplugError as error:
            check.fault = error.message
            self.faults.append(Fault.of(error, f"data.sources.{name}: "))
            return None

    def _is_pack(self, name: str, section: SourceSection, spec: DataSpec, check: SourceCheck) -> bool:
        data = self.recipe.data
        folder = locate(spec.path, spec.split, spec.format, data.cache, data.cache_gb)
        if folder is None:
            return False
        pack = Pack(folder, section.limit)
        for task in section.tasks:
            pack.index.require(KINDS.get(task, task), task, pack.name)
        check.images, check.note = len(pack), f"pack of {len(pack.shards)} shards"
        if not section.text_only:
            lots = self.processes * self.recipe.engine.accumulate
            vision = self.recipe.model.vision
            streamed = ShardSource(name, section, pack, vision, {}, lots, data.max_bad_fraction)
            self.epochs[name] = streamed.steps_per_epoch
        return True

    def _read(
        self, tasks: Iterable[str], spec: DataSpec, section: SourceSection, check: SourceCheck
    ) -> dict[str, list[Any]]:
        from mplug_core.tasks.patches import PatchTask
        from mplug_core.tasks.registry import TASKS

        records: dict[str, list[Any]] = {}
        for task in tasks:
            found = PatchTask.read(None, spec) if task == "patches" else TASKS[task].read(spec, section.text_only)
            bad = len(found.missing) + len(found.broken)
            check.found[task] = {"records": len(found), "missing": len(found.missing), "broken": len(found.broken)}
            if bad > self.recipe.data.max_bad_fraction * (bad + len(found)):
                raise DataError(found.report(), "repair it or raise data.max_bad_fraction")
            records[task] = found.records
        images = {str(getattr(r, "image", None) or getattr(r, "images", "")) for rs in records.values() for r in rs}
        check.images = None if section.text_only else len(images)
        return records

    def _architecture(self, records: dict[str, dict[str, list[Any]]]) -> tuple[MplugConfig, Tokenizer | None]:
        """The model's configuration, and its vocabulary if that is known; the recipe becomes complete with it."""
        recipe, start = self.recipe, self.recipe.start
        if start.model:
            try:
                stored = read_model(start.model)
                bins = recipe.model.box_bins if "box_bins" in recipe.model.model_fields_set else None
                tokenizer = grown_vocabulary(stored.tokenizer, bins)
                config = changed_config(stored.config, recipe.model, tokenizer)
                if recipe.data.vocabulary == "extend":
                    self.notes.append("the vocabulary is that of start.model; words that it will get are not counted")
                for lack in recipe.lacks(config):
                    self.faults.append(Fault(f"start.model {start.model}: {lack}", None, DataError.exit_code))
                return config, tokenizer
            except MplugError as error:
                self.faults.append(Fault.of(error, "start.model: "))
                return self._unseen_architecture(), None
        tokenizer = self._vocabulary(records)
        values = recipe.model.model_dump()
        if tokenizer is not None:
            values |= {"vocab_size": tokenizer.vocab_size, "box_bins": tokenizer.bins}
        return MplugConfig(**values), tokenizer

    def _unseen_architecture(self) -> MplugConfig:
        """That of a start model that is not at hand, if its name tells it; else one that only the data is read with."""
        found = start_architecture(self.recipe)
        self.size_known = found is not None
        if found is None:
            self.notes.append("start.model is not there, and its size is not known: what depends on it is not counted")
            return MplugConfig(**self.recipe.model.model_dump())
        section, origin = found
        self.notes.append(f"start.model is not there: the sizes are those of {origin}")
        if self.recipe.data.vocabulary == "extend":
            self.notes.append("words that the vocabulary will get are not counted")
        return MplugConfig(**section.model_dump())

    def _vocabulary(self, records: dict[str, dict[str, list[Any]]]) -> Tokenizer | None:
        size, base = self.recipe.model.vocab_size, self.recipe.start.text
        if base and not is_here(base) and self.recipe.data.vocabulary in ("bert", "data"):
            self.notes.append(f"the vocabulary comes with {base}, which the run fetches; {size} pieces assumed")
            return None
        try:
            if self.recipe.data.vocabulary == "data" and len(records) < len(self.recipe.data.sources):
                self.notes.append(f"the vocabulary is built from the data; {size} pieces assumed")
                return None
            by_source = [found for by_task in records.values() for found in by_task.values()]
            return new_vocabulary(
                self.recipe, (text for found in by_source for record in found for text in texts_of(record))
            )
        except CheckpointError as error:
            self.notes.append(f"vocabulary: {error}; {size} pieces assumed")
            return None

    def starts(self, bench: Workbench) -> None:
        """What the parts start from: what is at hand is read and checked, the rest only named."""
        start, config = self.recipe.start, bench.config
        if any(fault.message.startswith("start.model") for fault in self.faults):
            return  # nothing is known of the model
        try:
            if start.visual and (is_downloaded(start.visual) or not is_here(start.visual)):
                self.notes.append(f"start.visual: {start.visual} is fetched by the run, and not checked here")
            elif start.visual:
                self._tell(visual_start(bench.model, start.visual)[1])
        except MplugError as error:
            self.faults.append(Fault.of(error, "start.visual: "))
        berts = {part: start.bert(part) for part in ("text", "fusion", "decoder")}
        away = [part for part, name in berts.items() if name and not is_here(name)]
        for part in away:
            self.notes.append(f"start.{part}: {berts[part]} is fetched by the run, and not checked here")
        layers = start.layers.model_copy(update=dict.fromkeys(away))
        start = start.model_copy(update={**berts, **dict.fromkeys(away), "layers": layers})
        try:
            for part in language_starts(start, config, self.tokenizer, bench.model.state_dict()):
                self._tell(part.origin)
        except MplugError as error:
            self.faults.append(Fault.of(error))

    def _tell(self, origin: Origin) -> None:
        self.notes += [origin.text, *origin.warnings]

    def evaluations(self) -> list[SourceCheck]:
        """The evaluation data, read as before a run."""
        checks = []
        for name, section in self.recipe.evaluate.items():
            spec = self.recipe.placed(section)
            check = SourceCheck(name, spec.path)
            checks.append(check)
            self.advance(1)
            if self._to_render(spec.path):
                check.note = "will be rendered"
                continue
            try:
                for task in section.tasks:
                    found = evaluated_task(task).read(spec)
                    for one in found if isinstance(found, list) else [(task, found)]:
                        records = one[1]
                        check.found[task] = {
                            "records": len(records), "missing": len(records.missing), "broken": len(records.broken)
                        }  # fmt: skip
            except MplugError as error:
                check.fault = error.message
                self.faults.append(Fault.of(error, f"evaluate.{name}: "))
        return checks

    def precision_on(self, device: str) -> str:
        """What ``precision: auto`` comes to on a device by its name: bf16 on a GPU."""
        if device == "cpu":
            return settled(self.given, torch.device("cpu")).precision
        return self.recipe.engine.precision

    # -- costs -------------------------------------------------------------------------------------------------------

    def speeds(self, devices: Iterable[str]) -> dict[str, dict[str, Any]]:
        """Peak FLOP/s and assumed share of it, of the devices that are known."""
        found: dict[str, dict[str, Any]] = {}
        for device in devices:
            precision = self.precision_on(device)
            peak = peak_flops(device, precision)
            if peak is None:
                self.notes.append(f"no speed is known of {device}; known: {', '.join([*DEVICE_FLOPS, 'cpu'])}")
                continue
            share = CPU_UTILISATION if device == "cpu" else UTILISATION
            found[device] = {"precision": precision, "peak_flops": peak, "utilisation": share}
        return found

    def stage(self, bench: Workbench, stage: StageSection, speeds: dict[str, dict[str, Any]]) -> StageCost:
        """What a stage takes."""
        self.advance(1)
        engine = self.recipe.engine
        names = bench.sources_of(stage)
        images = sum(self.recipe.data.sources[name].batch_size for name in names)
        images *= self.processes * engine.accumulate
        steps = 0 if stage.align is not None else self._steps(stage, names)
        if not self.size_known:
            return StageCost(stage.name, steps, images, {}, None)
        cost = StageCost(stage.name, steps, images, count_parameters(bench, stage), None)
        if stage.align is not None:
            self.notes.append(f"stage {stage.name} trains the contrastive head on features computed once: not costed")
            return cost
        if not names:
            return cost
        cost.flops = step_flops(bench, stage, each_objective=True)
        cost.memory = self._memory(bench, stage)
        work = cost.flops.per_image * images / self.processes
        cost.step_seconds = {name: work / (s["peak_flops"] * s["utilisation"]) for name, s in speeds.items()}
        if steps is not None:
            cost.hours = {name: seconds * steps / 3600 for name, seconds in cost.step_seconds.items()}
        return cost

    def _steps(self, stage: StageSection, names: list[str]) -> int | None:
        if stage.steps or self.recipe.steps:
            return stage.steps or self.recipe.steps
        sections = self.recipe.data.sources
        published = {name: sections[name].published_images for name in names if name not in self.epochs}
        if not names or None in published.values():
            self.notes.append(f"steps of stage {stage.name}: epochs are counted on the data")
            return None
        lots = self.processes * self.recipe.engine.accumulate
        if published:
            shown = ", ".join(f"{name} {count:,}" for name, count in published.items())
            self.notes.append(f"steps of stage {stage.name}: counted on the images of the published data: {shown}")
        steps = [self.epochs[name](lots) for name in names if name in self.epochs]
        steps += [max(1, (count or 0) // (sections[name].batch_size * lots)) for name, count in published.items()]
        return max(steps) * (self.recipe.epochs or 1)

    def _memory(self, bench: Workbench, stage: StageSection) -> list[dict[str, Any]]:
        """Rows by ZeRO stage and share of the batch, on a GPU, and for the recipe's own settings on a CPU."""
        engine, sizes, rows = self.recipe.engine, count_sizes(bench, stage), []
        images = sum(self.recipe.data.sources[name].batch_size for name in bench.sources_of(stage))
        traced = Activations.of(bench, stage, "cuda")
        for zero in (0, 1, 2, 3):
            if zero == 0 and engine.precision == "bf16":
                continue  # DeepSpeed's stage 0 can't
            settings = engine.model_copy(update={"name": "deepspeed", "zero_stage": zero})
            for scale in (0.5, 1.0, 2.0):
                memory = estimate_memory(
                    bench, stage, settings, self.processes, "cuda", scale=scale, activations=traced, sizes=sizes
                )
                own = zero == engine.zero_stage and scale == 1.0 and engine.name == "deepspeed"
                row = {"zero_stage": zero, "images": round(images * scale), "recipe": own}
                rows.append(row | memory.as_object())
        return rows

    def disk(self, bench: Workbench) -> dict[str, Any]:
        """Free space where the run writes, and what it will write: None where the model's size is not known."""
        if not self.size_known:
            free = shutil.disk_usage(existing(self.folder)).free
            unknown = dict.fromkeys(("checkpoint", "model", "caches", "needed"))
            return {"folder": str(self.folder), "kept": self.recipe.run.keep, "free": free, **unknown}
        sizes = [count_sizes(bench, stage) for stage in bench.stages]
        largest = max(sizes, key=lambda size: size.trained + size.teacher)
        low = self.recipe.engine.precision == "bf16"
        # weights, masters, two moments; teacher, average and queue
        checkpoint = largest.all * (2 if low else 4) + largest.trained * 12
        checkpoint += 4 * (largest.teacher + largest.average) + largest.queue_bytes
        model = 2 * largest.all
        known = [bench.sources[name] for name in self.recipe.cached_sources() if name in bench.known]
        caches = FeatureCache(bench.model.visual, known, self.folder / "features").bytes_needed()
        need = (self.recipe.run.keep + 1) * checkpoint + 2 * model + caches
        try:
            check_run_folder(self.folder)
        except MplugError as error:
            self.faults.append(Fault.of(error))
        place = existing(self.folder)
        free = shutil.disk_usage(place).free
        if free < need:
            shown = f"{need / 1e9:.1f} GB are needed in {self.folder}, and {free / 1e9:.1f} GB are free"
            self.faults.append(Fault(shown, "free some, lower run.keep, or set run.folder", MplugError.exit_code))
        return {
            "folder": str(self.folder), "checkpoint": checkpoint, "kept": self.recipe.run.keep, "model": model,
            "caches": caches, "needed": need, "free": free,
        }  # fmt: skip


def count_parameters(bench: Workbench, stage: StageSection) -> dict[str, dict[str, int]]:
    """Trained and frozen parameters of each part in a stage; the teacher's, which are neither."""
    with hollow():
        parts = build_parts(bench, stage, bench.objectives_of(stage))
    found = {name: {"trained": 0, "frozen": 0} for name in (*PARTS, "heads")}
    for name, parameter in parts.step.named_parameters():
        own = name.removeprefix("model.").split(".")[0]
        part = "visual" if own in VISUAL else own if own in PARTS else "heads"
        found[part]["trained" if parameter.requires_grad else "frozen"] += parameter.numel()
    if parts.teacher is not None:
        copied = sum(p.numel() for p in parts.teacher.parameters())
        found["teacher"] = {"trained": 0, "frozen": copied}
    return found


def existing(folder: Path) -> Path:
    """The folder, or the nearest above it that is there."""
    folder = folder.absolute()
    while not os.path.exists(folder):
        folder = folder.parent
    return folder
