"""``mplug vqa``: questions on images in, short answers out."""

from __future__ import annotations

import glob
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from mplug_cli import options, show
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
from mplug_cli.streams import read_inputs, read_text
from mplug_core.device import check_device, check_dtype
from mplug_core.errors import DataError, UsageError
from mplug_core.limits import MOST_AT_ONCE, MOST_BEAMS, MOST_TEXTS
from mplug_core.tasks.answering import Request

if TYPE_CHECKING:
    from mplug_core.tasks.caption import Answer

EXPECTED = '{"image": PATH, "question": TEXT}'


class Parser(TyperCommand):
    """Takes ``-q QUESTION`` for ``-Q QUESTION``, with a note, where what follows ``-q`` can't be meant as an image."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        args, old = with_questions(args)
        if old and not ctx.resilient_parsing and not {"--quiet", "-q"} & set(args):
            show.note("-q before a question will mean --quiet in the next version: write -Q or --question")
        return super().parse_args(ctx, args)


def with_questions(args: list[str]) -> tuple[list[str], bool]:
    """The arguments with ``-Q`` in place of each ``-q`` that a question follows, and whether there was one."""
    found: list[str] = []
    old = False
    rest = iter(args)
    for argument in rest:
        if argument == "--":
            found.append(argument)
            break
        if argument == "-q":
            following = next(rest, None)
            question = following is not None and _is_question(following)
            found += [*(["-Q"] if question else ["-q"]), *([following] if following is not None else [])]
            old = old or question
        elif argument.startswith("-q") and argument[2] not in "Qh":  # -qQUESTION; else several short options in one
            found += ["-Q", argument[2:].removeprefix("=")]
            old = True
        else:
            found.append(argument)
    return [*found, *rest], old


def _is_question(argument: str) -> bool:
    """Whether an argument is no option, and names no image, folder or pattern."""
    if argument.startswith("-") or os.path.exists(argument) or looks_like_image(argument):
        return False
    one_word = not any(c.isspace() for c in argument)
    return not (one_word and glob.has_magic(argument) and ("*" in argument or "/" in argument))


def vqa(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[INPUTS]... [QUESTION]",
            help="Files, folders, 'patterns*', addresses, or - for an image on stdin; then the question, without -Q.",
        ),
    ] = None,
    questions: Annotated[
        list[str] | None,
        typer.Option("--question", "-Q", help="A question, or several. All INPUTS are images."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON Lines, also for a single question.")] = False,
    beam: Annotated[
        int | None, typer.Option("--beam", min=1, max=MOST_BEAMS, help="Beams; 1 is greedy. Default: the task's.")
    ] = None,
    n: Annotated[int, typer.Option("--n", min=1, max=MOST_TEXTS, help="Answers to each question, best first.")] = 1,
    answers: Annotated[
        Path | None, typer.Option("--answers", metavar="FILE", help="Choose among these answers, one a line.")
    ] = None,
    model: options.Model = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    threads: options.Threads = None,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, max=MOST_AT_ONCE, help="Images, and questions, computed at once.")
    ] = 16,
    quiet: options.Quiet = False,
) -> None:
    """Answer questions on images in a word or a few.

    mplug vqa photo.jpg "what colour is the bus?" gives a plain line. Several images or questions (-Q Q -Q Q), --json,
    paths on stdin with -Q, or {"image", "question"} a line on stdin give JSON Lines in the order of the inputs:
    {"image", "question", "answer", "confidence"}, or "error" in place of the answer; the exit code is then 4.
    "confidence" is the probability of being right where the model is calibrated (mplug calibrate).
    """
    if answers is not None and beam is not None:
        raise UsageError("--answers ranks a list, and --beam is for writing answers", "leave one of them out")
    if beam is not None and n > beam:
        raise UsageError(f"--n {n} needs at least as many beams", f"--beam {n}")
    check_device(device)
    check_dtype(dtype)
    candidates = read_answers(answers) if answers is not None else None
    requests = _requests(list(arguments or []), list(questions or []), quiet)

    loaded = load(model, device, quiet, threads=threads, dtype=dtype)
    write_answers(
        requests, loaded, loaded.answerer(choices=candidates, n=n, beams=beam), lambda found: _fields(found, n > 1),
        _as_text, batch_size=batch_size, as_json=as_json, quiet=quiet, failure="of the questions could not be answered",
    )  # fmt: skip


def _requests(arguments: list[str], questions: list[str], quiet: bool) -> Requests:
    """What is asked: by arguments, by -Q on images that arguments or paths on stdin name, or by JSON on stdin."""
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
    inputs = read_inputs(arguments, quiet=quiet)
    items = (
        Request((item,), tuple(Question({"image": item.shown, "question": text}, text) for text in questions))
        for item in inputs.items
    )
    return Requests(items, inputs.plain and len(questions) == 1, inputs.total)


def _parse(values: dict[str, Any]) -> Request:
    item, text = image_field(values), text_field(values, "question")
    return Request((item,), (Question({"image": item.shown, "question": text}, text),))


def read_answers(file: Path) -> list[str]:
    """The lines of a file that are not blank, each once; DataError if there is none."""
    hint = "--answers names a file, one answer a line"
    lines = [line.strip() for line in read_text(str(file), "answers", hint).splitlines()]
    found = list(dict.fromkeys(line for line in lines if any(c.isalnum() for c in line)))
    if not found:
        raise DataError(f"{file} has no answers", "write one answer a line")
    return found


def _fields(best: Answer, several: bool) -> dict[str, Any]:
    """The best answer, and where several are wanted all of them."""
    shown = [{"answer": a.text, "confidence": shown_share(a.confidence)} for a in (best, *best.others)]
    return {**shown[0], **({"answers": shown} if several else {})}


def _as_text(question: Question, fields: dict[str, Any]) -> list[str]:
    return [found["answer"] for found in fields.get("answers", [fields])]
