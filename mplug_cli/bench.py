"""``mplug bench``: how fast it is, measured here, and against what else does the same."""

from __future__ import annotations

import typer

from mplug_cli.bench_decode import decode
from mplug_cli.bench_load import load
from mplug_cli.bench_rerank import rerank
from mplug_cli.bench_start import start
from mplug_cli.bench_train import train
from mplug_cli.groups import Group

bench = typer.Typer(
    name="bench", cls=Group, help="Measure speed and memory here, side by side with others.", no_args_is_help=True
)


@bench.callback()
def _group() -> None:
    """Measure speed and memory here, side by side with others."""


bench.command("decode")(decode)
bench.command("rerank")(rerank)
bench.command("train")(train)
bench.command("start")(start)
bench.command("load")(load)
