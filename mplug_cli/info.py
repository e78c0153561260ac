"""``mplug model info``: what is known of a model without loading it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from mplug_cli import completion, options, show
from mplug_cli.streams import json_line, write_line
from mplug_core.errors import shown_address

if TYPE_CHECKING:
    from mplug_core.weights.summary import Summary


def info(
    spec: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]",
            help="As for --model. Default: $MPLUG_MODEL, else the embedded model.",
            show_default=False,
            autocompletion=completion.models,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
    quiet: options.Quiet = False,
) -> None:
    """Where a model is, its size and parts, what it can do, how it was trained, and its scores; nothing is loaded."""
    from mplug_core.weights.summary import summarise

    with show.downloads(quiet):
        summary = summarise(spec)
    for note in summary.notes:
        show.note(note, quiet)
    if as_json:
        write_line(json_line(as_object(summary)))
        return
    for line in as_lines(summary):
        write_line(show.printable(line))


def as_object(summary: Summary) -> dict[str, Any]:
    """Everything for programs."""
    from mplug_core.weights.card import training_facts

    config, card, recipe = summary.config, summary.card, summary.recipe
    scores = card.scores() if card else []
    values: dict[str, Any] = {
        "name": summary.name,
        "path": str(summary.path),
        "kind": summary.kind,
        "bytes": summary.bytes,
        "numbers": summary.dtypes,
        "parameters": {"all": sum(summary.parameters.values()), **summary.parameters},
        "tasks": {task: {"able": why is None, "why_not": why} for task, why in summary.tasks.items()},
        "missing": {part: len(names) for part, names in summary.missing.items()},
        "vocabulary": config.vocab_size,
        "box_bins": config.box_bins,
        "image": {
            "size": config.vision.image_size, "fit": config.vision.fit, "tokens": summary.tokens,
            "backbone": config.vision.backbone,
        },
        "fusion": {
            "kind": config.fusion, "layers": config.fusion_layers, "stride": config.stride, "rule": config.rule,
            "connected": [layer + 1 for layer in config.connected_layers],
        },
        "max_positions": config.max_positions,
        "classifiers": {name: head.labels for name, head in config.classifiers.items()},
        "calibration": {kind: part.model_dump() for kind, part in config.calibration.items()},
        "scores": [
            {
                "task": s.task, "data": s.data, "split": s.split, "metric": s.metric, "value": s.value,
                **({"limit": s.limit} if s.limit else {}),
            }
            for s in scores
        ],
    }  # fmt: skip
    if card and not scores:
        values["score_tables"] = _score_tables(summary)
    if card and "license" in card.fields:
        values["license"] = str(card.fields["license"])  # YAML has dates and more
    if recipe is not None:
        values["recipe"] = {
            "name": recipe.name,
            "start": recipe.start.model and shown_address(recipe.start.model),
            "objectives": recipe.objectives,
            "data": [{"path": s.path, "split": s.split, "tasks": list(s.tasks)} for s in recipe.data.sources.values()],
            "facts": training_facts(recipe),
        }
    return values


def as_lines(summary: Summary) -> list[str]:
    """Everything for people: aligned columns under headings."""
    from mplug_cli.runs import aligned

    lines = [summary.name, *(f"  {line}" for line in aligned(_facts(summary)))]
    tasks = [[task, "yes" if why is None else f"no: {why}"] for task, why in summary.tasks.items()]
    for heading, rows in (("tasks", tasks), ("training", _training(summary)), ("scores", _scores(summary))):
        if rows:
            lines += ["", heading, *(f"  {line}" for line in aligned(rows))]
    return lines


def _facts(summary: Summary) -> list[list[str]]:
    config = summary.config
    vision = config.vision
    parts = ", ".join(f"{part} {_count(n)}" for part, n in summary.parameters.items())
    numbers = ", ".join(f"{dtype} {_count(n)}" for dtype, n in summary.dtypes.items())
    rows = [
        ["place", str(summary.path)],
        ["kind", summary.kind],
        ["on disk", f"{summary.bytes / 1e6:.1f} MB"],
        ["parameters", f"{_count(sum(summary.parameters.values()))}: {parts}"],
        ["numbers", numbers],
        ["images", f"{vision.image_size} x {vision.image_size} pixels ({vision.fit}), {summary.tokens} tokens"],
        ["visual encoder", vision.backbone],
        ["text", f"{config.vocab_size} pieces, {config.max_positions} positions"],
        ["boxes", f"{config.box_bins} bins" if config.box_bins else "no box tokens"],
        ["fusion", _fusion(summary)],
        ["decoder", f"{config.decoder_layers} layers" if config.decoder_layers else "none"],
    ]
    for name, head in config.classifiers.items():
        rows.append([f"classifier {name}", ", ".join(head.labels)])
    if config.calibration:
        kinds = (f"{kind} (temperature {part.temperature:.3g})" for kind, part in config.calibration.items())
        rows.append(["calibrated", ", ".join(kinds)])
    if summary.missing:
        rows.append(
            ["not in the files", ", ".join(f"{part} ({len(names)})" for part, names in summary.missing.items())]
        )
    if summary.card and "license" in summary.card.fields:
        rows.append(["licence", str(summary.card.fields["license"])])
    return rows


def _fusion(summary: Summary) -> str:
    config = summary.config
    if config.fusion == "none":
        return "none"
    text = f"{config.fusion}, {config.fusion_layers} layers"
    if config.fusion == "skip":
        connected = ", ".join(str(layer + 1) for layer in config.connected_layers) or "none"
        text += f", stride {config.stride}, rule {config.rule}; connected: {connected}"
    return text


def _training(summary: Summary) -> list[list[str]]:
    from mplug_core.weights.card import training_facts

    recipe = summary.recipe
    if recipe is None:
        return []
    rows = [["recipe", recipe.name]]
    if recipe.start.model:
        rows.append(["from", shown_address(recipe.start.model)])
    rows += [[what, value] for what, value in training_facts(recipe).items()]
    for name, source in recipe.data.sources.items():
        split = f", split {source.split}" if source.split else ""
        rows.append([f"data {name}", f"{source.path}{split} ({', '.join(source.tasks)})"])
    return rows


def _scores(summary: Summary) -> list[list[str]]:
    scores = summary.card.scores() if summary.card else []
    if not scores:
        return [row for table in _score_tables(summary) for row in table]
    return [
        [s.task, s.data + (f" {s.split}" if s.split else ""), s.metric, f"{s.value:.4f}"]
        + ([f"the first {s.limit}"] if s.limit else [])
        for s in scores
    ]


def _score_tables(summary: Summary) -> list[list[list[str]]]:
    """Tables of the card that have a number in every row but the heading."""
    tables = summary.card.tables() if summary.card else []
    return [
        table for table in tables if len(table) > 1 and all(any(_is_figure(cell) for cell in row) for row in table[1:])
    ]


def _is_figure(cell: str) -> bool:
    words = cell.replace("(", " ").replace(")", " ").replace(",", " ").replace("/", " ").split()
    return bool(words) and all(word.removesuffix("%").lstrip("+-").replace(".", "", 1).isdigit() for word in words)


def _count(number: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)
