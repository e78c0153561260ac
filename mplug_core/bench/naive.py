"""A pre-training step as it is written without further thought, one choice at a time.

Each context undoes one choice of ours, within it alone, and computes the same loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from timm.layers.attention import Attention
from torch import Tensor, nn
from torch.nn import functional as F

from mplug_core.data.batches import Batch, Block
from mplug_core.model import attention, vision
from mplug_core.model.attention import CrossAttention, LayerCache, SelfAttention
from mplug_core.model.mplug import ImageEncoding, MplugModel
from mplug_core.model.teacher import Teacher
from mplug_core.objectives.masked_language import IGNORED
from mplug_core.objectives.matching import HardNegatives
from mplug_core.tasks import pairs
from mplug_core.tasks.pretrain import PretrainTask
from mplug_core.tasks.task import Context
from mplug_core.training.engine import PlainEngine
from mplug_core.training.step import TrainStep


@contextmanager
def padded_texts(length: int) -> Iterator[None]:
    """All texts padded to ``length`` tokens, instead of the batch's longest."""
    losses = PretrainTask.losses

    def padded(self: PretrainTask, model: MplugModel, images: ImageEncoding, block: Block, context: Context) -> Any:
        block = {name: _padded(name, value, length) for name, value in block.items()}
        return losses(self, model, images, block, context)

    with mock.patch.object(PretrainTask, "losses", padded):
        yield


def _padded(name: str, value: Tensor, length: int) -> Tensor:
    if value.dim() != 2:
        return value
    return F.pad(value, (0, length - value.shape[1]), value=IGNORED if name == "labels" else 0)


@contextmanager
def unheard_teacher(teacher: Teacher, images_again: bool = False) -> Iterator[None]:
    """A teacher that is run for ITC and MLM, and updated, though distillation is off and nothing looks at its targets.

    ``images_again``: each of the two losses has it encode the images for itself.
    """
    encode, losses, step = TrainStep.encode, PretrainTask.losses, PlainEngine.step
    pixels: list[Tensor] = []

    def encoded(self: TrainStep, batch: Batch, context: Context) -> ImageEncoding:
        pixels[:] = [batch.pixels]
        return encode(self, batch, context)

    def distilled(self: PretrainTask, model: MplugModel, images: ImageEncoding, block: Block, context: Context) -> Any:
        with torch.no_grad():
            mask, seen = block["mask"], teacher.model.encode_image(pixels[0])
            teacher.model.text_feature(teacher.model.encode_text(block["ids"], mask), mask)
            if images_again:
                seen = teacher.model.encode_image(pixels[0])
            hidden = teacher.model.encode_text(block["masked"], mask)
            _, fused = teacher.model.fuse(seen[block["image"]], hidden, mask)
            teacher.model.masked_logits(fused[block["labels"] != IGNORED])
        return losses(self, model, images, block, context)

    def stepped(self: PlainEngine, learning_rate_step: int, steps: int) -> float | None:
        norm = step(self, learning_rate_step, steps)
        teacher.update(self.module.model)
        return norm

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(TrainStep, "encode", encoded))
        stack.enter_context(mock.patch.object(PretrainTask, "losses", distilled))
        stack.enter_context(mock.patch.object(PlainEngine, "step", stepped))
        yield


@contextmanager
def logits_of_all_positions() -> Iterator[None]:
    """PrefixLM's fp32 logits [B, T, V] of every position, padding among them."""

    def prefix(self: PretrainTask, model: MplugModel, image: ImageEncoding, block: Block, context: Context) -> Tensor:
        mask, ids = block["prefix_mask"], block["target_ids"]
        memory, memory_mask = model.memory(image, model.encode_text(block["prefix_ids"], mask), mask)
        logits = model.decode(ids, memory, memory_mask).float()
        labels = ids.masked_fill(block["target_mask"] == 0, IGNORED)[:, 1:]
        return _mean_cross_entropy(logits[:, :-1], labels, context.label_smoothing)

    with mock.patch.object(PretrainTask, "_prefix", prefix):
        yield


