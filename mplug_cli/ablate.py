"""``mplug ablate``: parts of the model against their alternatives, at equal width and depth."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mplug_cli import completion
from mplug_cli.bench_report import (
    AsJson,
    Markdown,
    Repeats,
    Size,
    Threads,
    check_size,
    markdown_file,
    measuring,
    show_report,
)
from mplug_cli.groups import Group
from mplug_cli.options import Device, Quiet
from mplug_core.errors import UsageError
from mplug_core.json_text import to_json
from mplug_core.outputs import output_file

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.figure import Figure

    from mplug_core.ablation.cost import Cost
    from mplug_core.ablation.quality import Experiment
    from mplug_core.ablation.variants import Variant
    from mplug_core.bench.measure import Report, Timing
    from mplug_core.training.history import Curve

RECIPE = "ablation/fusion"

ablate = typer.Typer(
    name="ablate", cls=Group, help="Compare parts of the model with their alternatives.", no_args_is_help=True
)


@ablate.callback()
def _group() -> None:
    """Compare parts of the model with their alternatives."""


@ablate.command()
def fusion(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY.PATH=VALUE]...", help="With --train: fields of the recipe to change."),
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option("--only", metavar="NAME", help="One of the networks. Repeatable; default: all.")
    ] = None,
    size: Size = "base",
    image_tokens: Annotated[
        int, typer.Option("--image-tokens", min=1, help="Of an image, where costs are measured.")
    ] = 577,
    text_tokens: Annotated[int, typer.Option("--text-tokens", min=1, help="Of a text, there.")] = 25,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Examples, there.")] = 1,
    train: Annotated[
        Path | None,
        typer.Option("--train", metavar="FOLDER", help="Also train every network alike; runs and figure are there."),
    ] = None,
    recipe: Annotated[
        str,
        typer.Option(
            "--recipe",
            metavar="NAME|FILE",
            help="With --train: its first stage is shared by all.",
            autocompletion=completion.recipes,
        ),
    ] = RECIPE,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="With --train: runs of each network.")] = 1,
    repeats: Repeats = 5,
    threads: Threads = None,
    device: Device = None,
    as_json: AsJson = False,
    markdown: Markdown = None,
    quiet: Quiet = False,
) -> None:
    """Co-attention, connected, asymmetric and skip-connected fusion: what they cost, and what they learn.

    Parameters, counted operations, time and memory at one shape. With --train each is trained by the recipe, what is
    there already is not trained again, and FOLDER gets fusion.json, fusion.md, fusion.png and fusion.html with quality
    after equal steps and after equal time.
    """
    check_size(size)
    if overrides and train is None:
        raise UsageError(f"{overrides[0]}: fields of a recipe are for --train", "name a folder for the runs")
    if train is None and (seeds != 1 or recipe != RECIPE):
        raise UsageError(f"{'--seeds' if seeds != 1 else '--recipe'} is for --train", "name a folder for the runs")

    from mplug_core.ablation.variants import chosen

    variants = chosen(only or None)
    if train is None:
        with markdown_file(markdown) as out:
            report, _ = _costs(variants, size, image_tokens, text_tokens, batch, repeats, device, threads)
            show_report(report, as_json, out)
        return

    from mplug_cli.watch import watching
    from mplug_core.ablation.quality import Experiment
    from mplug_core.recipe import load_recipe

    settings = load_recipe(recipe, overrides or [])
    experiment = Experiment(settings, train, tuple(range(settings.seed, settings.seed + seeds)))
    experiment.check_folder()
    with markdown_file(markdown, train=train) as out:
        with watching(quiet) as watch:
            experiment.train(variants, watch)
        costs, found = _costs(variants, size, image_tokens, text_tokens, batch, repeats, device, threads)
        curves = experiment.curves(variants)
        quality, steps = _quality(experiment, variants, curves, repeats, threads)
        text = costs.markdown() + "\n" + quality.markdown()
        _write_folder(experiment.folder, (costs, quality), text, _figure(experiment, variants, curves, steps, found))
        for report in (costs, quality):
            show_report(report, as_json, None)
        if out is not None:
            out.write(text)


def _costs(
    variants: Sequence[Variant], size: str, image_tokens: int, text_tokens: int, batch: int, repeats: int,
    device: str | None, threads: int | None,
) -> tuple[Report, dict[str, Cost]]:  # fmt: skip
    with measuring("fusion networks", None, device, threads) as (where, advance):
        from mplug_core.ablation.cost import Shape, costs
        from mplug_core.ablation.report import cost_report
        from mplug_core.bench.measure import Machine
        from mplug_core.model.config import MplugConfig

        config, shape = MplugConfig.named(size), Shape(batch, image_tokens, text_tokens)
        found = costs(variants, config, shape, repeats, where, advance)
        return cost_report(variants, config, shape, found, Machine.here(where)), found


def _quality(
    experiment: Experiment, variants: Sequence[Variant], curves: Mapping[str, Mapping[str, Sequence[Curve]]],
    repeats: int, threads: int | None,
) -> tuple[Report, dict[str, Timing]]:  # fmt: skip
    with measuring("training steps", None, "cpu", threads or experiment.recipe.engine.threads) as (_, advance):
        from mplug_core.ablation.report import quality_report
        from mplug_core.bench.measure import Machine

        steps = experiment.step_seconds(variants, repeats, advance)
        return quality_report(experiment, variants, curves, steps, Machine.here()), steps


def _figure(
    experiment: Experiment, variants: Sequence[Variant], curves: Mapping[str, Mapping[str, Sequence[Curve]]],
    steps: Mapping[str, Timing], costs: Mapping[str, Cost],
) -> Figure:  # fmt: skip
    from mplug_cli.fusion_figure import Line, draw
    from mplug_core.ablation.quality import equal_time
    from mplug_core.ablation.report import compared_metrics
    from mplug_core.ablation.variants import distinct

    metrics = compared_metrics(experiment.recipe)
    seconds = {name: timing.median for name, timing in steps.items()}
    lines = [
        Line(first.name, first.layout(experiment.config), seconds[first.name], costs[first.name].seconds.median,
             curves[first.name])
        for first in distinct(variants, experiment.config)
    ]  # fmt: skip
    return draw(lines, metrics, equal_time(curves, seconds, metrics[0]))


def _write_folder(folder: Path, reports: Sequence[Report], markdown: str, figure: Figure) -> None:
    """``fusion.json``, ``.md``, ``.png`` and ``.html`` in the experiment's folder."""
    from mplug_cli import pages

    sections: pages.Sections = [
        (report.title, [("", [list(report.columns), *map(list, report.rows)])]) for report in reports
    ]
    notes = [[note] for report in reports for note in (*report.notes, str(report.machine))]
    page = pages.page("Fusion networks", pages.svg(figure), [*sections, ("Notes", [("", [[""], *notes])])])
    objects = [json.loads(report.json()) for report in reports]
    _write(folder / "fusion.json", to_json(objects, indent=1) + "\n")
    _write(folder / "fusion.md", markdown)
    _write(folder / "fusion.png", pages.png(figure))
    _write(folder / "fusion.html", page)


def _write(file: Path, content: str | bytes) -> None:
    with output_file(file, "--train", {}) as out:
        out.write(content)
