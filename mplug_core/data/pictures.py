"""Pictures: whatever a program has of an image, opened and fitted to the model's square."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mplug_core.data.images import PlacedTransform, convert_image, full_size, open_image
from mplug_core.data.placement import WHOLE, Placement
from mplug_core.data.web import download, is_address
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


ImageSource: TypeAlias = str | os.PathLike[str] | bytes | Image.Image | np.ndarray | Tensor | Picture
"""One image: a path, an http(s) address (a str), the bytes of a file, a Pillow image, a uint8 array [H, W, 3], a uint8
tensor [3, H, W], a float tensor [3, S, S] of pixels that are normalised as the model wants them, or an opened picture.
"""


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
    if isinstance(source, str) and is_address(source):
        return open_image(download(source), target=target, name=source)
    if isinstance(source, (str, os.PathLike)):
        return open_image(os.fspath(source), target=target)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return open_image(bytes(source), target=target, name=name)
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
        "give a path, an address, bytes, a Pillow image, an array or a tensor", "not_an_image",
    )  # fmt: skip


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
