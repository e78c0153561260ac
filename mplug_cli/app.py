"""``mplug``: the one entry point. Subcommands are in files of their own; every error becomes one line and an exit code.

Subcommands are imported when they are called, and import torch and the model inside their functions: help and usage
errors answer at once.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Annotated, Any, NoReturn

import typer

from mplug_cli import show, standard
from mplug_cli.groups import Group
from mplug_core.errors import INTERRUPTED, MplugError, Preempted, UsageError

# Base class of the parser's own errors; where it lives differs between versions of typer.
_ParserError: type[Exception] = typer.BadParameter.__bases__[0]

DEBUG_VARIABLE = "MPLUG_DEBUG"
COMPLETION_VARIABLE = "_MPLUG_COMPLETE"
"""Set by the shell where it asks for completions."""

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
    "calibrate": (
        "mplug_cli.calibrate:calibrate",
        "Fit a temperature a task on records with known answers, and store it with the model.",
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
    """The parser's command or group of a name in :data:`COMMANDS`, with its options.

    A module may have a class ``Parser`` for its command line.
    """
    path, _, attribute = COMMANDS[name][0].partition(":")
    module = import_module(path)
    found = getattr(module, attribute)
    holder = typer.Typer(add_completion=False, rich_markup_mode=None)
    holder.callback()(lambda: None)
    if isinstance(found, typer.Typer):
        holder.add_typer(found, name=name)
    else:
        holder.command(name, cls=getattr(module, "Parser", None))(found)
    return typer.main.get_group(holder).commands[name]


class _ImportedWhenCalled(Group):
    """Knows its commands by name and first line, which is what help and suggestions need."""

    def resolve_command(self, ctx: typer.Context, args: list[str]) -> tuple[str | None, Any, list[str]]:
        name, command, rest = super().resolve_command(ctx, args)
        return name, load_command(name) if name in COMMANDS else command, rest


app = typer.Typer(
    name="mplug",
    cls=_ImportedWhenCalled,
    help="Vision-language models with cross-modal skip-connections: pre-train, evaluate, use.",
    no_args_is_help=True,
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
    standard.settle()
    code = main()
    if "mplug_core.training.distributed" in sys.modules:  # this process has trained, maybe with others
        from mplug_core.training.distributed import end_process

        end_process(code)
    sys.exit(code)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line (default: the process's own) and return its exit code. Never raises."""
    debug = bool(os.environ.get(DEBUG_VARIABLE))
    try:
        with contextlib.nullcontext() if debug else _silent_libraries():
            code = _run(list(sys.argv[1:] if arguments is None else arguments))
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except BrokenPipeError:  # whoever read our output has gone
        return 0
    except BaseException as error:
        if debug:
            show.where_from()
        return _ended_by(error)
    finally:
        standard.drop_unwritten()


@contextlib.contextmanager
def _silent_libraries() -> Iterator[None]:
    """Keep libraries' warnings and logs, which are for those who write code on them, from stderr."""
    handler, root = logging.NullHandler(), logging.getLogger()
    root.addHandler(handler)  # without any handler at all Python writes to stderr
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        root.removeHandler(handler)


def _ended_by(error: BaseException) -> int:
    """Say what has ended a command, in one line; returns its exit code."""
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        return INTERRUPTED
    if isinstance(error, SystemExit):  # some library's
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    if isinstance(error, OSError) and (refusal := standard.refusal()) is not None:
        from mplug_cli.streams import cannot_write

        error = cannot_write(refusal)
    if isinstance(error, MplugError):
        _report(error)
        return error.exit_code
    if isinstance(error, OSError) and error.strerror:
        # what the system refuses is no fault of the program
        where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
        show.error(f"{where}{error.strerror}")
        return 1
    if not isinstance(error, Exception):
        raise error
    what = ": ".join(filter(None, (type(error).__name__, " ".join(str(error).split()))))
    show.error(f"internal: {what} (set {DEBUG_VARIABLE}=1 for the traceback)")
    return 1


def _run(arguments: list[str]) -> int:
    command = typer.main.get_command(app)
    if COMPLETION_VARIABLE in os.environ:
        return _complete(command)
    try:
        # Not command(): it prints errors its own way, over several lines, and handles signals and pipes.
        with command.make_context("mplug", arguments) as context:
            command.invoke(context)
    except typer.Exit as end:
        return end.exit_code
    except _ParserError as error:
        return _usage(error)
    return 0


def _complete(command: Any) -> int:
    """Answer the shell, which shows the user nothing of an error."""
    with contextlib.suppress(MplugError, OSError, _ParserError):
        command.main(args=[], prog_name="mplug", standalone_mode=False)
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
        for line in context.get_help().splitlines():
            show.line(line)
        return UsageError.exit_code
    hint = f"see {context.command_path} --help" if context is not None else "see mplug --help"
    message = error.format_message().strip().rstrip(".")  # type: ignore[attr-defined]
    raise UsageError(message[:1].lower() + message[1:], hint) from error


if __name__ == "__main__":
    entry_point()
