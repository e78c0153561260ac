"""``mplug eval``: a model's scores on a data set."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mplug_cli import show
from mplug_cli.choices import check_choice
from mplug_cli.options import Device, Threads
from mplug_cli.streams import json_line, write_line
from mplug_cli.vqa import read_answers
from mplug_core.allocator import keep_freed_memory
from mplug_core.cpu import asked_threads, settle_threads
from mplug_core.device import asked_dtype, check_device, choose_device
from mplug_core.errors import DataError, MplugError, UsageError
from mplug_core.recipe import nearest

if TYPE_CHECKING:
    from mplug_core.recipe import DataSpec
    from mplug_core.tasks.task import EvaluateOptions, Result
    from mplug_core.weights.folder import Loaded

# What mplug_core.tasks would say, which can't be asked without torch; a test compares them.
OPTIONS: dict[str, tuple[str, ...]] = {
    "caption": ("decoding",),
    "vqa": ("decoding", "answers"),
    "retrieval": ("candidates", "rerank"),
    "grounding": ("draws",),
    "statements": (),
    "entailment": (),
    "reasoning": (),
}
"""The tasks, and of each the further options of its evaluation."""
BASELINES = {
    "caption": ("nearest",),
    "vqa": ("majority", "prior"),
    "retrieval": ("random",),
    "grounding": ("constant_box",),
    "statements": ("majority",),
    "entailment": ("majority",),
}
SUBMITTED = ("caption", "vqa", "statements")
"""Tasks whose predictions a public evaluation server or program takes."""
RERANKS = ("itm", "itm+itc")

_BASELINE_NAMES = ", ".join(
    f"{name} ({', '.join(task for task, names in BASELINES.items() if name in names)})"
    for name in dict.fromkeys(name for names in BASELINES.values() for name in names)
)


@dataclass(frozen=True)
class _Asked:
    """The command line, as far as it says what is evaluated."""

    tasks: tuple[str, ...]
    layout: str | None
    beam: int | None
    candidates: int | None
    rerank: str | None
    answers: Path | None
    baseline: str | None
    train: str | None
    predictions: Path | None
    results: Path | None


def evaluate(
    data: Annotated[str, typer.Option("--data", metavar="PATH", help="A file or folder of records (see mplug data).")],
    task: Annotated[
        list[str] | None,
        typer.Option("--task", help=f"One of {', '.join(OPTIONS)}; again for several. Default: caption."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", help="A model or run folder. Default: $MPLUG_MODEL, else the embedded model."),
    ] = None,
    split: Annotated[str | None, typer.Option("--split", help="Part of the data set: val, test, ...")] = None,
    layout: Annotated[
        str | None, typer.Option("--format", help="Layout of the data: coco, vqa, ... Default: what it looks like.")
    ] = None,
    images: Annotated[
        str | None, typer.Option("--images", metavar="DIR", help="Folder of the images, if not where the layout says.")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Only the first records.")] = None,
    beam: Annotated[int | None, typer.Option("--beam", min=1, help="Beams, for caption and vqa; 1 is greedy.")] = None,
    answers: Annotated[
        Path | None,
        typer.Option("--answers", metavar="FILE", help="For vqa: choose from these, one a line, instead of writing."),
    ] = None,
    candidates: Annotated[
        int | None, typer.Option("--candidates", min=0, help="For retrieval: how many are re-ranked by matching.")
    ] = None,
    rerank: Annotated[
        str | None, typer.Option("--rerank", help=f"For retrieval: what re-ranks, {' or '.join(RERANKS)}.")
    ] = None,
    baseline: Annotated[
        str | None, typer.Option("--baseline", help=f"Also score what a model has to beat: {_BASELINE_NAMES}.")
    ] = None,
    train: Annotated[
        str | None, typer.Option("--train", metavar="PATH", help="Records that the baseline repeats.")
    ] = None,
    train_split: Annotated[str | None, typer.Option("--train-split", help="Their part.")] = None,
    predictions: Annotated[
        Path | None, typer.Option("--predictions", metavar="FILE", help="Write what was predicted, as JSON Lines.")
    ] = None,
    results: Annotated[
        Path | None,
        typer.Option(
            "--results", metavar="FILE", help="Write what evaluation servers take: COCO and VQA JSON, NLVR2 lines."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON object a task instead of a table.")] = False,
    device: Device = None,
    threads: Threads = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, max=1024, help="Images computed at once.")] = 32,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No notes on stderr.")] = False,
) -> None:
    """Score a model on records of one or more tasks, and say how many records could not be used."""
    tasks = tuple(dict.fromkeys(task or ["caption"]))
    asked = _Asked(tasks, layout, beam, candidates, rerank, answers, baseline, train, predictions, results)
    _check(asked)
    check_device(device)
    asked_threads(threads)
    asked_dtype()
    listed = None if answers is None else tuple(read_answers(answers))

    import torch

    from mplug_core.recipe import DataSpec
    from mplug_core.tasks.registry import evaluated_task
    from mplug_core.tasks.task import EvaluateOptions
    from mplug_core.weights.folder import load_model

    # before anything is computed: nothing is worse than an hour's predictions with nowhere to go
    out, submitted = _open(predictions, "--predictions"), _open(results, "--results")
    where = choose_device(device)
    settle_threads(threads)
    if where == "cpu":
        keep_freed_memory()
    with show.downloads(quiet):
        loaded = load_model(model, where)
    spec = DataSpec(path=data, split=split, format=layout, images=images)
    repeated = DataSpec(path=train, split=train_split) if train else None
    empty = False
    for name in tasks:
        chosen = evaluated_task(name)
        options = EvaluateOptions(limit=limit, batch_size=batch_size, **_options(chosen, asked, listed))
        try:
            result = chosen.evaluate(loaded, spec, options)
            found = _baseline(baseline, name, repeated, spec, options, loaded) if baseline else None
        except torch.cuda.OutOfMemoryError as error:
            raise MplugError("the GPU's memory does not suffice", f"--batch-size is {batch_size}", "memory") from error
        if result.skipped:
            records = "1 record" if result.skipped == 1 else f"{result.skipped} records"
            show.note(f"{records} could not be used: image missing or damaged, or entry broken", quiet)
        for note in result.notes:
            show.note(note, quiet)
        if out is not None:
            label = {"task": name} if len(tasks) > 1 else {}
            out.writelines(json_line(label | prediction) + "\n" for prediction in result.predictions)
        if as_json:
            write_line(json.dumps(_as_object(result, loaded.name, data, split, found)))
        else:
            _table(result, found)
        if submitted is not None:
            _submit(chosen, result, submitted)
        empty = empty or result.n == 0
    for stream in (out, submitted):
        if stream is not None:
            stream.close()
    if empty:
        raise DataError(f"nothing in {data} could be evaluated", "its images are missing or damaged")


def _check(asked: _Asked) -> None:
    """UsageError where options are wrong or don't go together."""
    from mplug_core.data.records import FORMATS

    for name in asked.tasks:
        check_choice("task", name, OPTIONS)
    if asked.rerank is not None and asked.rerank not in RERANKS:
        raise UsageError(f"no rerank {asked.rerank!r}{nearest(asked.rerank, RERANKS)}", f"one of {', '.join(RERANKS)}")
    given = {
        "--beam": ("decoding", asked.beam),
        "--answers": ("answers", asked.answers),
        "--candidates": ("candidates", asked.candidates),
        "--rerank": ("rerank", asked.rerank),
    }
    for flag, (option, value) in given.items():
        those = [name for name, options in OPTIONS.items() if option in options]
        if value is not None and not any(name in those for name in asked.tasks):
            raise UsageError(f"{flag} is for {' and '.join(those)}, not {', '.join(asked.tasks)}", "leave it out")
    if asked.beam is not None and asked.answers is not None:
        raise UsageError("--answers are ranked, so there is no --beam", "leave one of the two out")
    for name in asked.tasks:
        known = FORMATS.get(name) or tuple(dict.fromkeys(FORMATS["statements"] + FORMATS["entailment"]))
        if asked.layout is not None and asked.layout not in known:
            raise UsageError(
                f"no format {asked.layout!r} of {name}{nearest(asked.layout, known)}", f"formats: {', '.join(known)}"
            )
    if len(asked.tasks) > 1 and (asked.baseline or asked.results):
        flag = "--baseline" if asked.baseline else "--results"
        raise UsageError(f"{flag} is for one task, and these are {len(asked.tasks)}", "evaluate one at a time")
    (first, *_) = asked.tasks
    if asked.results is not None and first not in SUBMITTED:
        raise UsageError(f"no server takes results of {first}", f"--results is for {', '.join(SUBMITTED)}")
    _check_baseline(asked.baseline, first, asked.train)


