"""Pre-training on image-caption pairs: ITC, ITM, MLM and PrefixLM (paper section 3.3)."""

from __future__ import annotations

import random
import zlib
from typing import Any

import torch
from torch import Tensor

from mplug_core.data.batches import Block, Drawn
from mplug_core.data.records import Records, read_captions
from mplug_core.data.text import clean_caption
from mplug_core.model.mplug import ImageEncoding, Mplug
from mplug_core.objectives.contrastive import contrastive_loss
from mplug_core.objectives.masked_language import IGNORED, mask_tokens, masked_language_loss
from mplug_core.objectives.matching import hard_negatives, matching_loss
from mplug_core.objectives.prefix_language import sequence_loss, split_prefix
from mplug_core.recipe import DataSpec
from mplug_core.tasks.task import Context, Texts, rows


class PretrainTask:
    """The four losses on pairs. Captions without photos take part in MLM and PrefixLM with stand-in images."""

    name = "pretrain"
    objectives = ("itc", "itm", "mlm", "prefix_lm")
    options = ()

    def read(self, spec: DataSpec, text_only: bool = False) -> Records[Any]:
        return read_captions(spec.path, spec.split, spec.format, spec.images, text_only)

    def encode(self, drawn: list[Drawn], rng: random.Random, texts: Texts) -> Block:
        captions = [clean_caption(rng.choice(record.captions)) for _, record in drawn]
        ids, mask = texts.encode(captions)
        generator = torch.Generator().manual_seed(rng.getrandbits(62))
        tokenizer = texts.tokenizer
        masked, labels = mask_tokens(
            ids, mask, tokenizer.mask_id, tokenizer.vocab_size, tokenizer.special_ids, generator
        )
        split = split_prefix(ids, mask, tokenizer.cls_id, tokenizer.sep_id, generator, tokenizer.pad_id)
        return {
            "image": rows(drawn),
            "ids": ids,
            "mask": mask,
            # equal captions are no negatives of each other
            "group": torch.tensor([zlib.crc32(caption.encode()) for caption in captions]),
            "masked": masked,
            "labels": labels,
            **split._asdict(),
        }

    def losses(self, model: Mplug, images: ImageEncoding, block: Block, context: Context) -> dict[str, Tensor]:
        image = images[block["image"]]
        losses: dict[str, Tensor] = {}
        imagined = context.image_ids is None
        if not imagined and (context.wants("itc") or context.wants("itm")):
            losses |= self._pair_losses(model, image, block, context)
        if context.wants("mlm"):
            losses["mlm"] = self._masked(model, image, block, context)
        if context.wants("prefix_lm"):
            losses["prefix_lm"] = self._prefix(model, image, block, context)
        return losses

    def _pair_losses(self, model: Mplug, image: ImageEncoding, block: Block, context: Context) -> dict[str, Tensor]:
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
            keys = self._keys(teacher_image, teacher_text, image_ids, context)
        output = contrastive_loss(
            image.feature, text_feature, temperature, image_ids,
            image_keys=keys[0], text_keys=keys[1], key_ids=keys[2],
            teacher_image=teacher_image, teacher_text=teacher_text, alpha=context.alpha,
        )  # fmt: skip
        losses = {"itc": output.loss} if context.wants("itc") else {}
        if context.wants("itm") and model.config.fusion != "none":
            losses["itm"] = self._matching(model, image, text, block, image_ids, output, context)
        return losses

    def _keys(self, image: Tensor, text: Tensor, ids: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        """The teacher's features of all processes' pairs, and behind them the queue, which they then enter."""
        image, text, ids = (context.gather(t.float() if t.is_floating_point() else t) for t in (image, text, ids))
        if context.queue is None:
            return image, text, ids
        keys = tuple(torch.cat(pair) for pair in zip((image, text, ids), context.queue.keys(), strict=True))
        context.queue.push(image, text, ids)
        return keys

    def _matching(
        self,
        model: Mplug,
        image: ImageEncoding,
        text: Tensor,
        block: Block,
        image_ids: Tensor,
        output: Any,
        context: Context,
    ) -> Tensor:
        negatives = hard_negatives(
            output.image_to_text, image_ids, context.generator,
            text_to_image=output.text_to_image, text_groups=block["group"],
        )  # fmt: skip
        here = torch.arange(len(text), device=text.device)
        # one pass over positives, wrong texts and wrong images
        which_image = torch.cat([here, here, negatives.image_of_text])
        which_text = torch.cat([here, negatives.text_of_image, here])
        _, fused = model.fuse(image[which_image], text[which_text], block["mask"][which_text])
        positive, wrong_text, wrong_image = model.matching_logits(fused).chunk(3)
        matching = matching_loss(positive, (wrong_text, wrong_image), negatives.valid)
        context.count("itm_skipped", matching.skipped)
        return matching.loss

    def _masked(self, model: Mplug, image: ImageEncoding, block: Block, context: Context) -> Tensor:
        labelled = block["labels"] != IGNORED
        _, fused = model.fuse(image, model.encode_text(block["masked"], block["mask"]), block["mask"])
        logits = model.masked_logits(fused[labelled])
        teacher_logits = None
        if context.teacher is not None and context.alpha > 0:
            with torch.no_grad(), context.autocast():
                teacher = context.teacher.model
                seen = context.teacher_images()[block["image"]]
                _, fused = teacher.fuse(seen, teacher.encode_text(block["masked"], block["mask"]), block["mask"])
                teacher_logits = teacher.masked_logits(fused[labelled])
        return masked_language_loss(logits, block["labels"][labelled], teacher_logits, context.alpha)

    def _prefix(self, model: Mplug, image: ImageEncoding, block: Block, context: Context) -> Tensor:
        prefix, mask = block["prefix_ids"], block["prefix_mask"]
        memory, memory_mask = model.memory(image, model.encode_text(prefix, mask), mask)
        logits = model.decode(block["target_ids"], memory, memory_mask)
        return sequence_loss(logits, block["target_ids"], block["target_mask"], label_smoothing=context.label_smoothing)

    def evaluate(self, *args: Any, **options: Any) -> Any:
        """Pairs are evaluated as captions and as retrieval."""
        raise NotImplementedError("evaluate caption or retrieval")
