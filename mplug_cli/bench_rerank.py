"""``mplug bench rerank``: many captions or questions on one image, which they share, against each by itself."""

from __future__ import annotations

from typing import Annotated

import typer

from mplug_cli.bench_report import (
    AsJson,
    Markdown,
    Repeats,
    Size,
    Threads,
    check_size,
    chosen,
    markdown_file,
    measuring,
    show_report,
)
from mplug_cli.options import Device, Quiet
from mplug_core.bench.opponents import RERANK as OPPONENTS


def rerank(
    size: Size = "base",
    against: Annotated[
        list[str] | None,
        typer.Option(
            "--against",
            metavar="NAME",
            help="hf-blip: HF transformers' BLIP; plain: our own model without sharing. Repeatable; default: both.",
        ),
    ] = None,
    repeats: Repeats = 3,
    threads: Threads = None,
    device: Device = None,
    as_json: AsJson = False,
    markdown: Markdown = None,
    quiet: Quiet = False,
) -> None:
    """Re-ranking 256 captions of an image and answering 32 questions on it, with random weights: how many a second."""
    names = chosen(against, OPPONENTS)
    check_size(size)
    ways = 2 + 3 * ("plain" in names) + ("hf-blip" in names)
    with markdown_file(markdown) as out:
        with measuring("re-ranking", ways * repeats, device, threads, quiet) as (device, advance):
            from mplug_core.bench.rerank import bench_rerank
            from mplug_core.bench.sizes import measured_config

            report = bench_rerank(measured_config(size), against=names, repeats=repeats, device=device, advance=advance)
        show_report(report, as_json, out)
