"""``mplug model convert``: a checkpoint of any layout to a native folder, and an account of every tensor."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mplug_cli import completion, options, show
from mplug_cli.streams import is_terminal, json_line, write_line
from mplug_core.errors import UsageError
from mplug_core.recipe import nearest

if TYPE_CHECKING:
    from mplug_core.weights.conversion import Account, Group

# Parts that a model can do without for some task; the visual encoder is none of them.
PARTS = ("text", "fusion", "decoder", "contrastive", "matching", "masked")
# Short names to torch's.
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def convert(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="A checkpoint file, a ModelScope folder, a model or run folder.")
    ],
    target: Annotated[Path, typer.Argument(metavar="DST", help="The native folder to write.")],
    image_size: Annotated[
        int | None, typer.Option("--image-size", min=1, help="Pixels; positions are resized. Default: the model's.")
    ] = None,
    allow_missing: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-missing",
            metavar="PART",
            help=f"A part to do without, of {', '.join(PARTS)}; repeated.",
            autocompletion=completion.one_of(PARTS),
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            metavar="|".join(DTYPES),
            help="How weights are stored. Default: as they are.",
            autocompletion=completion.one_of(DTYPES),
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", "-f", help="Replace the model folder DST.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The account as one JSON object, with every name.")] = False,
    quiet: options.Quiet = False,
) -> None:
    """Convert a released checkpoint, or any model, to a native folder, whole or not at all.

    Printed is what was used, what was dropped and why, and what is missing. A part that is missing, has a wrong shape
    or was never trained is an error, where the rest of the checkpoint or its task needs it.
    """
    for part in allow_missing or []:
        if part not in PARTS:
            raise UsageError(f"no part {part!r}{nearest(part, PARTS)}", f"one of {', '.join(PARTS)}")
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"no dtype {dtype!r}{nearest(dtype, DTYPES)}", f"one of {', '.join(DTYPES)}")

    import torch

    from mplug_core.weights.conversion import convert_model

    with show.downloads(quiet):
        account = convert_model(
            source, target, image_size=image_size, allow_missing=allow_missing or [],
            dtype=getattr(torch, DTYPES[dtype]) if dtype else None, force=force,
        )  # fmt: skip
    if as_json:
        write_line(json_line({"target": str(target), **account.as_dict()}))
    else:
        _table(account)
    if unknown := account.dropped.get("unknown"):
        names, count = ", ".join(list(unknown.names)[:3]), len(unknown.names)
        what = "1 tensor has an unknown name" if count == 1 else f"{count} tensors have unknown names"
        show.warning(f"{what}, left out: {names}", quiet)
    show.note(f"{target}: {size(account.bytes)}, images of {account.config.vision.image_size} pixels", quiet)


def _rows(account: Account) -> Iterator[tuple[str, ...]]:
    for fate, groups in (("used", account.used), ("dropped", account.dropped), ("missing", account.missing)):
        for name, group in groups.items():
            yield (fate, name, *_figures(group))


def _figures(group: Group) -> tuple[str, ...]:
    return f"{len(group.names):,}", f"{group.parameters / 1e6:,.1f} M", size(group.bytes)


def size(count: int) -> str:
    """Bytes for people."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def _table(account: Account) -> None:
    """The account for people: a table on a terminal, aligned plain columns elsewhere."""
    head, rows = ("", "part or reason", "tensors", "parameters", "size"), list(_rows(account))
    if is_terminal(sys.stdout):
        from rich.console import Console

        table = show.table(head)
        for column in table.columns[2:]:
            column.justify = "right"
        for row in rows:
            table.add_row(*show.cells(row))
        Console().print(table)
        return
    widths = [max(len(row[k]) for row in [head, *rows]) for k in range(len(head))]
    for row in [head, *rows]:
        left = "  ".join(cell.ljust(width) for cell, width in zip(row[:2], widths, strict=False))
        right = "  ".join(cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True))
        write_line(f"{left}  {right}")
