"""``mplug ground``: phrases on an image in, the boxes that they mean out."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
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
    requests_on_stdin,
    shown_share,
    text_field,
    write_answers,
)  # fmt: skip
from mplug_cli.drawing import draw_boxes, place_for_picture
from mplug_cli.streams import read_inputs
from mplug_core.device import check_device, check_dtype
from mplug_core.errors import UsageError
from mplug_core.limits import MOST_AT_ONCE
from mplug_core.tasks.answering import Asked, Request, is_finite

if TYPE_CHECKING:
    from mplug_core.api import Box
    from mplug_core.data.pictures import Picture
    from mplug_core.model.mplug import ImageEncoding

EXPECTED = '{"image": PATH, "phrase": TEXT}'


def ground(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[IMAGE] [PHRASE]...",
            help="An image (a file, an address, or - for stdin), then phrases; with -p images alone, folders too.",
        ),
    ] = None,
    phrases: Annotated[
        list[str] | None,
        typer.Option("--phrase", "-p", help="A phrase, or several. All arguments are images."),
    ] = None,
    draw: Annotated[
        Path | None, typer.Option("--draw", metavar="FILE", help="Write the picture with the boxes drawn on it.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON Lines, also for a single image.")] = False,
    model: options.Model = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    threads: options.Threads = None,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, max=MOST_AT_ONCE, help="Images, and phrases, computed at once.")
    ] = 16,
    quiet: options.Quiet = False,
) -> None:
    """Find what phrases mean on an image.

    mplug ground photo.jpg "the left dog" prints the box as "x0 y0 x1 y1", in pixels of the upright picture; with
    several phrases a line each, and the phrase behind it. --json, several images (-p PHRASE), or {"image", "phrase"} a
    line on stdin give JSON Lines in the order of the inputs: {"image", "phrase", "box", "confidence"}, or "error" in
    place of the box; the exit code is then 4.
    """
    check_device(device)
    check_dtype(dtype)
    requests = _requests(list(arguments or []), list(phrases or []), quiet)
    only = _only(requests)
    if draw is not None and only is None:
        raise UsageError("--draw is for one image", "call it once for each")
    several = only is None or len(only.questions) > 1
    drawn: list[tuple[list[float], str]] = []
    opened: list[Picture] = []

    def as_text(question: Question, fields: dict[str, Any]) -> list[str]:
        corners = " ".join(f"{value:g}" for value in fields["box"])
        return [f"{corners} {question.text}" if several else corners]

    place = nullcontext() if draw is None else place_for_picture(draw, only.images[0].name, options.model_path(model))
    with place as write:
        loaded = load(model, device, quiet, threads=threads, dtype=dtype)
        find = loaded.grounder()

        def find_and_note(images: ImageEncoding, asked: list[Asked]) -> Sequence[Any]:
            found = find(images, asked)
            if draw is not None:
                opened.append(asked[0].pictures[0])
                drawn.extend(
                    (_fields(box)["box"], one.question.text)
                    for box, one in zip(found, asked, strict=True)
                    if is_finite(box)
                )
            return found

        write_answers(
            requests, loaded, find_and_note, _fields, as_text, batch_size=batch_size, as_json=as_json, quiet=quiet,
            what="boxes", failure="of the phrases could not be found", keep_pictures=draw is not None,
        )  # fmt: skip
        if write is not None:
            write(draw_boxes(opened[0].whole, drawn))


def _fields(box: Box) -> dict[str, Any]:
    """The corners to a tenth of a pixel."""
    return {"box": [round(value, 1) for value in box.corners], "confidence": shown_share(box.confidence)}


def _only(requests: Requests) -> Request | None:
    """The request on the one image that is named, if it is one."""
    items = requests.items
    return items[0] if isinstance(items, list) and len(items) == 1 else None


def _requests(arguments: list[str], phrases: list[str], quiet: bool) -> Requests:
    """What is sought: by arguments, by -p on images that arguments or paths on stdin name, or by JSON on stdin."""
    example = 'for example: mplug ground photo.jpg "the left dog"'
    if not arguments and not phrases:
        return requests_on_stdin(_parse, EXPECTED, example)
    if not phrases:
        phrases, arguments = arguments[1:], arguments[:1]
        if not phrases and not looks_like_image(arguments[0]):
            raise UsageError(f"no image is given for {arguments[0]!r}", example)
        if not phrases:
            raise UsageError("no phrase is given", example)
        for phrase in phrases:
            if looks_like_image(phrase):
                hint = "with several images every phrase is an option: -p PHRASE"
                raise UsageError(f"a phrase is expected, and {phrase} is an image", hint)
    for phrase in phrases:
        check_text(phrase, "phrase")
    inputs = read_inputs(arguments, quiet=quiet)
    items = (
        Request((item,), tuple(Question({"image": item.shown, "phrase": text}, text) for text in phrases))
        for item in inputs.items
    )
    return Requests(list(items) if arguments else items, inputs.plain, inputs.total)


def _parse(values: dict[str, Any]) -> Request:
    item, text = image_field(values), text_field(values, "phrase")
    return Request((item,), (Question({"image": item.shown, "phrase": text}, text),))
