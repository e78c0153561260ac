"""Images in: any photo that a user has becomes an upright RGB picture, or one clear error; pictures become tensors.

Opening is defensive because photos come from anywhere: the size is checked from the header before a pixel is decoded,
only raster formats without embedded programs are accepted, and whatever a damaged file makes the decoder raise comes
out as an :class:`~mplug_core.errors.ImageError` with a code that programs can use.

The test transform needs only Pillow and torch; torchvision (seconds to import) is loaded when a training transform is
made.
"""

from __future__ import annotations

import ctypes
import errno
import io
import logging
import os
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from mplug_core.data.folders import NotAFile, open_file
from mplug_core.data.metadata import ORIENTATION, without_metadata
from mplug_core.data.placement import Box, Placement
from mplug_core.errors import ImageError, shortened
from mplug_core.recipe import VisionSection

# Pillow warns about doubtful EXIF, palettes and sizes; the user gets an error or an answer, never those lines. A filter
# on Pillow's own modules is used instead of catch_warnings around each call, which is not safe with threads.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").addHandler(logging.NullHandler())

MAX_PIXELS = 100_000_000
MAX_BYTES = 1 << 30
_MAX_CLEANED = 1 << 28
"""Bytes of a file up to which a damaged one is looked at again without its metadata."""

# Raster formats with a signature only: EPS and WMF run interpreters, and TGA's reader takes text files for pictures.
_FORMATS = ("JPEG", "MPO", "PNG", "GIF", "WEBP", "AVIF", "BMP", "TIFF", "JPEG2000", "PPM", "ICO", "QOI")

# First bytes of image formats: a file that begins so and can't be opened is damaged, anything else is no image.
_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"II*\0", b"MM\0*", b"\0\0\0\x0cjP")

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def open_image(
    source: str | Path | bytes, max_pixels: int = MAX_PIXELS, target: int | None = None, name: str | None = None
) -> Image.Image:
    """Open an image file, or encoded image bytes, as an upright RGB picture on white, fully decoded.

    EXIF rotation is applied; CMYK, palette, grey and 16-bit images are converted; transparency is laid on white; of an
    animation the first frame counts. ``max_pixels`` is compared with the header's size before decoding (and can't
    exceed Pillow's own cap of about 178 million). With ``target`` (the side, in pixels, that the picture will be
    resized to) a JPEG is decoded at the smallest of its built-in scales whose sides are still at least twice that,
    which saves most of the time on camera photos and leaves the resized picture practically unchanged. ``name`` is what
    errors call the image: by default its path.

    Raises ImageError with code ``missing``, ``empty``, ``unreadable`` (a folder, a device, no permission),
    ``not_an_image``, ``broken`` (damaged or cut short) or ``too_large``.
    """
    name = name or ("the image data" if isinstance(source, bytes) else _shown(source))
    with _open_bytes(source, name) as file:
        try:
            return _read(file, name, max_pixels, target)
        except ImageError as error:
            if error.code != "broken":
                raise
            plain = _cleaned(file)
            if plain is None:
                raise
            try:
                return _read(plain, name, max_pixels, target)
            except ImageError as second:  # the first error is that of the file as it is
                raise (second if second.code == "too_large" else error) from None


def _read(file: BinaryIO, name: str, max_pixels: int, target: int | None) -> Image.Image:
    head = file.read(512)
    if not head:
        raise ImageError(f"{name} is empty", "the file has no bytes: copy or download it again", "empty")
    try:
        image = _open_heif(file, name, max_pixels) if _is_heif(head) else Image.open(file, formats=_formats())
    except ImageError:
        raise
    except (Image.DecompressionBombError, MemoryError) as error:
        raise _too_large(name, None, max_pixels) from error
    except UnidentifiedImageError as error:
        raise _unidentified(name, head) from error
    except Exception as error:
        raise _broken(name, error) from error
    with image:
        return _decoded(image, name, max_pixels, target)


