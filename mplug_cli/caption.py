"""``mplug caption``: images in, one sentence each out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from mplug_cli import options
from mplug_cli.answering import Question, Requests, load, write_answers
from mplug_cli.streams import Inputs, read_inputs
from mplug_core.device import check_device, check_dtype
from mplug_core.errors import UsageError
from mplug_core.limits import MOST_BEAMS, MOST_TEXTS
from mplug_core.tasks.answering import Request

# The defaults of mplug_core.tasks.caption.CaptionTask.decoding, which can't be asked without torch.
BEAMS, MIN_TOKENS, MAX_TOKENS = 6, 5, 25

if TYPE_CHECKING:
    from mplug_core.tasks.caption import Answer


def caption(
    images: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[INPUTS]...", help="Files, folders, 'patterns*', addresses, or - for an image on stdin."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON Lines, also for a single image.")] = False,
    beam: Annotated[
        int | None, typer.Option("--beam", min=1, max=MOST_BEAMS, help=f"Beams; 1 is greedy. Default: {BEAMS}.")
    ] = None,
    n: Annotated[int, typer.Option("--n", min=1, max=MOST_TEXTS, help="Captions for each image, best first.")] = 1,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", min=1, help=f"Longest caption. Default: {MAX_TOKENS}.")
    ] = None,
    min_tokens: Annotated[
        int | None, typer.Option("--min-tokens", min=0, help=f"Shortest caption. Default: {MIN_TOKENS}.")
    ] = None,
    sample: Annotated[bool, typer.Option("--sample", help="Draw at random instead of searching.")] = False,
    top_p: Annotated[
        float | None, typer.Option("--top-p", min=0.0, max=1.0, help="With --sample: share of probability drawn from.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", min=0, help="With --sample: repeats the draw of each image.")
    ] = None,
    model: options.Model = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    threads: options.Threads = None,
    batch_size: options.BatchSize = 16,
    null: Annotated[
        bool, typer.Option("--null", "-0", help="Paths on stdin end in NUL, as find -print0 writes.")
    ] = False,
    quiet: options.Quiet = False,
) -> None:
    """Describe images in a sentence each.

    One image gives a line of text. Several, a folder, a pattern, paths on stdin (ls *.jpg | mplug caption) or --json
    give JSON Lines in the order of the inputs: {"image", "caption", "score", "confidence"}, or {"image", "error"} for
    an image that can't be read; the others are still answered, and the exit code is 4.
    """
    settings = _decoding(beam, n, max_tokens, min_tokens, sample, top_p, seed)
    check_device(device)
    check_dtype(dtype)
    inputs = read_inputs(list(images or []), null, quiet)

    loaded = load(model, device, quiet, without=("text", "fusion"), threads=threads, dtype=dtype)
    write_answers(
        _as_requests(inputs), loaded, loaded.captioner(n=n, **settings), lambda found: _fields(found, n > 1), _as_text,
        batch_size=batch_size, as_json=as_json, quiet=quiet, what="captions", failure="of the images could not be read",
    )  # fmt: skip


def _decoding(
    beam: int | None,
    n: int,
    max_tokens: int | None,
    min_tokens: int | None,
    sample: bool,
    top_p: float | None,
    seed: int | None,
) -> dict[str, Any]:
    """The options as ``Mplug.captioner`` takes them; UsageError where they contradict each other."""
    if not sample and (top_p is not None or seed is not None):
        raise UsageError(f"{'--top-p' if top_p is not None else '--seed'} needs --sample", "only draws are random")
    if sample and beam is not None:
        raise UsageError("--beam and --sample exclude each other", "choose one")
    if top_p == 0:
        raise UsageError("--top-p 0 leaves nothing to draw from", "the most probable words alone: --beam 1")
    if not sample and beam is not None and n > beam:
        raise UsageError(f"--n {n} needs at least as many beams", f"--beam {n}")
    longest = max_tokens if max_tokens is not None else MAX_TOKENS
    if min_tokens is not None and min_tokens > longest:
        raise UsageError(f"--min-tokens {min_tokens} is above --max-tokens", f"which is {longest}")
    lengths = {"min_tokens": min_tokens, "max_tokens": max_tokens}
    if sample:
        return {"strategy": "sample", "top_p": top_p, "seed": seed, **lengths}
    return {"beams": beam, **lengths}


def _as_requests(inputs: Inputs) -> Requests:
    items = (Request((item,), (Question({"image": item.shown}),)) for item in inputs.items)
    return Requests(items, inputs.plain, inputs.total)


def _fields(best: Answer, several: bool) -> dict[str, Any]:
    """The best caption, and where several are wanted all of them."""
    shown = [
        {"caption": a.text, "score": round(a.score, 4), "confidence": round(a.confidence, 4)}
        for a in (best, *best.others)
    ]
    return {**shown[0], **({"captions": shown} if several else {})}


def _as_text(question: Question, fields: dict[str, Any]) -> list[str]:
    return [found["caption"] for found in fields.get("captions", [fields])]
