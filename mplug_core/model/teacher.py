"""The momentum teacher, a slow copy of the student that makes soft targets, and the queue of its past features.

Both live outside the training engine, in float32: at a momentum of 0.995 a step moves a weight by less than bfloat16
can hold. The teacher copies every part that makes a target, the fusion included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy

import torch
from torch import Tensor, nn

from mplug_core.model.mplug import MplugModel
from mplug_core.recipe import TeacherSection

CHUNK = 64
"""Parameters per update call: enough to fill the device, few enough to gather when they are sharded."""

Gather = Callable[[Sequence[nn.Parameter]], AbstractContextManager]


class _Absent(nn.Module):
    """Stands where the student has a part that the teacher has not."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def __getattr__(self, name: str):
        raise AttributeError(f"the teacher has no copy of '{self.name}'; add it to the teacher's parts")

    def forward(self, *args, **kwargs):
        raise RuntimeError(f"the teacher has no copy of '{self.name}'; add it to the teacher's parts")


class Teacher(nn.Module):
    """``teacher.model`` has the student's class and methods, its parts named in ``parts``, and no gradient.

    Args:
        student: the model, whole and in place (before an engine shards or casts it).
        momentum: share of the old weight in each update, 0..1.
        parts: names of the student's children to copy; None is all. A child that the student holds as None may be
            named. Parameters and buffers that are the student's own, not a child's, are always copied.

    The module is always in evaluation mode: targets are made without dropout. Call it under ``torch.no_grad()``;
    autocast gives it the compute type of the run while its weights stay float32. It must not become a child of the
    student, or it would be trained, sharded and saved with it.

    Raises:
        ValueError: unknown part, or momentum out of range.
    """

    def __init__(self, student: nn.Module, momentum: float = 0.995, parts: Iterable[str] | None = None) -> None:
        super().__init__()
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum is between 0 and 1, not {momentum}")
        children = dict(student.named_children())
        parts = list(children) if parts is None else list(parts)
        if unknown := [name for name in parts if name not in children and getattr(student, name, self) is not None]:
            raise ValueError(f"the student has no part {', '.join(unknown)}; it has {', '.join(children)}")
        self.momentum = momentum
        self.parts = tuple(name for name in parts if name in children)
        # deepcopy takes what the memo holds for these modules, so parts that aren't needed are never copied
        memo = {id(child): _Absent(name) for name, child in children.items() if name not in parts}
        self.model = deepcopy(student, memo)
        self.float().requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Teacher:
        """Stays in evaluation mode whatever ``mode`` says."""
        return super().train(False)

    def update(self, student: nn.Module, gather: Gather | None = None) -> None:
        """Moves every weight towards the student's by 1 - momentum; buffers become the student's.

        Args:
            student: the same model that the teacher was made from, trained further (an engine's inner module).
            gather: for sharded parameters: takes a list of parameters and returns a context manager within which they
                are whole, e.g. ``lambda chunk: deepspeed.zero.GatheredParameters(chunk, modifier_rank=None)``. All
                ranks must then call this together.

        Raises:
            ValueError: a parameter or buffer of the teacher is missing from the student or has another shape.
        """
        self._move(student, 1 - self.momentum, gather)

    def reset(self, student: nn.Module, gather: Gather | None = None) -> None:
        """Makes every weight equal to the student's, e.g. after the student has loaded others."""
        self._move(student, 1.0, gather)

    @torch.no_grad()
    def _move(self, student: nn.Module, weight: float, gather: Gather | None) -> None:
        # duplicates are kept on the student's side: a shared weight may be known there by the name of an absent part
        theirs = dict(student.named_parameters(remove_duplicate=False))
        buffers = dict(student.named_buffers(remove_duplicate=False))
        mine = list(self.model.named_parameters())
        names = [name for name, _ in mine]
        missing = [name for name in names if name not in theirs]
        missing += [name for name, _ in self.model.named_buffers() if name not in buffers]
        missing += self._uncovered(theirs, {name for name, _ in self.model.named_parameters(remove_duplicate=False)})
        if missing:
            raise ValueError(f"teacher and student do not have the same parts: {_listed(missing)}")
        for start in range(0, len(mine), CHUNK):
            chunk = mine[start : start + CHUNK]
            sources = [theirs[name] for name, _ in chunk]
            with gather(sources) if gather is not None else nullcontext():
                wrong = [
                    f"{name} {tuple(source.shape)} for {tuple(target.shape)}"
                    for (name, target), source in zip(chunk, sources, strict=True)
                    if source.shape != target.shape
                ]
                if wrong:
                    raise ValueError(f"teacher and student differ in shape: {_listed(wrong)}")
                targets = [target for _, target in chunk]
                values = [
                    source.detach().to(device=target.device, dtype=target.dtype)
                    for target, source in zip(targets, sources, strict=True)
                ]
                torch._foreach_lerp_(targets, values, weight)
        for name, buffer in self.model.named_buffers():
            if buffer.shape != buffers[name].shape:
                raise ValueError(f"teacher and student differ in the shape of buffer {name}")
            buffer.copy_(buffers[name])

    def _uncovered(self, theirs: Iterable[str], mine: set[str]) -> list[str]:
        """Parameters of the student, its own and those of the teacher's parts, that the teacher lacks."""
        covered = [name for name in theirs if "." not in name or name.split(".", 1)[0] in self.parts]
        return [name for name in covered if name not in mine]