def _check_baseline(baseline: str | None, task: str, train: str | None) -> None:
    known = BASELINES.get(task, ())
    if baseline and baseline not in known:
        raise UsageError(f"{task} has no baseline {baseline!r}{nearest(baseline, known)}", f"all: {_BASELINE_NAMES}")
    if baseline and baseline != "random" and not train:
        raise UsageError(f"--baseline {baseline} needs the records that it repeats", "--train PATH")
    if train and (not baseline or baseline == "random"):
        raise UsageError("--train is for a baseline that repeats records", f"--baseline: {_BASELINE_NAMES}")


def _options(task: Any, asked: _Asked, answers: tuple[str, ...] | None) -> dict[str, Any]:
    """Of the options that are given, those that a task has."""
    options: dict[str, Any] = {"candidates": asked.candidates, "rerank": asked.rerank, "answers": answers}
    if asked.beam is not None and "decoding" in task.options:
        greedy = "greedy" if asked.beam == 1 else "beam"
        options["decoding"] = task.decoding.model_copy(update={"beams": asked.beam, "strategy": greedy})
    return {name: value for name, value in options.items() if value is not None and name in task.options}


def _open(file: Path | None, flag: str) -> Any:
    if file is None:
        return None
    try:
        return open(file, "w", encoding="utf-8")
    except OSError as error:
        raise MplugError(f"{file} can't be written: {error.strerror}", f"{flag} names a file") from error


