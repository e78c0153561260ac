"""``mplug retrieve``: the images that a text describes, or the captions that suit an image."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mplug_cli import options, show
from mplug_cli.answering import check_text, load, looks_like_image, picture_opener
from mplug_cli.streams import Input, Inputs, json_line, read_inputs, write_line
from mplug_core.device import check_device
from mplug_core.errors import SOME_INPUTS_FAILED, DataError, ImageError, MplugError, UsageError
from mplug_core.recipe import nearest

if TYPE_CHECKING:
    from torch import Tensor

    from mplug_core.api import Mplug, RankedText
    from mplug_core.search.gallery import Gallery, Hit

CANDIDATES = 32
"""How many are re-ranked by default: each is encoded again, so fewer than in an evaluation."""

RERANK = ("itm", "itm+itc")

_LINE_END = re.compile(r"\r\n|\r|\n")


def retrieve(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="TEXT [IMAGES]... | IMAGE CAPTIONS",
            help="A text and files, folders or 'patterns*'; or an image and a file of captions, - for stdin.",
        ),
    ] = None,
    queries: Annotated[
        list[str] | None,
        typer.Option("--query", metavar="TEXT", help="A text to look for, repeated for several; all else is images."),
    ] = None,
    top: Annotated[int, typer.Option("--top", min=1, help="How many to list, best first.")] = 10,
    candidates: Annotated[
        int | None,
        typer.Option(
            "--candidates", min=0,
            help=f"How many of the best by contrast, at least --top, matching re-ranks; 0: none. "
            f"Default: {CANDIDATES}, 0 if the model's matching is not made for it.",
        ),
    ] = None,
    rerank: Annotated[
        str, typer.Option("--rerank", help="Score of the re-ranked: itm, or itm+itc, with the similarity added.")
    ] = "itm",
    as_json: Annotated[bool, typer.Option("--json", help="JSON Lines instead of score and name.")] = False,
    model: options.Model = None,
    device: options.Device = None,
    threads: options.Threads = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, max=1024, help="Images computed at once.")] = 32,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Neither use nor keep features of images.")] = False,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Compute all features anew, and keep them.")] = False,
    quiet: options.Quiet = False,
) -> None:  # fmt: skip
    """Find the images that a text describes, or the captions that suit an image.

    mplug retrieve "a dog on the beach" photos/ lists images, mplug retrieve photo.jpg captions.txt lines of a file. An
    existing file, an address or - in the first place is an image; --query says that something is a text.

    Lines are score, tab, name, best first; with --json, or several --query, they are
    {"query", "rank", "image" or "text", "score"}. Features of images are kept in .mplug/ in their folder (in the user's
    cache where that can't be written), and computed again for files that have changed. Images that can't be read are
    left out, and the exit code is then 4.
    """
    given = list(arguments or [])
    if rerank not in RERANK:
        raise UsageError(f"no --rerank {rerank!r}{nearest(rerank, RERANK)}", f"{' or '.join(RERANK)}")
    if no_cache and rebuild:
        raise UsageError("--rebuild and --no-cache exclude each other", "choose one")
    check_device(device)
    to_texts = not queries and bool(given) and looks_like_image(given[0])
    if to_texts:
        image, captions = _image_and_captions(given)
    else:
        texts, inputs = _texts_and_images(list(queries or []), given)

    from mplug_core.tasks.ranking import default_candidates

    loaded = load(
        model, device, quiet, without=("decoder",) if candidates != 0 else ("decoder", "fusion"), threads=threads
    )
    if candidates is None:
        candidates = min(CANDIDATES, default_candidates(loaded))
    if candidates and loaded.model.matching_head is None:
        raise UsageError(f"{loaded.name} has no matching head to re-rank by", "--candidates 0")
    settings = {"top": top, "candidates": candidates, "rerank": rerank}
    with _memory(batch_size):
        if to_texts:
            _list_texts(loaded, image, captions, as_json, settings)
        else:
            failed = _list_images(
                loaded, texts, inputs, as_json, quiet, settings,
                {"keep": not no_cache, "rebuild": rebuild, "batch_size": batch_size},
            )  # fmt: skip
            if failed:
                raise typer.Exit(SOME_INPUTS_FAILED)


def _image_and_captions(given: list[str]) -> tuple[Input, list[tuple[int, str]]]:
    """The image and the numbered lines to look among; UsageError or DataError where there are none."""
    name, *rest = given
    if len(rest) != 1:
        hint = "mplug retrieve photo.jpg captions.txt; if it is a text: --query"
        raise UsageError(f"{name} is an image, and one file of captions goes with it, not {len(rest)}", hint)
    if name == "-" and rest == ["-"]:
        raise UsageError("'-' is given twice, and standard input holds one thing", "name a file")
    (image,) = read_inputs([name]).items
    return image, read_captions_file(rest[0])


def _texts_and_images(queries: list[str], given: list[str]) -> tuple[list[str], Inputs]:
    if not queries:
        if not given:
            raise UsageError("nothing to look for", 'for example: mplug retrieve "a dog on the beach" photos/')
        text, *given = given
        if os.path.isdir(text):
            raise UsageError(f"{text} is a folder, and there is no text", f'mplug retrieve "a dog" {text}')
        queries = [text]
    for query in queries:
        check_text(query, "text to look for")
    return queries, read_inputs(given)


def read_captions_file(name: str) -> list[tuple[int, str]]:
    """(line number from 1, caption) of the lines of a file, or of standard input for ``-``, that have a word.

    Any of the three line ends will do. DataError for a file that can't be read, is not UTF-8, or has no captions.
    """
    shown = "standard input" if name == "-" else name
    try:
        if name == "-":
            if sys.stdin is None or sys.stdin.isatty():
                raise UsageError("'-' reads captions from standard input, which is a terminal", "name a file")
            data = sys.stdin.buffer.read()
        else:
            with open(name, "rb") as file:
                data = file.read()
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise DataError(
            f"captions {name} can't be read: {error.strerror}", "give a file, one caption a line"
        ) from error
    except ValueError as error:  # also a NUL character in the name
        raise DataError(f"{shown} is not UTF-8 text", "give a text file, one caption a line") from error
    lines = [(number, line.strip()) for number, line in enumerate(_LINE_END.split(text), 1)]
    captions = [(number, line) for number, line in lines if any(c.isalnum() for c in line)]
    if not captions:
        raise DataError(f"{shown} has no captions", "one caption a line")
    return captions


def _list_texts(
    loaded: Mplug, image: Input, captions: Sequence[tuple[int, str]], as_json: bool, settings: dict[str, Any]
) -> None:
    picture = picture_opener(loaded)(image)
    rerank = settings["rerank"] if settings["candidates"] else "itc"
    hits = loaded.rank(picture, [caption for _, caption in captions], **settings | {"rerank": rerank})
    for rank, hit in enumerate(hits, 1):
        number, caption = captions[hit.number]
        _write(image.name, rank, hit, {"text": caption, "line": number}, caption, as_json)


def _list_images(
    loaded: Mplug,
    texts: list[str],
    inputs: Inputs,
    as_json: bool,
    quiet: bool,
    settings: dict[str, Any],
    caching: dict[str, Any],
) -> int:
    """Write what was found; how many images could not be used."""
    from mplug_core.search.gallery import find_images, open_gallery

    items = {item.name: item for item in inputs.items}
    open_picture = picture_opener(loaded)
    pixels_on_stdin: dict[str, Tensor] = {}

    def read(name: str) -> Tensor:
        item = items[name]
        if not item.on_stdin:
            return open_picture(item).pixels
        if name not in pixels_on_stdin:  # standard input can be read once
            pixels_on_stdin[name] = open_picture(item).pixels
        return pixels_on_stdin[name]

    with show.progress("images", len(items), quiet) as advance:
        gallery = open_gallery(loaded, list(items), read, advance=advance, **caching)
    _notes(gallery, quiet)
    if not gallery.names:
        raise _nothing(gallery)
    found = find_images(loaded, gallery, texts, read, batch_size=caching["batch_size"], **settings)
    for text, hits in zip(texts, found, strict=True):
        for rank, hit in enumerate(hits, 1):
            name = gallery.names[hit.number]
            _write(text, rank, hit, {"image": name}, name, as_json or len(texts) > 1)
    return len(gallery.failed)


def _notes(gallery: Gallery, quiet: bool) -> None:
    for note in gallery.notes:
        show.note(note, quiet)
    if gallery.failed and gallery.names:
        first = gallery.failed[0][1]
        count = len(gallery.failed)
        show.note(f"{count} of {count + len(gallery.names)} images could not be used, first: {first}", quiet)


def _nothing(gallery: Gallery) -> MplugError:
    """The error where no image is left."""
    if len(gallery.failed) == 1:
        return gallery.failed[0][1]
    if not gallery.failed:
        return UsageError("no images are given", "name image files or folders")
    return ImageError(f"none of the {len(gallery.failed)} images can be used, first: {gallery.failed[0][1]}")


def _write(query: str, rank: int, hit: Hit | RankedText, what: dict[str, Any], name: str, as_json: bool) -> None:
    if as_json:
        more = {} if hit.match is None else {"similarity": round(hit.similarity, 4), "match": round(hit.match, 4)}
        write_line(json_line({"query": query, "rank": rank, **what, "score": round(hit.score, 4), **more}))
    else:
        write_line(f"{hit.score:.4f}\t{name}")


@contextmanager
def _memory(batch_size: int) -> Iterator[None]:
    import torch

    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        hint = f"--batch-size is {batch_size}: give a smaller one, or --device cpu"
        raise MplugError("the GPU's memory does not suffice", hint, "memory") from error
