"""The losses on pairs of an image and a caption of it, of pre-training and of fine-tuning for retrieval: ITC and ITM.

ITC compares with the other pairs of the batch and a queue of the teacher's earlier features, ITM with hard negatives
that ITC finds (paper section 3.3). What they share with each other, the encoded text and the similarities, is computed
once.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from mplug_core.data.batches import Block
from mplug_core.model.mplug import ImageEncoding, MplugModel
from mplug_core.objectives.contrastive import ContrastiveOutput, contrastive_loss
from mplug_core.objectives.matching import HardNegatives, hard_negatives, matching_loss
from mplug_core.tasks.task import Context


def caption_groups(captions: Sequence[str]) -> Tensor:
    """[B] numbers that are equal for equal captions: those are no negatives of each other."""
    return torch.tensor([zlib.crc32(caption.encode()) for caption in captions])


def pair_losses(model: MplugModel, image: ImageEncoding, block: Block, context: Context) -> dict[str, Tensor]:
    """``itc`` and ``itm``, those of them that have a weight.

    ``image``: the pairs' images, row by row. ``block``: ``image`` (rows of the batch's images), ``ids`` and ``mask``
    [B, T], ``group`` [B] of :func:`caption_groups`, and maybe ``fused``, the rows that ITM takes. Stand-ins for photos
    give no losses: they are made of the text.

    A batch without any valid negative (all pairs of one image, or a single pair) has an ITM loss of zero, which
    ``context.counts["itm_skipped"]`` counts.
    """
    if context.image_ids is None or not (context.wants("itc") or context.wants("itm")):
        return {}
    text = model.encode_text(block["ids"], block["mask"])
    text_feature = model.text_feature(text, block["mask"])
    # images with word for word the same caption are each other's positives, not negatives
    first_equal = (block["group"][:, None] == block["group"]).int().argmax(1)
    image_ids = context.image_ids[block["image"]][first_equal]
    temperature = model.temperature.clamp(0.001, 0.5)
    teacher_image = teacher_text = None
    if context.teacher is None:
        # the other processes' pairs are negatives, too
        gathered = (context.gather_with_gradient(image.feature), context.gather_with_gradient(text_feature))
        keys = (*gathered, context.gather(image_ids))
    else:
        with torch.no_grad(), context.autocast():
            teacher = context.teacher.model
            teacher_image = context.teacher_images().feature[block["image"]]
            encoded = teacher.encode_text(block["ids"], block["mask"])
            teacher_text = teacher.text_feature(encoded, block["mask"])
        keys = teacher_keys(teacher_image, teacher_text, image_ids, context)
    output = contrastive_loss(
        image.feature, text_feature, temperature, image_ids,
        image_keys=keys[0], text_keys=keys[1], key_ids=keys[2],
        teacher_image=teacher_image, teacher_text=teacher_text, alpha=context.alpha,
    )  # fmt: skip
    losses = {"itc": output.loss} if context.wants("itc") else {}
    if context.wants("itm") and model.config.fusion != "none":
        losses["itm"] = _matching(model, image, text, block, image_ids, output, context)
    return losses


def teacher_keys(image: Tensor, text: Tensor, ids: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
    """The teacher's features of all processes' pairs, and behind them the queue, which they then enter."""
    image, text, ids = (context.gather(t.float() if t.is_floating_point() else t) for t in (image, text, ids))
    if context.queue is None:
        return image, text, ids
    keys = tuple(torch.cat(pair) for pair in zip((image, text, ids), context.queue.keys(), strict=True))
    context.queue.push(image, text, ids)
    return keys


def _matching(
    model: MplugModel,
    image: ImageEncoding,
    text: Tensor,
    block: Block,
    image_ids: Tensor,
    output: ContrastiveOutput,
    context: Context,
) -> Tensor:
    negatives = hard_negatives(
        output.image_to_text, image_ids, context.generator,
        text_to_image=output.text_to_image, text_groups=block["group"],
    )  # fmt: skip
    if "fused" in block:
        negatives = HardNegatives(*(part[block["fused"]] for part in negatives))
    fused = fuse_triples(model, image, text, block, negatives)
    positive, wrong_text, wrong_image = model.matching_logits(fused).chunk(3)
    matching = matching_loss(positive, (wrong_text, wrong_image), negatives.valid)
    context.count("itm_skipped", matching.skipped)
    return matching.loss


def fuse_triples(
    model: MplugModel, image: ImageEncoding, text: Tensor, block: Block, negatives: HardNegatives
) -> Tensor:
    """Fused texts [3 F, T, W] of the pairs (``fused`` of the block, or all), of their images with wrong texts, and of
    wrong images with their texts: one pass over what is encoded already."""
    here = block.get("fused")
    here = torch.arange(len(text), device=text.device) if here is None else here
    which_image = torch.cat([here, here, negatives.image_of_text])
    which_text = torch.cat([here, negatives.text_of_image, here])
    return model.fuse(image[which_image], text[which_text], block["mask"][which_text])[1]
