"""Model cards: ``README.md`` with front matter that model hubs understand, written from what is known, and read back.

A card claims nothing that no file says: what a model was trained from and on, how, and what it scored on which data.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import yaml

from mplug_core.bounded import Unreadable, parse_yaml, read_text
from mplug_core.errors import CheckpointError, shown_address
from mplug_core.recipe import EvaluateSection, ModelSection, Recipe

HUB_TASKS = {
    "caption": "image-to-text", "vqa": "visual-question-answering", "retrieval": "image-text-retrieval",
    "grounding": "visual-grounding", "statements": "visual-reasoning", "entailment": "visual-entailment",
    "reasoning": "visual-reasoning",
}  # fmt: skip
"""Our tasks by what model hubs call them; those that hubs don't know have names like theirs."""
OBJECTIVE_TASKS = {
    "caption": "caption", "self_critical": "caption", "answer": "vqa", "box": "grounding", "itc": "retrieval",
    "statement": "statements", "entailment": "entailment",
}  # fmt: skip
_ROW = re.compile(r"\| *([\w.-]+)/([\w.-]+)/([^|\s]+) *\| *([-+.\deE]+|nan) *\|")
_WHERE = re.compile(r"`([\w.-]+)`: (.+)\.")
_FIRST = re.compile(r", the first (\d{1,15})$")
MAX_LINE = 2000
"""Characters of a line of a card that are looked at: figures and what they stand for are shorter."""


@dataclass(frozen=True)
class Score:
    """One figure of one evaluation; ``limit`` is how many records were looked at if not all were."""

    task: str
    data: str
    split: str | None
    metric: str
    value: float
    limit: int | None = None


@dataclass
class Card:
    """A card in two halves: the fields of its front matter, and the text behind it."""

    fields: dict[str, Any]
    body: str

    @classmethod
    def parse(cls, text: str, name: str = "README.md") -> Card:
        """Split a card; CheckpointError where its front matter is none."""
        front, body = _halves(text)
        if front is None:
            return cls({}, text)
        try:
            fields = parse_yaml(front)
        except Unreadable as error:
            raise CheckpointError(f"the front matter of {name} can't be read: {error}", "correct it") from error
        if fields is not None and not isinstance(fields, dict):
            raise CheckpointError(f"the front matter of {name} is no mapping", "correct it")
        return cls(fields or {}, body)

    @property
    def text(self) -> str:
        """The whole card."""
        if not self.fields:
            return self.body
        front = yaml.safe_dump(self.fields, sort_keys=False, allow_unicode=True, width=120)
        return f"---\n{front}---\n{self.body}"

    def scores(self) -> list[Score]:
        """The figures of the front matter's ``model-index``, else of the table that a training run writes."""
        return _indexed(self.fields.get("model-index")) or _tabled(self.body)

    def tables(self) -> list[list[list[str]]]:
        """All tables of the text, each as rows of cells, the heading first."""
        tables: list[list[list[str]]] = []
        inside = False
        for line in self.body.splitlines():
            if len(line) > MAX_LINE:
                inside = False
                continue
            cells = [cell.strip() for cell in line.strip().strip("|").split("|")] if "|" in line else []
            if line.strip().startswith("|") and cells:
                if not inside:
                    tables.append([])
                inside = True
                if not all(re.fullmatch(r":?-+:?", cell) for cell in cells):
                    tables[-1].append(cells)
            else:
                inside = False
        return tables


def _halves(text: str) -> tuple[str | None, str]:
    """What is between a first line ``---`` and the next such line, and what is behind; None where there is none."""
    lines = text.removeprefix("\ufeff").splitlines(keepends=True)
    if not lines or lines[0].rstrip() != "---":
        return None, text
    end = next((n for n, line in enumerate(lines[1:], 1) if line.rstrip() == "---"), None)
    return (None, text) if end is None else ("".join(lines[1:end]), "".join(lines[end + 1 :]))


def _indexed(index: Any) -> list[Score]:
    """The figures of a ``model-index``; none where it is not one."""
    scores = []
    try:
        for result in [result for model in index or [] for result in model["results"]]:
            task, data = result["task"], result["dataset"]
            for metric in result["metrics"]:
                value = float(metric["value"])
                name, split = str(task.get("name") or task["type"]), data.get("split")
                split = None if split is None else str(split)
                scores.append(Score(name, str(data["name"]), split, str(metric["type"]), value))
    except (KeyError, TypeError, ValueError, AttributeError):
        return []
    return scores


