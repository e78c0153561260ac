"""Options that several commands have, each said once: same name, same help, same meaning."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from mplug_cli import completion
from mplug_core.limits import MOST_AT_ONCE

MODELS = "A model or run folder, a released checkpoint, hf:org/name, ms:org/name, a URL, or a name of mplug model ls"
"""What an option or argument takes that names a model."""

Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="MODEL",
        help=f"{MODELS}. Default: $MPLUG_MODEL, else the embedded model.",
        autocompletion=completion.models,
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        "--device",
        help="cpu, cuda, cuda:N or mps. Default: CUDA where there is any.",
        autocompletion=completion.one_of(completion.DEVICES),
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        metavar="TYPE",
        help="float32, bfloat16 or float16. Default: $MPLUG_DTYPE, else what the device computes well.",
    ),
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
BatchSize = Annotated[
    int, typer.Option("--batch-size", min=1, max=MOST_AT_ONCE, help="Images computed at once.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No notes and no progress on stderr.")]


def model_path(model: str | None) -> str | None:
    """What ``--model`` names, or the variable in its place: a path, perhaps."""
    from mplug_core.recipe import MODEL_VARIABLE

    return model or os.environ.get(MODEL_VARIABLE)


Split = Annotated[str | None, typer.Option("--split", help="Part of the data set: val, test, ...")]
Layout = Annotated[
    str | None,
    typer.Option(
        "--format",
        help="Layout of the data: coco, vqa, ... Default: what it looks like.",
        autocompletion=completion.formats,
    ),
]
Images = Annotated[
    str | None, typer.Option("--images", metavar="DIR", help="Folder of the images, if not where the layout says.")
]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="Only the first records.")]
RecipeName = Annotated[
    str,
    typer.Option(
        "--recipe",
        metavar="NAME|FILE",
        help="A shipped recipe (mplug recipe ls) or a file.",
        autocompletion=completion.recipes,
    ),
]
Resume = Annotated[
    str,
    typer.Option(
        "--resume",
        metavar="auto|never|PATH",
        help="Go on from the run's last checkpoint, or from PATH.",
        autocompletion=completion.one_of(("auto", "never")),
    ),
]
AllowChangedData = Annotated[
    bool,
    typer.Option("--allow-changed-data", help="Go on from a checkpoint though a source has other records than then."),
]
RunFolder = Annotated[
    str | None, typer.Option("--run", metavar="FOLDER", help="Output; the same as run.folder=FOLDER.")
]
Data = Annotated[
    str | None, typer.Option("--data", metavar="PATH", help="Where the data is; the same as data.root=PATH.")
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
    typer.Option(
        "--device-name",
        metavar="NAME",
        help="Device for the hours of --dry-run: a100, h100, cpu, ...",
        autocompletion=completion.one_of(("a100", "h100", "cpu")),
    ),
]
DryRunJson = Annotated[bool, typer.Option("--json", help="With --dry-run: one JSON object with everything.")]
OnlyErrors = Annotated[bool, typer.Option("--quiet", "-q", help="Nothing on stderr but errors.")]
Try = Annotated[
    int | None,
    typer.Option(
        "--try",
        min=1,
        metavar="N",
        help="N steps of every stage and a short evaluation, in FOLDER-try, then what the whole run would take.",
    ),
]
