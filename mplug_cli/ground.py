"""``mplug ground``: phrases on an image in, the boxes that they mean out."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mplug_cli import options
from mplug_cli.answering import (
    Asked,
    Picture,
    Question,
    Request,
    Requests,
    answer_requests,
    check_text,
    image_field,
    load,
    looks_like_image,
    requests_on_stdin,
    text_field,
)  # fmt: skip
from mplug_cli.device import check_device
from mplug_cli.drawing import draw_boxes, place_for_picture
from mplug_cli.streams import read_inputs
from mplug_core.errors import MplugError, UsageError

if TYPE_CHECKING:
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
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, max=1024, help="Images, and phrases, computed at once.")
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
    requests = _requests(list(arguments or []), list(phrases or []))
    only = _only(requests)
    if draw is not None and only is None:
        raise UsageError("--draw is for one image", "call it once for each")
    several = only is None or len(only.questions) > 1
    drawn: list[tuple[list[float], str]] = []
    opened: list[Picture] = []

    def as_text(question: Question, fields: dict[str, Any]) -> list[str]:
        corners = " ".join(f"{value:g}" for value in fields["box"])
        return [f"{corners} {question.text}" if several else corners]

    place = nullcontext() if draw is None else place_for_picture(draw, only.images[0].name)
    with place as write:
        from mplug_core.tasks.grounding import find_boxes
        from mplug_core.tasks.task import need

        loaded = load(model, device, quiet)
        need(loaded.model.decoder is not None, "decoder")
        need(loaded.tokenizer.bins, "box tokens")

        def answer(images: ImageEncoding, asked: list[Asked]) -> list[dict[str, Any] | MplugError]:
            rows, texts = [a.rows[0] for a in asked], [a.question.text for a in asked]
            boxes, confidence = find_boxes(loaded, images, rows, texts)
            found = [
                {"box": in_pixels(one.pictures[0], box), "confidence": round(sure, 4)}
                for one, box, sure in zip(asked, boxes.tolist(), confidence.tolist(), strict=True)
            ]
            if draw is not None:
                opened.append(asked[0].pictures[0])
                drawn.extend((fields["box"], text) for fields, text in zip(found, texts, strict=True))
            return found

        answer_requests(
            requests, loaded, answer, as_text, batch_size=batch_size, as_json=as_json, quiet=quiet, what="boxes",
            failure="of the phrases could not be found", keep_pictures=draw is not None,
        )  # fmt: skip
        if write is not None:
            write(draw_boxes(opened[0].whole, drawn))


def in_pixels(picture: Picture, box: list[float]) -> list[float]:
    """A box of the model's square as x0, y0, x1, y1 in pixels of the upright picture, to a tenth."""
    width, height = picture.size
    shares = picture.placement.to_picture(box)
    return [round(share * side, 1) for share, side in zip(shares, (width, height, width, height), strict=True)]


def _only(requests: Requests) -> Request | None:
    """The request on the one image that is named, if it is one."""
    items = requests.items
    return items[0] if isinstance(items, list) and len(items) == 1 else None


def _requests(arguments: list[str], phrases: list[str]) -> Requests:
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
    inputs = read_inputs(arguments)
    items = (
        Request((item,), tuple(Question({"image": item.name, "phrase": text}, text) for text in phrases))
        for item in inputs.items
    )
    return Requests(list(items) if arguments else items, inputs.plain, inputs.total)


def _parse(values: dict[str, Any]) -> Request:
    item, text = image_field(values), text_field(values, "phrase")
    return Request((item,), (Question({"image": item.name, "phrase": text}, text),))
