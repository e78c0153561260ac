"""``mplug model push``: a model folder to a model hub."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from mplug_cli import options, show
from mplug_cli.streams import json_line, write_line
from mplug_core.errors import UsageError
from mplug_core.weights.target import Target

if TYPE_CHECKING:
    from mplug_core.weights.publish import Push


def push(
    spec: Annotated[str, typer.Argument(metavar="MODEL", help="A model or run folder; mini is the embedded model.")],
    target: Annotated[str, typer.Argument(metavar="hf:ORG/NAME|ms:ORG/NAME", help="Hugging Face or ModelScope.")],
    private: Annotated[bool, typer.Option("--private", help="A new repository is private.")] = False,
    revision: Annotated[str | None, typer.Option("--revision", metavar="BRANCH", help="Default: the main one.")] = None,
    message: Annotated[str | None, typer.Option("--message", "-m", help="Of the commit.")] = None,
    licence: Annotated[
        str | None, typer.Option("--license", metavar="ID", help="For the card, such as apache-2.0.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", "-f", help="Publish with --license although the card says otherwise.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Upload nothing: print the files and the card.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --dry-run: one JSON object.")] = False,
    quiet: options.Quiet = False,
) -> None:
    """Upload a model folder with a model card, in one commit; prints its address.

    The folder's own README.md keeps its text and scores and gets the fields that hubs read; without one the card is
    written from recipe.yaml. The token is that of hf auth login or HF_TOKEN (ModelScope: MODELSCOPE_API_TOKEN).
    """
    if as_json and not dry_run:
        raise UsageError("--json is for --dry-run", "a push prints the address alone")
    place = Target.parse(target)

    from mplug_core.weights.publish import prepare
    from mplug_core.weights.publish import push as upload

    with show.downloads(quiet):
        plan = prepare(spec, place, private, revision, message, licence, force)
    for text in plan.notes:
        show.note(text, quiet)
    if dry_run:
        _print(plan, as_json)
        return
    write_line(upload(plan, lambda text: show.note(text, quiet)))


def _print(plan: Push, as_json: bool) -> None:
    """What a push would do."""
    sizes = {file.name: file.stat().st_size for file in plan.files}
    sizes["README.md"] = len(plan.card.text.encode("utf-8"))
    if as_json:
        values: dict[str, Any] = {
            "target": str(plan.target), "private": plan.private, "revision": plan.revision, "message": plan.message,
            "files": sizes, "card": plan.card.text,
        }  # fmt: skip
        write_line(json_line(values))
        return
    from mplug_cli.runs import aligned

    where = f"{plan.target}{f', branch {plan.revision}' if plan.revision else ''}"
    write_line(f"{where}{' (private)' if plan.private else ''}: {plan.message}")
    for line in aligned([[name, f"{size} bytes"] for name, size in sorted(sizes.items())]):
        write_line(f"  {show.printable(line)}")
    write_line("")
    for line in plan.card.text.rstrip("\n").split("\n"):
        write_line(show.printable(line))