def _tabled(body: str) -> list[Score]:
    """The figures of rows ``| name/task/metric | value |``, and what ``name`` stands for where a line says so."""
    lines = [line.strip() for line in body.splitlines() if len(line) <= MAX_LINE]
    places = {match[1]: match[2] for line in lines if (match := _WHERE.fullmatch(line))}
    scores = []
    for line in lines:
        if match := _ROW.fullmatch(line):
            name, task, metric, figure = match.groups()
            try:
                value = float(figure)
            except ValueError:  # a dash
                continue
            data, limit = places.get(name, name), None
            if first := _FIRST.search(data):
                data, limit = data[: first.start()], int(first[1])
            data, _, split = data.partition(", split ")
            scores.append(Score(task, data, split or None, metric, value, limit))
    return scores


def scores_of_run(recipe: Recipe, metrics: Mapping[str, float]) -> list[Score]:
    """Metrics by ``name/task/metric`` as a training run keeps them."""
    scores = []
    for path, value in metrics.items():
        name, task, metric = path.split("/", 2)
        section = recipe.evaluate.get(name) or EvaluateSection(path=name, tasks=[])
        scores.append(Score(task, section.path, section.split, metric, value, section.limit))
    return scores


def model_card(
    name: str,
    config: ModelSection,
    recipe: Recipe | None = None,
    steps: int | None = None,
    metrics: Mapping[str, float] | None = None,
) -> str:
    """The card of a model: what it is, what it was trained from and on and how, and what it scored.

    ``steps`` is how many were made (None: unknown), ``metrics`` are scores by ``name/task/metric``.
    """
    lines = [f"# {name}", "", architecture(config)]
    if recipe is not None:
        lines += ["", *_training(recipe, steps)]
    scores = []
    if recipe is not None and metrics:
        scores = scores_of_run(recipe, metrics)
        lines += ["", "## Scores", "", "| metric | score |", "|---|---|"]
        lines += [f"| {path} | {value:.4f} |" for path, value in metrics.items()]
        for evaluation, section in recipe.evaluate.items():
            part = f", split {section.split}" if section.split else ""
            most = f", the first {section.limit}" if section.limit else ""
            lines += ["", f"`{evaluation}`: {section.path}{part}{most}."]
    return Card(front_matter(name, config, recipe, scores), "\n".join(lines) + "\n").text


def architecture(config: ModelSection) -> str:
    """The model in a sentence or two."""
    vision, fusion = config.vision, config.fusion
    parts = [f"{vision.backbone} on {vision.image_size} x {vision.image_size} pixels"]
    if "text" not in config.absent:
        parts.append(f"a text encoder of {config.text_layers} layers")
    if fusion != "none":
        every = f" (stride {config.stride})" if fusion == "skip" else ""
        named = {"skip": "skip-connected", "co": "co-attention"}.get(fusion, fusion)
        parts.append(f"{config.fusion_layers} {named} fusion layers{every}")
    if config.decoder_layers:
        parts.append(f"a decoder of {config.decoder_layers} layers")
    *first, last = parts
    listed = f"{', '.join(first)} and {last}" if first else last
    return f"An mPLUG vision-language model, {config.width} wide: {listed}."


def _training(recipe: Recipe, steps: int | None) -> list[str]:
    """What it was trained from and on, and how."""
    origin = f" from {shown_address(recipe.start.model)}" if recipe.start.model else ""
    count = f" for {steps} steps" if steps else ""
    lines = ["## Training", "", f"Trained{origin}{count} as `recipe.yaml` says, on:", ""]
    for source in recipe.data.sources.values():
        tasks = ", ".join(source.tasks)
        lines.append(f"- {shown_address(source.path)}{f', split {source.split}' if source.split else ''} ({tasks})")
    lines += ["", "| | |", "|---|---|"]
    lines += [f"| {what} | {value} |" for what, value in training_facts(recipe).items()]
    return lines