def _cleaned(file: BinaryIO) -> BinaryIO | None:
    """The same picture without metadata; None where that is no other file."""
    try:
        file.seek(0)
        data = file.read(_MAX_CLEANED + 1)
    except (OSError, MemoryError):
        return None
    plain = without_metadata(data) if len(data) <= _MAX_CLEANED else None
    return None if plain is None else io.BytesIO(plain)


def _brands(head: bytes) -> set[bytes]:
    """The brands of an ISO media file: what kinds of file it is; empty for another one."""
    if head[4:8] != b"ftyp":
        return set()
    end = min(int.from_bytes(head[:4], "big"), len(head))
    return {head[8:12], *(head[at : at + 4] for at in range(16, end - 3, 4))}


def _is_avif(head: bytes) -> bool:
    return not _brands(head).isdisjoint((b"avif", b"avis"))


def _is_heif(head: bytes) -> bool:
    brands = _brands(head)
    return any(brand[:3] in (b"hei", b"hev", b"mif", b"msf") for brand in brands) and not _is_avif(head)


def _open_heif(file: BinaryIO, name: str, max_pixels: int) -> Image.Image:
    """A HEIC or HEIF photo as a picture that is not decoded yet, and stands upright."""
    try:
        import pillow_heif
    except ImportError as error:
        hint = "pip install 'mplug[heif]', or convert it to JPEG"
        raise ImageError(f"{name} is a HEIC photo, for which pillow-heif is needed", hint, "not_an_image") from error
    file.seek(0)
    found = pillow_heif.open_heif(file, convert_hdr_to_8bit=True)
    if found.size[0] * found.size[1] > max_pixels:
        raise _too_large(name, found.size, max_pixels)
    picture = found.to_pillow()
    picture.format = "HEIF"
    return picture


def convert_image(image: Image.Image, name: str = "the image", max_pixels: int = MAX_PIXELS) -> Image.Image:
    """A Pillow image of any mode as :func:`open_image` gives a file: a new upright RGB picture on white.

    ImageError if it is larger than ``max_pixels``, or if its file is damaged or closed.
    """
    return _decoded(image, name, max_pixels, None)


def _decoded(image: Image.Image, name: str, max_pixels: int, target: int | None) -> Image.Image:
    width, height = image.size
    if width * height > max_pixels:
        raise _too_large(name, (width, height), max_pixels)
    if width * height == 0:
        raise ImageError(f"{name} has no pixels ({width} x {height})", "save it again", "broken")
    try:
        if target and image.format in ("JPEG", "MPO"):
            image.draft(None, (2 * target, 2 * target))
        if image.format == "TIFF":
            with _quiet_tiff():
                image.load()
        else:
            image.load()
        picture = _rgb(_upright(image))
        picture.info[_FULL_SIZE] = (height, width) if _on_its_side(image) else (width, height)
        picture.info[_FORMAT] = image.format or ""
        return picture
    except MemoryError as error:
        raise _too_large(name, (width, height), max_pixels) from error
    except Exception as error:
        raise _broken(name, error) from error


_TIFF_LOCK = threading.Lock()
_tiff_users = 0
_tiff_handlers: list[tuple[Any, int | None]] = []


@contextmanager
def _quiet_tiff() -> Iterator[None]:
    """Have libtiff, which writes what it finds to stderr by itself, say nothing while the block runs.

    Its handlers are the process's: the first block puts them aside, the last one brings them back.
    """
    global _tiff_users
    with _TIFF_LOCK:
        _tiff_users += 1
        if _tiff_users == 1:
            _tiff_handlers[:] = [(setter, setter(None)) for setter in _tiff_setters()]
    try:
        yield
    finally:
        with _TIFF_LOCK:
            _tiff_users -= 1
            if not _tiff_users:
                for setter, before in _tiff_handlers:
                    setter(before)


