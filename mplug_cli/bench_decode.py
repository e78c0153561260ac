"""``mplug bench decode``: how fast captions are written, against HF BLIP and without a cache."""

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
from mplug_core.bench.opponents import DECODE as OPPONENTS
from mplug_core.bench.opponents import DECODE_ONCE

IMAGES = (1, 4)


def decode(
    size: Size = "base",
    against: Annotated[
        list[str] | None,
        typer.Option(
            "--against",
            metavar="NAME",
            help="hf-blip: HF transformers' BLIP; plain: our own decoder without a cache, nothing shared among beams; "
            "no-cache: without a cache alone. Repeatable; default: all.",
        ),
    ] = None,
    repeats: Repeats = 5,
    threads: Threads = None,
    device: Device = None,
    as_json: AsJson = False,
    markdown: Markdown = None,
    quiet: Quiet = False,
) -> None:
    """Beam search for 1 and 4 images with random weights: seconds, and the memory of the caches."""
    names = chosen(against, OPPONENTS)
    check_size(size)
    once = len(set(names) & set(DECODE_ONCE))
    turns = len(IMAGES) * ((1 + len(names) - once) * (1 + repeats) + once)
    with markdown_file(markdown) as out:
        with measuring("decoding", turns, device, threads, quiet) as (device, advance):
            from mplug_core.bench.decode import Captioning, bench_decode
            from mplug_core.bench.sizes import image_tokens, measured_config

            captioning = Captioning(image_tokens=image_tokens(size))
            report = bench_decode(measured_config(size), captioning, names, IMAGES, repeats, device, advance)
        show_report(report, as_json, out)
