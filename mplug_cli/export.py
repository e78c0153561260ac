"""``mplug model export``: a model in another number type, with int8 weights, or as ONNX graphs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mplug_cli import completion, options, show
from mplug_cli.streams import write_line
from mplug_core.errors import UsageError
from mplug_core.recipe import nearest

if TYPE_CHECKING:
    from mplug_core.weights.export import Source

FORMATS = ("safetensors", "int8", "onnx")
# Of mplug_core.weights.export, which can't be asked without torch; a test compares them.
DTYPES = ("bf16", "fp16", "fp32")
OPSET = 18


def export(
    spec: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="As for --model; mini is the embedded model.", autocompletion=completion.models
        ),
    ],
    target: Annotated[Path, typer.Argument(metavar="FOLDER", help="What is made.")],
    form: Annotated[
        str, typer.Option("--format", help=f"{', '.join(FORMATS)}.", autocompletion=completion.one_of(FORMATS))
    ] = "safetensors",
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            help=f"{', '.join(DTYPES)}; of int8 what is not quantised. Default: bf16.",
            autocompletion=completion.one_of(DTYPES),
        ),
    ] = None,
    image_size: Annotated[
        int | None, typer.Option("--image-size", min=1, metavar="N", help="Pixels. Default: the model's own.")
    ] = None,
    opset: Annotated[int | None, typer.Option("--opset", min=1, help=f"For onnx. Default: {OPSET}.")] = None,
    force: Annotated[bool, typer.Option("--force", "-f", help="Replace a model folder that is there.")] = False,
    quiet: options.Quiet = False,
) -> None:
    """Write a model in another form; the folder is whole or not there.

    safetensors and int8 are folders that --model reads; int8 computes in int8 on a CPU. onnx is a folder of graphs,
    each compared with PyTorch, with a meta.json that says how they go together (pip install 'mplug[onnx]').
    """
    _check(form, dtype, opset)

    from mplug_core.weights.card import model_card
    from mplug_core.weights.destination import check_destination
    from mplug_core.weights.export import export_int8, export_safetensors, read_source
    from mplug_core.weights.folder import find_model

    if form == "onnx":
        from mplug_core.weights.onnx import require_packages

        require_packages()
    with show.downloads(quiet):
        place = find_model(spec)
    check_destination(target, place, force)  # before anything is read
    source = read_source(spec, image_size)
    text = source.texts.get("README.md") or model_card(source.stored.name, source.config)
    if form == "safetensors":
        export_safetensors(source, target, dtype or "bf16", text, force)
    elif form == "int8":
        export_int8(source, target, dtype or "bf16", text, force)
    else:
        _export_onnx(source, target, text, opset or OPSET, quiet)
    write_line(str(target))


def _check(form: str, dtype: str | None, opset: int | None) -> None:
    """UsageError where options are wrong or don't go together."""
    if form not in FORMATS:
        raise UsageError(f"no format {form!r}{nearest(form, FORMATS)}", f"one of {', '.join(FORMATS)}")
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"no dtype {dtype!r}{nearest(dtype, DTYPES)}", f"one of {', '.join(DTYPES)}")
    if form == "onnx" and dtype not in (None, "fp32"):
        raise UsageError(f"graphs are written in fp32, not {dtype}", "leave --dtype out")
    if form != "onnx" and opset is not None:
        raise UsageError(f"--opset is for onnx, not {form}", "leave it out")


def _export_onnx(source: Source, target: Path, card: str, opset: int, quiet: bool) -> None:
    """The graphs, and on stderr how far each is from PyTorch."""
    from mplug_core.weights.export import build
    from mplug_core.weights.onnx import export_onnx

    with show.progress("graphs", None, quiet):
        differences = export_onnx(target, build(source), source.stored.tokenizer, card, opset)
    for name, difference in differences.items():
        show.note(f"{name}: at most {difference:.1e} from PyTorch", quiet)
