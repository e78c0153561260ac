"""``mplug eval``: a model's scores on a data set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mplug_cli import show
from mplug_cli.device import check_device, choose_device
from mplug_cli.streams import json_line, write_line
from mplug_core.errors import DataError, MplugError, UsageError
from mplug_core.recipe import nearest

if TYPE_CHECKING:
    from mplug_core.recipe import DataSpec
    from mplug_core.tasks.task import EvaluateOptions, Result
    from mplug_core.weights.folder import Loaded

# The names of mplug_core.tasks.registry.EVALUATED, which can't be asked without torch.
TASKS = ("caption", "vqa", "retrieval", "grounding", "statements", "entailment")
BASELINES = ("nearest",)
FORMATS = ("jsonl", "json", "flickr8k", "coco")


def evaluate(
    data: Annotated[str, typer.Option("--data", metavar="PATH", help="A file or folder of records (see mplug data).")],
    task: Annotated[str, typer.Option("--task", help=f"One of {', '.join(TASKS)}.")] = "caption",
    model: Annotated[
        str | None, typer.Option("--model", help="A model folder. Default: $MPLUG_MODEL, else the embedded model.")
    ] = None,
    split: Annotated[str | None, typer.Option("--split", help="Part of the data set: val, test, ...")] = None,
    layout: Annotated[
        str | None, typer.Option("--format", help=f"One of {', '.join(FORMATS)}. Default: what the file looks like.")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Only the first records.")] = None,
    beam: Annotated[int | None, typer.Option("--beam", min=1, help="Beams, for caption and vqa; 1 is greedy.")] = None,
    candidates: Annotated[
        int | None, typer.Option("--candidates", min=0, help="For retrieval: how many are re-ranked by matching.")
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option("--baseline", help="For caption: nearest, the caption of the nearest photo of --train."),
    ] = None,
    train: Annotated[
        str | None, typer.Option("--train", metavar="PATH", help="Captions that the baseline repeats.")
    ] = None,
    train_split: Annotated[str | None, typer.Option("--train-split", help="Its part.")] = None,
    predictions: Annotated[
        Path | None, typer.Option("--predictions", metavar="FILE", help="Write what was predicted, as JSON Lines.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of a table.")] = False,
    device: Annotated[
        str | None, typer.Option("--device", help="cpu, cuda, cuda:N or mps. Default: CUDA where there is any.")
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, max=1024, help="Images computed at once.")] = 32,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No notes on stderr.")] = False,
) -> None:
    """Score a model on records of a task, and how many records could not be used."""
    _check(task, layout, beam, candidates, baseline, train)
    check_device(device)

    import torch

    from mplug_core.recipe import DataSpec
    from mplug_core.tasks.registry import evaluated_task
    from mplug_core.tasks.task import EvaluateOptions
    from mplug_core.weights.folder import load_model

    # before anything is computed: nothing is worse than an hour's predictions with nowhere to go
    out = _open(predictions)
    loaded = load_model(model, choose_device(device))
    spec = DataSpec(path=data, split=split, format=layout)
    options: dict[str, Any] = {"limit": limit, "batch_size": batch_size}
    chosen = evaluated_task(task)
    if beam is not None:
        options["decoding"] = chosen.decoding.model_copy(
            update={"beams": beam, "strategy": "greedy" if beam == 1 else "beam"}
        )
    if candidates is not None:
        options["candidates"] = candidates
    try:
        result = chosen.evaluate(loaded, spec, EvaluateOptions(**options))
        found = _baseline(loaded, spec, train, train_split, EvaluateOptions(**options)) if baseline else None
    except torch.cuda.OutOfMemoryError as error:
        raise MplugError("the GPU's memory does not suffice", f"--batch-size is {batch_size}", "memory") from error
    if result.skipped:
        show.note(f"{result.skipped} records could not be used: image missing or damaged, or entry broken", quiet)
    if out is not None:
        with out:
            out.writelines(json_line(prediction) + "\n" for prediction in result.predictions)
    if as_json:
        write_line(json.dumps(_as_object(result, loaded.name, data, split, found)))
    else:
        _table(result, found)
    if result.n == 0:
        raise DataError(f"nothing in {data} could be evaluated", "its images are missing or damaged")


def _check(
    task: str, layout: str | None, beam: int | None, candidates: int | None, baseline: str | None, train: str | None
) -> None:
    """UsageError where options are wrong or don't go together."""
    for what, value, choices in (("task", task, TASKS), ("format", layout, FORMATS), ("baseline", baseline, BASELINES)):
        if value is not None and value not in choices:
            raise UsageError(f"no {what} {value!r}{nearest(value, choices)}", f"{what}s: {', '.join(choices)}")
    if beam is not None and task not in ("caption", "vqa"):
        raise UsageError(f"--beam is for caption and vqa, not {task}", "leave it out")
    if candidates is not None and task != "retrieval":
        raise UsageError(f"--candidates is for retrieval, not {task}", "leave it out")
    if layout is not None and task not in ("caption", "retrieval"):
        raise UsageError(f"--format is for captions, and {task} has JSON Lines only", "leave it out")
    if baseline and task != "caption":
        raise UsageError(f"--baseline {baseline} is for caption, not {task}", "leave it out")
    if baseline and not train:
        raise UsageError("--baseline nearest needs the captions that it repeats", "--train PATH")
    if train and not baseline:
        raise UsageError("--train is for a baseline", "--baseline nearest")


def _open(file: Path | None) -> Any:
    if file is None:
        return None
    try:
        return open(file, "w", encoding="utf-8")
    except OSError as error:
        raise MplugError(f"{file} can't be written: {error.strerror}", "--predictions names a file") from error


def _baseline(
    loaded: Loaded, spec: DataSpec, train: str | None, train_split: str | None, options: EvaluateOptions
) -> Result:
    from mplug_core.recipe import DataSpec
    from mplug_core.tasks.nearest import nearest_captions

    assert train is not None
    return nearest_captions(loaded, DataSpec(path=train, split=train_split), spec, options)


def _as_object(result: Result, model: str, data: str, split: str | None, baseline: Result | None) -> dict[str, Any]:
    """The result for programs."""
    values = {
        "task": result.task,
        "model": model,
        "data": data,
        "split": split,
        "n": result.n,
        "skipped": result.skipped,
        "seconds_per_example": round(result.seconds / max(result.n, 1), 5),
        "metrics": result.metrics,
    }
    return values | ({"baseline": {"name": baseline.task, "metrics": baseline.metrics}} if baseline else {})


def _table(result: Result, baseline: Result | None) -> None:
    """The result for people: a table on a terminal, aligned plain columns elsewhere."""
    import sys

    per_example = f"{1000 * result.seconds / max(result.n, 1):.1f} ms"
    facts = [("examples", str(result.n)), ("skipped", str(result.skipped)), ("time an example", per_example)]
    scores = [
        (name, f"{value:.4f}", *([f"{baseline.metrics[name]:.4f}"] if baseline and name in baseline.metrics else []))
        for name, value in result.metrics.items()
    ]
    head = (result.task, "model", *([baseline.task] if baseline else []))
    if sys.stdout is not None and sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        table = Table(*head)
        for row in scores:
            table.add_row(*row)
        table.add_section()
        for row in facts:
            table.add_row(*row)
        Console().print(table)
        return
    for row in [head, *scores, *facts]:
        write_line("  ".join(f"{cell:<16}" for cell in row).rstrip())
