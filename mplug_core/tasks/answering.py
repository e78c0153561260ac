"""Questions on images, answered batch by batch: images are opened ahead in threads, and encoded once.

What is asked, and how a batch of it is answered, is the caller's: see :class:`Request` and :data:`AnswerBatch`.
Importing this module does not import torch.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from mplug_core.data.ahead import batches_ahead
from mplug_core.errors import MplugError, NotFiniteError

if TYPE_CHECKING:
    from mplug_core.data.pictures import Picture
    from mplug_core.model.mplug import ImageEncoding
    from mplug_core.tasks.task import Ready

R = TypeVar("R")

# Pictures of the last requests that are not opened again; neighbours are often on one image.
_KEPT_PICTURES = 8

MOSTLY_UNKNOWN = 0.5
"""Share of a text's pieces that are unknown to the vocabulary from which on an answer to it has no confidence."""


def unknown_note(text: str, share: float) -> str:
    """What to say of a text of which the vocabulary knows little or nothing."""
    shown = text if len(text) <= 60 else f"{text[:57]}..."
    return f"the vocabulary does not know {share:.0%} of the pieces of {shown!r}: what is said of it means little"


@dataclass(frozen=True)
class Request:
    """Questions on the same image, or images: equal keys are the same image. ``fault`` is what is already known to be
    wrong."""

    images: tuple[Hashable, ...]
    questions: tuple[Any, ...]
    fault: MplugError | None = None


@dataclass(frozen=True)
class Asked:
    """A question, the rows of its images in the encoding that comes with it, and these images."""

    question: Any
    rows: tuple[int, ...]
    pictures: tuple[Picture, ...]


AnswerBatch = Callable[["ImageEncoding", list[Asked]], Sequence["R | MplugError"]]
"""Of each question the result, or what is wrong with it."""


@dataclass(frozen=True)
class Answered(Generic[R]):
    """A request and a result for each of its questions, or in its place what is wrong."""

    request: Request
    results: list[R | MplugError]


def answer_requests(
    ready: Ready,
    requests: Iterable[Request],
    read: Callable[[Any], Picture],
    answer: AnswerBatch[R],
    batch_size: int,
) -> Iterator[list[Answered[R]]]:
    """The answers to ``requests`` in their order, a batch as soon as it is computed.

    ``read`` opens the image of a key; an MplugError that it raises is the result of all questions on it. A result that
    is not a number is a NotFiniteError. ``batch_size``
    is how many images, and how many questions, are computed at once. An image is opened and encoded once for a request,
    for the requests of a batch, and for those that go on with it in the next batch.
    """
    opened, encoder = _Opened(read), _Encoder(ready, batch_size)
    for batch in batches_ahead(requests, opened, batch_size):
        yield _answer_batch(batch, encoder, answer, batch_size)


def _answer_batch(
    batch: list[tuple[Request, tuple[Picture, ...] | MplugError]], encoder: _Encoder, answer: AnswerBatch[R], size: int
) -> list[Answered[R]]:
    found: dict[Hashable, Picture] = {}
    for request, pictures in batch:
        if not isinstance(pictures, MplugError):
            found.update(zip(request.images, pictures, strict=True))
    asked: list[Asked] = []
    if found:
        images, rows = encoder(found)
        for request, pictures in batch:
            if not isinstance(pictures, MplugError):
                places = tuple(rows[key] for key in request.images)
                asked += [Asked(question, places, pictures) for question in request.questions]
    results = iter(
        [_sound(r) for start in range(0, len(asked), size) for r in answer(images, asked[start : start + size])]
    )
    return [
        Answered(request, [pictures if isinstance(pictures, MplugError) else next(results) for _ in request.questions])
        for request, pictures in batch
    ]


def is_finite(value: Any) -> bool:
    """Whether all numbers of a result are finite: those of its fields, its items, its tensors."""
    if isinstance(value, float):
        return math.isfinite(value)
    if is_dataclass(value):
        return all(is_finite(getattr(value, part.name)) for part in fields(value))
    if isinstance(value, dict):
        return all(map(is_finite, value.values()))
    if isinstance(value, list | tuple):
        return all(map(is_finite, value))
    # a tensor, which can't be asked for without torch
    return bool(value.isfinite().all()) if hasattr(value, "isfinite") else True


def _sound(result: R | MplugError) -> R | MplugError:
    return result if isinstance(result, MplugError) or is_finite(result) else NotFiniteError.of("the answer")


class _Opened:
    """Opens the images of requests, in several threads; the pictures of the last ones are kept."""

    def __init__(self, read: Callable[[Any], Picture]) -> None:
        self._read = read
        self._known: OrderedDict[Hashable, Future[Picture]] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, request: Request) -> tuple[Picture, ...]:
        if request.fault is not None:
            raise request.fault
        return tuple(self._picture(key) for key in request.images)

    def _picture(self, key: Hashable) -> Picture:
        with self._lock:
            future = self._known.get(key)
            first = future is None
            if future is None:
                future = self._known[key] = Future()
                if len(self._known) > _KEPT_PICTURES:
                    self._known.popitem(last=False)
        if first:
            try:
                future.set_result(self._read(key))
            except BaseException as error:
                future.set_exception(error)
        return future.result()


class _Encoder:
    """Encodes images once: those of the batch before are kept, as their questions may go on in this one."""

    def __init__(self, ready: Ready, batch_size: int) -> None:
        self._ready, self._batch_size = ready, batch_size
        self._rows: dict[Hashable, int] = {}
        self._images: ImageEncoding | None = None

    def __call__(self, pictures: dict[Hashable, Picture]) -> tuple[ImageEncoding, dict[Hashable, int]]:
        """The encoding, and the row of each image in it."""
        import torch

        from mplug_core.model.mplug import ImageEncoding

        ready = self._ready
        kept = [key for key in pictures if key in self._rows]
        others = {key: picture for key, picture in pictures.items() if key not in self._rows}
        seen = [key for key, picture in others.items() if picture.encoding is not None]
        fresh = [key for key, picture in others.items() if picture.encoding is None]
        parts = []
        with torch.inference_mode():
            if kept and self._images is not None:
                parts.append(self._images[torch.tensor([self._rows[key] for key in kept], device=ready.device)])
            parts += [others[key].encoding.to(ready.device, ready.dtype) for key in seen]
            for start in range(0, len(fresh), self._batch_size):
                pixels = torch.stack([others[key].pixels for key in fresh[start : start + self._batch_size]])
                if ready.device.type == "cuda":  # from pinned memory the copy goes on beside what is computed
                    pixels = pixels.pin_memory()
                pixels = pixels.to(ready.device, non_blocking=True)
                parts.append(ready.model.encode_image(pixels.to(ready.dtype)))
            self._images = parts[0] if len(parts) == 1 else ImageEncoding.join(parts)
        self._rows = {key: row for row, key in enumerate(kept + seen + fresh)}
        return self._images, self._rows
