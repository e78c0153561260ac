"""What is wrong with a converted checkpoint: parts that are missing or not whole, weights that were never trained.

The released loader ignores names that it doesn't know, so that a model could run without its fusion, or with random
layers. Here every such thing is a fault that names the part.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor

from mplug_core.errors import CheckpointError
from mplug_core.model.config import MplugConfig
from mplug_core.weights.official import LONE_MATCHING, PARTS, UNKNOWN, Conversion, part_of

TASK_PARTS = {
    "image-captioning": ("visual", "decoder"),
    "visual-question-answering": ("visual", "text", "fusion", "decoder"),
    "image-text-retrieval": ("visual", "text", "fusion", "contrastive", "matching"),
}
"""What a model needs for a task, by ModelScope's names of tasks."""
TOWERS = ("visual", "text", "fusion", "decoder")
RESTS_ON = {
    "visual": (),
    "text": (),
    "decoder": (),
    "contrastive": ("text",),
    "fusion": ("text",),
    "matching": ("text", "fusion"),
    "masked": ("text", "fusion"),
}
"""What a part can't work without."""
STRANGERS = 3
"""Unknown tensors of known parts that are taken for leftovers; more are a sign of another architecture."""
_KNOWN_PARTS = re.compile(r"(visual_encoder\.visual|text_encoder|fusion_encoder|text_decoder|visn_\w+|itm_head)\.")
_NORM = re.compile(r"^(.*norm\w*(?:\.\d+)?)\.(weight|bias)$")


def present_parts(state: Mapping[str, Tensor]) -> set[str]:
    """Parts of which there is anything. The temperature alone is no part."""
    return {part_of(name) for name in state if name != "temperature"}


def part_faults(conversion: Conversion, task: str | None = None) -> dict[str, str]:
    """Parts that must be there, for what else is there or for ``task``, and aren't or aren't whole: what is wrong."""
    present, missing = present_parts(conversion.state), conversion.missing
    faults: dict[str, str] = {}
    for part in PARTS:
        if part in present and missing.get(part):
            more = len(missing[part]) - 1
            faults[part] = f"lacks {missing[part][0]}{f' and {more} more' if more else ''}"
    users = ["decoder"] if "decoder" in present else []
    if "matching" in present or LONE_MATCHING in conversion.dropped.values():
        users.append("matching")
    if "text" in present and users and "fusion" not in present:
        made = " and ".join(shown(user) for user in users)
        faults["fusion"] = f"is not there, and what it makes of the text is for {made}"
    if "text" not in present and present & {"fusion", "contrastive", "matching"}:
        faults["text"] = f"is not there, and {' and '.join(sorted(present & {'fusion', 'contrastive', 'matching'}))} is"
    if not present & {"decoder", "contrastive", "matching"}:
        faults["decoder"] = "is not there, nor is a head that could answer"
    for part in TASK_PARTS.get(task or "", ()):
        if part not in present:
            faults.setdefault(part, f"is not there, and {task} needs it")
    return faults