def _listed(names: Sequence[str], most: int = 5) -> str:
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


class FeatureQueue(nn.Module):
    """The last ``size`` pairs of teacher features, first in, first out: extra negatives for the contrastive loss.

    Buffers: ``image`` and ``text`` [size, dim] float32, ``ids`` [size] int64 with -1 in empty slots, ``pointer`` [1]
    the slot that is written next. They are saved with the state and never trained. A size of 0 is a queue that stays
    empty. Sets of features that must not meet (another task, another data set) get a queue each. With several processes
    each pushes the same gathered features, so that the queues stay equal.
    """

    image: Tensor
    text: Tensor
    ids: Tensor
    pointer: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("image", torch.zeros(size, dim))
        self.register_buffer("text", torch.zeros(size, dim))
        self.register_buffer("ids", torch.full((size,), -1, dtype=torch.long))
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.long))

    @property
    def size(self) -> int:
        """Number of slots."""
        return len(self.ids)

    @torch.no_grad()
    def push(self, image: Tensor, text: Tensor, ids: Tensor) -> None:
        """Writes N pairs (features [N, dim], ids [N]) over the oldest slots; any N, also more than the queue holds.

        Features that are not finite leave the queue as it is.

        Raises:
            ValueError: the three do not have the same number of rows.
        """
        if not len(image) == len(text) == len(ids):
            raise ValueError(f"{len(image)} images, {len(text)} texts and {len(ids)} ids are not pairs")
        # a feature that is no number would be a key of every later loss
        if not self.size or not bool(torch.isfinite(image).all() and torch.isfinite(text).all()):
            return
        # of a batch longer than the queue only the end survives; writing the rest first would write slots twice
        last = slice(max(len(ids) - self.size, 0), None)
        count = len(ids)
        slots = (self.pointer + torch.arange(count, device=self.pointer.device)[last]) % self.size
        self.image[slots] = image[last].to(self.image)
        self.text[slots] = text[last].to(self.text)
        self.ids[slots] = ids[last].to(self.ids)
        self.pointer.add_(count).remainder_(self.size)

    def keys(self) -> tuple[Tensor, Tensor, Tensor]:
        """(image [size, dim], text [size, dim], ids [size]): the buffers themselves, in slot order, empty too.

        They change with the next push: join them to the batch's features (a copy) before they enter a loss.
        """
        return self.image, self.text, self.ids


def build_teacher(
    model: MplugModel, settings: TeacherSection, objectives: Mapping[str, float]
) -> tuple[Teacher | None, FeatureQueue | None]:
    """A teacher where one of the ``objectives`` (weights by name) wants its targets or its keys, with the parts that
    those need; the queue where it has a size and ITC is among them."""
    distilled = settings.alpha > 0 and any(objectives.get(name) for name in ("itc", "mlm", "answer"))
    queued = settings.queue_size > 0 and bool(objectives.get("itc"))
    if not distilled and not queued:
        return None, None
    parts = {"visual", "visual_projection", "image_projection", "summary", "text", "text_projection"}
    if objectives.get("mlm") and settings.alpha > 0:
        parts |= {"fusion", "masked_head"}
    if objectives.get("answer") and settings.alpha > 0:
        parts |= {"fusion", "decoder"}
    parts &= {name for name, _ in model.named_children()}
    queue = FeatureQueue(settings.queue_size, model.config.embed_dim) if queued else None
    return Teacher(model, settings.momentum, parts), queue
