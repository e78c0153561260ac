"""What the commands that answer share: requests in, images opened ahead and encoded once, one line of results each.

A command makes :class:`Requests` of its arguments or of JSON Lines on standard input, says how a batch of them is
answered, and how an answer looks as plain text. Opening, batching, errors, JSON Lines and exit codes are here.
"""

from __future__ import annotations

import json
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import typer

from mplug_cli import show
from mplug_cli.device import choose_device
from mplug_cli.streams import IMAGE_SUFFIXES, Input, json_line, lines_on_stdin, open_input, write_line
from mplug_core.errors import SOME_INPUTS_FAILED, DataError, MplugError, UsageError

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from mplug_core.data.placement import Placement
    from mplug_core.model.mplug import ImageEncoding
    from mplug_core.weights.folder import Loaded

# Pictures of the last requests that are not opened again; neighbours on standard input are often on one.
_KEPT_PICTURES = 8


@dataclass(frozen=True)
class Question:
    """One thing to answer: what its line of JSON begins with, the text, and for ``reason`` who is to judge it."""

    shown: dict[str, Any]
    text: str = ""
    classifier: str = ""


@dataclass(frozen=True)
class Request:
    """Questions on the same image, or images. ``fault`` is what is already known to be wrong."""

    images: tuple[Input, ...]
    questions: tuple[Question, ...]
    fault: MplugError | None = None


@dataclass(frozen=True)
class Requests:
    """All of a call. ``plain`` says that plain text will do; ``total`` is None while unknown."""

    items: Iterable[Request]
    plain: bool
    total: int | None


@dataclass(frozen=True)
class Picture:
    """An opened image: the model's input [3, S, S], where the picture lies in it, the upright picture's width and
    height, and itself where it was asked for."""

    pixels: Tensor
    placement: Placement
    size: tuple[int, int]
    whole: Image.Image | None = None


@dataclass(frozen=True)
class Asked:
    """A question, the rows of its images in the encoding that comes with it, and these images."""

    question: Question
    rows: tuple[int, ...]
    pictures: tuple[Picture, ...]


Answer = Callable[["ImageEncoding", list[Asked]], list["dict[str, Any] | MplugError"]]
"""Of each question the fields of its result, or what is wrong with it."""


AsText = Callable[[Question, "dict[str, Any]"], list[str]]
"""The plain lines of a result."""


def looks_like_image(argument: str) -> bool:
    """Whether an argument names an image and can't be meant as a text."""
    if argument == "-" or os.path.isfile(argument) or argument.lower().startswith(("http://", "https://")):
        return True
    return argument.lower().endswith(IMAGE_SUFFIXES) and not any(c.isspace() for c in argument)


def check_text(text: str, what: str) -> None:
    """UsageError for a text without a word, of which a model could see nothing."""
    if not any(c.isalnum() for c in text):
        raise UsageError(f"the {what} is empty" if not text.strip() else f"the {what} {text!r} has no word", "give one")


def requests_on_stdin(parse: Callable[[dict[str, Any]], Request], expected: str, hint: str) -> Requests:
    """A request for each line of JSON on standard input; a line that is none is a request with a fault.

    ``parse`` raises an MplugError for an object without the fields that are ``expected``. UsageError where standard
    input is no JSON Lines.
    """
    lines = lines_on_stdin(f"nothing is asked: expected JSON Lines {expected} on standard input", hint)

    def requests() -> Iterator[Request]:
        for number, line in lines:
            try:
                values = json.loads(line)
                if not isinstance(values, dict):
                    raise DataError(f"line {number}: expected a JSON object {expected}", hint)
                yield parse(values)
            except (ValueError, RecursionError) as error:
                fault = DataError(f"line {number} is not JSON: {' '.join(str(error).split())}", f"expected {expected}")
                yield Request((), (Question({"line": number}),), fault)
            except MplugError as error:
                yield Request((), (Question({"line": number}),), error)

    return Requests(requests(), plain=False, total=None)


def text_field(values: dict[str, Any], name: str) -> str:
    """The text in a field of an object from standard input; DataError if there is none."""
    value = values.get(name)
    if not isinstance(value, str) or not any(c.isalnum() for c in value):
        raise DataError(f'field "{name}": expected a text, got {json.dumps(value)[:60]}')
    return value


def image_field(values: dict[str, Any], name: str = "image") -> Input:
    """The image that a field of an object from standard input names; DataError if there is none."""
    return named_image(values.get(name), name)


def named_image(value: Any, name: str) -> Input:
    if not isinstance(value, str) or not value:
        raise DataError(f'field "{name}": expected the path of an image, got {json.dumps(value)[:60]}')
    return Input(value)


def load(model: str | None, device: str | None, quiet: bool, without: tuple[str, ...] = ()) -> Loaded:
    """The model, with a note where it is the embedded one."""
    from mplug_core.weights.folder import load_model

    with show.downloads(quiet):
        loaded = load_model(model, choose_device(device), without=without)
    if loaded.is_embedded:
        show.note("the embedded model is a small demonstration model and often wrong (--model takes another)", quiet)
    return loaded


def picture_opener(loaded: Loaded, keep: bool = False) -> Callable[[Input], Picture]:
    """How an image is opened for a model; with ``keep`` in full, to be used further."""
    from mplug_core.data.images import full_size, placed_transform

    vision = loaded.config.vision
    transform = placed_transform(vision)

    def open_picture(item: Input) -> Picture:
        picture = open_input(item, None if keep else vision.image_size)
        return Picture(*transform(picture), full_size(picture), picture if keep else None)

    return open_picture


