"""Pre-training on image-caption pairs: ITC, ITM, MLM and PrefixLM (paper section 3.3)."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from mplug_core.data.batches import Block, Drawn
from mplug_core.data.records import Records, read_captions
from mplug_core.data.text import clean_caption
from mplug_core.model.mplug import ImageEncoding, MplugModel
from mplug_core.objectives.masked_language import IGNORED, mask_tokens, masked_language_loss
from mplug_core.objectives.prefix_language import sequence_loss, split_prefix
from mplug_core.recipe import DataSpec
from mplug_core.tasks.pairs import caption_groups, pair_losses
from mplug_core.tasks.task import Context, Texts, rows


class PretrainTask:
    """The four losses on pairs. Captions without photos take part in MLM and PrefixLM with stand-in images."""

    name = "pretrain"
    objectives = ("itc", "itm", "mlm", "prefix_lm")
    options = ()

    def read(self, spec: DataSpec, text_only: bool = False) -> Records[Any]:
        return read_captions(spec.path, spec.split, spec.format, spec.images, text_only)

    def encode(self, drawn: list[Drawn], rng: random.Random, texts: Texts) -> Block:
        """``image`` [B], ``ids`` and ``mask`` [B, T] and ``group`` [B] of all pairs, which ITC compares; of F of them
        (rows ``fused`` [F], or all) ``masked`` and ``labels`` [F, T] for MLM, and what PrefixSplit has."""
        captions = [clean_caption(rng.choice(record.captions)) for _, record in drawn]
        ids, mask = texts.encode(captions)
        block = {"image": rows(drawn), "ids": ids, "mask": mask, "group": caption_groups(captions)}
        if texts.fused_share < 1:
            few = max(1, round(texts.fused_share * len(drawn)))
            block["fused"] = torch.tensor(sorted(rng.sample(range(len(drawn)), few)))
            ids, mask = ids[block["fused"]], mask[block["fused"]]
        generator = torch.Generator().manual_seed(rng.getrandbits(62))
        tokenizer = texts.tokenizer
        masked, labels = mask_tokens(
            ids, mask, tokenizer.mask_id, tokenizer.vocab_size, tokenizer.special_ids, generator
        )
        split = split_prefix(ids, mask, tokenizer.cls_id, tokenizer.sep_id, generator, tokenizer.pad_id)
        return {**block, "masked": masked, "labels": labels, **split._asdict()}

    def losses(self, model: MplugModel, images: ImageEncoding, block: Block, context: Context) -> dict[str, Tensor]:
        image = images[block["image"]]
        losses = pair_losses(model, image, block, context)
        if "fused" in block:
            image = image[block["fused"]]
        if context.wants("mlm"):
            losses["mlm"] = self._masked(model, image, block, context)
        if context.wants("prefix_lm"):
            losses["prefix_lm"] = self._prefix(model, image, block, context)
        return losses

    def _masked(self, model: MplugModel, image: ImageEncoding, block: Block, context: Context) -> Tensor:
        labelled = block["labels"] != IGNORED
        masked, mask = block["masked"], block["mask"]
        if "fused" in block:
            mask = mask[block["fused"]]
        _, fused = model.fuse(image, model.encode_text(masked, mask), mask)
        hidden, taught, teacher_head = fused[labelled], None, None
        if context.teacher is not None and context.alpha > 0:
            with torch.no_grad(), context.autocast():
                teacher = context.teacher.model
                rows_seen = block["image"][block["fused"]] if "fused" in block else block["image"]
                seen = context.teacher_images()[rows_seen]
                _, fused = teacher.fuse(seen, teacher.encode_text(masked, mask), mask)
                taught, teacher_head = fused[labelled], context.taught(teacher.masked_logits)
        return masked_language_loss(
            hidden, block["labels"][labelled], taught, context.alpha,
            head=model.masked_logits, teacher_head=teacher_head,
        )  # fmt: skip

    def _prefix(self, model: MplugModel, image: ImageEncoding, block: Block, context: Context) -> Tensor:
        prefix, mask = block["prefix_ids"], block["prefix_mask"]
        memory, memory_mask = model.memory(image, model.encode_text(prefix, mask), mask)
        ids = block["target_ids"]
        return sequence_loss(
            model.hidden(ids, block["target_mask"], memory, memory_mask), ids, block["target_mask"],
            head=model.decoder.logits, label_smoothing=context.label_smoothing,
        )  # fmt: skip

    def evaluate(self, *args: Any, **options: Any) -> Any:
        """Pairs are evaluated as captions and as retrieval."""
        raise NotImplementedError("evaluate caption or retrieval")
