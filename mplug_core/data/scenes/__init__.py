"""Scenes: a small generated world with captions, questions, phrases, statements and entailment, all exact.

Models are proved on it without any download: every text comes from the scene graph, so every answer can be checked.

- ``world``: the vocabularies (:class:`World`), the scene graph, and how a scene is drawn from a seed
- ``render``: scene -> picture
- ``words``: descriptions of objects ("large red circle") and spatial relations with margins
- ``captions``, ``questions``, ``phrases``, ``statements``, ``entailments``: scene -> text, one kind a file
- ``labels``: dense labels per patch, for warming up a visual encoder
- ``folder``: writes all of it as images and JSON Lines, reads scenes back
- ``leaks``: how well the labels can be guessed from the text alone, or with single things in the picture
"""

from __future__ import annotations

from .captions import caption_correct, captions, parse_caption
from .entailments import entailments
from .folder import SPLITS, holds_scenes, read_scenes, split_sizes, write_scenes
from .labels import patch_labels
from .leaks import shortcut_accuracy, text_only_accuracy
from .phrases import phrases
from .questions import questions
from .render import render
from .statements import statements
from .world import SMALL_WORLD, WORLD, WORLDS, Scene, SceneObject, World, sample_scene

__all__ = [
    "SMALL_WORLD",
    "SPLITS",
    "WORLD",
    "WORLDS",
    "Scene",
    "SceneObject",
    "World",
    "caption_correct",
    "captions",
    "entailments",
    "holds_scenes",
    "parse_caption",
    "patch_labels",
    "phrases",
    "questions",
    "read_scenes",
    "render",
    "sample_scene",
    "shortcut_accuracy",
    "split_sizes",
    "statements",
    "text_only_accuracy",
    "write_scenes",
]
