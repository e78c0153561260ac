"""A pretrained visual backbone as the start of the visual encoder.

Vision transformers are read as OpenAI and open_clip, Hugging Face's CLIP, or timm lay them out; all their tokens are
used after the final norm, and the projection and the text side of a CLIP are left out. Position embeddings are resized
to the model's grid. Other networks come with timm's names, or as a port whose tensors stand in the same order.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import timm
from timm.layers import QuickGELU
from timm.models import PretrainedCfg
from torch import Tensor, nn

from mplug_core.bounded import read_json
from mplug_core.errors import CheckpointError
from mplug_core.json_text import to_json
from mplug_core.model.config import MplugConfig
from mplug_core.model.mplug import MplugModel
from mplug_core.model.vision import resize_positions
from mplug_core.recipe import nearest
from mplug_core.weights import hub
from mplug_core.weights.faults import check_finite
from mplug_core.weights.official import CLIP_BLOCK, Account, layer_numbers
from mplug_core.weights.pretrained import Origin, find_part, read_tensors, weights_in

FILES = (
    "model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors", "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
)  # fmt: skip
OPENAI_SETTINGS = {"input_resolution", "context_length", "vocab_size"}
"""Settings that OpenAI's own files of CLIP, all of QuickGELU, carry as tensors."""
HUGGING_FACE_BLOCK = {
    "self_attn.out_proj": "attn.proj", "layer_norm1": "norm1", "layer_norm2": "norm2", "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}  # fmt: skip
TEXT_SIDE = (
    "text_model.", "text.", "transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection",
    "attn_mask",
)  # fmt: skip
TIMM = "timm"
CLASSIFIER = re.compile(r"^(head|head_dist|fc_norm|pre_logits)\.")


@dataclass
class VisualTensors:
    """A vision transformer by timm's names. ``dropped``: what else the file holds, in words.

    ``quick_gelu`` is None where nothing tells.
    """

    layout: str
    state: dict[str, Tensor]
    dropped: set[str] = field(default_factory=set)
    quick_gelu: bool | None = None


def is_downloaded(name: str) -> bool:
    """Whether ``start.visual`` is one of timm's own weights, which it fetches itself."""
    return name == "timm" or name.startswith("timm:")


def load_visual(model: MplugModel, name: str) -> Origin:
    """Fill the visual backbone; see :func:`visual_start`. CheckpointError for weights that are not finite."""
    state, origin = visual_start(model, name)
    for key, value in state.items():
        check_finite(key, value, name)
    model.visual.backbone.load_state_dict(state)
    return origin


def visual_start(model: MplugModel, name: str) -> tuple[dict[str, Tensor], Origin]:
    """A state for ``model.visual.backbone``, of whose own weights only names and shapes matter, and where it is from.

    ``name``: ``timm`` (the backbone's own weights) or ``timm:NAME.TAG``, which timm downloads; else a file or folder,
    or what :func:`~mplug_core.weights.pretrained.find_part` knows. CheckpointError for one that can't be had or read,
    that lacks a tensor, or that is of another width, depth or patch.
    """
    if is_downloaded(name):
        name, tensors = timm_weights(name.removeprefix("timm").removeprefix(":"), model.config)
        quick_gelu = of_timm(name)
    else:
        place = find_part(name)
        file = weights_in(place, FILES)
        tensors = read_tensors(file)
        quick_gelu = told_beside(file) if file.name in FILES else None
    if not model.visual.is_transformer:
        chosen = same_network(model.visual.backbone, tensors, name, model.config.vision.backbone)
        return chosen, Origin(f"visual: {len(chosen)} tensors of {name}")
    found = vision_transformer(tensors, name)
    if quick_gelu is not None:
        found.quick_gelu = quick_gelu
    return fitted(found, model, name)


def timm_weights(name: str, config: MplugConfig) -> tuple[str, dict[str, Tensor]]:
    """The full name and the tensors of timm's weights ``name`` (the configured backbone's if empty)."""
    name = name or config.vision.backbone
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        raise CheckpointError(f"timm has no model {architecture!r}{nearest(architecture, timm.list_models())}")
    known = timm.models.list_pretrained(f"{architecture}.*") or timm.models.list_pretrained(architecture)
    tags = [full.partition(".")[2] for full in known]
    if not known or (tag and tag not in tags):
        hint = f"it has {', '.join(known)}" if known else "give start.visual a file, or timm:NAME of a model like it"
        raise CheckpointError(f"timm has no weights of {name}", hint)
    settings = timm.models.get_pretrained_cfg(name)
    full = f"{architecture}.{settings.tag}" if settings.tag else architecture
    classes = config.image_head.classes if config.image_head else 0
    try:
        # fetched here and not by timm, which takes a minute to find out that there is no network
        overlay = {"file": str(timm_file(settings)), "custom_load": False} if settings.hf_hub_id else {}
        source = timm.create_model(
            name, pretrained=True, num_classes=classes, pretrained_cfg_overlay=overlay, **config.vision.options
        )
    except Exception as error:
        reason = error.message if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
        hint = "give start.visual a file, or fetch them once where there is a network"
        raise CheckpointError(f"no weights of {full}: {reason}", hint) from error
    return full, source.state_dict()


def timm_file(settings: PretrainedCfg) -> Path:
    """The file of timm's weights on the hub, fetched."""
    inside = f"/{settings.hf_hub_filename}" if settings.hf_hub_filename else ""
    return weights_in(hub.find(f"hf:{settings.hf_hub_id}{inside}"), FILES)


def of_timm(name: str) -> bool:
    """Whether timm's weights of this full name were trained with QuickGELU."""
    config = timm.models.get_pretrained_cfg(name)
    notes = " ".join(getattr(config, "notes", None) or ())
    return "quickgelu" in name or "QuickGELU" in notes


def told_beside(file: Path) -> bool | None:
    """What a configuration beside the weights says of QuickGELU."""
    for name in ("open_clip_config.json", "config.json"):
        try:
            config = read_json(file.parent / name)
            if "model_cfg" in config:  # open_clip
                return bool(config["model_cfg"].get("quick_gelu", False))
            if "architecture" in config:  # timm
                return "quickgelu" in to_json([config["architecture"], config["pretrained_cfg"].get("notes")])
            return config.get("vision_config", config)["hidden_act"] == "quick_gelu"
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
    return None


def same_network(backbone: nn.Module, tensors: dict[str, Tensor], name: str, kind: str) -> dict[str, Tensor]:
    """The state of a backbone from tensors of its names, or of a port: names may differ, order and shapes may not."""
    ours = backbone.state_dict()
    if set(ours) <= set(tensors):
        chosen = {key: tensors[key] for key in ours}
    else:
        # the classifier comes last and is not built
        chosen = dict(zip(ours, tensors.values(), strict=False))
    if len(chosen) < len(ours):
        raise CheckpointError(f"{name} has {len(chosen)} tensors, {kind} has {len(ours)}")
    for key, value in chosen.items():
        if value.shape != ours[key].shape:
            raise CheckpointError(
                f"{name}: tensor for {key} has shape {tuple(value.shape)}, not {tuple(ours[key].shape)}"
            )
    return chosen


def vision_transformer(tensors: dict[str, Tensor], name: str) -> VisualTensors:
    """The vision transformer among the tensors of a file, however they are laid out; CheckpointError if none is."""
    for read, blocks, markers in (
        (read_openai, "transformer.resblocks.", ("class_embedding", "conv1.weight")),
        (read_hugging_face, "encoder.layers.", ("embeddings.class_embedding", "embeddings.patch_embedding.weight")),
        (read_timm, "blocks.", ("pos_embed", "patch_embed.proj.weight")),
    ):
        prefix = prefix_of(tensors, *markers)
        if prefix is None:
            continue
        account = Account({key.removeprefix(prefix): v for key, v in tensors.items() if key.startswith(prefix)})
        found = VisualTensors(read(account), account.state)
        for key in account.tensors.keys() - account.used.keys():
            if key.startswith(blocks):
                raise CheckpointError(f"{name} has {prefix}{key}, which no vision transformer of {found.layout} has")
            found.dropped.add(outside(key))
        found.dropped |= {outside(key) for key in tensors if not key.startswith(prefix)}
        if tensors.keys() >= OPENAI_SETTINGS:
            found.quick_gelu = True
        return found
    raise CheckpointError(f"{name} holds no vision transformer", "give one of OpenAI, open_clip, Hugging Face or timm")


def prefix_of(tensors: Mapping[str, Tensor], *markers: str) -> str | None:
    """The shortest prefix under which all ``markers`` are names; None if there is none."""
    prefixes = [key.removesuffix(markers[0]) for key in tensors if f".{key}".endswith(f".{markers[0]}")]
    whole = [prefix for prefix in prefixes if all(prefix + marker in tensors for marker in markers)]
    return min(whole, key=len, default=None)


def outside(key: str) -> str:
    """What a tensor is that the visual encoder has no use for, in words."""
    if key.startswith(TEXT_SIDE):
        return "text side"
    if key in ("proj", "visual_projection.weight") or key.startswith("visual.head."):
        return "projection"
    if key in ("logit_scale", "logit_bias", *OPENAI_SETTINGS) or key.endswith("position_ids"):
        return "constants"
    return "classifier" if CLASSIFIER.match(key) else key.split(".")[0]


def read_openai(account: Account) -> str:
    """Take the visual side of CLIP as OpenAI's code and open_clip name it."""
    account.take("class_embedding", "cls_token", account.tensors["class_embedding"].reshape(1, 1, -1))
    if "positional_embedding" in account.tensors:
        account.take("positional_embedding", "pos_embed", account.tensors["positional_embedding"][None])
    account.take_both("conv1", "patch_embed.proj")
    account.take_both("ln_pre", "norm_pre")
    account.take_both("ln_post", "norm")
    for k in layer_numbers(account.tensors, "transformer.resblocks"):
        for theirs, ours in CLIP_BLOCK.items():
            dot = "" if theirs.endswith("_") else "."  # in_proj_weight, but ln_1.weight
            for kind in ("weight", "bias"):
                source = f"transformer.resblocks.{k}.{theirs}{dot}{kind}"
                account.take(source, f"blocks.{k}.{ours}{dot}{kind}")
    return "OpenAI's and open_clip's CLIP"


def read_hugging_face(account: Account) -> str:
    """Take the visual side of Hugging Face's CLIP."""
    token, positions = "embeddings.class_embedding", "embeddings.position_embedding.weight"
    account.take(token, "cls_token", account.tensors[token].reshape(1, 1, -1))
    if positions in account.tensors:
        account.take(positions, "pos_embed", account.tensors[positions][None])
    account.take_both("embeddings.patch_embedding", "patch_embed.proj")
    account.take_both("pre_layrnorm", "norm_pre")  # so it is spelled
    account.take_both("post_layernorm", "norm")
    for k in layer_numbers(account.tensors, "encoder.layers"):
        source = f"encoder.layers.{k}"
        account.stack([f"{source}.self_attn.{part}_proj" for part in ("q", "k", "v")], f"blocks.{k}.attn.qkv")
        for theirs, ours in HUGGING_FACE_BLOCK.items():
            account.take_both(f"{source}.{theirs}", f"blocks.{k}.{ours}")
    return "Hugging Face's CLIP"


def read_timm(account: Account) -> str:
    """Take everything: the names are timm's, or those of a release that timm renames itself."""
    for key in account.tensors:
        account.take(key, key)
    return TIMM


def fitted(found: VisualTensors, model: MplugModel, name: str) -> tuple[dict[str, Tensor], Origin]:
    """The state for the model's backbone, with positions resized to its grid; CheckpointError where it doesn't fit."""
    backbone, kind, grid = model.visual.backbone, model.config.vision.backbone, model.visual.grid
    ours, state, notes = backbone.state_dict(), dict(found.state), []
    same_geometry(state, ours, name, kind)
    if "pos_embed" in state and "pos_embed" in ours and state["pos_embed"].shape != ours["pos_embed"].shape:
        first = ours["pos_embed"].shape[1] - grid[0] * grid[1]
        side = round(max(state["pos_embed"].shape[1] - first, 0) ** 0.5)
        state["pos_embed"] = resize_positions(state["pos_embed"][0], grid, first)[None]
        notes.append(f"positions of {side} x {side} patches resized to {grid[0]} x {grid[1]}")
    if found.layout == TIMM:
        if renamed := getattr(sys.modules[type(backbone).__module__], "checkpoint_filter_fn", None):
            state = renamed(state, backbone)
        if any(CLASSIFIER.match(key) and key not in ours for key in state):
            found.dropped.add("classifier")
            state = {key: value for key, value in state.items() if key in ours or not CLASSIFIER.match(key)}
    for key, value in state.items():
        if key not in ours:
            raise CheckpointError(f"{name} has {key}, for which {kind} has no place", "set model.vision.backbone")
        if value.shape != ours[key].shape:
            raise CheckpointError(
                f"{name}: tensor for {key} has shape {tuple(value.shape)}, not {tuple(ours[key].shape)}"
            )
    missing = [key for key in ours if key not in state]
    if missing:
        raise CheckpointError(f"{name} lacks {missing[0]}", "its file is not whole, or set model.vision.backbone")
    if found.dropped:
        notes.append(f"left out: {', '.join(sorted(found.dropped))}")
    has_quick_gelu = any(isinstance(module, QuickGELU) for module in backbone.modules())
    ours_is, warnings = "QuickGELU" if has_quick_gelu else "GELU", []
    if found.quick_gelu is None and "_clip_" in kind:
        notes.append(f"nothing tells whether it was trained with QuickGELU, {kind} computes {ours_is}")
    elif found.quick_gelu is not None and found.quick_gelu != has_quick_gelu:
        other, hint = ("QuickGELU", "with") if found.quick_gelu else ("GELU", "without")
        hint = f"set model.vision.backbone to the one {hint} quickgelu in its name"
        warnings.append(f"{name} was trained with {other}, {kind} computes {ours_is}: {hint}")
    text = "; ".join([f"visual: {len(state)} tensors of {name} ({found.layout})", *notes])
    return {key: value.float() for key, value in state.items()}, Origin(text, warnings)


def same_geometry(theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor], name: str, kind: str) -> None:
    """CheckpointError, with both numbers, for a vision transformer of another width, depth or patch."""

    def measure(state: Mapping[str, Tensor]) -> dict[str, int]:
        patch = state["patch_embed.proj.weight"].shape
        return {"width": patch[0], "depth": len(layer_numbers(state, "blocks")), "patch": patch[-1]}

    found, wanted = measure(theirs), measure(ours)
    other = [what for what in found if found[what] != wanted[what]]
    if other:
        is_, should = (", ".join(f"{what} {numbers[what]}" for what in other) for numbers in (found, wanted))
        reason = f"{name} is a vision transformer of {is_}, the model's {kind} of {should}"
        raise CheckpointError(reason, "set model.vision.backbone")
