"""What may be measured against, by name. Importing this module does not import torch: usage errors answer at once."""

from __future__ import annotations

DECODE = {
    "hf-blip": "HF BLIP, cached",
    "plain": "mPLUG, no cache, nothing shared",
    "no-cache": "mPLUG, no cache",
}
"""Ways to decode, and their names in the table."""
DECODE_ONCE = ("plain", "no-cache")
"""Those of them that take minutes, and are measured once."""

RERANK = ("hf-blip", "plain")
"""HF transformers' BLIP; our own model without sharing."""

NAIVE = ("teacher", "teacher-images", "itm", "padding", "logits", "mlm", "qkv", "attention")
"""Choices of the training step that are undone one at a time (see :mod:`naive`)."""
TOGETHER = {"naive": NAIVE, "naive-but-itm": tuple(name for name in NAIVE if name != "itm")}
SWITCHES = {"checkpointing": "with checkpointing of all towers", "compile": "with engine.compile"}
TRAIN = (*NAIVE, *TOGETHER, *SWITCHES)
"""Ways to take a training step."""
