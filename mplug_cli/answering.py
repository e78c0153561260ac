"""What the commands that answer share: requests in, one line of results each out.

A command makes :class:`Requests` of its arguments or of JSON Lines on standard input, and says which answers of
:class:`~mplug_core.api.Mplug` it wants, and how they look as fields of JSON and as plain text. Errors, JSON Lines and
exit codes are here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import typer

from mplug_cli import show
from mplug_cli.daily import is_due
from mplug_cli.streams import MAX_LINE_BYTES, Input, json_line, lines_on_stdin, open_input, write_line
from mplug_core.cpu import asked_threads, settle_threads
from mplug_core.data.embedded import is_data_url
from mplug_core.data.folders import has_image_suffix
from mplug_core.device import asked_dtype
from mplug_core.download import is_address
from mplug_core.errors import SOME_INPUTS_FAILED, DataError, MplugError, NotFiniteError, UsageError
from mplug_core.json_text import to_json
from mplug_core.tasks.answering import (
    MOSTLY_UNKNOWN,
    AnswerBatch,
    Answered,
    Request,
    answer_requests,
    unknown_note,
)

if TYPE_CHECKING:
    from mplug_core.api import Mplug
    from mplug_core.data.pictures import Picture


@dataclass(frozen=True)
class Question:
    """One thing to answer: what its line of JSON begins with, the text, and for ``reason`` who is to judge it."""

    shown: dict[str, Any]
    text: str = ""
    classifier: str = ""


@dataclass(frozen=True)
class Requests:
    """All of a call. ``plain`` says that plain text will do; ``total`` is None while unknown."""

    items: Iterable[Request]
    plain: bool
    total: int | None


AsFields = Callable[[Any], dict[str, Any]]
"""A result of the model as the fields of its line of JSON."""

AsText = Callable[[Question, "dict[str, Any]"], list[str]]
"""The plain lines of a result."""


def looks_like_image(argument: str) -> bool:
    """Whether an argument names an image and can't be meant as a text."""
    if argument == "-" or os.path.isfile(argument) or is_address(argument) or is_data_url(argument):
        return True
    return has_image_suffix(argument) and not any(c.isspace() for c in argument)


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
                if line is None:
                    raise DataError(f"line {number} has more than {MAX_LINE_BYTES >> 20} MB", hint)
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
        raise DataError(f'field "{name}": expected a text, got {to_json(value)[:60]}')
    return value


def image_field(values: dict[str, Any], name: str = "image") -> Input:
    """The image that a field of an object from standard input names; DataError if there is none."""
    return named_image(values.get(name), name)


def named_image(value: Any, name: str) -> Input:
    if not isinstance(value, str) or not value:
        raise DataError(f'field "{name}": expected the path of an image, got {to_json(value)[:60]}')
    return Input(value)


def load(
    model: str | None,
    device: str | None,
    quiet: bool,
    without: tuple[str, ...] = (),
    threads: int | None = None,
    dtype: str | None = None,
) -> Mplug:
    """The model, with a note once a day where it is the embedded one; ``threads`` as of ``settle_threads``, ``dtype``
    as of ``from_pretrained``."""
    asked_threads(threads)
    asked_dtype()
    from mplug_core.api import Mplug

    with show.downloads(quiet):
        loaded = Mplug.from_pretrained(model, device=device, without=without, dtype=dtype)
    settle_threads(threads)
    if loaded.is_embedded and not quiet and is_due("embedded-model"):
        show.note("the embedded model is a small demonstration model and often wrong (--model takes another)")
    return loaded


def shown_share(value: float | None) -> float | None:
    """A confidence or probability as JSON shows it; None where there is none."""
    return None if value is None else round(value, 4)


class UnknownTexts:
    """Says of each text once, on stderr, that the vocabulary knows little of it."""

    MOST = 10

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet
        self.known: set[str] = set()

    def fields(self, text: str, share: float) -> dict[str, float]:
        """What a line of JSON says of a text of which a share of the pieces is unknown."""
        if share >= MOSTLY_UNKNOWN and text not in self.known and len(self.known) < self.MOST:
            self.known.add(text)
            show.note(unknown_note(text, share), self.quiet)
        return {"unknown": round(share, 4)} if share else {}


def picture_opener(loaded: Mplug, keep: bool = False) -> Callable[[Input], Picture]:
    """How an image is opened for a model; with ``keep`` in full, to be used further."""

    def open_picture(item: Input) -> Picture:
        picture = open_input(item, None if keep else loaded.config.vision.image_size)
        placed = loaded.place(picture)
        return replace(placed, whole=picture) if keep else placed

    return open_picture


def write_answers(
    requests: Requests,
    loaded: Mplug,
    answer: AnswerBatch[Any],
    as_fields: AsFields,
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

    plain = requests.plain and not as_json
    unknown = UnknownTexts(quiet)
    opener = picture_opener(loaded, keep_pictures)
    failed: list[MplugError] = []
    try:
        with show.progress(what, requests.total, quiet) as advance:
            for batch in answer_requests(loaded, requests.items, opener, answer, batch_size):
                for answered in batch:
                    failed += _write(answered, plain, as_fields, as_text, unknown)
                advance(len(batch))
    except torch.cuda.OutOfMemoryError as error:
        hint = f"--batch-size is {batch_size}: give a smaller one, or --device cpu"
        raise MplugError("the GPU's memory does not suffice", hint, "memory") from error
    if failed and requests.total != 1:
        show.note(f"{len(failed)} {failure}: see their error in the results", quiet)
    if failed:
        unsound = any(isinstance(error, NotFiniteError) for error in failed)
        raise typer.Exit(1 if requests.plain and not unsound else SOME_INPUTS_FAILED)


def _write(
    answered: Answered[Any], plain: bool, as_fields: AsFields, as_text: AsText, unknown: UnknownTexts
) -> list[MplugError]:
    """Write the results of a request; those of them that are errors."""
    errors = [result for result in answered.results if isinstance(result, MplugError)]
    if plain:  # questions on one image fail mostly for the same reason
        for message in dict.fromkeys(map(str, errors)):
            show.error(message)
    for question, result in zip(answered.request.questions, answered.results, strict=True):
        more = {} if isinstance(result, MplugError) else unknown.fields(question.text, getattr(result, "unknown", 0.0))
        if isinstance(result, MplugError) and plain:
            continue
        if isinstance(result, MplugError):
            fields = {"error": {"code": result.code, "message": str(result)}}
            write_line(json_line({**question.shown, **fields}))
        elif plain:
            for line in as_text(question, as_fields(result)):
                write_line(line)
        else:
            write_line(json_line({**question.shown, **as_fields(result), **more}))
    return errors