def head_faults(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Of the two heads of retrieval, the one that is missing where the other one is there.

    Training can start without it, answering can't.
    """
    present = present_parts(state)
    if "fusion" not in present or ("matching" in present) == ("contrastive" in present):
        return {}
    lone, other = ("matching", "contrastive") if "contrastive" in present else ("contrastive", "matching")
    return {lone: f"is not there, and {other} is"}


def untrained(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Parts whose weights are what a model begins with: positions of zeros, norms that were never moved.

    Tensors without values, on the meta device, are not judged.
    """
    faults: dict[str, str] = {}
    positions = state.get("visual.backbone.pos_embed")
    if positions is not None and not positions.is_meta and not positions.any():
        faults["visual"] = "has position embeddings of zeros only: they were never filled"
    norms: dict[str, list[bool]] = {}
    for name, value in state.items():
        found = _NORM.match(name)
        if found and value.dim() == 1 and not value.is_meta and part_of(name) in TOWERS:
            start = 1.0 if found[2] == "weight" else 0.0
            norms.setdefault(part_of(name), []).append(bool((value == start).all()))
    for part, still in norms.items():
        if all(still):
            faults.setdefault(part, "has layer norms of ones and zeros only: it was never trained")
    return faults


def not_finite(value: Tensor) -> int:
    """How many numbers of a weight are NaN or infinite.

    A sum costs a tenth of looking at each number, and is finite where all of them are.
    """
    if value.is_meta or not value.is_floating_point():
        return 0
    wide = torch.float32 if value.dtype in (torch.float16, torch.bfloat16) else value.dtype
    total = value.sum() if value.dtype == torch.bfloat16 else value.sum(dtype=wide)
    # a sum may leave the range of numbers that are within it
    return 0 if total.isfinite() else int((~value.isfinite()).sum())


def check_finite(name: str, value: Tensor, origin: object, others: Mapping[str, Tensor] | None = None) -> None:
    """CheckpointError where a weight of ``origin`` holds numbers that are not finite; it counts those ``others`` that
    do, too."""
    count = not_finite(value)
    if not count:
        return
    more = sum(not_finite(other) > 0 for other in (others or {}).values())
    also = f", and so do{'es' if more == 1 else ''} {more} further tensor{'' if more == 1 else 's'}" if more else ""
    numbers = f"{count} number{'' if count == 1 else 's'} that {'is' if count == 1 else 'are'} not finite"
    raise CheckpointError(f"{origin}: {name} holds {numbers}{also}", "take another checkpoint, or copy it again")


def broken_values(name: str, value: Tensor) -> str | None:
    """What is wrong with the numbers of a weight that are finite: all are the same; None if nothing is."""
    if value.is_meta or not value.is_floating_point():
        return None
    low, high = torch.aminmax(value)
    if value.dim() > 1 and value.numel() > 1 and low == high:
        return f"{name} is {low.item():g} everywhere: it was never trained"
    return None


def strangers(conversion: Conversion) -> list[str]:
    """Unknown tensors that bear the names of parts in use."""
    return [n for n, why in conversion.dropped.items() if why == UNKNOWN and _KNOWN_PARTS.match(n)]


def check_conversion(
    conversion: Conversion, origin: str, task: str | None = None, allowed: Collection[str] = ()
) -> None:
    """CheckpointError for the first fault of a checkpoint called ``origin`` that is not of an ``allowed`` part."""
    unknown = strangers(conversion)
    if len(unknown) > STRANGERS:
        raise CheckpointError(
            f"{origin}: {len(unknown)} tensors of parts in use have unknown names ({', '.join(unknown[:2])}, ...)",
            "is it a released mPLUG?",
        )
    faults = part_faults(conversion, task) | untrained(conversion.state)
    raise_first({part: fault for part, fault in faults.items() if part not in allowed}, origin)


def raise_first(faults: Mapping[str, str], origin: str, hint: str | None = None) -> None:
    """CheckpointError for the first fault, and how many more there are."""
    if not faults:
        return
    part, fault = next(iter(faults.items()))
    more = f" (and {', '.join(list(faults)[1:])}, too)" if len(faults) > 1 else ""
    hint = hint or f"take another checkpoint, or mplug model convert --allow-missing {part}"
    raise CheckpointError(f"{origin}: {shown(part)} {fault}{more}", hint)


def shown(part: str) -> str:
    """A part as people call it."""
    return {
        "visual": "the visual encoder", "text": "the text encoder", "fusion": "the fusion encoder",
        "decoder": "the decoder", "contrastive": "the contrastive head", "matching": "the matching head",
        "masked": "the masked-language head",
    }[part]  # fmt: skip


def with_dependents(parts: Iterable[str]) -> set[str]:
    """Parts, and those that can't work without one of them."""
    gone = set(parts)
    return gone | {part for part, needs in RESTS_ON.items() if gone & set(needs)}


def absent_parts(config: MplugConfig, missing: Mapping[str, list[str]]) -> set[str]:
    """Parts that a model of ``config`` would have and of which ``missing`` names tensors, with what rests on them."""
    gone = {part for part, names in missing.items() if names}
    if config.fusion == "none":
        gone.add("fusion")
    return with_dependents(gone)


def without_parts(
    config: MplugConfig, state: Mapping[str, Tensor], gone: Collection[str]
) -> tuple[MplugConfig, dict[str, Tensor]]:
    """The model without parts: a configuration that builds none of them, and a state without their tensors."""
    optional = ("text", "contrastive", "matching", "masked")
    update: dict[str, object] = {"absent": [part for part in optional if part in gone or part in config.absent]}
    if "fusion" in gone:
        update |= {"fusion": "none", "fusion_layers": 0}
    if "decoder" in gone:
        update |= {"decoder_layers": 0}
    kept = {name: value for name, value in state.items() if part_of(name) not in gone}
    if "contrastive" in gone:  # every model has one
        kept["temperature"] = torch.tensor([config.temperature])
    return config.model_copy(update=update), kept
