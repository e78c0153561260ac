"""``mplug``: the one entry point. Subcommands are in files of their own; every error becomes one line and an exit code.

Subcommands are imported when they are called, and import torch and the model inside their functions: help and usage
errors answer at once.
"""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from mplug_cli import show
from mplug_core.errors import INTERRUPTED, MplugError, Preempted, UsageError

# Base class of the parser's own errors; where it lives differs between versions of typer.
_ParserError: type[Exception] = typer.BadParameter.__bases__[0]

DEBUG_VARIABLE = "MPLUG_DEBUG"

COMMANDS = {
    "caption": ("mplug_cli.caption:caption", "Describe images in a sentence each."),
    "vqa": ("mplug_cli.vqa:vqa", "Answer questions on images in a word or a few."),
    "ground": ("mplug_cli.ground:ground", "Find what phrases mean on an image."),
    "reason": ("mplug_cli.reason:reason", "Judge a statement on one image or two, or a hypothesis on one."),
    "retrieve": (
        "mplug_cli.retrieve:retrieve",
        "Find the images that a text describes, or the captions that suit an image.",
    ),
    "pretrain": ("mplug_cli.pretrain:pretrain", "Pre-train a model as a recipe says."),
    "finetune": ("mplug_cli.finetune:finetune", "Fine-tune a model as a recipe says."),
    "eval": (
        "mplug_cli.eval:evaluate",
        "Score a model on records of one or more tasks, and say how many records could not be used.",
    ),
    "recipe": ("mplug_cli.recipe:recipe", "List, read, copy and check recipes."),
    "data": ("mplug_cli.data:data", "Make data sets and look into them."),
    "model": ("mplug_cli.model:model", "Download, look at, convert, export and publish models."),
    "runs": ("mplug_cli.runs:runs", "Look at runs: curves, checkpoints, state."),
    "ablate": ("mplug_cli.ablate:ablate", "Compare parts of the model with their alternatives."),
    "bench": ("mplug_cli.bench:bench", "Measure speed and memory here, side by side with others."),
}
"""The subcommands in the order of the help: where each is, and the first line of its own help."""


def load_command(name: str) -> Any:
    """The parser's command or group of a name in :data:`COMMANDS`, with its options."""
    module, _, attribute = COMMANDS[name][0].partition(":")
    found = getattr(import_module(module), attribute)
    holder = typer.Typer(add_completion=False, rich_markup_mode=None)
    holder.callback()(lambda: None)
    if isinstance(found, typer.Typer):
        holder.add_typer(found, name=name)
    else:
        holder.command(name)(found)
    return typer.main.get_group(holder).commands[name]


class _ImportedWhenCalled(TyperGroup):
    """Knows its commands by name and first line, which is what help and suggestions need."""

    def resolve_command(self, ctx: typer.Context, args: list[str]) -> tuple[str | None, Any, list[str]]:
        name, command, rest = super().resolve_command(ctx, args)
        return name, load_command(name) if name in COMMANDS else command, rest


app = typer.Typer(
    name="mplug",
    cls=_ImportedWhenCalled,
    help="Vision-language models with cross-modal skip-connections: pre-train, evaluate, use.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

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


for _name, (_, _line) in COMMANDS.items():
    app.command(_name, help=_line)(lambda: None)


def entry_point() -> NoReturn:
    """The installed command: :func:`main` in a process of its own."""
    code = main()
    if "mplug_core.training.distributed" in sys.modules:  # this process has trained, maybe with others
        from mplug_core.training.distributed import end_process

        end_process(code)
    sys.exit(code)


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
    entry_point()