@cache
def _tiff_setters() -> tuple[Any, ...]:
    """libtiff's functions that exchange a handler, from the library that Pillow has loaded; none where it has none."""
    try:
        library = ctypes.CDLL(Image.core.__file__)
        found = (library.TIFFSetWarningHandler, library.TIFFSetErrorHandler)
    except (OSError, AttributeError):  # linked into Pillow itself, or left out
        return ()
    for setter in found:
        setter.restype, setter.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    return found


_FULL_SIZE = "full size"
_FORMAT = "format"


def full_size(picture: Image.Image) -> tuple[int, int]:
    """Width and height of an upright picture as its file has it, which may have been decoded smaller (``target``)."""
    return picture.info.get(_FULL_SIZE, picture.size)


def picture_shape(source: str | Path | bytes) -> tuple[tuple[int, int], int] | None:
    """Width and height of a picture as it is shown, and the EXIF orientation by which its file is turned for that.

    Only the header is read; None for what can't be opened.
    """
    try:
        with _open_bytes(source, "the image") as file, Image.open(file, formats=_formats()) as image:
            width, height = image.size
            return ((height, width) if _on_its_side(image) else (width, height)), _orientation(image)
    except Exception:  # whoever opens the picture says what is wrong with it
        return None


def _orientation(image: Image.Image) -> int:
    """1 to 8; damaged EXIF turns nothing."""
    try:
        found = image.getexif().get(ORIENTATION, 1)
    except Exception:
        return 1
    return found if found in range(1, 9) else 1


def format_of(picture: Image.Image) -> str:
    """Pillow's name of the format of the file that an opened picture is of; empty where it is of none."""
    return picture.info.get(_FORMAT, "")


def _on_its_side(image: Image.Image) -> bool:
    """Whether EXIF says that width and height change places."""
    return _orientation(image) in (5, 6, 7, 8)


def _shown(source: str | Path) -> str:
    """The path as it may go to a terminal or a JSON line: valid Unicode without control characters."""
    text = shortened(os.fsencode(source).decode("utf-8", "replace"), 200)
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text) or "the empty path"


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _open_bytes(source: str | Path | bytes, name: str) -> BinaryIO:
    """A seekable binary file on ``source``; pipes of the shell (``<(curl ...)``) are read whole."""
    if isinstance(source, bytes):
        return io.BytesIO(source)
    try:
        file = open_file(source)
        if file.seekable() and os.fstat(file.fileno()).st_size <= MAX_BYTES:
            return file
        with file:
            data = b"" if file.seekable() else file.read(MAX_BYTES + 1)
            if file.seekable() or len(data) > MAX_BYTES:
                raise ImageError(f"{name} has more than {MAX_BYTES >> 20} MB", "give one image", "too_large")
        return io.BytesIO(data)
    except NotAFile as error:
        hint = "name the files in it" if error.what == "a folder" else "name an image file, or - for standard input"
        raise ImageError(f"{name} is {error.what}, not an image", hint, "unreadable") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the path
        number = getattr(error, "errno", None)
        if number in (None, errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
            raise ImageError(f"{name} does not exist", "check the path", "missing") from error
        if number in (errno.EACCES, errno.EPERM):
            raise ImageError(f"{name} can't be read: permission denied", "change its mode", "unreadable") from error
        raise ImageError(f"{name} can't be read: {os.strerror(number)}", "check the file", "unreadable") from error


def _unidentified(name: str, head: bytes) -> ImageError:
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype html", b"<html")) or b"<html" in text:
        return ImageError(f"{name} is an HTML page, not an image", "download the image, not its page", "not_an_image")
    if text.startswith(b"version https://git-lfs"):
        return ImageError(f"{name} is a Git LFS pointer, not an image", "run git lfs pull", "not_an_image")
    if b"<svg" in text or text.startswith(b"%pdf") or text.startswith(b"%!ps"):
        return ImageError(f"{name} is a drawing, not a photo", "export it as PNG or JPEG", "not_an_image")
    if _is_avif(head) and "AVIF" not in _formats():
        hint = "pip install -U pillow, or convert it to JPEG"
        return ImageError(f"{name} is an AVIF image, which this Pillow can't open", hint, "not_an_image")
    if head.startswith(_SIGNATURES) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP") or _is_avif(head):
        return ImageError(f"{name} is damaged or cut short", "copy or download it again", "broken")
    return ImageError(f"{name} is not an image", "give a JPEG, PNG, WebP, GIF, BMP or TIFF file", "not_an_image")


def _broken(name: str, error: Exception) -> ImageError:
    reason = " ".join(str(error).split())[:120]
    if "truncated" in reason.lower():
        return ImageError(f"{name} is cut short", "copy or download it again", "broken")
    return ImageError(f"{name} is damaged: {reason or type(error).__name__}", "copy or download it again", "broken")


def _too_large(name: str, size: tuple[int, int] | None, max_pixels: int) -> ImageError:
    shown = f": {size[0]} x {size[1]} pixels" if size else ""
    return ImageError(
        f"{name} is too large{shown}, and the cap is {max_pixels / 1e6:g} million pixels", "scale it down", "too_large"
    )


def _upright(image: Image.Image) -> Image.Image:
    try:
        turned = image.getexif().get(ORIENTATION, 1) not in (None, 1)
        return ImageOps.exif_transpose(image) if turned else image
    except Exception:  # damaged EXIF says nothing about the pixels
        return image


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        image = _eight_bit(image)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, (255, 255, 255))
        white.paste(image, mask=image.getchannel("A"))
        return white
    # A copy where nothing is converted: the picture has to outlive the file.
    return image.convert("RGB") if image.mode != "RGB" else image.copy()


