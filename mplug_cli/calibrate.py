"""``mplug calibrate``: make a model's confidences the probability of being right."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mplug_cli import completion, options, show
from mplug_cli.choices import check_choice
from mplug_cli.streams import json_line, write_line
from mplug_cli.vqa import read_answers
from mplug_core.allocator import keep_freed_memory
from mplug_core.cpu import asked_threads, settle_threads
from mplug_core.device import asked_dtype, check_device, choose_device
from mplug_core.errors import MplugError, UsageError

TASKS = ("vqa", "grounding", "statements", "entailment")
"""The tasks that answer with a confidence that is right or wrong; captions are neither."""
FEW = 200
"""Fewer answers than these leave a calibration uncertain."""


def calibrate(
    data: Annotated[str, typer.Option("--data", metavar="PATH", help="Records that the model has not learned from.")],
    task: Annotated[list[str], typer.Option("--task", help=f"One of {', '.join(TASKS)}; again for several.",
                                              autocompletion=completion.one_of(TASKS))],
    target: Annotated[
        Path | None,
        typer.Argument(metavar="[FOLDER]", help="A calibrated copy of the model. Default: the model's own folder."),
    ] = None,
    model: options.Model = None,
    split: options.Split = None,
    layout: options.Layout = None,
    images: options.Images = None,
    limit: options.Limit = None,
    answers: Annotated[
        Path | None,
        typer.Option("--answers", metavar="FILE", help="For vqa: calibrate the choice from these, one a line."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", "-f", help="Replace the model folder FOLDER.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON object a task instead of a table.")] = False,
    device: options.Device = None,
    threads: options.Threads = None,
    batch_size: options.BatchSize = 32,
    quiet: options.Quiet = False,
) -> None:
    """Fit a temperature a task on records with known answers, and store it with the model.

    From then on "confidence" is the probability of being right; mplug eval reports how far from it (ece). Only
    config.json changes, or FOLDER becomes a copy; other tasks stay calibrated as they were. With --answers the shares
    among given choices are calibrated, without them the answers that the model writes.
    """
    tasks = tuple(dict.fromkeys(task))
    for name in tasks:
        check_choice("task", name, TASKS)
    if answers is not None and "vqa" not in tasks:
        raise UsageError(f"--answers is for vqa, not {', '.join(tasks)}", "leave it out")
    check_device(device)
    asked_threads(threads)
    asked_dtype()
    listed = None if answers is None else tuple(read_answers(answers))

    import torch

    from mplug_cli.runs import aligned
    from mplug_core.metrics.calibration import EXTREME
    from mplug_core.model.config import Calibration
    from mplug_core.recipe import DataSpec
    from mplug_core.tasks.registry import evaluated_task
    from mplug_core.tasks.task import EvaluateOptions
    from mplug_core.weights.calibration import check_calibrated, save_calibration
    from mplug_core.weights.folder import load_model

    where = choose_device(device)
    settle_threads(threads)
    if where == "cpu":
        keep_freed_memory()
    with show.downloads(quiet):
        folder = check_calibrated(model, target, force)  # before anything is computed
        loaded = load_model(model, where)
    loaded.model.config = loaded.config.model_copy(update={"calibration": {}})
    spec = DataSpec(path=data, split=split, format=layout, images=images)
    fitted: dict[str, Calibration] = {}
    objects: list[dict[str, Any]] = []
    rows: list[list[str]] = [["task", "answers", "temperature", "bias", "ece before", "after"]]
    for name in tasks:
        choices = listed if name == "vqa" else None
        try:
            with show.evaluations(name, quiet):
                result = evaluated_task(name).evaluate(
                    loaded, spec, EvaluateOptions(limit=limit, batch_size=batch_size, answers=choices)
                )
        except torch.cuda.OutOfMemoryError as error:
            raise MplugError("the GPU's memory does not suffice", f"--batch-size is {batch_size}", "memory") from error
        evidence = result.evidence
        found = fitted[evidence.kind] = evidence.calibration()
        before, after = evidence.error(), evidence.calibrated(found).error()
        count = len(evidence.right)
        if result.skipped:
            records = "1 record" if result.skipped == 1 else f"{result.skipped} records"
            show.note(f"{records} could not be used: image missing or damaged, or entry broken", quiet)
        if count < FEW:
            show.note(f"{name}: {count} answers leave a calibration uncertain", quiet)
        if found.temperature >= EXTREME:
            show.note(f"{name}: how sure the model is says nothing of what is right: confidences become equal", quiet)
        about = {"task": name, "kind": evidence.kind, "n": count, "skipped": result.skipped, **found.model_dump()}
        objects.append({**about, "ece": {"before": before, "after": after}, "folder": str(target or folder)})
        figures = [found.temperature, found.bias, before, after]
        rows.append([name, str(count), *(f"{value:.4f}" for value in figures)])
    place = save_calibration(folder, fitted, target)
    for line in map(json_line, objects) if as_json else aligned(rows):
        write_line(line)
    show.note(f"{place}: calibrated for {', '.join(tasks)}", quiet)