def _submit(task: Any, result: Result, stream: Any) -> None:
    """What an evaluation server takes: a JSON list, or lines of text."""
    rows = list(task.submission(result.predictions))
    if rows and isinstance(rows[0], str):
        stream.writelines(row + "\n" for row in rows)
    else:
        json.dump(rows, stream)


def _baseline(
    name: str, task: str, train: DataSpec | None, spec: DataSpec, options: EvaluateOptions, loaded: Loaded
) -> Result:
    from mplug_core.tasks.baselines import baseline

    return baseline(name, task, train, spec, options, loaded)


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
    if result.notes:
        values["notes"] = result.notes
    return values | ({"baseline": {"name": baseline.task, "metrics": baseline.metrics}} if baseline else {})


def _table(result: Result, baseline: Result | None) -> None:
    """The result for people: a table on a terminal, aligned plain columns elsewhere."""
    per_example = f"{1000 * result.seconds / max(result.n, 1):.1f} ms"
    facts = [("examples", str(result.n)), ("skipped", str(result.skipped)), ("time an example", per_example)]
    scores: list[Sequence[str]] = [
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
    width = max(16, *(len(row[0]) for row in scores)) if scores else 16
    for row in [head, *scores, *facts]:
        write_line(f"{row[0]:<{width}}  " + "  ".join(f"{cell:<16}" for cell in row[1:]).rstrip())