def _eight_bit(image: Image.Image) -> Image.Image:
    """Grey with 16 or 32 bits a pixel as 8-bit grey. Pillow's own conversion clips, which gives white pictures.

    The range is 0..1, 0..255 or 0..65535, the smallest that holds the values of a float or 32-bit image (16-bit images
    say their range); outside of all, the picture's own range.
    """
    values = np.nan_to_num(np.asarray(image).astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    low, high = 0.0, 65535.0
    if not image.mode.startswith("I;"):
        if values.min() < 0 or values.max() > 65535:
            low, high = float(values.min()), float(values.max())
        elif values.max() <= 255:
            high = 1.0 if image.mode == "F" and values.max() <= 1 else 255.0
    return Image.fromarray(np.rint((values - low) * (255.0 / max(high - low, 1e-12))).astype(np.uint8))


@dataclass(frozen=True)
class EvalTransform:
    """PIL picture -> float tensor [3, size, size]: squashed to a square (bicubic), scaled to 0..1, normalised."""

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, image: Image.Image) -> torch.Tensor:
        return PlacedTransform(self.size, self.mean, self.std)(image)[0]


def to_tensor(image: Image.Image, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """RGB picture of H x W -> float tensor [3, H, W], ``(value / 255 - mean) / std`` a channel."""
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1).to(torch.float32).contiguous()
    return pixels.div_(255).sub_(torch.tensor(mean).view(3, 1, 1)).div_(torch.tensor(std).view(3, 1, 1))


