"""What ``--dry-run`` prints: the resolved recipe, then what it trains and costs, and what is missing for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import typer

from mplug_cli import show
from mplug_cli.recipe import as_yaml
from mplug_cli.streams import json_line, write_line, write_text
from mplug_core.errors import UsageError

if TYPE_CHECKING:
    from mplug_core.recipe import Recipe
    from mplug_core.training.preflight import Preflight, SourceCheck, StageCost

DEVICES = ("a100", "h100", "cpu")


def show_check(
    recipe: Recipe, processes: int, devices: Sequence[str] | None, as_json: bool, quiet: bool = False
) -> None:
    """Print the recipe and its check; ends with the code of the first fault, if there is any.

    The check is printed as comments: what stands on stdout is a recipe that can be run.
    """
    names = [name.lower() for name in devices or DEVICES]
    if not as_json:
        # at once: the check takes seconds
        write_text(as_yaml(recipe))
    from mplug_core.training.flops import DEVICE_FLOPS
    from mplug_core.training.preflight import check_run, parts_of_check

    for name in names:
        if name != "cpu" and name not in DEVICE_FLOPS:
            raise UsageError(f"--device-name {name}: no such device", f"known: {', '.join([*DEVICE_FLOPS, 'cpu'])}")
    with show.progress("checking", parts_of_check(recipe), quiet, lines=False) as advance:
        found = check_run(recipe, processes, names, advance)
    if as_json:
        write_line(json_line(found.as_object()))
    else:
        for line in lines_of(found):
            write_line(f"# {line}".rstrip())
    for fault in found.faults[:1]:
        more = len(found.faults) - 1
        show.error(str(fault) + (f"; and {more} more, see the report" if more else ""))
    if found.faults:
        raise typer.Exit(found.exit_code)


def lines_of(found: Preflight) -> list[str]:
    """The report as text."""
    pieces = "not known" if found.vocabulary is None else f"{found.vocabulary} pieces"
    lines = ["", f"processes: {found.processes}, a device each; vocabulary: {pieces}", ""]
    for cost in found.stages:
        lines += _stage_lines(cost, found)
    if len(found.stages) > 1:
        lines += [f"all stages: {_counted(found.steps, 'steps')}{_hours(found.hours)}", ""]
    lines += ["data"]
    lines += [_source_line(check) for check in found.sources]
    lines += ["evaluation data", *(_source_line(check) for check in found.evaluations)] if found.evaluations else []
    disk = found.disk
    needed = (
        f"disk: {_size(disk['needed'])} needed in {disk['folder']} ({disk['kept']} + 1 checkpoints of "
        f"{_size(disk['checkpoint'])}, models of {_size(disk['model'])}, caches {_size(disk['caches'])}), "
        f"{_size(disk['free'])} free"
        if disk["needed"] is not None
        else f"disk: {_size(disk['free'])} free in {disk['folder']}; what is needed is not known"
    )
    lines += ["", needed]
    lines += [
        f"hours assume {speed['utilisation']:.0%} of {speed['peak_flops'] / 1e12:.3g} TFLOP/s in "
        f"{speed['precision']} on {name}"
        for name, speed in found.devices.items()
    ]
    lines += [f"note: {note}" for note in found.notes]
    lines += [f"fault: {fault}" for fault in found.faults]
    return lines


def _stage_lines(cost: StageCost, found: Preflight) -> list[str]:
    lines = [
        f"stage {cost.stage}: {_counted(cost.steps, 'steps')} of {cost.images_per_step} images{_hours(cost.hours)}"
    ]
    if cost.step_seconds:
        speeds = [f"{seconds:.3g} s on {name}" for name, seconds in cost.step_seconds.items()]
        lines.append(f"  a step takes {', '.join(speeds)}")
    for name, count in cost.parameters.items():
        if count["trained"] or count["frozen"]:
            parts = [f"{count[kind] / 1e6:.1f}M {kind}" for kind in ("trained", "frozen") if count[kind]]
            # a copy that follows the model
            shown = f"{count['frozen'] / 1e6:.1f}M" if name == "teacher" else ", ".join(parts)
            lines.append(f"  {name:8} {shown}")
    if not cost.parameters:
        return [*lines, "  the model's size is not known", ""]
    own = [count for name, count in cost.parameters.items() if name != "teacher"]
    lines.append(f"  {'in all':8} {sum(sum(count.values()) for count in own) / 1e6:.1f}M without the teacher")
    if cost.flops is not None:
        kinds = ", ".join(f"{kind} {value / 1e9:.2f}" for kind, value in cost.flops.by_kind.items())
        lines.append(f"  GFLOP an image: {cost.flops.per_image / 1e9:.2f} ({kinds})")
        alone = ", ".join(f"{name} {value / 1e9:.2f}" for name, value in cost.flops.alone.items())
        lines.append(f"  with one objective alone: {alone}")
    if cost.memory:
        lines += _memory_lines(cost.memory)
    return [*lines, ""]


def _memory_lines(rows: list[dict[str, Any]]) -> list[str]:
    columns = ("weights", "optimizer", "gradients", "teacher", "activations", "buffers", "total", "host")
    lines = ["  GB of a GPU, by ZeRO stage and images a device (* the recipe's; the total is of the peak)"]
    lines.append("  " + "stage images".ljust(14) + "".join(name.rjust(12) for name in columns))
    for row in rows:
        mark = "*" if row["recipe"] else " "
        figures = "".join(f"{row[name] / 1e9:12.2f}" for name in columns)
        lines.append(f"  {row['zero_stage']:5} {row['images']:6}{mark} {figures}")
    return lines


def _source_line(check: SourceCheck) -> str:
    parts = [f"{task} {_amounts(amounts)}" for task, amounts in check.found.items()]
    parts += [f"{check.images} images"] if check.images is not None else []
    parts += [text for text in (check.note, check.fault and f"FAULT: {check.fault}") if text]
    return f"  {check.name} ({check.path}): {'; '.join(parts)}"


def _amounts(amounts: dict[str, int]) -> str:
    bad = [f"{amounts[kind]} {kind}" for kind in ("missing", "broken") if amounts[kind]]
    return ", ".join([f"{amounts['records']} records", *bad])


def _counted(number: int | None, what: str) -> str:
    return f"{what} not known" if number is None else f"{number} {what}"


def _hours(hours: dict[str, float]) -> str:
    return "".join(f", {value:.3g} h on {name}" for name, value in hours.items())


def _size(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
