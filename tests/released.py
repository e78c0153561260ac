"""Checkpoints as the authors release them, with random weights, of any size: names, shapes, files and folders."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

Shapes = Iterator[tuple[str, tuple[int, ...]]]


@dataclass(frozen=True)
class Sizes:
    """What the shapes of a released checkpoint follow from; the default is small enough for a test."""

    visual: int = 16
    depth: int = 2
    patch: int = 8
    grid: int = 2
    width: int = 16
    heads: int = 2
    feed: int = 24
    words: int = 30
    positions: int = 12
    text_layers: int = 2
    fusion_layers: int = 4
    decoder_layers: int = 3
    embed: int = 8
    queue: int = 6
    stride: int = 2
    clip_width: int = 8
    clip_words: int = 9
    clip_layers: int = 1

    @property
    def bert(self) -> dict[str, Any]:
        """What ``config_bert.json`` says."""
        return {
            "hidden_size": self.width, "num_attention_heads": self.heads, "text_encoder_layers": self.text_layers,
            "fusion_layers": self.fusion_layers, "stride_layer": self.stride, "hidden_dropout_prob": 0.0,
            "layer_norm_eps": 1e-12,
        }  # fmt: skip


SMALL = Sizes()
BASE = Sizes(
    visual=768, depth=12, patch=16, grid=24, width=768, heads=12, feed=3072, words=30522, positions=512, text_layers=6,
    fusion_layers=6, decoder_layers=12, embed=256, queue=65536, stride=3, clip_width=512, clip_words=49408,
    clip_layers=12,
)  # fmt: skip
TWINS = ("visual_encoder", "text_encoder", "fusion_encoder", "text_decoder", "vision_proj", "text_proj", "visn_fc")


def pair(name: str, *shape: int) -> Shapes:
    """Shapes of a linear layer or norm: its weight, and a bias of the first dimension."""
    yield f"{name}.weight", shape
    yield f"{name}.bias", shape[:1]


def bert_embeddings(name: str, sizes: Sizes) -> Shapes:
    yield f"{name}.position_ids", (1, sizes.positions)
    yield f"{name}.word_embeddings.weight", (sizes.words, sizes.width)
    yield f"{name}.position_embeddings.weight", (sizes.positions, sizes.width)
    yield f"{name}.token_type_embeddings.weight", (2, sizes.width)
    yield from pair(f"{name}.LayerNorm", sizes.width)


def bert_layer(name: str, cross: bool, sizes: Sizes) -> Shapes:
    width = sizes.width
    for attention in ("attention", "crossattention") if cross else ("attention",):
        for part in ("self.query", "self.key", "self.value", "output.dense"):
            yield from pair(f"{name}.{attention}.{part}", width, width)
        yield from pair(f"{name}.{attention}.output.LayerNorm", width)
    yield from pair(f"{name}.intermediate.dense", sizes.feed, width)
    yield from pair(f"{name}.output.dense", width, sizes.feed)
    yield from pair(f"{name}.output.LayerNorm", width)


def language_head(name: str, sizes: Sizes) -> Shapes:
    yield f"{name}.bias", (sizes.words,)
    yield from pair(f"{name}.transform.dense", sizes.width, sizes.width)
    yield from pair(f"{name}.transform.LayerNorm", sizes.width)
    yield f"{name}.decoder.weight", (sizes.words, sizes.width)
    yield f"{name}.decoder.bias", (sizes.words,)


def clip_block(name: str, width: int) -> Shapes:
    yield f"{name}.attn.in_proj_weight", (3 * width, width)
    yield f"{name}.attn.in_proj_bias", (3 * width,)
    yield from pair(f"{name}.attn.out_proj", width, width)
    yield from pair(f"{name}.ln_1", width)
    yield from pair(f"{name}.ln_2", width)
    yield from pair(f"{name}.mlp.c_fc", 4 * width, width)
    yield from pair(f"{name}.mlp.c_proj", width, 4 * width)


def clip(sizes: Sizes) -> Shapes:
    """CLIP, of which only the visual side is used."""
    root, width = "visual_encoder.visual", sizes.visual
    yield f"{root}.class_embedding", (width,)
    yield f"{root}.positional_embedding", (1 + sizes.grid**2, width)
    yield f"{root}.proj", (width, sizes.clip_width)
    yield f"{root}.conv1.weight", (width, 3, sizes.patch, sizes.patch)
    yield from pair(f"{root}.ln_pre", width)
    yield from pair(f"{root}.ln_post", width)
    for k in range(sizes.depth):
        yield from clip_block(f"{root}.transformer.resblocks.{k}", width)
    yield "visual_encoder.logit_scale", ()
    for k in range(sizes.clip_layers):
        yield from clip_block(f"visual_encoder.transformer.resblocks.{k}", sizes.clip_width)
    yield "visual_encoder.token_embedding.weight", (sizes.clip_words, sizes.clip_width)


def released_shapes(sizes: Sizes = SMALL) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a released model with all parts."""

    def all_of() -> Shapes:
        yield from clip(sizes)
        yield from bert_embeddings("text_encoder.embeddings", sizes)
        for k in range(sizes.text_layers):
            yield from bert_layer(f"text_encoder.encoder.layer.{k}", False, sizes)
        yield from bert_embeddings("fusion_encoder.embeddings", sizes)
        for k in range(2 * sizes.fusion_layers):
            yield from bert_layer(f"fusion_encoder.encoder.layer.{k}", k >= sizes.fusion_layers, sizes)
        yield from language_head("fusion_encoder.cls.predictions", sizes)
        yield from bert_embeddings("text_decoder.bert.embeddings", sizes)
        for k in range(sizes.decoder_layers):
            yield from bert_layer(f"text_decoder.bert.encoder.layer.{k}", True, sizes)
        yield from language_head("text_decoder.cls.predictions", sizes)
        yield from pair("vision_proj", sizes.embed, sizes.width)
        yield from pair("text_proj", sizes.embed, sizes.width)
        yield from pair("itm_head", 2, sizes.width)
        if sizes.visual != sizes.width:
            yield from pair("visn_fc", sizes.width, sizes.visual)
            yield from pair("visn_layer_norm", sizes.width)
        yield "temp", ()
        yield "image_queue", (sizes.embed, sizes.queue)
        yield "text_queue", (sizes.embed, sizes.queue)
        yield "idx_queue", (1, sizes.queue)
        yield "queue_ptr", (1,)

    return dict(all_of())


