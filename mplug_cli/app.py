"""``mplug``: the one entry point. Subcommands are in files of their own; every error becomes one line and an exit code.

Subcommands import torch and the model inside their functions, so that help and usage errors answer at once.
"""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import typer

from mplug_cli import show
from mplug_cli.bench import bench
from mplug_cli.caption import caption
from mplug_cli.data import data
from mplug_cli.eval import evaluate
from mplug_cli.finetune import finetune
from mplug_cli.ground import ground
from mplug_cli.model import model
from mplug_cli.pretrain import pretrain
from mplug_cli.reason import reason
from mplug_cli.recipe import recipe
from mplug_cli.retrieve import retrieve
from mplug_cli.runs import runs
from mplug_cli.vqa import vqa
from mplug_core.errors import INTERRUPTED, MplugError, Preempted, UsageError

# Base class of the parser's own errors; where it lives differs between versions of typer.
_ParserError: type[Exception] = typer.BadParameter.__bases__[0]

DEBUG_VARIABLE = "MPLUG_DEBUG"

app = typer.Typer(
    name="mplug",
    help="Vision-language models with cross-modal skip-connections: pre-train, evaluate, use.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        try:
            typer.echo(f"mplug {version('mplug')}")
        except PackageNotFoundError:
            typer.echo("mplug, not installed as a package")
        raise typer.Exit()


@app.callback()
def _options(
    show_version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
    local_rank: Annotated[
        int | None, typer.Option("--local_rank", hidden=True, help="DeepSpeed's launcher gives it, and sets variables.")
    ] = None,
) -> None:
    """Vision-language models with cross-modal skip-connections: pre-train, evaluate, use."""


app.command("caption")(caption)
app.command("vqa")(vqa)
app.command("ground")(ground)
app.command("reason")(reason)
app.command("retrieve")(retrieve)
app.command("pretrain")(pretrain)
app.command("finetune")(finetune)
app.command("eval")(evaluate)
app.add_typer(recipe, name="recipe")
app.add_typer(data, name="data")
app.add_typer(model, name="model")
app.add_typer(runs, name="runs")
app.add_typer(bench, name="bench")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line (default: the process's own) and return its exit code. Never raises."""
    debug = bool(os.environ.get(DEBUG_VARIABLE))
    try:
        try:
            with warnings.catch_warnings():
                if not debug:  # libraries' warnings are for those who write code on them
                    warnings.simplefilter("ignore")
                code = _run(list(sys.argv[1:] if arguments is None else arguments))
            if sys.stdout is not None:
                sys.stdout.flush()
            return code
        except BrokenPipeError:
            raise
        except (KeyboardInterrupt, typer.Abort):
            if debug:
                traceback.print_exc()
            return INTERRUPTED
        except MplugError as error:
            if debug:
                traceback.print_exc()
            _report(error)
            return error.exit_code
        except Exception as error:
            if debug:
                traceback.print_exc()
            what = ": ".join(filter(None, (type(error).__name__, " ".join(str(error).split()))))
            show.error(f"internal: {what} (set {DEBUG_VARIABLE}=1 for the traceback)")
            return 1
    except BrokenPipeError:
        _leave_closed_pipes()
        return 0


def _run(arguments: list[str]) -> int:
    command = typer.main.get_command(app)
    try:
        # Not command(): it prints errors its own way, over several lines, and handles signals and pipes.
        with command.make_context("mplug", arguments) as context:
            command.invoke(context)
    except typer.Exit as end:
        return end.exit_code
    except _ParserError as error:
        return _usage(error)
    return 0


def _report(error: MplugError) -> None:
    """The error in one line, with the process that it is of where several were started."""
    rank = os.environ.get("RANK", "0")
    if rank == "0":
        show.error(str(error))
    elif not isinstance(error, Preempted):  # which all are at once
        show.error(f"process {rank}: {error}")


def _usage(error: Exception) -> int:
    """A mistake that the parser found, in one line; a group without a subcommand gets its help."""
    context = getattr(error, "ctx", None)
    if type(error).__name__ == "NoArgsIsHelpError":
        print(context.get_help(), file=sys.stderr)
        return UsageError.exit_code
    hint = f"see {context.command_path} --help" if context is not None else "see mplug --help"
    message = error.format_message().strip().rstrip(".")  # type: ignore[attr-defined]
    raise UsageError(message[:1].lower() + message[1:], hint) from error


def _leave_closed_pipes() -> None:
    """Whoever read our output has gone: what is still buffered goes nowhere, so that the exit is quiet."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            os.dup2(nowhere, stream.fileno())
        except (AttributeError, ValueError, OSError):  # no stream, a closed one, or one without a file
            pass
    os.close(nowhere)


if __name__ == "__main__":
    sys.exit(main())
