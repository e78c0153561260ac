"""``mplug bench load``: whether reading images keeps a model busy."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from mplug_cli.bench_report import AsJson, Markdown, Repeats, Threads, markdown_file, measuring, show_report
from mplug_cli.options import BatchSize, Device, Model, Quiet, model_path
from mplug_cli.streams import read_inputs
from mplug_core.errors import DataError, UsageError

COUNT, SIZE = 128, "640x480"


def load(
    data: Annotated[
        str | None, typer.Option("--data", metavar="FOLDER", help="Images to read. Default: photo-like JPEGs.")
    ] = None,
    count: Annotated[int, typer.Option("--images", min=1, help="How many.")] = COUNT,
    size: Annotated[str, typer.Option("--size", metavar="WxH", help="Of the photo-like JPEGs, in pixels.")] = SIZE,
    model: Model = None,
    batch_size: BatchSize = 16,
    repeats: Repeats = 3,
    threads: Threads = None,
    device: Device = None,
    as_json: AsJson = False,
    markdown: Markdown = None,
    quiet: Quiet = False,
) -> None:
    """Captions of image files beside those of images in memory, and opening files alone: images per second."""
    sides = [int(side) for side in size.lower().split("x") if side.isdecimal() and int(side)]
    if len(sides) != 2:
        raise UsageError(f"--size {size}: no size in pixels", f"for example {SIZE}")
    if data is not None and not Path(data).is_dir():
        raise DataError(f"no folder {data}", "name one of images")
    found = [] if data is None else [item for item in read_inputs([data]).items if item.fault is None]
    if data is not None and not found:
        raise DataError(f"{data} has no images", "name a folder that has some")
    with markdown_file(markdown, data=data, model=model_path(model)) as out:
        with (
            measuring("reading images", None, device, threads, quiet) as (device, advance),
            tempfile.TemporaryDirectory() as made,
        ):
            from mplug_core.api import Mplug
            from mplug_core.bench.load import bench_load
            from mplug_core.bench.photos import write_photos

            loaded = Mplug.from_pretrained(model, device=device, without=("text", "fusion"))
            files = [Path(item.name) for item in found[:count]] or write_photos(Path(made), count, (sides[0], sides[1]))
            report = bench_load(loaded, files, repeats, batch_size, advance)
        show_report(report, as_json, out)
