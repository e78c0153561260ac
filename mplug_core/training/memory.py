"""Memory of a training step per device: weights, optimizer, gradients, teacher, activations, by engine and ZeRO stage.

Activations are traced (see :mod:`tracing`); what an engine adds is known from what it allocates, and held against
measurements by ``benchmarks/memory.py``. The peak of a step is the larger of two moments: somewhere in the backward
pass, or in the optimizer's step, when activations are gone and all gradients are there.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from mplug_core.model.hollow import hollow
from mplug_core.recipe import EngineSection, StageSection
from mplug_core.training.engine import BUCKET
from mplug_core.training.flops import trace_step
from mplug_core.training.optimizer import parameter_groups
from mplug_core.training.tracing import Trace
from mplug_core.training.workload import Workbench, build_parts

CUDA_CONTEXT = 0.6e9
"""What CUDA and its libraries take for themselves on a GPU."""
FP32 = 4
LIVE = 1_000_000_000
"""Gathered parameters that stage 3 lets live at once: DeepSpeed's ``stage3_max_live_parameters``."""


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters: trained, in the largest group of the optimizer, in all, of the teacher and of the average
    of the weights; and the queue's bytes."""

    trained: int
    largest_group: int
    all: int
    teacher: int
    average: int
    queue_bytes: int


@dataclass(frozen=True)
class Memory:
    """Bytes of one device, and on the host what is offloaded there.

    ``activations`` is the peak of what forward and backward hold beside the complete gradients; ``buffers`` what the
    engine holds beside the others at the peak; ``total`` is that of the larger moment, so less than the sum of all.
    """

    weights: float
    optimizer: float
    gradients: float
    teacher: float
    activations: float
    buffers: float
    total: float
    host: float = 0.0

    def as_object(self) -> dict[str, int]:
        return {name: round(value) for name, value in asdict(self).items()}


def count_sizes(bench: Workbench, stage: StageSection) -> Sizes:
    """What a stage trains and holds."""
    with hollow():
        parts = build_parts(bench, stage, bench.objectives_of(stage))
    groups = parameter_groups(parts.step, bench.recipe.optimizer)
    numbers = [sum(p.numel() for p in group["params"]) for group in groups]
    total = sum(p.numel() for p in parts.step.parameters())
    queue = 0 if parts.queue is None else sum(b.numel() * b.element_size() for b in parts.queue.buffers())
    teacher = 0 if parts.teacher is None else sum(p.numel() for p in parts.teacher.parameters())
    model = sum(p.numel() for p in parts.step.model.parameters())
    return Sizes(sum(numbers), max(numbers, default=0), total, teacher, model * bool(bench.recipe.run.average), queue)


