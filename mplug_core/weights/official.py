"""The authors' released checkpoints: their tensor names and ours, and the architecture read off the shapes.

A checkpoint is a dict of tensors, perhaps under ``model`` or ``module``, perhaps with ``module.`` or ``model.`` before
every name, with several spellings of the BERT parts. :func:`convert` gives a configuration and a state dict for
:class:`~mplug_core.model.mplug.MplugModel`, and accounts for every tensor: used, dropped and why, or missing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from mplug_core.errors import CheckpointError
from mplug_core.model.config import MplugConfig
from mplug_core.model.hollow import hollow
from mplug_core.model.mplug import MplugModel
from mplug_core.model.vision import resize_positions
from mplug_core.weights.tensor_names import DAMAGED, check_storage, innermost, named_tensors, plain_name, same

PARTS = ("visual", "text", "fusion", "decoder", "contrastive", "matching", "masked")


Entry = tuple[torch.dtype, tuple[int, ...]]
Release = Callable[[Tensor], None]
"""What is done with a tensor of the checkpoint that has been read and will not be read again."""


@dataclass
class Conversion:
    """The outcome of :func:`convert`.

    ``used`` gives the parameter of ours that a released tensor is, or is a piece of; ``dropped`` why another isn't;
    ``missing`` lists by part our parameters that the checkpoint doesn't fill. ``entries`` has type and shape of each
    released tensor.
    """

    config: MplugConfig
    state: dict[str, Tensor]
    used: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    missing: dict[str, list[str]] = field(default_factory=dict)
    entries: dict[str, Entry] = field(default_factory=dict)

    def require(self, *parts: str) -> None:
        """CheckpointError unless every one of ``parts`` is complete."""
        gaps = [
            f"{part} ({self.missing[part][0]}{', ...' if len(self.missing[part]) > 1 else ''})"
            for part in parts
            if self.missing.get(part)
        ]
        if gaps:
            raise CheckpointError(f"the checkpoint lacks {', '.join(gaps)}", "take a checkpoint of the task at hand")


WRAPPERS = ("model", "module", "state_dict")
"""Keys under which a checkpoint may keep its tensors, also one inside another."""


def unwrap(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a checkpoint with clean, canonical released names."""
    tensors: dict[str, Tensor] = {}
    for name, value in named_tensors(innermost(checkpoint, WRAPPERS)).items():
        check_storage(name, value)
        clean = canonical(name)
        if clean in tensors and not same(tensors[clean], value):
            raise CheckpointError(f"two different tensors of this checkpoint are {clean}", "is it a mix of two models?")
        tensors[clean] = value
    if not tensors:
        raise CheckpointError("there are no tensors in this checkpoint", "give a released mPLUG checkpoint")
    return tensors


def canonical(name: str) -> str:
    """One spelling for each released name."""
    name = re.sub(r"^(model\.)+", "", plain_name(name))
    return re.sub(r"^(text_encoder|fusion_encoder)(_m)?\.(bert|fusion)\.", r"\1\2.", name)


CLIP_BLOCK = {
    "ln_1": "norm1", "attn.in_proj_": "attn.qkv.", "attn.out_proj": "attn.proj", "ln_2": "norm2",
    "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
}  # fmt: skip
BERT_LAYER = {
    "attention.output.dense": "attention.out", "attention.output.LayerNorm": "attention_norm",
    "crossattention.self.query": "cross.query", "crossattention.output.dense": "cross.out",
    "crossattention.output.LayerNorm": "cross_norm",
    "intermediate.dense": "feed_forward.up", "output.dense": "feed_forward.down",
    "output.LayerNorm": "feed_forward_norm",
}  # fmt: skip
HEADS = {
    "vision_proj": "image_projection", "text_proj": "text_projection", "itm_head": "matching_head",
    "visn_fc": "visual_projection.0", "visn_layer_norm": "visual_projection.1",
}  # fmt: skip
PROJECTIONS = ("vision_proj", "text_proj")


FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def matrix(tensors: Mapping[str, Tensor], name: str, dimensions: int = 2) -> Tensor:
    """A tensor with so many dimensions, none of them empty; CheckpointError if it is not there or is another."""
    if name not in tensors:
        raise CheckpointError(f"no tensor {name} in this checkpoint", "is it a released mPLUG?")
    if tensors[name].dim() != dimensions or not tensors[name].numel():
        shape = tuple(tensors[name].shape)
        raise CheckpointError(f"{name} has shape {shape}, not {dimensions} dimensions", DAMAGED)
    return tensors[name]


class Account:
    """Takes tensors out of a checkpoint and remembers what became of each.

    ``release`` gets tensors that were copied, and are not needed any more.
    """

    def __init__(self, tensors: dict[str, Tensor], release: Release | None = None) -> None:
        self.tensors = tensors
        self.release = release or (lambda tensor: None)
        self.state: dict[str, Tensor] = {}
        self.used: dict[str, str] = {}

    def take(self, source: str, target: str, value: Tensor | None = None) -> None:
        if source in self.tensors:
            self.state[target] = self.tensors[source] if value is None else value
            self.used[source] = target

    def take_both(self, source: str, target: str) -> None:
        for kind in ("weight", "bias"):
            self.take(f"{source}.{kind}", f"{target}.{kind}")

    def stack(self, sources: list[str], target: str) -> None:
        """Several projections to one fused projection."""
        for kind in ("weight", "bias"):
            names = [f"{source}.{kind}" for source in sources]
            if all(name in self.tensors for name in names):
                pieces = [self.tensors[name] for name in names]
                if any(piece.shape != pieces[0].shape for piece in pieces):
                    raise CheckpointError(f"{', '.join(names)} have different shapes", DAMAGED)
                self.state[f"{target}.{kind}"] = torch.cat(pieces)
                self.used.update(dict.fromkeys(names, f"{target}.{kind}"))
                for piece in pieces:
                    self.release(piece)

    def bert_layer(self, source: str, target: str, cross: bool) -> None:
        self.stack([f"{source}.attention.self.{part}" for part in ("query", "key", "value")], f"{target}.attention.qkv")
        if cross:
            self.stack([f"{source}.crossattention.self.{part}" for part in ("key", "value")], f"{target}.cross.kv")
        for theirs, ours in BERT_LAYER.items():
            if cross or not theirs.startswith("crossattention"):
                self.take_both(f"{source}.{theirs}", f"{target}.{ours}")

    def embeddings(self, source: str, target: str) -> None:
        self.take(f"{source}.word_embeddings.weight", f"{target}.words.weight")
        self.take(f"{source}.position_embeddings.weight", f"{target}.positions.weight")
        segments = f"{source}.token_type_embeddings.weight"
        if segments in self.tensors:
            self.take(segments, f"{target}.segment", matrix(self.tensors, segments)[0])
        self.take_both(f"{source}.LayerNorm", f"{target}.norm")

    def language_head(self, source: str, target: str, words: str) -> None:
        self.take_both(f"{source}.transform.dense", f"{target}.dense")
        self.take_both(f"{source}.transform.LayerNorm", f"{target}.norm")
        self.take(f"{source}.bias", f"{target}.bias")
        tied = self.tensors.get(f"{source}.decoder.weight")
        if tied is not None and words in self.tensors and not same(tied, self.tensors[words]):
            raise CheckpointError(f"{source}.decoder.weight differs from {words}, to which it is tied", DAMAGED)
        if tied is not None:
            self.release(tied)


def layer_numbers(tensors: Mapping[str, Tensor], prefix: str) -> list[int]:
    """Numbers N of ``prefix.N.`` among the names."""
    pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.")
    return sorted({int(match[1]) for name in tensors if (match := pattern.match(name))})


def layer_count(tensors: Mapping[str, Tensor], prefix: str) -> int:
    """One more than the highest number, so that a gap among the layers is missing and not passed over."""
    return max(layer_numbers(tensors, prefix), default=-1) + 1


