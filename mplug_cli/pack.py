"""``mplug data pack``: a data set to tar shards that training streams."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from mplug_cli import completion, show
from mplug_cli.choices import check_choice
from mplug_cli.options import OnlyErrors
from mplug_cli.streams import json_line, write_line
from mplug_core.errors import UsageError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


def size_in_bytes(text: str) -> int:
    """``256MB``, ``1.5G``, ``64MiB`` or bytes; UsageError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]I?|)B?\s*", text.upper())
    if match is None or float(match[1]) <= 0:
        raise UsageError(f"--shard-size: {text!r} is no size", "for example 256MB")
    return max(1, int(float(match[1]) * _UNITS[match[2]]))


def pack_data(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="A data set: file or folder, list of URLs, img2dataset's output.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of the pack.")],
    split: Annotated[str | None, typer.Option("--split", help="Part of the data set.")] = None,
    layout: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="A reader's format, tsv, urls or img2dataset. Default: what SRC looks like.",
            autocompletion=completion.formats,
        ),
    ] = None,
    images: Annotated[
        str | None, typer.Option("--images", metavar="DIR", help="The folder that image names are relative to.")
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            "--task",
            help="caption, vqa, ... (again for more). Default: all of SRC.",
            autocompletion=completion.tasks,
        ),
    ] = None,
    text_only: Annotated[bool, typer.Option("--text-only", help="Captions alone; no images.")] = False,
    shard_size: Annotated[str, typer.Option("--shard-size", metavar="SIZE", help="Bytes of a shard.")] = "256MB",
    max_samples: Annotated[int | None, typer.Option("--max-samples", min=1, help="Stop after so many.")] = None,
    workers: Annotated[
        int, typer.Option("--workers", min=1, max=512, help="Threads that read, download and check images.")
    ] = 8,
    max_bad: Annotated[
        float, typer.Option("--max-bad", min=0, max=1, help="Share of bad entries that may be left out.")
    ] = 0.01,
    timeout: Annotated[float, typer.Option("--timeout", min=0.1, help="Seconds that a download may stand still.")] = 20,
    retries: Annotated[int, typer.Option("--retries", min=0, max=20, help="Further attempts of a download.")] = 2,
    force: Annotated[bool, typer.Option("--force", help="Replace a pack that is there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
    quiet: OnlyErrors = False,
) -> None:
    """Pack a data set into tar shards that training streams from disk, HTTP or S3.

    Images are kept byte for byte, beside each a JSON with its captions, questions, phrases, statements and hypotheses.
    The same input gives the same shards; a run that was stopped goes on with the same command. What can't be packed is
    named in OUT/left_out.jsonl.
    """
    size = size_in_bytes(shard_size)
    from mplug_core.data.records.types import FORMATS

    formats = sorted({name for names in FORMATS.values() for name in names} | {"tsv", "urls", "img2dataset"})
    for name in task or ():
        check_choice("task", name, FORMATS)
    check_choice("format", layout, formats)

    from mplug_core.data.shards.pack import PackOptions, pack

    options = PackOptions(source, split, layout, images, tuple(task or ()), text_only, size, max_samples)
    with _progress(quiet) as progress:
        report = pack(options, out, workers, max_bad, force, timeout, retries, progress)
    index = report.index
    if report.first_bad and not quiet:
        show.line(f"left out: {'; '.join(report.first_bad)}")
    if as_json:
        values = index.model_dump(mode="json", exclude={"shards", "kinds"})
        kinds = {kind: summary.records for kind, summary in index.kinds.items()}
        write_line(json_line({"pack": str(out), **values, "kinds": kinds, "shards": len(index.shards),
                              "bytes": report.bytes}))  # fmt: skip
        return
    kinds = ", ".join(f"{summary.records:,} {kind}" for kind, summary in index.kinds.items())
    left_out = sum(index.left_out.values())
    write_line(
        f"{out}: {index.samples:,} samples, {index.images:,} images, {kinds}; "
        f"{len(index.shards):,} shards, {report.bytes / 1e6:,.1f} MB; {left_out:,} left out"
    )


@contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """A running count on a terminal's stderr, a line now and then elsewhere."""
    if quiet:
        yield lambda samples, bad: None
        return
    if show.on_terminal():
        from rich.console import Console
        from rich.progress import Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("packed {task.completed:,}, left out {task.fields[bad]:,}"), TimeElapsedColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("pack", total=None, bad=0)
            yield lambda samples, bad: bar.update(task, completed=samples, bad=bad)
        return
    told = 0

    def tell(samples: int, bad: int) -> None:
        nonlocal told
        if samples - told >= 10_000:
            told = samples
            show.line(f"packed {samples:,}, left out {bad:,}")

    yield tell
