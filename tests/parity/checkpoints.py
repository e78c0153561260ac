"""Fixtures of released checkpoints: their spellings, their names and shapes, their sizes, and native folders of them.

Where the released loaders differ from the toolkit: they rename only for training, delete entries of the fusion encoder
that need no renaming, and fail on a ``module.`` prefix. Here every spelling is the same model, always.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from mplug_core.data.text import SPECIAL_TOKENS
from mplug_core.model.vision import resize_positions
from mplug_core.weights.conversion import convert_model
from mplug_core.weights.faults import part_faults
from mplug_core.weights.folder import load_model
from mplug_core.weights.official import UNKNOWN, Conversion, canonical, convert, part_of, reason_to_drop
from tests.parity.golden import EXACT, Checks, Folder
from tests.parity.texts import entry_of, same
from tests.released import SMALL, released, with_twins

Shapes = dict[str, list[int]]

TOWERS = ("visual_encoder", "text_encoder", "fusion_encoder", "text_decoder", "visn_fc", "visn_layer_norm")
RUN = {
    "vqa": ("visual", "text", "fusion", "decoder"),
    "caption": ("visual", "decoder"),
    "retrieval": ("visual", "text", "fusion", "contrastive", "matching"),
    "grounding": ("visual", "text", "fusion", "decoder"),
}
"""What runs for a task."""
NO_PARAMETERS = re.compile(
    r"position_ids$|_queue$|queue_ptr$|^prefix_ids$|^target_ids$|^bbox_prob_mask$|\.predictions\.decoder\."
)
"""Buffers, and names of tied weights."""


def renaming(folder: Folder, name: str, checks: Checks) -> None:
    conversion = convert(with_twins(released(replace(SMALL, visual=24, fusion_layers=6, decoder_layers=12))))
    for task, cases in entry_of(folder, name).items():
        for style, case in cases.items():
            where = f"{task}, {style}"
            for old, new in case.get("renamed", {}).items():
                same(checks, f"{where}: {old}", canonical(old), canonical(new))
            for key in [*case.get("renamed", {}).values(), *case.get("dropped", [])]:
                # a place in the model, or a reason for none
                fate = conversion.used.get(canonical(key)) or reason_to_drop(canonical(key), list(range(6, 12)))
                same(checks, f"{where}: {key} is known", fate != UNKNOWN, True)
            for key, change in case.get("pos_embed", {}).items():
                # a list is the shape of a copy that was left as it is
                shapes = [json.loads(s) for s in change.split(" -> ")] if isinstance(change, str) else [change, change]
                before, after = shapes
                grid = round((after[0] - 1) ** 0.5)
                same(checks, f"{where}: {key}", list(resize_positions(torch.zeros(before), (grid, grid)).shape), after)
            if "error" in case:
                key = re.search(r"'(.+)'", case["error"])[1]
                same(checks, f"{where}: {key}", canonical(f"module.{key}"), key)


def key_lists(folder: Folder) -> dict[str, Shapes]:
    """Names and shapes of real models, also of those that the fixture describes by others."""
    lists: dict[str, Shapes] = dict(entry_of(folder, "j10_state_dict_keys_real"))
    lists["base/caption"], lists["large/vqa"] = lists["base/vqa"], lists["large/caption"]
    for size in ("base", "large"):
        lists[f"{size}/vqa/distill"] = momentum(lists[f"{size}/vqa"])
    large = lists["large/caption"]
    visual = {key: shape for key, shape in large.items() if key.startswith(("visual_encoder", "visn"))}
    whole = {key: shape for key, shape in large.items() if not key.startswith("text_decoder")}
    towers = ("visual_encoder", "text_encoder.", "fusion_encoder.")
    heads = {key: shape for key, shape in lists["base/retrieval/distill"].items() if not key.startswith(towers)}
    lists["large/retrieval/distill"] = {**whole, **heads, **{twin(key): shape for key, shape in visual.items()}}
    only = ("vision_proj", "text_proj", "prefix_ids", "target_ids", "bbox_prob_mask")
    grounding = {key: shape for key, shape in lists["base/grounding"].items() if key.startswith(only)}
    lists["large/grounding"] = {**large, **grounding}
    return lists


def twin(key: str) -> str:
    head, _, rest = key.partition(".")
    return f"{head}_m.{rest}"


def momentum(shapes: Shapes) -> Shapes:
    return shapes | {twin(key): shape for key, shape in shapes.items() if key.startswith(TOWERS)}


def real(shapes: Shapes) -> Conversion:
    return convert({key: torch.empty(shape, device="meta") for key, shape in shapes.items()})


def keys(folder: Folder, name: str, checks: Checks) -> None:
    for model, shapes in entry_of(folder, name).items():
        conversion = real(shapes)
        same(checks, f"{model}: account", sorted([*conversion.used, *conversion.dropped]), sorted(shapes))
        same(checks, f"{model}: unknown", [k for k, why in conversion.dropped.items() if why == UNKNOWN], [])
        same(checks, f"{model}: faults", part_faults(conversion), {})
        gaps = [part for part in RUN[model.split("/")[1]] if conversion.missing.get(part)]
        same(checks, f"{model}: missing", gaps, [])
        config = conversion.config
        large = model.startswith("large")
        same(checks, f"{model}: backbone", config.vision.options, {})
        side = round((shapes["visual_encoder.visual.positional_embedding"][0] - 1) ** 0.5)
        same(checks, f"{model}: image size", config.vision.image_size, side * (14 if large else 16))
        same(checks, f"{model}: stride", config.stride, 6 if large else 3)


def counts(folder: Folder, name: str, checks: Checks) -> None:
    lists = key_lists(folder)
    for model, want in entry_of(folder, name).items():
        shapes, conversion = lists[model], real(lists[model])
        numel = {key: torch.Size(shape).numel() for key, shape in shapes.items()}
        modules: dict[str, int] = {}
        for key in shapes:
            if not NO_PARAMETERS.search(key):
                modules[key.split(".")[0]] = modules.get(key.split(".")[0], 0) + numel[key]
        same(checks, f"{model}: by_module", sorted(modules.items()), sorted(want["by_module"].items()))
        same(checks, f"{model}: total_unique", sum(modules.values()), want["total_unique"])
        online = sum(count for module, count in modules.items() if not module.endswith("_m"))
        same(checks, f"{model}: online_without_m", online, want["online_without_m"])
        same(checks, f"{model}: state_dict_keys", len(shapes), want.get("state_dict_keys", len(shapes)))
        compare_used(checks, model, want, conversion, numel)


def compare_used(checks: Checks, model: str, want: Any, conversion: Conversion, numel: dict[str, int]) -> None:
    """What runs, counted in released tensors, and the parameters of ours that they become."""
    used, config, task = conversion.used, conversion.config, model.split("/")[1]
    tower = sum(numel[key] for key in used if key.startswith("visual_encoder."))
    same(checks, f"{model}: visual_tower_used", tower, want["visual_tower_used"])
    same(checks, f"{model}: connected_layers", [k + 6 for k in config.connected_layers], want["connected_layers"])
    reasons = conversion.dropped.items()
    dead = sum(numel[key] for key, why in reasons if why == "cross-attention of a connected layer")
    if "dead_crossattention_in_connected" in want:
        same(checks, f"{model}: dead cross-attention", dead, want["dead_crossattention_in_connected"])
    fusion = sum(numel[key] for key, ours in used.items() if part_of(ours) == "fusion")
    same(checks, f"{model}: fusion_layers_6_11", fusion + dead, want["fusion_layers_6_11"])
    mine = {key: ours for key, ours in used.items() if part_of(ours) in RUN[task]}
    same(checks, f"{model}: actually_used_online", sum(numel[key] for key in mine), want["actually_used_online"])
    # of two segments one is used
    second = sum(config.width for key in mine if key.endswith("token_type_embeddings.weight"))
    parameters = sum(conversion.state[ours].numel() for ours in set(mine.values()))
    same(checks, f"{model}: parameters of ours", parameters + second, want["actually_used_online"])


@torch.no_grad()
def converted(folder: Folder, name: str, checks: Checks) -> None:
    """ModelScope's layout of the weights, and the native folder made of it, are the model of the fixtures."""
    for bert in sorted(folder.path.glob("bert_config_stride*.json")):
        settings = json.loads(bert.read_text(encoding="utf-8"))
        conversion = convert(folder.weights, settings)
        with TemporaryDirectory() as place:
            source, target = Path(place) / "released", Path(place) / "native"
            source.mkdir()
            torch.save({"model": folder.weights}, source / "pytorch_model.bin")
            (source / "configuration.json").write_text('{"task": "visual-question-answering"}', encoding="utf-8")
            (source / "config_bert.json").write_text(json.dumps(settings), encoding="utf-8")
            pieces = [*SPECIAL_TOKENS, *(f"word{k}" for k in range(settings["vocab_size"] - len(SPECIAL_TOKENS)))]
            (source / "vocab.txt").write_text("".join(f"{piece}\n" for piece in pieces), encoding="utf-8")
            convert_model(str(source), target)
            first, second = load_model(str(source)), load_model(str(target))
            for loaded in (first, second):
                state = loaded.model.state_dict()
                same(checks, f"{bert.stem}: names", sorted(state), sorted(conversion.state))
                for key, value in conversion.state.items():
                    checks.compare(f"{bert.stem}: {key}", state[key], value, EXACT)
            for label, one, other in zip(OUTPUTS, outputs(first.model), outputs(second.model), strict=True):
                checks.compare(f"{bert.stem}: {label}", one, other, EXACT)


OUTPUTS = ("tokens", "feature", "text feature", "matching", "logits")


def outputs(model: Any) -> list[Tensor]:
    """What a model makes of the same random picture and words."""
    generator = torch.Generator().manual_seed(0)
    size = model.config.vision.image_size
    images = model.encode_image(torch.randn(2, 3, size, size, generator=generator))
    ids = torch.randint(5, model.config.vocab_size, (2, 7), generator=generator)
    mask = torch.ones_like(ids)
    text = model.encode_text(ids, mask)
    memory, memory_mask = model.memory(images, text, mask)
    _, fused = model.fuse(images, text, mask)
    logits = model.decode(ids, memory, memory_mask)
    return [images.tokens, images.feature, model.text_feature(text, mask), model.matching_logits(fused), logits]


FIXTURES = {"j10_checkpoint": renaming, "j10_state": keys, "j10_param": counts, "converted": converted}
