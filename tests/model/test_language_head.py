"""The language head on more rows than a chunk: what one product gives, without the logits of all rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mplug_core.model.teacher import Teacher
from mplug_core.objectives.prefix_language import sequence_loss
from mplug_core.tasks.caption import CaptionTask
from mplug_core.tasks.pretrain import PretrainTask
from mplug_core.tasks.task import Context
from mplug_core.tasks.vqa import VqaTask
from tests.small import random_inputs, small_model

VOCABULARY = 61
"""No other size of the small model: a last axis of it is the vocabulary."""


class MostLogits(TorchDispatchMode):
    """Notes the most rows of logits that one tensor has; the head's transposed weight [32, V] is none."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.shape[-1:] == (VOCABULARY,) and tensor.shape[:-1] != (32,):
                self.rows = max(self.rows, tensor.numel() // VOCABULARY)
        return out


def smoothed_loss(chunk: int, seed: int = 0, teacher: bool = True) -> tuple[float, dict[str, Tensor]]:
    """A loss with everything in it, and the decoder's gradients."""
    model, taught = small_model(vocab_size=VOCABULARY), small_model(seed + 1, vocab_size=VOCABULARY)
    image, ids, mask = random_inputs(model)
    for decoder in (model.decoder, taught.decoder):
        decoder.head.chunk = chunk
    inputs = ids[:, :-1], image.tokens.detach(), image.mask
    soft: dict[str, Any] = {}
    if teacher:
        with torch.no_grad():
            soft = {"teacher_hidden": taught.decoder(*inputs), "teacher_head": taught.decoder.logits, "alpha": 0.4}
    loss = sequence_loss(
        model.decoder(*inputs), ids, mask, torch.tensor([0.5, 1.0, 2.0]),
        head=model.decoder.logits, label_smoothing=0.1, **soft,
    )  # fmt: skip
    loss.backward()
    return float(loss.detach()), {name: p.grad for name, p in model.decoder.named_parameters()}


@pytest.mark.parametrize("teacher", [False, True])
@pytest.mark.parametrize("chunk", [1, 5, 11])
def test_chunks_give_the_loss_and_gradients_of_the_whole(chunk: int, teacher: bool) -> None:
    want, gradients = smoothed_loss(1000, teacher=teacher)
    got, in_chunks = smoothed_loss(chunk, teacher=teacher)
    assert got == pytest.approx(want, rel=1e-6)
    for name, gradient in gradients.items():
        assert torch.allclose(in_chunks[name], gradient, atol=1e-6, rtol=1e-4), name


@pytest.mark.parametrize(("chunk", "calls"), [(6, 1), (4, 4), (3, 4)])
def test_only_what_does_not_fit_a_chunk_is_computed_again(chunk: int, calls: int) -> None:
    head, words = small_model().decoder.head, small_model().decoder.embeddings.words
    head.chunk, seen = chunk, []
    hidden = torch.randn(6, 32, requires_grad=True)
    head(
        hidden, words, lambda logits, rows: seen.append((rows.start, rows.stop)) or logits.exp().sum(1)
    ).sum().backward()
    assert len(seen) == calls and seen[0] == (0, min(chunk, 6))
    assert all(stop <= 6 for _, stop in seen)


def test_nothing_is_computed_again_without_a_gradient() -> None:
    decoder, seen = small_model().decoder, []
    decoder.head.chunk = 2
    with torch.no_grad():
        sums = decoder.logits(torch.randn(6, 32), lambda logits, rows: seen.append(rows) or logits.sum(1))
    assert len(seen) == 3 and sums.shape == (6,)


def test_no_rows_keep_the_graph() -> None:
    hidden = torch.zeros(0, 32, requires_grad=True)
    decoder = small_model().decoder
    decoder.logits(hidden, lambda logits, rows: F.cross_entropy(logits, torch.zeros(0).long(), reduction="none")).sum()
    loss = sequence_loss(hidden[None], torch.zeros(1, 1).long(), torch.ones(1, 1), head=decoder.logits)
    loss.backward()
    assert decoder.head.bias.grad.abs().sum() == 0 and hidden.grad is not None


def losses_of(task: str, model: Any, context: Context) -> dict[str, Tensor]:
    """A task's losses on three images, with far more labels than a chunk has rows."""
    _, ids, mask = random_inputs(model)
    images = model.encode_image(torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(2)))
    rows = torch.arange(3)
    target = {"image": rows, "ids": ids, "mask": mask, "target_ids": ids, "target_mask": mask}
    if task == "caption":
        return CaptionTask().losses(model, images, target, context)
    if task == "vqa":
        block = {**target, "question": rows, "weights": torch.ones(3)}
        return VqaTask().losses(model, images, block, context)
    labels = torch.where(mask > 0, ids, -100)
    block = {**target, "masked": ids, "labels": labels, "prefix_ids": ids, "prefix_mask": mask, "group": rows}
    return PretrainTask().losses(model, images, block, context)


@pytest.mark.parametrize("alpha", [0.0, 0.4])
@pytest.mark.parametrize(
    ("task", "objectives"), [("caption", ["caption"]), ("vqa", ["answer"]), ("pretrain", ["mlm", "prefix_lm"])]
)
def test_tasks_never_hold_more_logits_than_a_chunk(task: str, objectives: list[str], alpha: float) -> None:
    model = small_model(vocab_size=VOCABULARY)
    for head in (model.decoder.head, model.masked_head):
        head.chunk = 2
    teacher = Teacher(model)
    images = lambda: teacher.model.encode_image(torch.zeros(3, 3, 32, 32))  # noqa: E731
    context = Context(alpha, weights=dict.fromkeys(objectives, 1.0), teacher=teacher, teacher_images=images)
    with MostLogits() as most:
        losses = losses_of(task, model, context)
        sum(losses.values()).backward()
    assert set(losses) == set(objectives)
    assert most.rows == 2
