"""Pictures: whatever a program has of an image, opened and fitted to the model's square."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import IO, TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from PIL import Image, ImageSequence
from torch import Tensor

from mplug_core.data.embedded import image_in_text, is_data_url, shown_name
from mplug_core.data.images import MAX_BYTES, PlacedTransform, convert_image, full_size, open_image
from mplug_core.data.placement import WHOLE, Placement
from mplug_core.data.web import download
from mplug_core.download import is_address
from mplug_core.errors import ImageError

if TYPE_CHECKING:
    from mplug_core.model.mplug import ImageEncoding


@dataclass(frozen=True)
class Picture:
    """An opened image: the model's input [3, S, S], where the picture lies in it, and the upright picture's width and
    height. ``encoding`` (of one row) is what the model sees in it, where it has looked at it already, and ``whole`` the
    picture itself where somebody needs it further.
    """

    pixels: Tensor
    placement: Placement
    size: tuple[int, int]
    encoding: ImageEncoding | None = None
    whole: Image.Image | None = None

    @classmethod
    def placed(cls, picture: Image.Image, transform: PlacedTransform) -> Picture:
        """An upright RGB picture as the model will see it."""
        return cls(*transform(picture), full_size(picture))

    def content(self) -> bytes:
        """What tells the picture from others as the model sees it, wherever it came from: a digest of its pixels."""
        return content_of(self.pixels)


def content_of(pixels: Tensor) -> bytes:
    """A digest of normalised pixels [3, S, S]."""
    return blake2b(pixels.float().cpu().contiguous().numpy().data, digest_size=16).digest()


ImageSource: TypeAlias = (
    str | os.PathLike[str] | bytes | bytearray | memoryview | IO[bytes] | Mapping[str, Any] | Image.Image | np.ndarray
    | Tensor | Picture
)  # fmt: skip
"""One image: a path, an http(s) address, a ``data:`` URL or base64 (a str), the bytes of a file, an open binary file, a
dict with ``bytes`` or ``path`` (as the datasets package has them), a Pillow image, a uint8 array [H, W, 3], a uint8
tensor [3, H, W], a float tensor [3, S, S] of pixels that are normalised as the model wants them, or an opened picture.
"""


def is_one_image(value: Any) -> bool:
    """Whether a value is one image by its type, whatever it can be iterated over for; arrays and tensors with a batch
    dimension in front are several."""
    if isinstance(value, np.ndarray):
        return value.ndim == 0 or (value.ndim != 4 and value.dtype.kind not in "OU")
    if isinstance(value, Tensor):
        return value.ndim != 4
    one = (str, os.PathLike, bytes, bytearray, memoryview, Mapping, Image.Image, ImageSequence.Iterator, Picture)
    return isinstance(value, one) or hasattr(value, "read")


def open_picture(source: ImageSource, transform: PlacedTransform, name: str = "the image") -> Picture:
    """Open one image for a model. ``name`` is what errors call one that has no name of its own.

    ImageError for one that can't be had, see :func:`~mplug_core.data.images.open_image`, or is of no such kind.
    """
    if isinstance(source, Picture):
        return source
    if isinstance(source, Tensor) and source.is_floating_point():
        return _normalised(source, transform.size, name)
    return Picture.placed(open_source(source, transform.size, name), transform)


def open_source(source: ImageSource, target: int | None = None, name: str = "the image") -> Image.Image:
    """Open one image as an upright RGB picture; ``target`` and errors as of ``open_image``."""
    if isinstance(source, str):
        return _open_text(source, target, name)
    if isinstance(source, os.PathLike):
        return open_image(os.fspath(source), target=target)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return open_image(bytes(source), target=target, name=name)
    if hasattr(source, "read"):
        return open_image(_bytes_of(source, name), target=target, name=_name_of(source) or name)
    if isinstance(source, Mapping):
        return _open_mapping(source, target, name)
    if isinstance(source, ImageSequence.Iterator):
        source = source.im
    if isinstance(source, Image.Image):
        return convert_image(source, name)
    if isinstance(source, Tensor):
        if source.dtype != torch.uint8 or source.dim() != 3 or len(source) != 3:
            raise _no_image(name, "tensor", "float [3, S, S] or uint8 [3, H, W]", source)
        source = source.permute(1, 2, 0).cpu().numpy()
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3:
            raise _no_image(name, "array", "uint8 [H, W, 3]", source)
        return convert_image(Image.fromarray(np.ascontiguousarray(source)), name)
    raise ImageError(
        f"{name} is no image but a {type(source).__name__}",
        "give a path, an address, bytes, an open file, a Pillow image, an array or a tensor", "not_an_image",
    )  # fmt: skip


def _open_text(source: str, target: int | None, name: str) -> Image.Image:
    """A path, an address, a data: URL or base64."""
    if is_address(source):
        return open_image(download(source), target=target, name=shown_name(source))
    called = shown_name(source) if is_data_url(source) else name
    data = image_in_text(source, called)
    return open_image(source, target=target) if data is None else open_image(data, target=target, name=called)


def _bytes_of(file: Any, name: str) -> bytes:
    """What is in an open file, from its beginning where it can go back there, as Pillow reads it."""
    try:
        if getattr(file, "seekable", lambda: hasattr(file, "seek"))():
            file.seek(0)
        data = file.read(MAX_BYTES + 1)
    except ImageError:
        raise
    except Exception as error:  # a file of whatever kind
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ImageError(f"{name} can't be read: {reason}", "give a binary file that is open", "unreadable") from error
    if not isinstance(data, (bytes, bytearray, memoryview)):
        kind = type(data).__name__
        raise ImageError(f"{name} is a file that gives {kind}, not bytes", 'open it with "rb"', "unreadable")
    if len(data) > MAX_BYTES:
        raise ImageError(f"{name} has more than {MAX_BYTES >> 20} MB", "scale it down", "too_large")
    return bytes(data)


def _name_of(file: Any) -> str | None:
    name = getattr(file, "name", None)
    return name if isinstance(name, str) and name and name.isprintable() else None


def _open_mapping(source: Mapping[str, Any], target: int | None, name: str) -> Image.Image:
    """``{"bytes", "path"}``: the bytes where there are some, else the file."""
    data, path = source.get("bytes"), source.get("path")
    if isinstance(data, (bytes, bytearray, memoryview)):
        return open_image(bytes(data), target=target, name=name)
    if data is None and isinstance(path, (str, os.PathLike)) and os.fspath(path):
        return open_source(path, target, name)
    hint = 'give {"bytes": ..., "path": ...}, as the datasets package has images'
    kind = type(source).__name__
    raise ImageError(f"{name} is a {kind} without the bytes or the path of an image", hint, "not_an_image")


def _normalised(pixels: Tensor, size: int, name: str) -> Picture:
    """Pixels that somebody has prepared; what they were cut from is not known, so that the square is the picture."""
    if tuple(pixels.shape) != (3, size, size):
        raise _no_image(name, "float tensor", f"the model's normalised pixels [3, {size}, {size}]", pixels)
    pixels = pixels.detach().float().cpu()
    if not pixels.isfinite().all():
        raise ImageError(f"{name} has pixels that are not finite", "give numbers", "broken")
    return Picture(pixels, WHOLE, (size, size))


def _no_image(name: str, kind: str, expected: str, found: np.ndarray | Tensor) -> ImageError:
    shown = f"{str(found.dtype).removeprefix('torch.')} {list(found.shape)}"
    return ImageError(f"{name} is a {kind} {shown}", f"expected {expected}", "not_an_image")