@dataclass(frozen=True)
class PlacedTransform:
    """PIL picture -> (float tensor [3, size, size], where the picture lies in it).

    ``fit`` "squash" brings both sides to ``size``. "pad" brings the long side to ``size``, keeps the aspect ratio, and
    puts the picture in the middle; the padding is 0 after normalisation, the mean colour. Its tokens aren't masked: the
    visual encoder has mixed them with the others before anything could mask them, and the released model, whose
    grounding pads so, doesn't mask them either. A released picture is resized bilinearly when it is padded.
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fit: str = "squash"
    resample: Image.Resampling = Image.Resampling.BICUBIC

    def __call__(self, image: Image.Image) -> tuple[torch.Tensor, Placement]:
        image = image if image.mode == "RGB" else image.convert("RGB")
        return self.place(self.fitted(image))

    def fitted(self, image: Image.Image, share: float = 1.0) -> Image.Image:
        """The picture at its size in the square; ``share`` is what a padded picture's long side takes of it."""
        size = (self.size, self.size)
        if self.fit == "pad":
            ratio = self.size * share / max(image.size)
            size = tuple(min(max(round(side * ratio), 1), self.size) for side in image.size)
        return image if image.size == size else image.resize(size, self.resample)

    def place(
        self, fitted: Image.Image, region: Box = (0.0, 0.0, 1.0, 1.0), flipped: bool = False
    ) -> tuple[torch.Tensor, Placement]:
        """The square around a fitted picture, which is the ``region`` of its original, mirrored if ``flipped``."""
        width, height = fitted.size
        left, top = (self.size - width) // 2, (self.size - height) // 2
        pixels = to_tensor(fitted, self.mean, self.std)
        if fitted.size != (self.size, self.size):
            square = torch.zeros(3, self.size, self.size)
            square[:, top : top + height, left : left + width] = pixels
            pixels = square
        target = tuple(v / self.size for v in (left, top, left + width, top + height))
        return pixels, Placement.of_region(region, flipped, target)


LONG_SIDES = (0.7, 1.0)
"""Shares of the square that the long side of a padded picture takes in training."""
CROP_TRIES = 10


@dataclass(frozen=True)
class TrainTransform:
    """PIL picture -> (float tensor [3, size, size], placement): random crop, flip, RandAugment, fitted to the square.

    ``scale`` None crops nothing. With ``targets``, the boxes that phrases on the picture mean, half of the pictures
    are cropped, around one of the targets each, and none where there is no target; with None every picture is cropped.
    The long side of a padded picture is drawn from :data:`LONG_SIDES` where pictures are cropped.
    """

    fitting: PlacedTransform
    scale: tuple[float, float] | None
    flip: bool
    augment: RandAugment | None

    def __call__(self, image: Image.Image, targets: Sequence[Box] | None = None) -> tuple[torch.Tensor, Placement]:
        image = image if image.mode == "RGB" else image.convert("RGB")
        region, share = (0.0, 0.0, 1.0, 1.0), 1.0
        if self.scale is not None:
            left, top, right, bottom = self._crop(image, targets)
            width, height = image.size
            region = (left / width, top / height, right / width, bottom / height)
            image = image.crop((left, top, right, bottom))
            if self.fitting.fit == "pad":
                share = torch.empty(1).uniform_(*LONG_SIDES).item()
        image = self.fitting.fitted(image, share)
        flipped = self.flip and torch.rand(1).item() < 0.5
        if flipped:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.augment is not None:
            image = self.augment(image)
        return self.fitting.place(image, region, flipped)

    def _crop(self, image: Image.Image, targets: Sequence[Box] | None) -> tuple[int, int, int, int]:
        """Left, top, right and bottom in pixels."""
        width, height = image.size
        if targets is None:
            return self._draw(image)
        if targets and torch.rand(1).item() < 0.5:
            kept = targets[int(torch.randint(len(targets), (1,)))]
            for _ in range(CROP_TRIES):
                left, top, right, bottom = self._draw(image)
                if (
                    left <= kept[0] * width and top <= kept[1] * height
                    and right >= kept[2] * width and bottom >= kept[3] * height
                ):  # fmt: skip
                    return left, top, right, bottom
        return 0, 0, width, height

    def _draw(self, image: Image.Image) -> tuple[int, int, int, int]:
        from torchvision.transforms import RandomResizedCrop

        top, left, height, width = RandomResizedCrop.get_params(image, list(self.scale), [3 / 4, 4 / 3])
        return left, top, left + width, top + height