def answer_requests(
    requests: Requests,
    loaded: Loaded,
    answer: Answer,
    as_text: AsText,
    *,
    batch_size: int,
    as_json: bool = False,
    quiet: bool = False,
    what: str = "answers",
    failure: str = "of the answers failed",
    keep_pictures: bool = False,
) -> None:
    """Write the answers in order, batch by batch, flushed line by line; typer.Exit with the code if some failed.

    ``batch_size`` is how many images, and how many questions, are computed at once.
    """
    import torch

    from mplug_core.data.ahead import batches_ahead

    plain = requests.plain and not as_json
    opened = _Opened(picture_opener(loaded, keep_pictures))
    encoder = _Encoder(loaded, batch_size)
    failed = 0
    with show.progress(what, requests.total, quiet) as advance:
        for batch in batches_ahead(requests.items, opened, batch_size):
            try:
                outcomes = _outcomes(batch, encoder, answer, batch_size)
            except torch.cuda.OutOfMemoryError as error:
                hint = f"--batch-size is {batch_size}: give a smaller one, or --device cpu"
                raise MplugError("the GPU's memory does not suffice", hint, "memory") from error
            for (request, _), results in zip(batch, outcomes, strict=True):
                failed += sum(isinstance(result, MplugError) for result in results)
                if plain and isinstance(results[0], MplugError):  # all on one image fail for the same reason
                    show.error(str(results[0]))
                    continue
                for question, result in zip(request.questions, results, strict=True):
                    if plain and not isinstance(result, MplugError):
                        for line in as_text(question, result):
                            write_line(line)
                    else:
                        write_line(json_line({**question.shown, **_fields(result)}))
            advance(len(batch))
    if failed and requests.total != 1:
        show.note(f"{failed} {failure}: see their error in the results", quiet)
    if failed:
        raise typer.Exit(1 if requests.plain else SOME_INPUTS_FAILED)


def _fields(result: dict[str, Any] | MplugError) -> dict[str, Any]:
    if isinstance(result, MplugError):
        return {"error": {"code": result.code, "message": str(result)}}
    return result


def _outcomes(
    batch: list[tuple[Request, tuple[Picture, ...] | MplugError]], encoder: _Encoder, answer: Answer, size: int
) -> list[list[dict[str, Any] | MplugError]]:
    """The results of each request of a batch, one per question."""
    found: dict[Input, Picture] = {}
    for request, pictures in batch:
        if not isinstance(pictures, MplugError):
            found.update(zip(request.images, pictures, strict=True))
    asked: list[Asked] = []
    if found:
        images, rows = encoder(found)
        for request, pictures in batch:
            if not isinstance(pictures, MplugError):
                places = tuple(rows[item] for item in request.images)
                asked += [Asked(question, places, pictures) for question in request.questions]
    results = iter([r for start in range(0, len(asked), size) for r in answer(images, asked[start : start + size])])
    return [
        [pictures if isinstance(pictures, MplugError) else next(results) for _ in request.questions]
        for request, pictures in batch
    ]


class _Opened:
    """Opens the images of requests, in several threads; the pictures of the last ones are kept."""

    def __init__(self, open_picture: Callable[[Input], Picture]) -> None:
        self._open = open_picture
        self._known: OrderedDict[Input, Future[Picture]] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, request: Request) -> tuple[Picture, ...]:
        if request.fault is not None:
            raise request.fault
        return tuple(self._picture(item) for item in request.images)

    def _picture(self, item: Input) -> Picture:
        with self._lock:
            future = self._known.get(item)
            first = future is None
            if future is None:
                future = self._known[item] = Future()
                if len(self._known) > _KEPT_PICTURES:
                    self._known.popitem(last=False)
        if first:
            try:
                future.set_result(self._open(item))
            except BaseException as error:
                future.set_exception(error)
        return future.result()


class _Encoder:
    """Encodes images once: those of the batch before are kept, as their questions may go on in this one."""

    def __init__(self, loaded: Loaded, batch_size: int) -> None:
        self._loaded, self._batch_size = loaded, batch_size
        self._rows: dict[Input, int] = {}
        self._images: ImageEncoding | None = None

    def __call__(self, pictures: dict[Input, Picture]) -> tuple[ImageEncoding, dict[Input, int]]:
        """The encoding, and the row of each image in it."""
        import torch

        from mplug_core.model.mplug import ImageEncoding

        loaded = self._loaded
        kept = [item for item in pictures if item in self._rows]
        fresh = [item for item in pictures if item not in self._rows]
        parts = []
        with torch.inference_mode():
            if kept and self._images is not None:
                parts.append(self._images[torch.tensor([self._rows[item] for item in kept], device=loaded.device)])
            for start in range(0, len(fresh), self._batch_size):
                pixels = torch.stack([pictures[item].pixels for item in fresh[start : start + self._batch_size]])
                parts.append(loaded.model.encode_image(pixels.to(loaded.device, loaded.dtype)))
            self._images = parts[0] if len(parts) == 1 else ImageEncoding.join(parts)
        self._rows = {item: row for row, item in enumerate(kept + fresh)}
        return self._images, self._rows
