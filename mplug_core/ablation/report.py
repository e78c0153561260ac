"""The tables of the comparison of fusion networks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict

from mplug_core.ablation.cost import Cost, Shape
from mplug_core.ablation.quality import Experiment, equal_time, last_step, qualities
from mplug_core.ablation.variants import Variant, distinct
from mplug_core.bench.measure import Machine, Report, Timing
from mplug_core.model.config import MplugConfig
from mplug_core.recipe import Recipe
from mplug_core.training.history import Curve

REFERENCE = "connected"
"""What ratios are to, where it is among the variants."""
HEADLINES = {
    "vqa": "accuracy", "retrieval": "r_mean", "caption": "cider", "grounding": "accuracy", "statements": "accuracy",
    "entailment": "accuracy", "reasoning": "accuracy",
}  # fmt: skip
"""The metric of a task that networks are compared by."""
LAYERS = "layers: c co-attention, j connected (joint), a asymmetric; networks that are the same are measured once"


def cost_report(
    variants: Sequence[Variant], config: MplugConfig, shape: Shape, found: Mapping[str, Cost], machine: Machine
) -> Report:
    """Parameters, operations, time and memory of each network, and its time as a share of the reference's."""
    title = (
        f"Fusion networks: {config.fusion_layers} layers of width {config.width}, {shape.image_tokens} image and "
        f"{shape.text_tokens} text tokens, batch {shape.batch}"
    )
    columns = ("fusion", "layers", "parameters", "forward", "forward + backward", "spread, s", "of connected", "kept")
    report = Report("ablate fusion", title, columns, machine)
    reference = found[REFERENCE].seconds.median if REFERENCE in found else None
    for variant in variants:
        cost = found[variant.name]
        share = "" if reference is None else f"{cost.seconds.median / reference:.2f}"
        report.rows.append(
            (
                variant.title, variant.layout(config), f"{cost.parameters / 1e6:.1f} M",
                f"{cost.forward_flops / 1e9:.1f} GFLOP", f"{cost.seconds.median:.3f} s", cost.seconds.spread, share,
                f"{cost.saved_bytes / 1e6:.0f} MB",
            )
        )  # fmt: skip
    report.figures = {"shape": asdict(shape), "costs": {name: cost.as_object() for name, cost in found.items()}}
    report.notes = [LAYERS, "kept: bytes that the backward pass needs of the forward pass, counted"]
    return report


def compared_metrics(recipe: Recipe) -> list[str]:
    """One metric of each evaluation of the recipe: val/vqa/accuracy."""
    return [f"{name}/{task}/{HEADLINES[task]}" for name, section in recipe.evaluate.items() for task in section.tasks]


def quality_report(
    experiment: Experiment,
    variants: Sequence[Variant],
    curves: Mapping[str, Mapping[str, Sequence[Curve]]],
    seconds: Mapping[str, Timing],
    machine: Machine,
) -> Report:
    """Quality of each network after equal steps and after equal time, and what its step takes."""
    metrics = compared_metrics(experiment.recipe)
    medians = {name: timing.median for name, timing in seconds.items()}
    found = {metric: qualities(curves, medians, metric) for metric in metrics}
    several = len(experiment.seeds) > 1
    columns = ["fusion", "layers", "step", "spread, s", "of connected", "steps in equal time"]
    for metric in metrics:
        columns += [f"{metric}, equal steps", *(["seeds apart"] if several else []), "equal time"]
    steps = last_step(curves, metrics[0])
    title = f"Fusion networks trained alike: {experiment.recipe.name}, {steps} steps"
    report = Report("ablate fusion --train", title, columns, machine)
    for variant in variants:
        timing = seconds[variant.name]
        share = f"{timing.median / medians[REFERENCE]:.2f}" if REFERENCE in medians else ""
        row = [variant.title, variant.layout(experiment.config), f"{timing.median:.3f} s", timing.spread, share]
        row.append(f"{found[metrics[0]][variant.name].steps_in_time:.0f}")
        for metric in metrics:
            quality = found[metric][variant.name]
            spread = [f"{100 * quality.spread:.1f}"] if several else []
            row += [f"{100 * quality.equal_steps:.1f}", *spread, f"{100 * quality.equal_time:.1f}"]
        report.rows.append(row)
    budget = equal_time(curves, medians, metrics[0])
    report.figures = {
        "steps": steps,
        "seeds": list(experiment.seeds),
        "seconds_in_equal_time": budget,
        "step_seconds": {name: timing.seconds for name, timing in seconds.items()},
        "quality": {metric: {name: asdict(quality) for name, quality in of.items()} for metric, of in found.items()},
        "curves": {
            first.name: {
                metric: [[curve.steps, curve.values] for curve in curves[first.name][metric]] for metric in metrics
            }
            for first in distinct(variants, experiment.config)
        },
    }
    report.notes = [
        LAYERS,
        f"percent; equal time: what the fastest needs for its {steps} steps, {budget:.0f} s of this machine",
        "time is steps times the median step, measured in turns after training",
        f"seeds: {', '.join(map(str, experiment.seeds))}",
    ]
    return report
