"""Options that several commands have, each said once: same name, same help, same meaning."""

from __future__ import annotations

from typing import Annotated

import typer

Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="MODEL",
        help="A model or run folder, a released checkpoint, hf:org/name, ms:org/name, a URL, or a name of "
        "mplug model ls. Default: $MPLUG_MODEL, else the embedded model.",
    ),
]
Device = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda, cuda:N or mps. Default: CUDA where there is any.")
]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads",
        min=1,
        metavar="N",
        help="CPU threads. Default: $MPLUG_THREADS, else $OMP_NUM_THREADS, else the cores that this process may use.",
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No notes and no progress on stderr.")]

RecipeName = Annotated[
    str, typer.Option("--recipe", metavar="NAME|FILE", help="A shipped recipe (mplug recipe ls) or a file.")
]
Resume = Annotated[
    str, typer.Option("--resume", metavar="auto|never|PATH", help="Go on from the run's last checkpoint, or from PATH.")
]
RunFolder = Annotated[
    str | None, typer.Option("--run", metavar="FOLDER", help="Output; the same as run.folder=FOLDER.")
]
Devices = Annotated[
    str,
    typer.Option("--devices", metavar="auto|N", help="Processes on this machine: one a GPU, or N on a CPU; auto: all."),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Train nothing: print every field, parameters, FLOPs, memory, time, faults.")
]
DeviceNames = Annotated[
    list[str] | None,
    typer.Option("--device-name", metavar="NAME", help="Device for the hours of --dry-run: a100, h100, cpu, ..."),
]
DryRunJson = Annotated[bool, typer.Option("--json", help="With --dry-run: one JSON object with everything.")]
OnlyErrors = Annotated[bool, typer.Option("--quiet", "-q", help="Nothing on stderr but errors.")]
