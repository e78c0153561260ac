"""``mplug eval``: a model's scores on a data set."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mplug_cli import completion, show
from mplug_cli.choices import check_choice
from mplug_cli.options import (
    MODELS,
    BatchSize,
    Device,
    Dtype,
    Images,
    Layout,
    Limit,
    Quiet,
    Split,
    Threads,
    model_path,
)
from mplug_cli.streams import is_terminal, json_line, write_line
from mplug_cli.vqa import read_answers
from mplug_core.allocator import keep_freed_memory
from mplug_core.cpu import asked_threads, settle_threads
from mplug_core.device import asked_dtype, check_device, check_dtype, choose_device
from mplug_core.errors import SOME_INPUTS_FAILED, DataError, MplugError, UsageError, shown_address
from mplug_core.json_text import to_json
from mplug_core.limits import MOST_BEAMS
from mplug_core.outputs import Output, output_file
from mplug_core.recipe import nearest

if TYPE_CHECKING:
    from mplug_core.tasks.stored import Comparison
    from mplug_core.tasks.task import Result

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
PREDICTED = {"caption", "answer", "rank", "box", "label"}
"""Fields that predictions have, one of them each."""
SCORED = {"truth", "confidence", "score", "rank"}
"""Fields that predictions have and records don't, one at least."""
RESULTS = re.compile(r'\[\]|\[\{"(image_id|question_id)": [^,]*, "(caption|answer)": |[^\n,]*,(True|False)\n')
"""How files that ``--results`` wrote begin."""
RERANKS = ("itm", "itm+itc")
NEEDS_MODEL = ("nearest",)
"""Baselines that are made with the model's features."""
NO_MODEL = "none"
"""What ``--model`` is called where only a baseline is scored."""

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
    data: str
    split: str | None
    train_split: str | None
    train_layout: str | None
    train_images: str | None
    model: str | None
    answers_from: Path | None
    against: Path | None
    images: str | None

    @property
    def computes(self) -> bool:
        """Whether a model answers: not where answers are read from a file, nor with ``--model none``."""
        return self.answers_from is None and self.model != NO_MODEL


