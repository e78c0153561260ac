"""A data set like those of real photos: pictures with captions, questions and statements, and captions alone."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mplug_core.recipe import Recipe
from tests.training.recipes import scene_recipe

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "grey": (120, 120, 120)}


def write_photos(folder: Path, n: int = 20) -> Path:
    """``n`` noisy pictures of one colour with records of three tasks, and twice as many captions without a photo."""
    (folder / "images").mkdir(parents=True)
    generator, names = np.random.default_rng(0), list(COLOURS)
    colours = [names[k % len(names)] for k in range(n)]
    images = [f"images/{k}.png" for k in range(n)]
    for image, colour in zip(images, colours, strict=True):
        pixels = np.array(COLOURS[colour]) + generator.integers(-30, 30, (40, 60, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / image)
    pairs = list(zip(images, colours, strict=True))
    captions = [{"image": i, "caption": [f"a {c} wall", f"the wall is {c}"]} for i, c in pairs]
    questions = [{"image": i, "question": "which colour is it?", "answer": c, "question_id": i} for i, c in pairs]
    statements = [
        {"image": i, "statement": f"it is {names[k % 3]}", "label": c == names[k % 3], "identifier": i}
        for k, (i, c) in enumerate(pairs)
    ]
    texts = [{"image_id": f"t{k}", "caption": [f"a {names[k % 4]} wall"]} for k in range(2 * n)]
    for name, records in (("captions", captions), ("questions", questions), ("statements", statements)):
        _write(folder / f"{name}_train.jsonl", records)
    _write(folder / "captions_text_only.jsonl", texts)
    return folder


def _write(file: Path, records: Iterable[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def photo_recipe(photos: Path, folder: Path, *overrides: str) -> Recipe:
    """A recipe like `mini`: a frozen encoder whose features are computed once, an align stage, captions alone."""
    plain = {"path": str(photos), "split": "train", "batch_size": 4, "cached_views": 1, "augment": "none"}
    texts = {"path": str(photos), "split": "text_only", "text_only": True, "batch_size": 4, "tasks": {"caption": 1}}
    sources = {
        "photos": {**plain, "cached_views": 2, "augment": "crop", "tasks": {"caption": 1}},
        "texts": texts,
        "questions": {**plain, "tasks": {"vqa": 1}},
        "statements": {**plain, "tasks": {"statements": 1}},
    }
    stages = [
        {"name": "align", "align": {"folds": 2, "pool": 8}, "steps": 3, "sources": ["photos", "texts"]},
        {"name": "learn", "steps": 3},
    ]
    return scene_recipe(
        photos, folder, "model.summary_tokens=2", "model.image_head={hidden: 16}",
        "freeze=[visual, image_projection]", *overrides,
        data={"vocabulary": "data", "max_text": 16, "sources": sources},
        objectives={"caption": 1, "answer": 1, "statement": 1}, teacher={"alpha": 0, "queue_size": 0}, stages=stages,
    )  # fmt: skip