def released(sizes: Sizes = SMALL, dtype: torch.dtype = torch.float32, std: float = 1.0) -> dict[str, Tensor]:
    """A released model of random tensors of this deviation (norms are around 1), with tied heads."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in released_shapes(sizes).items():
        value = torch.randn(shape, generator=generator).mul_(std)
        is_norm = re.search(r"(LayerNorm|\.ln_\w+|layer_norm)\.weight$", name) is not None
        tensors[name] = (value + (std != 1.0) if is_norm else value).to(dtype)
    for part, words in (("text_decoder", "text_decoder.bert"), ("fusion_encoder", "fusion_encoder")):
        tensors[f"{part}.cls.predictions.decoder.weight"] = tensors[f"{words}.embeddings.word_embeddings.weight"]
    return tensors


def with_twins(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The model with its momentum teacher."""
    twins = {}
    for name, value in tensors.items():
        head, _, rest = name.partition(".")
        if head in TWINS:
            twins[f"{head}_m.{rest}"] = value + 1
    return {**tensors, **twins}


def vocabulary(count: int) -> str:
    """``vocab.txt`` with so many pieces."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    return "".join(f"{piece}\n" for piece in [*special, *(f"word{k}" for k in range(count - len(special)))])


def write_alicemind(file: Path, tensors: Mapping[str, Any], wrapper: str = "model", sizes: Sizes = SMALL) -> Path:
    """A file as AliceMind's, with the settings that it needs beside it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save({wrapper: dict(tensors), "epoch": 3}, file)
    (file.parent / "vocab.txt").write_text(vocabulary(sizes.words))
    (file.parent / "config_bert.json").write_text(json.dumps(sizes.bert))
    return file


def write_modelscope(
    folder: Path, tensors: Mapping[str, Any], task: str, sizes: Sizes = SMALL, **settings: Any
) -> Path:
    """A folder as ModelScope's; ``settings`` are fields of ``config.yaml``."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({f"model.{name}": value for name, value in tensors.items()}, folder / "pytorch_model.bin")
    about = {"framework": "pytorch", "task": task, "model": {"type": "mplug"}, "pipeline": {"type": task}}
    (folder / "configuration.json").write_text(json.dumps(about))
    (folder / "config.yaml").write_text(yaml.safe_dump({"bert_config": "config_bert.json", **settings}))
    (folder / "config_bert.json").write_text(json.dumps(sizes.bert))
    (folder / "vocab.txt").write_text(vocabulary(sizes.words))
    return folder
