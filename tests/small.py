"""Models small enough for a test, with every value spelled out: the named sizes may change, these may not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count

from mplug_core.data.records import read_captions, read_entailments, read_phrases, read_questions, read_statements
from mplug_core.data.text import Tokenizer, build_vocabulary
from mplug_core.model.config import MplugConfig
from mplug_core.model.mplug import ImageEncoding, MplugModel

FUSED_ON_CPU = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda q, k, v, *rest, **options: sdpa_flop_count(q, k, v)
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda gradient, q, k, v, *rest, **options: sdpa_backward_flop_count(gradient, q, k, v)
    ),
}
"""What PyTorch's counter of FLOPs does not count by itself."""
VIT = {
    "backbone": "vit_base_patch16_clip_quickgelu_224",
    "image_size": 32,
    "options": {"embed_dim": 32, "depth": 2, "num_heads": 4, "patch_size": 8},
}
CNN = {
    "backbone": "resnet10t",
    "image_size": 32,
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
    "options": {
        "channels": [8, 8, 16, 16], "stem_type": "deep", "stem_width": 8, "output_stride": 16,
        "norm_layer": "groupnorm1",
    },
}  # fmt: skip
CLASSIFIERS = {
    "statement": {"images": 2, "labels": ["false", "true"]},
    "entailment": {"images": 1, "labels": ["entailment", "neutral", "contradiction"]},
}


def small_config(**fields: Any) -> MplugConfig:
    """A transformer on 4 x 4 patches, width 32; ``fields`` override."""
    values: dict[str, Any] = {
        "vision": VIT, "width": 32, "heads": 4, "intermediate": 64, "text_layers": 2, "fusion": "skip",
        "fusion_layers": 4, "stride": 1, "rule": "paper", "decoder_layers": 2, "vocab_size": 64, "max_positions": 40,
        "embed_dim": 16, "dropout": 0.0,
    }  # fmt: skip
    return MplugConfig(**{**values, **fields})


def small_model(seed: int = 0, **fields: Any) -> MplugModel:
    """A model of :func:`small_config` with weights large enough that nothing is nearly zero, in evaluation mode."""
    torch.manual_seed(seed)
    model = MplugModel(small_config(**fields))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
            else:  # timm starts the last norm of a residual branch at zero
                parameter.add_(torch.randn_like(parameter) * 0.1)
        model.temperature.fill_(0.07)
    return model.eval()


def random_inputs(model: MplugModel, images: int = 3, length: int = 6, seed: int = 1) -> tuple[ImageEncoding, Any, Any]:
    """An encoding of random pixels, random ids [B, T], and a mask [B, T] with padding in the second row."""
    generator = torch.Generator().manual_seed(seed)
    size = model.config.vision.image_size
    pixels = torch.randn(images, 3, size, size, generator=generator)
    ids = torch.randint(5, model.config.vocab_size, (images, length), generator=generator)
    mask = torch.ones_like(ids)
    if images > 1:
        mask[1, length // 2 :] = 0
        ids[1, length // 2 :] = 0
    return model.encode_image(pixels), ids, mask


def scene_tokenizer(folder: Path, bins: int = 16) -> Tokenizer:
    """A vocabulary of all texts of the training split."""
    texts: list[str] = []
    for record in read_captions(folder, "train"):
        texts += record.captions
    for record in read_questions(folder, "train"):
        texts += [record.question, *record.answers]
    texts += [record.phrase for record in read_phrases(folder, "train")]
    texts += [record.statement for record in read_statements(folder, "train")]
    texts += [record.hypothesis for record in read_entailments(folder, "train")]
    return Tokenizer(build_vocabulary(texts, box_bins=bins))