@dataclass(frozen=True)
class Activations:
    """Traced steps at two sizes of the batch, from which any other follows.

    ``saved`` and ``peak`` are bytes (see :class:`Trace`) at ``scales`` times the recipe's batch.
    """

    scales: tuple[float, float]
    traces: tuple[Trace, Trace]

    @classmethod
    def of(cls, bench: Workbench, stage: StageSection, device: str) -> Activations:
        """Traces of half and of the whole batch: what a step keeps grows in proportion, but for a constant part."""
        whole = traced_sizes(bench, stage)
        half = {name: max(2, size // 2) for name, size in whole.items()}
        made = [trace_step(bench, stage, sizes, device=device) for sizes in (half, whole)]
        return cls((sum(half.values()) / sum(whole.values()), 1.0), tuple(made))

    def at(self, scale: float) -> float:
        """Peak bytes at ``scale`` times the batch."""
        (x0, x1), (y0, y1) = self.scales, (trace.peak for trace in self.traces)
        slope = (y1 - y0) / (x1 - x0) if x1 > x0 else y1 / x1
        return max(0.0, y1 + slope * (scale - x1))


def traced_sizes(bench: Workbench, stage: StageSection) -> dict[str, int]:
    """Images of each source in a step. Of more than two alike, two stand for all: the largest, whose recomputation
    needs most at once, and one with the images of the others."""
    sections = bench.recipe.data.sources
    groups: dict[Any, list[str]] = {}
    for name in bench.sources_of(stage):
        groups.setdefault(bench.likeness(name), []).append(name)
    sizes: dict[str, int] = {}
    for names in groups.values():
        *others, largest = sorted(names, key=lambda name: sections[name].batch_size)
        if others:
            sizes[others[0]] = sum(sections[name].batch_size for name in others)
        sizes[largest] = sections[largest].batch_size
    return sizes


def estimate_memory(
    bench: Workbench,
    stage: StageSection,
    engine: EngineSection,
    processes: int = 1,
    device: str = "cpu",
    *,
    scale: float = 1.0,
    activations: Activations | None = None,
    sizes: Sizes | None = None,
) -> Memory:
    """Memory of each of ``processes`` devices (``cpu`` or ``cuda``) at ``scale`` times the recipe's batch."""
    sizes = sizes or count_sizes(bench, stage)
    activations = activations or Activations.of(bench, stage, device)
    element = 2 if engine.precision == "bf16" else FP32
    zero = engine.zero_stage if engine.name == "deepspeed" else 0
    share = 1 / processes if zero else 1.0
    low = element < FP32
    weights = float(element * sizes.all)
    if zero == 3:
        weights *= share  # what the others hold is gathered while it is computed with
    masters = FP32 * sizes.trained * share if low or zero else 0.0
    moments = 2 * FP32 * sizes.trained * share
    teacher = float(FP32 * (sizes.teacher + sizes.average) + sizes.queue_bytes)
    engine_holds = _held_gradients(sizes, engine, share, device)
    offloaded = engine.offload != "none" and zero > 0
    forward_backward = activations.at(scale) + engine_holds.always
    # AdamW, which is fused, holds nothing of its own
    peak = max(forward_backward, engine_holds.after_backward, engine_holds.in_step)
    host = 0.0
    if offloaded:
        host, masters, moments = masters + moments + FP32 * sizes.trained * share, 0.0, 0.0
        if engine.offload == "parameters" and zero == 3:
            host, weights = host + weights, 0.0
    context = 0.0 if device == "cpu" else CUDA_CONTEXT
    gradients = min(engine_holds.in_step, peak)
    return Memory(
        weights=weights, optimizer=masters + moments, gradients=gradients, teacher=teacher,
        activations=min(activations.at(scale), peak), buffers=max(0.0, peak - max(gradients, activations.at(scale))),
        total=weights + masters + moments + teacher + peak + context, host=host,
    )  # fmt: skip


@dataclass(frozen=True)
class Held:
    """Bytes that an engine holds of gradients: beside what is traced, when the backward pass ends, and in the step."""

    always: float
    after_backward: float
    in_step: float


def _held_gradients(sizes: Sizes, engine: EngineSection, share: float, device: str) -> Held:
    trained, group = sizes.trained, sizes.largest_group
    element = 2 if engine.precision == "bf16" else FP32
    if engine.name == "plain" or engine.zero_stage == 0:
        return Held(0.0, FP32 * trained, FP32 * trained)
    bucket = BUCKET
    if device == "cpu":
        bucket = min(bucket, trained)  # the rest of it is never touched
    partition = FP32 * trained * share
    accumulated = FP32 * trained if engine.accumulate > 1 and engine.zero_stage == 2 else 0.0
    if engine.zero_stage == 1:
        # whole gradients in fp32, a bucket of them on their way to the others, and this process's part in one piece
        whole = FP32 * trained
        return Held(0.0, whole + FP32 * bucket + partition, whole + FP32 * group * share)
    if engine.zero_stage == 2:
        buffer = element * bucket
        return Held(accumulated * share, buffer + partition, buffer + partition)
    # its own part in the compute type, always there; the optimizer's step widens a group at a time. Weights that were
    # gathered stay until there are too many, and gradients are sent from one bucket into another.
    gathered = element * min(sizes.all, LIVE) * (1 - share)
    sent = 2 * bucket if share < 1 else bucket
    buffer = element * (sent + trained * share)
    always = element * trained * share + gathered + element * (sent - bucket)
    return Held(always, buffer + gathered, buffer + FP32 * group * share)
