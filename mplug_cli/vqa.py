"""``mplug vqa``: questions on images in, short answers out."""

from __future__ import annotations

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
    text_field,
    write_answers,
)  # fmt: skip
from mplug_cli.streams import read_inputs
from mplug_core.device import check_device
from mplug_core.errors import DataError, UsageError
from mplug_core.tasks.answering import Request

if TYPE_CHECKING:
    from mplug_core.tasks.caption import Answer

EXPECTED = '{"image": PATH, "question": TEXT}'


def vqa(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[INPUTS]... [QUESTION]",
            help="Files, folders, 'patterns*', addresses, or - for an image on stdin; then the question, without -q.",
        ),
    ] = None,
    questions: Annotated[
        list[str] | None,
        typer.Option("--question", "-q", help="A question, or several. All INPUTS are images."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON Lines, also for a single question.")] = False,
    beam: Annotated[int | None, typer.Option("--beam", min=1, help="Beams; 1 is greedy. Default: the task's.")] = None,
    n: Annotated[int, typer.Option("--n", min=1, help="Answers to each question, best first.")] = 1,
    answers: Annotated[
        Path | None, typer.Option("--answers", metavar="FILE", help="Choose among these answers, one a line.")
    ] = None,
    model: options.Model = None,
    device: options.Device = None,
    threads: options.Threads = None,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, max=1024, help="Images, and questions, computed at once.")
    ] = 16,
    quiet: Annotated[bool, typer.Option("--quiet", help="No notes and no progress on stderr.")] = False,
) -> None:
    """Answer questions on images in a word or a few.

    mplug vqa photo.jpg "what colour is the bus?" gives a plain line. Several images or questions (-q Q -q Q), --json,
    paths on stdin with -q, or {"image", "question"} a line on stdin give JSON Lines in the order of the inputs:
    {"image", "question", "answer", "confidence"}, or "error" in place of the answer; the exit code is then 4.
    """
    if answers is not None and beam is not None:
        raise UsageError("--answers ranks a list, and --beam is for writing answers", "leave one of them out")
    if beam is not None and n > beam:
        raise UsageError(f"--n {n} needs at least as many beams", f"--beam {n}")
    check_device(device)
    candidates = read_answers(answers) if answers is not None else None
    requests = _requests(list(arguments or []), list(questions or []))

    loaded = load(model, device, quiet, threads=threads)
    write_answers(
        requests, loaded, loaded.answerer(choices=candidates, n=n, beams=beam), lambda found: _fields(found, n > 1),
        _as_text, batch_size=batch_size, as_json=as_json, quiet=quiet, failure="of the questions could not be answered",
    )  # fmt: skip


def _requests(arguments: list[str], questions: list[str]) -> Requests:
    """What is asked: by arguments, by -q on images that arguments or paths on stdin name, or by JSON on stdin."""
    example = 'for example: mplug vqa photo.jpg "what colour is the bus?"'
    if not arguments and not questions:
        return requests_on_stdin(_parse, EXPECTED, example)
    if not questions:
        *arguments, question = arguments
        if looks_like_image(question):
            raise UsageError(f"no question is given: the last argument, {question}, is an image", example)
        questions = [question]
    for question in questions:
        check_text(question, "question")
    inputs = read_inputs(arguments)
    items = (
        Request((item,), tuple(Question({"image": item.name, "question": text}, text) for text in questions))
        for item in inputs.items
    )
    return Requests(items, inputs.plain and len(questions) == 1, inputs.total)


def _parse(values: dict[str, Any]) -> Request:
    item, text = image_field(values), text_field(values, "question")
    return Request((item,), (Question({"image": item.name, "question": text}, text),))


def read_answers(file: Path) -> list[str]:
    """The lines of a file that are not blank, each once; DataError if there is none."""
    hint = "--answers names a file, one answer a line"
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
    except OSError as error:
        raise DataError(f"{file} can't be read: {error.strerror}", hint) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text", hint) from error
    found = list(dict.fromkeys(line for line in lines if any(c.isalnum() for c in line)))
    if not found:
        raise DataError(f"{file} has no answers", "write one answer a line")
    return found


def _fields(best: Answer, several: bool) -> dict[str, Any]:
    """The best answer, and where several are wanted all of them."""
    shown = [{"answer": a.text, "confidence": round(a.confidence, 4)} for a in (best, *best.others)]
    return {**shown[0], **({"answers": shown} if several else {})}


def _as_text(question: Question, fields: dict[str, Any]) -> list[str]:
    return [found["answer"] for found in fields.get("answers", [fields])]
