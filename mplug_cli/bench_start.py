"""``mplug bench start``: how long commands take from nothing."""

from __future__ import annotations

from typing import Annotated

import typer

from mplug_cli.bench_report import AsJson, Markdown, Repeats, markdown_file, measuring, show_report
from mplug_cli.options import Quiet, model_path

PROCESSES = 4


def start(
    model: Annotated[str, typer.Option("--model", metavar="MODEL", help="As of mplug caption.")] = "mini",
    repeats: Repeats = 5,
    as_json: AsJson = False,
    markdown: Markdown = None,
    quiet: Quiet = False,
) -> None:
    """Whole processes: mplug --help, the first caption and the first answer, beside one that imports torch."""
    with markdown_file(markdown, model=model_path(model)) as out:
        with measuring("starts", PROCESSES * (1 + repeats), "cpu", None, quiet) as (_, advance):
            from mplug_core.bench.start import bench_start

            report = bench_start(model, repeats, advance)
        show_report(report, as_json, out)
