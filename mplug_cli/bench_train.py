"""``mplug bench train``: how fast a pre-training step is, and what each choice in it is worth."""

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
from mplug_cli.options import Quiet
from mplug_core.bench.opponents import TRAIN as OPPONENTS

UNASKED = tuple(name for name in OPPONENTS if name != "compile")
"""Without being named: compiling takes minutes."""


def train(
    size: Size = "base",
    against: Annotated[
        list[str] | None,
        typer.Option(
            "--against",
            metavar="NAME",
            help="A choice to undo (teacher, teacher-images, itm, padding, logits, mlm, qkv, attention), naive: all of "
            "them, naive-but-itm: all but one; or a switch to turn: checkpointing, compile. Repeatable; default: all "
            "but compile, which takes minutes.",
        ),
    ] = None,
    batch: Annotated[int, typer.Option("--batch", min=2, help="Pairs of a step.")] = 8,
    repeats: Repeats = 3,
    threads: Threads = None,
    as_json: AsJson = False,
    markdown: Markdown = None,
    quiet: Quiet = False,
) -> None:
    """A pre-training step of four losses on the CPU in fp32: seconds and memory, with each choice and without."""
    names = chosen(against, OPPONENTS) if against else list(UNASKED)
    check_size(size)
    with markdown_file(markdown) as out:
        with measuring("training steps", (1 + len(names)) * (1 + repeats), "cpu", threads, quiet) as (_, advance):
            from mplug_core.bench.train import Pretraining, bench_train
            from mplug_core.model.config import MplugConfig

            report = bench_train(MplugConfig.named(size), Pretraining(batch), names, repeats, advance)
        show_report(report, as_json, out)