def read_config(tensors: Mapping[str, Tensor], bert: Mapping[str, Any] | None = None, **overrides: Any) -> MplugConfig:
    """The architecture from the shapes, and from ``config_bert.json`` what shapes don't tell (heads, stride).

    Without ``bert``, heads are 64 wide, the fusion is the second half of its BERT, and the stride is 3 for a visual
    width of 768 and 6 for 1024, as in the released files. CheckpointError where they don't make a model.
    """
    bert = bert or {}
    visual, words_name = "visual_encoder.visual.", "embeddings.word_embeddings.weight"
    patch = matrix(tensors, f"{visual}conv1.weight", 4).shape
    positions = len(matrix(tensors, f"{visual}positional_embedding")) - 1
    vision_width, depth = patch[0], layer_count(tensors, f"{visual}transformer.resblocks")
    encoder = "text_encoder" if f"text_encoder.{words_name}" in tensors else "text_decoder.bert"
    words = matrix(tensors, f"{encoder}.{words_name}")
    width = words.shape[1]
    if bert.get("hidden_size", width) != width:
        raise CheckpointError(
            f"config_bert.json says hidden_size {bert['hidden_size']}, and {encoder}.{words_name} is {width} wide",
            "put the config_bert.json of this checkpoint beside it",
        )
    layers = layer_numbers(tensors, f"{encoder}.encoder.layer")
    if not layers:
        raise CheckpointError(f"no layer of {encoder} in this checkpoint", "is it a released mPLUG?")
    fusion = layer_count(tensors, "fusion_encoder.encoder.layer")
    # the layers that run are the last half of a BERT, of which a file may hold only those
    fusion_count = bert.get("fusion_layers") or fusion // 2 if fusion else 0
    text = layer_count(tensors, "text_encoder.encoder.layer")
    # a whole BERT of 12 layers runs the first half as text encoder, too
    text_layers = bert.get("text_encoder_layers") or (6 if text in (0, 12) else text)
    if "prefix_ids" in tensors and text:
        text_layers = min(text_layers, text)  # grounding's text encoder was cut
    known = {
        (768, 12, 16): "vit_base_patch16_clip_quickgelu_224",
        (1024, 24, 14): "vit_large_patch14_clip_quickgelu_224",
    }
    backbone = known.get((vision_width, depth, patch[-1]))
    options: dict[str, Any] = {}
    if backbone is None:
        backbone = "vit_base_patch16_clip_quickgelu_224"
        heads = max(1, vision_width // 64)
        options = {"embed_dim": vision_width, "depth": depth, "num_heads": heads, "patch_size": patch[-1]}
    values: dict[str, Any] = {
        "vision": {"backbone": backbone, "image_size": round(positions**0.5) * patch[-1], "options": options},
        "width": width,
        "heads": bert.get("num_attention_heads") or max(1, width // 64),
        "intermediate": len(matrix(tensors, f"{encoder}.encoder.layer.{layers[0]}.intermediate.dense.weight")),
        "text_layers": text_layers,
        "fusion": "skip" if fusion else "none",
        "fusion_layers": fusion_count,
        "stride": bert.get("stride_layer") or (6 if vision_width == 1024 else 3),
        "rule": "released",
        "decoder_layers": layer_count(tensors, "text_decoder.bert.encoder.layer"),
        "vocab_size": words.shape[0],
        "max_positions": len(matrix(tensors, f"{encoder}.embeddings.position_embeddings.weight")),
        "layer_norm_eps": bert.get("layer_norm_eps", 1e-12),
        "dropout": bert.get("hidden_dropout_prob", 0.1),
        "embed_dim": len(matrix(tensors, "text_proj.weight")) if "text_proj.weight" in tensors else 256,
    }
    try:
        return MplugConfig(**{**values, **overrides})
    except ValidationError as error:
        first = error.errors()[0]
        what = ".".join(str(part) for part in first["loc"]) or "the whole"
        raise CheckpointError(f"the checkpoint's architecture can't be: {what}: {first['msg']}", DAMAGED) from error


def convert(
    checkpoint: Mapping[str, Any],
    bert: Mapping[str, Any] | None = None,
    image_size: int | None = None,
    release: Release | None = None,
) -> Conversion:
    """Released tensors to ours. ``image_size`` in pixels resizes the position embedding.

    Only tensors that are copied to be joined are read here, and then given to ``release``; all others stay where they
    are. CheckpointError where the shapes don't make a model.
    """
    tensors = unwrap(checkpoint)
    config = read_config(tensors, bert)
    account = Account(tensors, release)
    _take_visual(account, tensors, config, image_size)
    if image_size is not None:
        config = config.model_copy(update={"vision": config.vision.model_copy(update={"image_size": image_size})})

    account.embeddings("text_encoder.embeddings", "text.embeddings")
    for k in range(config.text_layers):
        account.bert_layer(f"text_encoder.encoder.layer.{k}", f"text.layers.{k}", cross=False)
    last = layer_count(tensors, "fusion_encoder.encoder.layer")
    fusion = list(range(last - config.fusion_layers, last))
    for k, number in enumerate(fusion):
        connected = k in config.connected_layers
        target = f"fusion.layers.{k}.{'joint' if connected else 'text'}"
        account.bert_layer(f"fusion_encoder.encoder.layer.{number}", target, cross=not connected)
    account.embeddings("text_decoder.bert.embeddings", "decoder.embeddings")
    for k in range(config.decoder_layers):
        account.bert_layer(f"text_decoder.bert.encoder.layer.{k}", f"decoder.layers.{k}", cross=True)
    account.language_head(
        "text_decoder.cls.predictions", "decoder.head", "text_decoder.bert.embeddings.word_embeddings.weight"
    )
    account.language_head(
        "fusion_encoder.cls.predictions", "masked_head", "fusion_encoder.embeddings.word_embeddings.weight"
    )
    # grounding's projections were never trained: they have no temperature
    projections = "temp" in tensors or "prefix_ids" not in tensors
    for theirs, ours in HEADS.items():
        if (ours != "matching_head" or config.fusion != "none") and (projections or theirs not in PROJECTIONS):
            account.take_both(theirs, ours)
    if "temp" in tensors:
        if tensors["temp"].numel() != 1:
            raise CheckpointError(f"temp has shape {tuple(tensors['temp'].shape)}, and is one number", DAMAGED)
        account.take("temp", "temperature", tensors["temp"].reshape(1))
    dropped = {name: reason_to_drop(name, fusion, projections) for name in tensors if name not in account.used}
    missing = missing_by_part(config, account.state)
    entries: dict[str, Entry] = {name: (value.dtype, tuple(value.shape)) for name, value in tensors.items()}
    return Conversion(config, account.state, account.used, dropped, missing, entries)


def _take_visual(account: Account, tensors: dict[str, Tensor], config: MplugConfig, image_size: int | None) -> None:
    theirs, ours = "visual_encoder.visual.", "visual.backbone."
    positions = tensors[f"{theirs}positional_embedding"]
    if image_size is not None:
        patch = tensors[f"{theirs}conv1.weight"].shape[-1]
        positions = resize_positions(positions, (patches(image_size, patch),) * 2)
    account.take(f"{theirs}positional_embedding", f"{ours}pos_embed", positions[None])
    if f"{theirs}class_embedding" in tensors:
        token = matrix(tensors, f"{theirs}class_embedding", 1)
        account.take(f"{theirs}class_embedding", f"{ours}cls_token", token.reshape(1, 1, -1))
    account.take(f"{theirs}conv1.weight", f"{ours}patch_embed.proj.weight")
    account.take_both(f"{theirs}ln_pre", f"{ours}norm_pre")
    account.take_both(f"{theirs}ln_post", f"{ours}norm")
    for k in layer_numbers(tensors, f"{theirs}transformer.resblocks"):
        for block_name, timm_name in CLIP_BLOCK.items():
            dot = "" if block_name.endswith("_") else "."
            for kind in ("weight", "bias"):
                source = f"{theirs}transformer.resblocks.{k}.{block_name}{dot}{kind}"
                account.take(source, f"{ours}blocks.{k}.{timm_name}{dot}{kind}")


UNKNOWN, LONE_MATCHING = "unknown", "matching head without a fusion"


def patches(image_size: int, patch: int) -> int:
    """Patches along a side of an image; CheckpointError where they don't fill it."""
    if image_size < patch or image_size % patch:
        near = max(1, round(image_size / patch)) * patch
        raise CheckpointError(f"image size {image_size} is not a multiple of the patches' {patch}", f"{near} is")
    return image_size // patch


def reason_to_drop(name: str, fusion: list[int], projections: bool = True) -> str:
    """Why a released tensor has no place in the model, whose fusion has these layers of BERT."""
    if re.match(r"^\w+_m\.", name):
        return "momentum teacher"
    if name in ("image_queue", "text_queue", "idx_queue", "queue_ptr"):
        return "feature queue"
    if name == "visual_encoder.visual.proj" or re.match(r"^visual_encoder\.(?!visual\.)", name):
        return "unused side of CLIP"
    if name.endswith("position_ids") or name in ("prefix_ids", "target_ids", "bbox_prob_mask"):
        return "constant"
    if name.endswith("token_type_embeddings.weight"):
        return "unused segment"
    if name.startswith("fusion_encoder.embeddings."):
        return "the fusion has no embeddings of its own"
    layer = re.match(r"^fusion_encoder\.encoder\.layer\.(\d+)\.(\w+)", name)
    if layer and int(layer[1]) not in fusion:
        return "fusion layer that never runs"
    if layer and layer[2] == "crossattention":
        return "cross-attention of a connected layer"
    if re.match(r"^(text_decoder|fusion_encoder)\.cls\.predictions\.decoder\.(weight|bias)$", name):
        return "tied"
    if re.match(r"^text_encoder\.encoder\.layer\.\d+\.(attention|intermediate|output)\.", name):
        return "text layer that never runs"
    if re.match(r"^text_encoder\.pooler\.|^text_decoder\.bert\.pooler\.|^fusion_encoder\.pooler\.", name):
        return "pooler that never runs"
    if not projections and name.split(".")[0] in PROJECTIONS:
        return "projection that was never trained"
    if name.startswith("itm_head.") and not fusion:
        return LONE_MATCHING
    return UNKNOWN


def part_of(name: str) -> str:
    """The part of the model that one of our parameters belongs to."""
    first = name.split(".")[0]
    return {
        "visual_projection": "visual", "grid_positions": "visual", "image_projection": "contrastive",
        "text_projection": "contrastive", "temperature": "contrastive", "matching_head": "matching",
        "masked_head": "masked",
    }.get(first, first)  # fmt: skip


def expected_shapes(config: MplugConfig) -> dict[str, torch.Size]:
    """Names and shapes of a model's state."""
    return _expected_shapes(config.model_dump_json())


@lru_cache(maxsize=4)
def _expected_shapes(config: str) -> dict[str, torch.Size]:
    with hollow():
        model = MplugModel(MplugConfig.model_validate_json(config))
    return {name: value.shape for name, value in model.state_dict().items()}


COUNTER = ".num_batches_tracked"
"""Of batch norms: what is no weight, and no float."""


def missing_by_part(config: MplugConfig, state: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Our parameters that ``state`` doesn't hold, by part; CheckpointError for a wrong shape."""
    missing: dict[str, list[str]] = {}
    for name, shape in expected_shapes(config).items():
        if name not in state:
            missing.setdefault(part_of(name), []).append(name)
        elif state[name].shape != shape:
            raise CheckpointError(f"{name} has shape {tuple(state[name].shape)}, not {tuple(shape)}", DAMAGED)
        elif state[name].dtype not in FLOATS and not name.endswith(COUNTER):
            raise CheckpointError(f"{name} holds {state[name].dtype}, which are no weights", DAMAGED)
    return missing
