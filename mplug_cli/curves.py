"""The curves of one run or of several as a picture, and a page around it that needs nothing from elsewhere."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING

from mplug_cli import pages
from mplug_core.errors import MplugError
from mplug_core.training.figures import RATES, is_loss
from mplug_core.training.history import Curve, Log, Run, thin

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

POINTS = 1000
"""Of a curve that are drawn; the spread between them is a band."""
MOST_PANELS = 24
COLUMNS = 3
MOST_MARKS = 200
PANELS = (
    ("learning rate", ("lr", "visual_lr")),
    ("gradient norm", ("grad_norm", "grad_norm_max")),
    ("images/s", ("images_per_second",)),
    ("tokens/s", ("tokens_per_second",)),
    ("MFU", ("mfu",)),
    ("memory, GB", ("memory_gb",)),
    ("reward", ("reward",)),
)
LOGARITHMIC = frozenset(("losses", "gradient norm"))
WIDE = 20
"""Highest by lowest value of such a diagram from which its axis is logarithmic."""


@dataclass
class Panel:
    """One diagram: curves with their labels and colours (numbers), and the runs whose marks it shows."""

    title: str
    lines: list[tuple[str, Curve, int]] = field(default_factory=list)


def panels(runs: dict[str, Run]) -> list[Panel]:
    """What to draw: of one run the parts of the loss together, rates, evaluations by task; of several each figure."""
    if len(runs) == 1:
        ((_, run),) = runs.items()
        return _panels_of_one(run.log)
    names = dict.fromkeys(name for run in runs.values() for name in figure_order(run.log))
    found = []
    for title, source, wanted in (
        *((name, "figures", name) for name in names),
        *((name, "evaluations", name) for name in dict.fromkeys(n for r in runs.values() for n in r.log.evaluations)),
    ):
        curves = [(label, getattr(run.log, source).get(wanted)) for label, run in runs.items()]
        lines = [(label, curve, colour) for colour, (label, curve) in enumerate(curves) if curve and curve.steps]
        if lines:
            title = next((known for known, figures in PANELS if figures[0] == title), title)
            found.append(Panel(title, lines))
    return found


def figure_order(log: Log) -> list[str]:
    """The figures worth a curve: losses, the sum first, then rates; counters are marks."""
    losses = [name for name in loss_curves(log) if log.figures[name].steps]
    rates = [name for _, names in PANELS for name in names if name in log.figures and log.figures[name].steps]
    return [*losses, *rates]


def loss_curves(log: Log) -> list[str]:
    """Names of the losses, ``loss`` first."""
    names = [name for name in log.figures if is_loss(name) and not is_count_curve(log, name)]
    return sorted(names, key=lambda name: name != "loss")


def is_count_curve(log: Log, name: str) -> bool:
    """Whether a figure that is neither place nor rate has been a counter: an int in the last line, or ever risen."""
    value = log.last.get(name)
    return name in log.marks or (isinstance(value, int) and name not in RATES)


def _panels_of_one(log: Log) -> list[Panel]:
    def panel(title: str, curves: dict[str, Curve], names: Iterable[str]) -> None:
        lines = [(name, curves[name], colour) for colour, name in enumerate(names) if curves[name].steps]
        if lines:
            found.append(Panel(title, lines))

    found: list[Panel] = []
    losses = loss_curves(log)
    panel("loss", log.figures, [name for name in losses if name == "loss"])
    panel("losses", log.figures, [name for name in losses if name != "loss"])
    for title, names in PANELS:
        panel(title, log.figures, [name for name in names if name in log.figures])
    groups: dict[str, list[str]] = {}
    for name in log.evaluations:
        groups.setdefault(name.rpartition("/")[0] or "evaluation", []).append(name)
    for title, names in groups.items():
        panel(title, log.evaluations, names)
    return found


def draw(runs: dict[str, Run]) -> Figure:
    """All diagrams in one picture. MplugError where there is nothing to draw."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    wanted = panels(runs)
    if not wanted:
        raise MplugError("there is nothing to draw: no figures are logged yet", "wait for the first logged step")
    more, wanted = len(wanted[MOST_PANELS:]), wanted[:MOST_PANELS]
    columns = min(COLUMNS, len(wanted))
    rows = math.ceil(len(wanted) / columns)
    with rc_context({"font.size": 8}):
        # not pyplot: no window system, nothing to close
        figure = Figure(figsize=(5.2 * columns, 3.2 * rows), layout="constrained")
        figure.subplots(rows, columns, squeeze=False)
        for place, panel in zip(figure.axes, wanted, strict=False):
            _draw_panel(place, panel, runs)
        for place in figure.axes[len(wanted) :]:
            place.set_axis_off()
        if more:
            figure.supxlabel(f"{more} more are left out", fontsize=8)
    return figure