@contextmanager
def masked_head_on_all_positions() -> Iterator[None]:
    """MLM's logits [B, T, V] of every position, of which one in seven is asked."""

    def masked(self: PretrainTask, model: MplugModel, image: ImageEncoding, block: Block, context: Context) -> Tensor:
        _, fused = model.fuse(image, model.encode_text(block["masked"], block["mask"]), block["mask"])
        return _mean_cross_entropy(model.masked_logits(fused).float(), block["labels"])

    with mock.patch.object(PretrainTask, "_masked", masked):
        yield


def _mean_cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    total = F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum", label_smoothing=label_smoothing
    )
    return total / (labels != IGNORED).sum().clamp(min=1)


@contextmanager
def negatives_encoded_again() -> Iterator[None]:
    """ITM in three passes, of which those of the negatives encode their images and texts for themselves."""
    encode = TrainStep.encode
    pixels: list[Tensor] = []

    def encoded(self: TrainStep, batch: Batch, context: Context) -> ImageEncoding:
        pixels[:] = [batch.pixels]
        return encode(self, batch, context)

    def passes(model: MplugModel, image: ImageEncoding, text: Tensor, block: Block, negatives: HardNegatives) -> Tensor:
        here = torch.arange(len(text))
        fused = [model.fuse(image, text, block["mask"])[1]]
        for which_image, which_text in ((here, negatives.text_of_image), (negatives.image_of_text, here)):
            mask = block["mask"][which_text]
            seen = model.encode_image(pixels[0][block["image"][which_image]])
            fused.append(model.fuse(seen, model.encode_text(block["ids"][which_text], mask), mask)[1])
        return torch.cat(fused)

    with (
        mock.patch.object(TrainStep, "encode", encoded),
        mock.patch.object(pairs, "fuse_triples", passes),
    ):
        yield


@contextmanager
def separate_projections() -> Iterator[None]:
    """Queries, keys and values by a product each."""

    def own(self: SelfAttention, x: Tensor, allowed: Tensor | None = None, cache: LayerCache | None = None) -> Tensor:
        query, key, value = _projected(self.qkv, x, 3, self.heads)
        if cache is not None:
            key, value = cache.extend(key, value)
        mixed = attention.attend(query, key, value, allowed, self.dropout if self.training else 0.0)
        return self.out(mixed.transpose(1, 2).reshape(x.shape))

    def timms(self: Attention, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        mixed = attention.attend(*_projected(self.qkv, x, 3, self.num_heads), None)
        return self.proj(mixed.transpose(1, 2).reshape(x.shape))

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(SelfAttention, "forward", own))
        stack.enter_context(mock.patch.object(Attention, "forward", timms))
        stack.enter_context(
            mock.patch.object(CrossAttention, "keys_values", lambda s, memory: _projected(s.kv, memory, 2, s.heads))
        )
        yield


def _projected(linear: nn.Linear, x: Tensor, count: int, heads: int) -> list[Tensor]:
    """[B, T, W] by each of ``count`` parts of a projection: [B, H, T, D] each."""
    biases = [None] * count if linear.bias is None else linear.bias.chunk(count)
    products = [F.linear(x, weight, bias) for weight, bias in zip(linear.weight.chunk(count), biases, strict=True)]
    return [product.unflatten(2, (heads, -1)).transpose(1, 2) for product in products]


@contextmanager
def unfused_attention() -> Iterator[None]:
    """Attention as product, softmax and product, which keeps the weights of all keys."""
    never = lambda query: False  # noqa: E731
    with (
        mock.patch.object(attention, "fused_is_faster", never),
        mock.patch.object(vision, "fused_is_faster", never),
    ):
        yield


Undo = Callable[[], AbstractContextManager[None]]


def undone(teacher: Teacher, max_text: int) -> dict[str, tuple[str, Undo]]:
    """What each choice's undoing is called and does, by a short name."""
    return {
        "teacher": ("teacher run though distillation is off", lambda: unheard_teacher(teacher)),
        "teacher-images": ("and its images encoded for each loss", lambda: unheard_teacher(teacher, True)),
        "itm": ("ITM's negatives encoded again, three passes", negatives_encoded_again),
        "padding": (f"texts padded to {max_text} tokens", lambda: padded_texts(max_text)),
        "logits": ("PrefixLM's fp32 logits of all positions", logits_of_all_positions),
        "mlm": ("MLM's head on all positions", masked_head_on_all_positions),
        "qkv": ("separate query, key and value projections", separate_projections),
        "attention": ("unfused attention", unfused_attention),
    }
