"""``mplug retrieve``: the images that a text describes, or the captions that suit an image."""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mplug_cli import completion, options, show
from mplug_cli.answering import UnknownTexts, check_text, load, looks_like_image, picture_opener
from mplug_cli.streams import Input, Inputs, json_line, read_inputs, read_text, write_line
from mplug_core.device import check_device, check_dtype
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
        str,
        typer.Option(
            "--rerank",
            help="Score of the re-ranked: itm, or itm+itc, with the similarity added.",
            autocompletion=completion.one_of(RERANK),
        ),
    ] = "itm",
    as_json: Annotated[bool, typer.Option("--json", help="JSON Lines instead of score and name.")] = False,
    model: options.Model = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    threads: options.Threads = None,
    batch_size: options.BatchSize = 32,
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
    check_dtype(dtype)
    to_texts = not queries and bool(given) and looks_like_image(given[0])
    if to_texts:
        image, captions = _image_and_captions(given)
    else:
        texts, inputs = _texts_and_images(list(queries or []), given, quiet)

    from mplug_core.tasks.ranking import default_candidates

    loaded = load(
        model, device, quiet, without=("decoder",) if candidates != 0 else ("decoder", "fusion"), threads=threads,
        dtype=dtype,
    )  # fmt: skip
    if candidates is None:
        candidates = min(CANDIDATES, default_candidates(loaded))
    if candidates and loaded.model.matching_head is None:
        raise UsageError(f"{loaded.name} has no matching head to re-rank by", "--candidates 0")
    settings = {"top": top, "candidates": candidates, "rerank": rerank}
    with _memory(batch_size):
        if to_texts:
            _list_texts(loaded, image, captions, as_json, quiet, settings)
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


def _texts_and_images(queries: list[str], given: list[str], quiet: bool) -> tuple[list[str], Inputs]:
    if not queries:
        if not given:
            raise UsageError("nothing to look for", 'for example: mplug retrieve "a dog on the beach" photos/')
        text, *given = given
        if os.path.isdir(text):
            raise UsageError(f"{text} is a folder, and there is no text", f'mplug retrieve "a dog" {text}')
        queries = [text]
    for query in queries:
        check_text(query, "text to look for")
    return queries, read_inputs(given, quiet=quiet)


def read_captions_file(name: str) -> list[tuple[int, str]]:
    """(line number from 1, caption) of the lines of a file, or of standard input for ``-``, that have a word.

    Any of the three line ends will do. DataError for a file that can't be read, is not UTF-8, or has no captions.
    """
    hint = "give a text file, one caption a line"
    if name == "-" and (sys.stdin is None or sys.stdin.isatty()):
        raise UsageError("'-' reads captions from standard input, which is a terminal", "name a file")
    text = read_text(name, "captions", hint)
    lines = [(number, line.strip()) for number, line in enumerate(_LINE_END.split(text), 1)]
    captions = [(number, line) for number, line in lines if any(c.isalnum() for c in line)]
    if not captions:
        raise DataError(f"{'standard input' if name == '-' else name} has no captions", "one caption a line")
    return captions


def _list_texts(
    loaded: Mplug, image: Input, captions: Sequence[tuple[int, str]], as_json: bool, quiet: bool,
    settings: dict[str, Any],
) -> None:
    from mplug_core.api import UnknownTextWarning

    picture = picture_opener(loaded)(image)
    rerank = settings["rerank"] if settings["candidates"] else "itc"
    with warnings.catch_warnings():  # what is listed says so itself
        warnings.simplefilter("ignore", UnknownTextWarning)
        hits = loaded.rank(picture, [caption for _, caption in captions], **settings | {"rerank": rerank})
    unknown = UnknownTexts(quiet)
    for rank, hit in enumerate(hits, 1):
        number, caption = captions[hit.number]
        more = unknown.fields(caption, hit.unknown)
        _write(image.shown, rank, hit, {"text": caption, "line": number}, caption, as_json, more)


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
    unknown = UnknownTexts(quiet)
    for text, hits in zip(texts, found, strict=True):
        of_query = unknown.fields(text, loaded.unknown_share(text))
        for rank, hit in enumerate(hits, 1):
            name = items[gallery.names[hit.number]].shown
            _write(text, rank, hit, {"image": name}, name, as_json or len(texts) > 1, of_query)
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


def _write(
    query: str,
    rank: int,
    hit: Hit | RankedText,
    what: dict[str, Any],
    name: str,
    as_json: bool,
    unknown: dict[str, float],
) -> None:
    if as_json:
        more = {} if hit.match is None else {"similarity": round(hit.similarity, 4), "match": round(hit.match, 4)}
        write_line(json_line({"query": query, "rank": rank, **what, "score": round(hit.score, 4), **more, **unknown}))
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