_RAND_AUGMENT_OPS = (
    "identity", "autocontrast", "equalize", "brightness", "sharpness",
    "shear_x", "shear_y", "translate_x", "translate_y", "rotate",
)  # fmt: skip
PHOTOMETRIC = _RAND_AUGMENT_OPS[:5]
"""The operations that leave everything where it is."""


@dataclass(frozen=True)
class RandAugment:
    """``count`` random operations out of ten that keep colours, each of strength ``magnitude`` out of 10.

    At strength 10 brightness and sharpness change by a factor of 0.1 or 1.9, shear is 0.3, translation a tenth of the
    side, rotation 30 degrees; signs are random and uncovered corners grey. torchvision's RandAugment also has
    operations that change colours (posterise, solarise, colour), which would make captions wrong. Random numbers are
    torch's, so seeded workers repeat. ``ops`` are those to draw from: where boxes are learned, :data:`PHOTOMETRIC`.
    """

    count: int
    magnitude: int
    ops: tuple[str, ...] = _RAND_AUGMENT_OPS

    def __call__(self, image: Image.Image) -> Image.Image:
        for index in torch.randint(len(self.ops), (self.count,)).tolist():
            sign = 1.0 if torch.rand(()).item() < 0.5 else -1.0
            image = self.apply(image, self.ops[index], sign * self.magnitude / 10)
        return image

    @staticmethod
    def apply(image: Image.Image, op: str, level: float) -> Image.Image:
        """One operation by name at ``level`` in -1..1."""
        from torchvision.transforms.v2 import functional as F

        if op == "identity":
            return image
        if op == "autocontrast":
            return F.autocontrast(image)
        if op == "equalize":
            return F.equalize(image)
        if op == "brightness":
            return F.adjust_brightness(image, 1 + 0.9 * level)
        if op == "sharpness":
            return F.adjust_sharpness(image, 1 + 0.9 * level)
        angle, shift, shear = 0.0, [0, 0], [0.0, 0.0]
        axis = 1 if op.endswith("_y") else 0
        if op.startswith("shear"):
            shear[axis] = float(np.degrees(np.arctan(0.3 * level)))
        elif op.startswith("translate"):
            shift[axis] = round(0.1 * level * image.size[axis])
        elif op == "rotate":
            angle = 30 * level
        else:
            raise ValueError(f"{op} is not one of {', '.join(_RAND_AUGMENT_OPS)}")
        return F.affine(image, angle, shift, 1.0, shear, fill=[128, 128, 128])


def eval_transform(size: int, mean: Sequence[float] = CLIP_MEAN, std: Sequence[float] = CLIP_STD) -> EvalTransform:
    """The transform of testing and inference; picklable, and fast to make."""
    return EvalTransform(int(size), tuple(mean), tuple(std))


def placed_transform(vision: VisionSection) -> PlacedTransform:
    """The transform of testing and inference as a model's ``vision`` section says, with where the picture lies."""
    return PlacedTransform(vision.image_size, tuple(vision.mean), tuple(vision.std), vision.fit)


def train_transform(
    vision: VisionSection,
    scale: tuple[float, float] | None = (0.5, 1.0),
    flip: bool = True,
    randaugment: tuple[int, int] | None = (2, 7),
    boxes: bool = False,
) -> TrainTransform:
    """The transform of training, with torch's random numbers; picklable.

    ``scale`` is the share of the picture that a random crop keeps (pre-training from scratch uses 0.2..1); None crops
    nothing. ``randaugment`` is (operations, magnitude out of 10). ``boxes``: what shows in the picture is known by its
    place, so that RandAugment may change colours and sharpness alone: it doesn't say where it has moved things.
    """
    ops = PHOTOMETRIC if boxes else _RAND_AUGMENT_OPS
    augment = RandAugment(*randaugment, ops) if randaugment else None
    return TrainTransform(placed_transform(vision), scale and tuple(scale), flip, augment)
