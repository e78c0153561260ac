"""What the embedded model scores on photos that it has not seen, with intervals and baselines: the README's table.

``python -m benchmarks.embedded DATA [--model MODEL] [--only NAME ...]`` runs ``mplug eval`` on the val parts of
``DATA/photos`` and on scenes of another seed, prints each command on stderr and the table as Markdown on stdout.
``--look 40 --seed 0 --sheet captions.png`` captions photos of Flickr8k val and COCO val that the seed chooses, and
draws each above its caption, so that a person can say how many are right.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import subprocess
import sys
import tempfile
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

FLICKR, COCO, SCENES = "photos/flickr8k", "photos/coco", "scenes"
WAYS = {"i2t": "image to text", "t2i": "text to image"}
TILE, LINES = 224, 4
"""Pixels of a photo's side in the sheet, and lines of text below it."""


@dataclass(frozen=True)
class Row:
    """One evaluation: ``metrics`` by the name that the table gives them."""

    name: str
    task: str
    data: str
    metrics: dict[str, str]
    baseline: str
    train: str | None = None
    options: tuple[str, ...] = ()

    def command(self, root: Path, model: str | None) -> list[str]:
        found = ["eval", "--task", self.task, "--data", str(root / self.data), "--baseline", self.baseline, "--json"]
        if not self.data.endswith(".jsonl"):
            found += ["--split", "val"]
        if self.train is not None:
            found += ["--train", str(root / self.train), "--train-split", "train"]
        return [*found, *self.options, *(["--model", model] if model else [])]


ROWS = (
    Row("flickr8k", "caption", FLICKR, {"captions of Flickr8k: CIDEr": "cider"}, "nearest", FLICKR),
    Row("coco", "caption", f"{COCO}/captions5_val.jsonl", {"captions of COCO: CIDEr": "cider"}, "nearest", COCO),
    Row(
        "retrieval", "retrieval", FLICKR,
        {f"Flickr8k, {says}: R@{k}": f"{way}_r{k}" for way, says in WAYS.items() for k in (1, 5, 10)}, "random",
    ),
    Row(
        "questions", "vqa", COCO,
        {
            "questions on COCO: yes or no": "accuracy_vqa2_yes_no", "COCO-QA": "accuracy_cocoqa",
            "COCO-QA, things": "accuracy_cocoqa_object", "COCO-QA, colours": "accuracy_cocoqa_color",
            "COCO-QA, numbers": "accuracy_cocoqa_number", "COCO-QA, places": "accuracy_cocoqa_location",
        }, "prior", COCO,
    ),
    Row("phrases", "grounding", FLICKR, {"phrases of Flickr8k: IoU 0.5": "accuracy_iou50"}, "constant_box", FLICKR),
    Row("statements", "statements", COCO, {"statements on COCO": "accuracy"}, "majority", COCO),
    Row("entailment", "entailment", FLICKR, {"entailment on Flickr8k": "accuracy"}, "majority", FLICKR),
    Row(
        "scene questions", "vqa", SCENES,
        {"scenes: questions": "accuracy", "scenes: existence": "accuracy_exists",
         "scenes: relations": "accuracy_relation"}, "prior", SCENES,
    ),
    Row("scene boxes", "grounding", SCENES, {"scenes: boxes, IoU 0.5": "accuracy_iou50"}, "constant_box", SCENES),
    Row("scene statements", "statements", SCENES, {"scenes: statements": "accuracy"}, "majority", SCENES),
    Row("scene entailment", "entailment", SCENES, {"scenes: entailment": "accuracy"}, "majority", SCENES),
)  # fmt: skip


def mplug(*arguments: str) -> str:
    """What a command prints; SystemExit where it fails."""
    print("mplug", shlex.join(arguments), file=sys.stderr, flush=True)
    done = subprocess.run([sys.executable, "-m", "mplug_cli.app", *arguments], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(done.returncode)
    return done.stdout


def figure(scores: dict[str, Any], metric: str) -> str:
    """A metric with its interval: in percent, but CIDEr."""
    scale, form = (1, ".3f") if metric == "cider" else (100, ".1f")
    text = format(scale * scores["metrics"][metric], form)
    between = scores["interval"].get(metric)
    if between is None:
        return text
    low, high = (format(scale * value, form) for value in between)
    return f"{text} [{low}, {high}]"


def table(root: Path, model: str | None, only: list[str]) -> None:
    print("| what | of | embedded model | baseline |\n|---|---|---|---|", flush=True)
    for row in ROWS:
        if only and row.name not in only:
            continue
        found = json.loads(mplug(*row.command(root, model)))
        for label, metric in row.metrics.items():
            beside = f"{row.baseline.replace('_', ' ')} {figure(found['baseline'], metric)}"
            print(f"| {label} | {found['n']} | {figure(found, metric)} | {beside} |", flush=True)


def look(root: Path, model: str | None, count: int, seed: int, sheet: Path) -> None:
    """Caption photos that a seed chooses, and draw them with their captions."""
    photos = [
        root / folder / json.loads(line)["image"]
        for folder, file in ((FLICKR, "captions_val.jsonl"), (COCO, "captions5_val.jsonl"))
        for line in (root / folder / file).read_text(encoding="utf-8").splitlines()
    ]
    chosen = random.Random(seed).sample(sorted(set(photos)), count)
    lines = mplug("caption", "-q", "--json", *map(str, chosen), *(["--model", model] if model else [])).splitlines()
    columns = 8
    height = TILE + 14 * LINES
    drawn = Image.new("RGB", (columns * TILE, -(-count // columns) * height), "white")
    draw = ImageDraw.Draw(drawn)
    for number, (photo, line) in enumerate(zip(chosen, lines, strict=True)):
        x, y = number % columns * TILE, number // columns * height
        with Image.open(photo) as image:
            drawn.paste(image.convert("RGB").resize((TILE - 4, TILE - 4)), (x, y))
        text = f"{number + 1}: {json.loads(line)['caption']}"
        draw.multiline_text((x + 2, y + TILE - 2), "\n".join(textwrap.wrap(text, 36)[:LINES]), "black")
        print(f"{photo.name}\t{text}")
    drawn.save(sheet)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--model")
    parser.add_argument("--only", nargs="*", default=[], choices=[row.name for row in ROWS])
    parser.add_argument("--look", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sheet", type=Path, default=Path("captions.png"))
    asked = parser.parse_args()
    if asked.look:
        look(asked.data, asked.model, asked.look, asked.seed, asked.sheet)
        return
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        (root / "photos").symlink_to((asked.data / "photos").resolve())
        if not asked.only or any(name.startswith("scene") for name in asked.only):
            mplug("data", "scenes", str(root / SCENES), "--n", "6000", "--seed", "777", "--size", "224", "-q")
        table(root, asked.model, asked.only)


if __name__ == "__main__":
    main()