def training_facts(recipe: Recipe) -> dict[str, str]:
    """Losses, length, batch and rates of a recipe, in words."""

    def mix(objectives: Mapping[str, float]) -> str:
        return ", ".join(f"{name} {weight:g}" for name, weight in objectives.items() if weight > 0)

    optimizer, batch = recipe.optimizer, sum(source.batch_size for source in recipe.data.sources.values())
    facts = {"losses": mix(recipe.objectives)}
    if recipe.steps or recipe.epochs:
        facts["length"] = f"{recipe.steps} steps" if recipe.steps else f"{recipe.epochs} epochs"
    for stage in recipe.stages:
        told = [f"{stage.steps} steps" if stage.steps else "", mix(stage.objectives) if stage.objectives else ""]
        told += ["aligns the contrastive head" if stage.align else "", f"rate {stage.lr:g}" if stage.lr else ""]
        facts[f"stage {stage.name}"] = "; ".join(filter(None, told)) or "as above"
    if batch:
        times = f", {recipe.engine.accumulate} times a step" if recipe.engine.accumulate > 1 else ""
        facts["batch"] = f"{batch} images a process{times}"
    visual = f", visual encoder {optimizer.visual_lr:g}" if optimizer.visual_lr else ""
    facts["optimizer"] = (
        f"AdamW, rate {optimizer.lr:g}{visual}, warm-up {optimizer.warmup_steps} steps, "
        f"cosine to {optimizer.min_lr:g}, weight decay {optimizer.weight_decay:g}"
    )
    if recipe.freeze:
        facts["frozen"] = ", ".join(recipe.freeze)
    return facts


def front_matter(
    name: str, config: ModelSection, recipe: Recipe | None = None, scores: list[Score] | None = None
) -> dict[str, Any]:
    """The fields that model hubs read. A licence is not among them: nobody but the model's owner knows it."""
    fields: dict[str, Any] = {"library_name": "mplug"}
    if config.decoder_layers:
        fields["pipeline_tag"] = "image-to-text"
    tasks = dict.fromkeys(OBJECTIVE_TASKS[o] for o in recipe.wanted() if o in OBJECTIVE_TASKS) if recipe else {}
    fields["tags"] = list(dict.fromkeys(["mplug", "vision-language", *(HUB_TASKS[task] for task in tasks)]))
    if recipe is not None:
        if recipe.start.model and recipe.start.model.startswith("hf:"):
            fields["base_model"] = recipe.start.model.removeprefix("hf:").partition("@")[0]
        if data := list(dict.fromkeys(data_name(source.path) for source in recipe.data.sources.values())):
            fields["datasets"] = data
    if scores:
        fields["model-index"] = model_index(name, scores)
    return fields


def model_index(name: str, scores: list[Score]) -> list[dict[str, Any]]:
    """Scores as model hubs keep them."""
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type=HUB_TASKS.get(score.task, score.task), task_name=score.task,
            dataset_type=data_name(score.data), dataset_name=data_name(score.data), dataset_split=score.split,
            dataset_args={"limit": score.limit} if score.limit else None,
            metric_type=score.metric, metric_value=round(score.value, 6),
        )
        for score in scores
        if math.isfinite(score.value)
    ]  # fmt: skip
    return ModelCardData(model_name=name, eval_results=results).to_dict()["model-index"]


def data_name(path: str) -> str:
    """What a data set is called: the last part of its path, which may end in a file."""
    path = shown_address(path).partition("?")[0] if "://" in path else path
    pure = PurePath(path.rstrip("/"))
    return (pure.stem if pure.suffix in (".json", ".jsonl", ".csv", ".tsv", ".txt") else pure.name) or path


def read_card(folder: Path) -> Card | None:
    """The card of a model folder, if it has one."""
    file = folder / "README.md"
    try:
        return Card.parse(read_text(file), str(file)) if file.is_file() else None
    except Unreadable as error:
        raise CheckpointError(f"cannot read {file}: {error}") from error


def published_card(card: Card | None, name: str, config: ModelSection, recipe: Recipe | None, address: str) -> Card:
    """The card to publish: an existing one keeps its text, its fields and its scores, and gets what it lacks."""
    if card is None:
        card = Card.parse(model_card(name, config, recipe))
    fields = dict(card.fields)
    for key, value in front_matter(name, config, recipe, card.scores()).items():
        fields.setdefault(key, value)
    body = card.body
    if address not in body:
        body = body.rstrip("\n") + "\n\n" + _use(config, address)
    return Card(fields, body)


def _use(config: ModelSection, address: str) -> str:
    """How the model is used, for its card."""
    if config.decoder_layers:
        command, call = "mplug caption photo.jpg", 'model.caption("photo.jpg")'
    else:
        command, call = 'mplug retrieve "a red ball" photos/', 'model.rank("photo.jpg", ["a red ball", "a dog"])'
    return (
        "## Use\n\n"
        f"```sh\n{command} --model {address}\n```\n\n"
        f'```python\nimport mplug_core\n\nmodel = mplug_core.load("{address}")\nprint({call})\n```\n'
    )
