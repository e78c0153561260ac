"""``mplug reason``: is a statement true of one image or two; does an image entail a hypothesis."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from mplug_cli import options
from mplug_cli.answering import (
    Question,
    Requests,
    check_text,
    image_field,
    load,
    looks_like_image,
    named_image,
    requests_on_stdin,
    text_field,
    write_answers,
)  # fmt: skip
from mplug_cli.streams import Input, read_inputs
from mplug_core.device import check_device, check_dtype
from mplug_core.errors import DataError, UsageError
from mplug_core.limits import MOST_AT_ONCE
from mplug_core.recipe import CLASSES
from mplug_core.tasks.answering import Request

if TYPE_CHECKING:
    from mplug_core.api import Judgement

EXPECTED = '{"images": [PATH, PATH], "statement": TEXT} or {"image": PATH, "hypothesis": TEXT}'


def reason(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[IMAGE] [IMAGE] [STATEMENT]",
            help="One image or two (files, addresses, or - for stdin); then the statement, without --hypothesis.",
        ),
    ] = None,
    hypothesis: Annotated[
        str | None, typer.Option("--hypothesis", help="Does the image entail this, contradict it, or neither?")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON with the probabilities of all labels.")] = False,
    model: options.Model = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    threads: options.Threads = None,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, max=MOST_AT_ONCE, help="Images, and statements, computed at once.")
    ] = 16,
    quiet: options.Quiet = False,
) -> None:
    """Judge a statement on one image or two, or a hypothesis on one.

    The last argument is the statement, those before it are images: mplug reason a.jpg b.jpg "there are two dogs" gives
    "true" or "false" and its probability. mplug reason a.jpg --hypothesis "a dog sleeps" gives "entailment", "neutral"
    or "contradiction". Without arguments, JSON Lines on stdin, {"images": [A, B], "statement"} or {"image",
    "hypothesis"}, give JSON Lines in their order, with "error" where one can't be judged; the exit code is then 4.
    """
    check_device(device)
    check_dtype(dtype)
    requests = _requests(list(arguments or []), hypothesis, quiet)

    from mplug_core.tasks.task import need

    loaded = load(model, device, quiet, threads=threads, dtype=dtype)
    has = {name for name in CLASSES if name in loaded.config.classifiers}
    if requests.plain:
        wanted = "entailment" if hypothesis is not None else "statement"
        need(wanted in has, f"classifier {wanted}")
    need(has, f"classifier {' or '.join(CLASSES)}")

    write_answers(
        requests, loaded, loaded.reasoner(), _fields, _as_text, batch_size=batch_size, as_json=as_json, quiet=quiet,
        failure="of the statements could not be judged",
    )  # fmt: skip


def _requests(arguments: list[str], hypothesis: str | None, quiet: bool) -> Requests:
    """What is to be judged: by arguments, or by JSON on stdin."""
    example = 'for example: mplug reason a.jpg b.jpg "there are two dogs"'
    if hypothesis is not None:
        example = 'for example: mplug reason photo.jpg --hypothesis "a dog sleeps"'
        check_text(hypothesis, "hypothesis")
        if len(arguments) > 1:
            raise UsageError(f"a hypothesis is about one image, and {len(arguments)} are given", example)
    elif not arguments:
        return requests_on_stdin(_parse, EXPECTED, example)
    else:
        *arguments, statement = arguments
        if looks_like_image(statement):
            raise UsageError(f"no statement is given: the last argument, {statement}, is an image", example)
        check_text(statement, "statement")
        if len(arguments) > 2:
            raise UsageError(f"a statement is about one image or two, and {len(arguments)} are given", example)
    if not arguments:
        raise UsageError("no image is given", example)
    items = list(read_inputs(arguments, quiet=quiet).items)
    if len(items) != len(arguments):
        raise UsageError(f"{len(items)} images are in what {len(arguments)} arguments name", example)
    question = _question(items, "hypothesis", hypothesis) if hypothesis else _question(items, "statement", statement)
    return Requests([Request(tuple(items), (question,))], plain=True, total=1)


def _question(items: list[Input], kind: str, text: str) -> Question:
    names = [item.shown for item in items]
    shown = {"image": names[0]} if len(names) == 1 else {"images": names}
    return Question({**shown, kind: text}, text, "entailment" if kind == "hypothesis" else "statement")


def _parse(values: dict[str, Any]) -> Request:
    if ("hypothesis" in values) == ("statement" in values):
        raise DataError('expected one of the fields "statement" and "hypothesis"', EXPECTED)
    kind = "hypothesis" if "hypothesis" in values else "statement"
    names = values.get("images")
    if kind == "hypothesis" or "image" in values:
        items = [image_field(values)]
    elif isinstance(names, list) and len(names) in (1, 2):
        items = [named_image(name, "images") for name in names]
    else:
        raise DataError('field "images": expected the paths of one image or two', EXPECTED)
    return Request(tuple(items), (_question(items, kind, text_field(values, kind)),))


def _fields(found: Judgement) -> dict[str, Any]:
    if found.probability is None:  # of a text that the vocabulary doesn't know
        return {"label": found.label, "probability": None, "probabilities": None}
    shown = {name: round(value, 4) for name, value in found.probabilities.items()}
    return {"label": found.label, "probability": shown[found.label], "probabilities": shown}


def _as_text(question: Question, fields: dict[str, Any]) -> list[str]:
    probability = fields["probability"]
    return [fields["label"] if probability is None else f"{fields['label']} {probability:.2f}"]
