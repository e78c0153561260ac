"""The figure of the comparison of fusion networks: quality over time, and quality over what a pass costs."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from mplug_core.training.history import Curve


@dataclass(frozen=True)
class Line:
    """A network: its name, its layers, seconds of its step and of a pass through its fusion at full size, and of each
    metric a curve a seed."""

    name: str
    layers: str
    step_seconds: float
    pass_seconds: float
    curves: Mapping[str, Sequence[Curve]]


def draw(lines: Sequence[Line], metrics: Sequence[str], budget: float) -> Figure:
    """Above each metric over the seconds of training (``budget``: the equal time), below over those of a pass."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"font.size": 8}):
        figure = Figure(figsize=(5.6 * len(metrics), 7.4), layout="constrained")
        axes = figure.subplots(2, len(metrics), squeeze=False)
        for column, metric in enumerate(metrics):
            _over_time(axes[0][column], lines, metric, budget)
            _over_cost(axes[1][column], lines, metric)
        axes[0][0].legend(fontsize=7)
    return figure


def _over_time(axes: Axes, lines: Sequence[Line], metric: str, budget: float) -> None:
    for number, line in enumerate(lines):
        curves = line.curves[metric]
        steps = [step for step in curves[0].steps if all(step in curve.steps for curve in curves)]
        values = [[100 * curve.values[curve.steps.index(step)] for curve in curves] for step in steps]
        seconds = [step * line.step_seconds for step in steps]
        colour = f"C{number % 10}"
        label = f"{line.name} {line.layers}"
        axes.plot(seconds, [statistics.mean(row) for row in values], "o-", color=colour, ms=3, lw=1.2, label=label)
        if len(curves) > 1:
            lows, highs = [min(row) for row in values], [max(row) for row in values]
            axes.fill_between(seconds, lows, highs, color=colour, alpha=0.12, lw=0)
    axes.axvline(budget, color="0.4", ls=":", lw=1)
    axes.text(budget, 0.01, " equal time", transform=axes.get_xaxis_transform(), fontsize=7, color="0.4")
    axes.set_title(metric, parse_math=False)
    axes.set_xlabel("seconds of training")
    axes.set_ylabel("percent")
    axes.grid(alpha=0.25)


def _over_cost(axes: Axes, lines: Sequence[Line], metric: str) -> None:
    for number, line in enumerate(lines):
        ends = [100 * curve.values[-1] for curve in line.curves[metric]]
        axes.plot([line.pass_seconds], [statistics.mean(ends)], "o", color=f"C{number % 10}", ms=6)
        if len(ends) > 1:
            axes.plot([line.pass_seconds] * 2, [min(ends), max(ends)], "-", color=f"C{number % 10}", lw=1)
        axes.annotate(line.name, (line.pass_seconds, statistics.mean(ends)), xytext=(5, 3),
                      textcoords="offset points", fontsize=7)  # fmt: skip
    axes.set_title(f"{metric} after equal steps", parse_math=False)
    axes.set_xlabel("seconds of a forward and backward pass through the fusion at full size")
    axes.set_ylabel("percent")
    axes.margins(x=0.15)
    axes.grid(alpha=0.25)