def evaluate(
    data: Annotated[
        str,
        typer.Option("--data", metavar="PATH", help="A file or folder of records; - is standard input."),
    ],
    task: Annotated[
        list[str] | None,
        typer.Option(
            "--task",
            help=f"One of {', '.join(OPTIONS)}; again for several. Default: caption.",
            autocompletion=completion.one_of(OPTIONS),
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="MODEL",
            help=f"{MODELS}; none scores the baseline alone. Default: $MPLUG_MODEL, else the embedded model.",
            autocompletion=completion.models_or_none,
        ),
    ] = None,
    split: Split = None,
    layout: Layout = None,
    images: Images = None,
    limit: Limit = None,
    beam: Annotated[
        int | None,
        typer.Option("--beam", min=1, max=MOST_BEAMS, help="Beams, for caption and vqa; 1 is greedy."),
    ] = None,
    answers: Annotated[
        Path | None,
        typer.Option("--answers", metavar="FILE", help="For vqa: choose from these, one a line, instead of writing."),
    ] = None,
    candidates: Annotated[
        int | None, typer.Option("--candidates", min=0, help="For retrieval: how many are re-ranked by matching.")
    ] = None,
    rerank: Annotated[
        str | None,
        typer.Option(
            "--rerank",
            help=f"For retrieval: what re-ranks, {' or '.join(RERANKS)}.",
            autocompletion=completion.one_of(RERANKS),
        ),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            "--baseline",
            help=f"Also score what a model has to beat: {_BASELINE_NAMES}.",
            autocompletion=completion.one_of(dict.fromkeys(name for names in BASELINES.values() for name in names)),
        ),
    ] = None,
    train: Annotated[
        str | None, typer.Option("--train", metavar="PATH", help="Records that the baseline repeats.")
    ] = None,
    train_split: Annotated[str | None, typer.Option("--train-split", help="Their part.")] = None,
    train_layout: Annotated[
        str | None,
        typer.Option(
            "--train-format", help="Their layout. Default: that of --format.", autocompletion=completion.formats
        ),
    ] = None,
    train_images: Annotated[
        str | None,
        typer.Option("--train-images", metavar="DIR", help="Folder of their images. Default: that of --images."),
    ] = None,
    predictions: Annotated[
        Path | None,
        typer.Option(
            "--predictions", metavar="FILE", help="Write what was predicted, with the truth beside it, as JSON Lines."
        ),
    ] = None,
    answers_from: Annotated[
        Path | None,
        typer.Option(
            "--answers-from",
            metavar="FILE",
            help="Score the predictions in a file that --predictions wrote: without a model, without images.",
        ),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(
            "--against",
            metavar="FILE",
            help="Another model's --predictions on the same records: by how much this one is better, record by record.",
        ),
    ] = None,
    results: Annotated[
        Path | None,
        typer.Option(
            "--results", metavar="FILE", help="Write what evaluation servers take: COCO and VQA JSON, NLVR2 lines."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON object a task instead of a table.")] = False,
    device: Device = None,
    dtype: Dtype = None,
    threads: Threads = None,
    batch_size: BatchSize = 32,
    quiet: Quiet = False,
) -> None:
    """Score a model on records of one or more tasks, and say how many records could not be used.

    Beside each metric stands its 95 % interval, by a bootstrap over images.
    """
    tasks = tuple(dict.fromkeys(task or ["caption"]))
    asked = _Asked(
        tasks, layout, beam, candidates, rerank, answers, baseline, train, predictions, results, data, split,
        train_split, train_layout, train_images, model, answers_from, against, images,
    )  # fmt: skip
    _check(asked)
    check_device(device)
    check_dtype(dtype)
    asked_threads(threads)
    asked_dtype()
    listed = None if answers is None else tuple(read_answers(answers))

    # before anything is computed: nothing is worse than an hour's predictions with nowhere to go
    inputs = _inputs(asked)
    with (
        output_file(predictions, "--predictions", inputs | {"--results": results}, _holds_predictions) as out,
        output_file(results, "--results", inputs, _holds_results) as submitted,
    ):
        options = {"limit": limit, "batch_size": batch_size}
        empty, unsound = _evaluate_all(
            asked, images, options, listed, out, submitted, as_json, device, dtype, threads, quiet
        )
    if unsound:  # the notes say how many
        raise typer.Exit(SOME_INPUTS_FAILED)
    if empty:
        raise DataError(f"nothing in {data} could be evaluated", "its images are missing or damaged")


def _evaluate_all(
    asked: _Asked,
    images: str | None,
    plain: dict[str, Any],
    listed: tuple[str, ...] | None,
    out: Output | None,
    submitted: Output | None,
    as_json: bool,
    device: str | None,
    dtype: str | None,
    threads: int | None,
    quiet: bool,
) -> tuple[bool, bool]:
    """Evaluate every task and write what is found; whether there was one of which no record could be used, and whether
    some answer was not a number."""
    import torch

    from mplug_core.recipe import DataSpec
    from mplug_core.tasks.baselines import baseline
    from mplug_core.tasks.registry import evaluated_task
    from mplug_core.tasks.stored import compare, match_both, read_predictions, read_unopened, stored_result
    from mplug_core.tasks.task import EvaluateOptions
    from mplug_core.weights.folder import load_model

    spec = DataSpec(path=asked.data, split=asked.split, format=asked.layout, images=images)
    others = {}
    for name in asked.tasks if asked.against else ():
        # what can't be compared is said before the work
        others[name] = read_predictions(asked.against, name)
        if name != "retrieval":  # which may have been without the images that are missing
            match_both(name, read_unopened(name, spec).records[: plain["limit"]], others[name], asked.against)
    where = choose_device(device)
    settle_threads(threads)
    if where == "cpu":
        keep_freed_memory()
    loaded = None
    if asked.computes:
        with show.downloads(quiet):
            loaded = load_model(asked.model, where, getattr(torch, dtype) if dtype else None)
    repeated = None
    if asked.train:
        # the same data set's other part, as a rule
        like = {"format": asked.train_layout or asked.layout, "images": asked.train_images or images}
        repeated = DataSpec(path=asked.train, split=asked.train_split, **like)
    empty = unsound = False
    for name in asked.tasks:
        chosen = evaluated_task(name)
        options = EvaluateOptions(**plain, **_options(chosen, asked, listed))
        result = found = None
        try:
            with show.evaluations(name, quiet):
                if asked.answers_from is not None:
                    result = stored_result(name, spec, asked.answers_from, options)
                elif loaded is not None:
                    result = chosen.evaluate(loaded, spec, options)
                if asked.baseline:
                    answered = result.records if result is not None else None
                    found = baseline(asked.baseline, name, repeated, spec, options, loaded, answered)
        except torch.cuda.OutOfMemoryError as error:
            batch = plain["batch_size"]
            raise MplugError("the GPU's memory does not suffice", f"--batch-size is {batch}", "memory") from error
        if result is None:
            assert found is not None
            result = replace(found, task=name)
        compared = compare(name, result, others[name], asked.against) if asked.against else None
        if lost := result.skipped - result.not_finite:
            records = "1 record" if lost == 1 else f"{lost} records"
            reason = "image missing or damaged, or entry broken" if loaded else "entry broken, or without an answer"
            show.note(f"{records} could not be used: {reason}", quiet)
        for note in result.notes + (compared.notes if compared else []):
            show.note(note, quiet)
        if out is not None:
            label = {"task": name} if len(asked.tasks) > 1 else {}
            out.writelines(json_line(label | prediction) + "\n" for prediction in result.predictions)
        if as_json:
            write_line(json_line(_as_object(result, loaded.name if loaded else None, asked, found, compared)))
        else:
            _table(result, asked, found, compared)
        if submitted is not None:
            _submit(chosen, result, submitted)
        empty, unsound = empty or result.n == 0, unsound or result.not_finite > 0
    return empty, unsound


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
        for layout in (asked.layout, asked.train_layout):
            if layout is not None and layout not in known:
                raise UsageError(
                    f"no format {layout!r} of {name}{nearest(layout, known)}", f"formats: {', '.join(known)}"
                )
    if len(asked.tasks) > 1 and (asked.baseline or asked.results):
        flag = "--baseline" if asked.baseline else "--results"
        raise UsageError(f"{flag} is for one task, and these are {len(asked.tasks)}", "evaluate one at a time")
    (first, *_) = asked.tasks
    if asked.results is not None and first not in SUBMITTED:
        raise UsageError(f"no server takes results of {first}", f"--results is for {', '.join(SUBMITTED)}")
    _check_baseline(asked.baseline, first, asked.train)
    given = {
        "--train-split": asked.train_split, "--train-format": asked.train_layout, "--train-images": asked.train_images
    }  # fmt: skip
    for flag, value in given.items():
        if value is not None and not asked.train:
            raise UsageError(f"{flag} is for --train", "name the records that the baseline repeats")
    _check_without_model(asked)


def _check_without_model(asked: _Asked) -> None:
    """UsageError where no model answers, and an option is for one."""
    if asked.computes:
        return
    flag = f"--model {NO_MODEL}" if asked.answers_from is None else "--answers-from"
    given = {
        "--model": asked.model if asked.answers_from is not None else None,
        "--beam": asked.beam,
        "--answers": asked.answers,
        "--candidates": asked.candidates,
        "--rerank": asked.rerank,
    }
    for other, value in given.items():
        if value is not None:
            raise UsageError(f"{other} is for a model that answers, and {flag} asks none", "leave one of the two out")
    if asked.baseline in NEEDS_MODEL:
        raise UsageError(f"--baseline {asked.baseline} needs a model, and {flag} asks none", "name a model instead")
    if asked.answers_from is None and asked.baseline is None:
        raise UsageError(f"{flag} leaves nothing to score", f"--baseline: {_BASELINE_NAMES}")


def _inputs(asked: _Asked) -> dict[str, str | Path | None]:
    """The files and folders that are read, by their options; the folder of a file of records has images, too."""
    inputs: dict[str, str | Path | None] = {
        "--answers": asked.answers, "--answers-from": asked.answers_from, "--against": asked.against,
        "--images": asked.images, "--train-images": asked.train_images, "--model": model_path(asked.model),
    }  # fmt: skip
    if asked.predictions is None and asked.results is None:
        return inputs
    for flag, path, split in (("--data", asked.data, asked.split), ("--train", asked.train, asked.train_split)):
        layout = asked.train_layout or asked.layout if flag == "--train" else asked.layout
        for number, file in enumerate(_sources(asked, path, split, layout) if path else ()):
            inputs[flag if not number else f"{flag}: {file}"] = file
        if path and os.path.isfile(path):
            inputs[f"the folder of {flag}"] = Path(os.path.realpath(path)).parent
    return inputs


def _holds_predictions(file: Path) -> bool:
    """Whether a file holds predictions of before, or a JSON Lines file no JSON; records and images are something
    else."""
    with open(file, encoding="utf-8", errors="replace") as lines:
        try:
            first = json.loads(lines.readline(1 << 20))
        except (ValueError, RecursionError):
            return file.suffix == ".jsonl"
    return isinstance(first, dict) and not PREDICTED.isdisjoint(first) and not SCORED.isdisjoint(first)


def _holds_results(file: Path) -> bool:
    """Whether a file holds what ``--results`` wrote before, or a JSON file no JSON."""
    with open(file, encoding="utf-8", errors="replace") as stream:
        text = stream.read(1000)
    other = file.suffix in (".json", ".jsonl") and not text.lstrip().startswith(("[", "{"))
    return other or RESULTS.match(text) is not None


def _sources(asked: _Asked, path: str, split: str | None, layout: str | None) -> list[Path]:
    """The files that records are read from, as far as they can be found; what is wrong with others is said later."""
    from mplug_core.data.records.finding import find
    from mplug_core.data.records.reading import selection
    from mplug_core.data.records.types import KINDS

    found = [Path(path)]
    for task in ("statements", "entailment") if asked.tasks == ("reasoning",) else asked.tasks:
        with contextlib.suppress(MplugError, OSError, KeyError):
            found.append(find(KINDS[task], Path(path), selection(split)[0], layout).file.path)
            found.append(found[-1].parent / "scenes.jsonl")
    return found


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


def _submit(task: Any, result: Result, stream: Any) -> None:
    """What an evaluation server takes: a JSON list, or lines of text."""
    rows = list(task.submission(result.predictions))
    if rows and isinstance(rows[0], str):
        stream.writelines(row + "\n" for row in rows)
    else:
        stream.write(to_json(rows))


def _as_object(
    result: Result, model: str | None, asked: _Asked, baseline: Result | None, compared: Comparison | None
) -> dict[str, Any]:
    """The result for programs."""
    values = {
        "task": result.task,
        "model": model and shown_address(model),
        "data": asked.data and shown_address(asked.data),
        "split": asked.split,
        "n": result.n,
        "skipped": result.skipped,
        "seconds_per_example": round(result.seconds / max(result.n, 1), 5),
        "metrics": result.metrics,
        "interval": result.intervals(),
    }
    if asked.answers_from is not None:
        values["answers_from"] = str(asked.answers_from)
    if result.notes:
        values["notes"] = result.notes
    if baseline is not None:
        values["baseline"] = {
            "name": baseline.task, "metrics": baseline.metrics, "interval": baseline.intervals()
        }  # fmt: skip
    if compared is not None:
        values["against"] = {
            "file": str(asked.against), "n": compared.n, "metrics": compared.metrics, "difference": compared.difference
        }  # fmt: skip
        if compared.notes:
            values["against"]["notes"] = compared.notes
    return values


def _table(result: Result, asked: _Asked, baseline: Result | None, compared: Comparison | None) -> None:
    """The result for people: a table on a terminal, aligned plain columns elsewhere."""
    per_example = f"{1000 * result.seconds / max(result.n, 1):.1f} ms"
    facts = [("examples", str(result.n)), ("skipped", str(result.skipped)), ("time an example", per_example)]
    own = "answers" if asked.answers_from else "model" if asked.computes else str(asked.baseline)
    columns: list[tuple[str, dict[str, str]]] = [*_scored(own, result.metrics, result.intervals())]
    if baseline is not None and own != baseline.task:
        columns += _scored(baseline.task, baseline.metrics, baseline.intervals())
    if compared is not None:
        name = asked.against.name if asked.against else ""
        difference = {metric: value for metric, (value, *_) in compared.difference.items()}
        between = {metric: (low, high) for metric, (_, low, high) in compared.difference.items()}
        columns += [_scored(name, compared.metrics, {})[0], *_scored("difference", difference, between, sign="+")]
    head = [result.task, *(name for name, _ in columns)]
    scores = [[metric, *(cells.get(metric, "") for _, cells in columns)] for metric in result.metrics]
    if is_terminal(sys.stdout):
        from rich.console import Console

        table = show.table(head)
        for row in scores:
            table.add_row(*show.cells(row))
        table.add_section()
        for fact in facts:
            table.add_row(*fact)
        Console().print(table)
        return
    width = max(16, *(len(row[0]) for row in scores)) if scores else 16
    for line in [head, *scores, *facts]:
        write_line((f"{line[0]:<{width}}  " + "  ".join(f"{cell:<16}" for cell in line[1:])).rstrip())


def _scored(
    name: str, metrics: Mapping[str, float], intervals: Mapping[str, tuple[float, float]], sign: str = ""
) -> list[tuple[str, dict[str, str]]]:
    """Two columns, each with a name and its cells by metric: values, and their intervals."""
    shown = {metric: f"{value:{sign}.4f}" for metric, value in metrics.items()}
    return [
        (name, shown),
        ("95 %", {metric: f"{low:{sign}.4f}..{high:{sign}.4f}" for metric, (low, high) in intervals.items()}),
    ]
