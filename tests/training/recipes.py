"""A recipe that trains a very small model on scenes in a second or two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mplug_core.recipe import Recipe, check_recipe
from tests.small import CLASSIFIERS, CNN


def scene_recipe(scenes: Path, folder: Path, *overrides: str, **values: Any) -> Recipe:
    """All objectives on 40 scenes at 48 pixels; ``overrides`` as on the command line, ``values`` replace sections."""
    recipe = {
        "name": "test",
        "steps": 6,
        "model": {
            "vision": {**CNN, "image_size": 48}, "width": 32, "heads": 4, "intermediate": 64, "text_layers": 1,
            "fusion": "skip", "fusion_layers": 2, "stride": 1, "decoder_layers": 1, "max_positions": 64,
            "embed_dim": 16, "dropout": 0.1, "box_bins": 8, "classifiers": CLASSIFIERS,
        },
        "data": {
            "vocabulary": "data", "max_text": 40,
            "sources": {
                "scenes": {
                    "path": str(scenes), "split": "train", "batch_size": 8, "augment": "flip",
                    "tasks": {
                        "pretrain": 1, "caption": 1, "vqa": 1, "grounding": 1, "statements": 1, "entailment": 1,
                        "patches": 1,
                    },
                }
            },
        },
        "objectives": {
            "itc": 1, "itm": 1, "mlm": 1, "prefix_lm": 1, "caption": 1, "answer": 1, "box": 1, "statement": 1,
            "entailment": 1, "patches": 1,
        },
        "teacher": {"alpha": 0.4, "queue_size": 24, "ramp_steps": 3},
        "optimizer": {"lr": 2e-3, "warmup_steps": 2},
        "engine": {"name": "plain", "precision": "fp32"},
        "run": {"folder": str(folder), "log_every": 1, "save_every": 3},
    }  # fmt: skip
    if values.get("stages"):  # which have their own lengths
        del recipe["steps"]
    return check_recipe({**recipe, **values}, overrides)