def _draw_panel(axes: Axes, panel: Panel, runs: dict[str, Run]) -> None:
    lowest, highest = math.inf, -math.inf
    for label, curve, colour in panel.lines:
        line = thin(curve, POINTS)
        shade = f"C{colour % 10}"
        dashes = ("-", "--", ":", "-.")[colour // 10 % 4]
        marker = "o" if len(line.steps) < 30 else None
        drawn = axes.plot(line.steps, line.means, dashes, color=shade, lw=1.0, marker=marker, markersize=2.5)
        drawn[0].set_label(_label(label))
        if len(curve.steps) > len(line.steps):
            axes.fill_between(line.steps, line.lows, line.highs, color=shade, alpha=0.18, lw=0)
        lowest = min([lowest, *filter(math.isfinite, line.lows)])
        highest = max([highest, *filter(math.isfinite, line.highs)])
    if panel.title in LOGARITHMIC and 0 < lowest < highest / WIDE:
        axes.set_yscale("log")
    axes.set_title(_short(panel.title, 60), parse_math=False)
    axes.set_xlabel("step")
    axes.grid(alpha=0.25)
    axes.margins(x=0.01)
    _draw_marks(axes, runs)
    if len(panel.lines) > 1 or len(runs) > 1:
        legend = axes.legend(fontsize=6.5, ncols=1 if len(panel.lines) < 8 else 2)
        for text in legend.get_texts():
            text.set_parse_math(False)  # a $ in a name is a $


def _draw_marks(axes: Axes, runs: dict[str, Run]) -> None:
    """Resumes and stages as lines across, counters that rose as ticks below."""
    for number, run in enumerate(runs.values()):
        shade = f"C{number % 10}" if len(runs) > 1 else "0.35"
        for step in run.resumes[-MOST_MARKS:]:
            axes.axvline(step, color=shade, ls="--", lw=0.7, alpha=0.7)
        if len(runs) == 1:
            for step, name in run.log.stages[1 : 1 + MOST_MARKS]:
                axes.axvline(step, color="0.6", ls=":", lw=0.8)
                axes.text(step, 0.99, f" {_short(name, 20)}", transform=axes.get_xaxis_transform(), va="top",
                          fontsize=6, color="0.4", parse_math=False)  # fmt: skip
            skipped = [step for step, _ in run.log.marks.get("skipped_steps", [])][-MOST_MARKS:]
            spikes = [step for step, _ in run.log.marks.get("loss_spikes", [])][-MOST_MARKS:]
            for steps, colour in ((skipped, "C3"), (spikes, "C1")):
                if steps:
                    axes.plot(steps, [0.03] * len(steps), "|", color=colour, ms=8, mew=1.6,
                              transform=axes.get_xaxis_transform())  # fmt: skip


def _label(text: str) -> str:
    # matplotlib leaves labels that begin with _ out
    return _short(text.lstrip("_") or "figure", 40)


def _short(text: str, length: int) -> str:
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
    return text if len(text) <= length else "…" + text[1 - length :]


LEGEND = (
    "Dashed lines across: the run went on from a checkpoint. Dotted: a stage begins. Red ticks: skipped steps; orange: "
    "spikes of the loss. Bands: lowest and highest between two points."
)


def page(title: str, runs: dict[str, Run], sections: pages.Sections) -> str:
    """A self-contained HTML page: the picture, then ``sections``."""
    try:
        picture = f"{pages.svg(draw(runs))}<p class=legend>{escape(LEGEND)}</p>"
    except MplugError as error:
        picture = f"<p>{escape(error.message)}</p>"
    return pages.page(title, picture, sections)
