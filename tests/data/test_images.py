"""Every kind of picture opens upright and in RGB, every bad file is one clear error, tensors are torchvision's."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mplug_core.data.images import (
    CLIP_MEAN,
    CLIP_STD,
    RandAugment,
    eval_transform,
    open_image,
    placed_transform,
    train_transform,
)
from mplug_core.data.placement import WHOLE, Placement
from mplug_core.errors import ImageError
from mplug_core.recipe import VisionSection

# pytest replaces the process's warning filters; what a user sees is tested in a process of its own below.
pytestmark = pytest.mark.filterwarnings("ignore:::PIL")

PARITY = Path(__file__).resolve().parents[2] / "../shared/parity"
RED, BLUE = (200, 30, 30), (20, 40, 210)


def halves(width: int = 64, height: int = 48) -> Image.Image:
    """Red on the left, blue on the right."""
    image = Image.new("RGB", (width, height), RED)
    image.paste(BLUE, (width // 2, 0, width, height))
    return image


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def near(pixel: tuple[int, ...], expected: tuple[int, ...], tolerance: int = 12) -> bool:
    return all(abs(a - b) <= tolerance for a, b in zip(pixel, expected, strict=True))


def png_header_only(width: int, height: int) -> bytes:
    """A PNG that claims a size and carries almost nothing."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("format", "mode", "options"),
    [
        ("JPEG", "RGB", {"quality": 95}),
        ("JPEG", "CMYK", {"quality": 95}),
        ("PNG", "RGB", {}),
        ("PNG", "P", {}),
        ("PNG", "RGBA", {}),
        ("GIF", "P", {}),
        ("WEBP", "RGB", {"quality": 95}),
        ("BMP", "RGB", {}),
        ("TIFF", "RGB", {"compression": "tiff_lzw"}),
        ("TIFF", "CMYK", {}),
        ("PPM", "RGB", {}),
    ],
)
def test_formats(format: str, mode: str, options: dict[str, object], tmp_path: Path) -> None:
    path = tmp_path / "photo with spaces \u00e9\u4e2d.bin"
    path.write_bytes(encoded(halves().convert(mode), format, **options))
    for source in (path, str(path), path.read_bytes()):
        image = open_image(source)
        assert image.mode == "RGB" and image.size == (64, 48)
        assert near(image.getpixel((5, 20)), RED, 40) and near(image.getpixel((60, 20)), BLUE, 40)


def test_exif_rotation() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: the right of the stored picture is the bottom
    image = open_image(encoded(halves(), "JPEG", quality=95, exif=exif))
    assert image.size == (48, 64)
    assert near(image.getpixel((20, 5)), RED) and near(image.getpixel((20, 60)), BLUE)


def test_damaged_exif_is_ignored() -> None:
    assert open_image(encoded(halves(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01")).size == (64, 48)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_laid_on_white(mode: str) -> None:
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0)).convert(mode)
    assert open_image(encoded(image, "PNG")).getpixel((3, 3)) == (255, 255, 255)


def test_transparent_palette_and_key_colour() -> None:
    palette = halves().convert("P")
    index = palette.getpixel((0, 0))
    assert open_image(encoded(palette, "PNG", transparency=index)).getpixel((0, 0)) == (255, 255, 255)
    assert open_image(encoded(halves(), "PNG", transparency=RED)).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bit_grey_keeps_its_range(format: str) -> None:
    values = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    pixels = np.asarray(open_image(encoded(Image.fromarray(values), format)))
    assert np.abs(pixels[..., 0].astype(int) - values / 257).max() <= 1


def test_float_grey() -> None:
    values = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    pixels = np.asarray(open_image(encoded(Image.fromarray(values), "TIFF")))
    assert pixels.min() == 0 and pixels.max() == 255


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (16, 16), color) for color in (RED, BLUE)]
    for format in ("GIF", "WEBP", "PNG"):
        data = encoded(frames[0], format, save_all=True, append_images=frames[1:], duration=100)
        assert near(open_image(data).getpixel((8, 8)), RED, 20), format


def test_thin_strip_is_fine() -> None:
    assert open_image(encoded(Image.new("RGB", (1, 5000)), "JPEG")).size == (1, 5000)
    assert eval_transform(32)(open_image(encoded(Image.new("RGB", (5000, 1)), "PNG"))).shape == (3, 32, 32)


def test_jpeg_is_decoded_small_for_a_target() -> None:
    data = encoded(halves(1600, 1200), "JPEG", quality=95)
    assert open_image(data).size == (1600, 1200)
    assert open_image(data, target=128).size == (400, 300)
    assert open_image(data, target=1000).size == (1600, 1200)
    assert open_image(encoded(halves(1600, 1200), "PNG"), target=128).size == (1600, 1200)


@pytest.mark.parametrize(
    ("content", "code", "words"),
    [
        (b"", "empty", "is empty"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "not_an_image", "HTML page"),
        (b"\n<html>", "not_an_image", "HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "not_an_image", "Git LFS"),
        (b"<?xml version='1.0'?><svg xmlns='x'/>", "not_an_image", "drawing"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not_an_image", "drawing"),
        (b"just words", "not_an_image", "not an image"),
        (b"\0" * 4096, "not_an_image", "not an image"),
        (b"\xff\xd8\xff\xe0\0\x10JFIF", "broken", "cut short"),
        (b"\x89PNG\r\n\x1a\n", "broken", "cut short"),
        (b"P6 1 9999999999999999999999999999999999", "broken", "damaged"),
        (png_header_only(30_000, 30_000), "too_large", "100 million pixels"),
        (png_header_only(12_000, 9_000), "too_large", "12000 x 9000"),
        (png_header_only(0, 10), "broken", ""),
    ],
)
def test_bad_content(content: bytes, code: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(content)
    for source in (path, content):
        with pytest.raises(ImageError) as caught:
            open_image(source)
        assert caught.value.code == code
        assert words in caught.value.message
        assert caught.value.hint and "\n" not in str(caught.value)
    assert "photo.jpg" in _message(path)


def _message(source: object) -> str:
    with pytest.raises(ImageError) as caught:
        open_image(source)  # type: ignore[arg-type]
    return caught.value.message


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("share", [0.1, 0.6, 0.9])
def test_truncated(format: str, share: float) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    data = encoded(noise, format)
    with pytest.raises(ImageError) as caught:
        open_image(data[: int(len(data) * share)])
    assert caught.value.code == "broken"


def test_garbage_inside_never_raises_anything_else() -> None:
    random = np.random.default_rng(1)
    for format in ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "JPEG2000"):
        clean = np.frombuffer(encoded(halves(), format), dtype=np.uint8)
        for _ in range(40):
            data = clean.copy()
            places = random.integers(0, len(data), 20)
            data[places] = random.integers(0, 256, 20)
            with contextlib.suppress(ImageError):
                assert open_image(data.tobytes(), max_pixels=10_000_000).mode == "RGB"


def test_bomb_is_refused_before_decoding(tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png_header_only(30_000, 30_000))
    start = time.perf_counter()
    assert "too large" in _message(path)
    assert time.perf_counter() - start < 0.5
    small = encoded(halves(100, 100), "PNG")
    with pytest.raises(ImageError) as caught:
        open_image(small, max_pixels=9_999)
    assert caught.value.code == "too_large" and "100 x 100" in caught.value.message
    assert open_image(small, max_pixels=10_000).size == (100, 100)


def test_bad_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def code(source: object) -> str:
        with pytest.raises(ImageError) as caught:
            open_image(source)  # type: ignore[arg-type]
        return caught.value.code

    assert code(tmp_path / "none.jpg") == code("") == code("a\0b") == code("x" * 5000) == "missing"
    assert code(tmp_path) == "unreadable"
    assert code("/dev/null") == "unreadable"
    path = tmp_path / "locked.jpg"
    path.write_bytes(encoded(halves(), "JPEG"))

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    # The superuser can read everything, so the refusal is played.
    monkeypatch.setattr("mplug_core.data.images.open", refuse, raising=False)
    assert code(path) == "unreadable"


def test_names_are_safe_to_print() -> None:
    message = _message(os.fsdecode(b"caf\xe9\x1b[31m\n.jpg"))
    assert message.isprintable()
    message.encode("utf-8")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_pipe_is_read(tmp_path: Path) -> None:
    fifo = tmp_path / "pipe"
    os.mkfifo(fifo)
    (tmp_path / "photo.png").write_bytes(encoded(halves(), "PNG"))
    writer = subprocess.Popen(["sh", "-c", 'cat "$0" > "$1"', str(tmp_path / "photo.png"), str(fifo)])
    assert open_image(fifo).size == (64, 48)
    writer.wait()


def test_no_warning_and_no_torchvision(tmp_path: Path) -> None:
    """In a process of its own: what is on the screen is what a user would see."""
    (tmp_path / "large.png").write_bytes(png_header_only(9_990, 9_990))
    (tmp_path / "exif.jpg").write_bytes(encoded(halves(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01"))
    (tmp_path / "cut.tif").write_bytes(encoded(halves(), "TIFF", compression="tiff_lzw")[:300])
    palette = encoded(halves().convert("P"), "PNG", transparency=bytes(range(256)))
    (tmp_path / "palette.png").write_bytes(palette)
    program = (
        "import sys, pathlib\n"
        "from mplug_core.data.images import open_image, eval_transform\n"
        "from mplug_core.errors import ImageError\n"
        "eval_transform(32)\n"
        "for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):\n"
        "    try: open_image(path)\n"
        "    except ImageError: pass\n"
        "assert 'torchvision' not in sys.modules\n"
    )
    command = [sys.executable, "-W", "always", "-c", program, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_eval_transform_equals_torchvision() -> None:
    from torchvision.transforms import v2

    reference = v2.Compose(
        [
            v2.Resize((96, 96), interpolation=v2.InterpolationMode.BICUBIC),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(CLIP_MEAN, CLIP_STD),
        ]
    )
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (70, 121, 3), dtype=np.uint8))
    ours = pickle.loads(pickle.dumps(eval_transform(96)))(noise)
    assert ours.shape == (3, 96, 96) and ours.dtype == torch.float32 and ours.is_contiguous()
    assert torch.allclose(ours, reference(noise), rtol=0, atol=1e-6)


@pytest.mark.skipif(not PARITY.is_dir(), reason="no ../shared/parity beside the project")
def test_eval_transform_as_released() -> None:
    from safetensors.torch import load_file

    golden = load_file(PARITY / "f11_transforms.safetensors")
    image = Image.fromarray(golden["in_uint8.image_hwc"].numpy())
    expected = golden["out.test_transform"]
    assert torch.allclose(eval_transform(expected.shape[-1])(image), expected, atol=1e-6)


def vision(size: int, fit: str = "squash") -> VisionSection:
    return VisionSection(image_size=size, mean=(0.5,) * 3, std=(0.5,) * 3, fit=fit)


def test_placed_transform_squashes_as_the_eval_transform() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (70, 121, 3), dtype=np.uint8))
    pixels, placement = pickle.loads(pickle.dumps(placed_transform(vision(96))))(noise)
    assert torch.equal(pixels, eval_transform(96, (0.5,) * 3, (0.5,) * 3)(noise)) and placement == WHOLE


@pytest.mark.parametrize(
    ("size", "box"),
    [
        ((200, 100), (0, 24, 96, 72)),
        ((100, 200), (24, 0, 72, 96)),
        ((96, 96), (0, 0, 96, 96)),
        ((1000, 3), (0, 47, 96, 48)),  # a line stays a line
        ((97, 50), (0, 23, 96, 72)),  # 49 rows: of 47 the upper padding has 23
    ],
)
def test_padding_by_hand(size: tuple[int, int], box: tuple[int, int, int, int]) -> None:
    pixels, placement = placed_transform(vision(96, "pad"))(Image.new("RGB", size, RED))
    left, top, right, bottom = box
    inside = torch.zeros(96, 96, dtype=torch.bool)
    inside[top:bottom, left:right] = True
    assert torch.equal((pixels != 0).any(0), inside)
    assert placement.to_square((0, 0, 1, 1)) == pytest.approx([v / 96 for v in box])


def test_train_transform() -> None:
    transform = pickle.loads(pickle.dumps(train_transform(vision(48), scale=(0.2, 1.0))))
    image = halves(200, 100)
    torch.manual_seed(0)
    first = [transform(image) for _ in range(4)]
    torch.manual_seed(0)
    again = [transform(image) for _ in range(4)]
    assert all(torch.equal(a[0], b[0]) and a[1] == b[1] for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0][0], first[1][0])
    assert all(t.shape == (3, 48, 48) and t.min() >= -1 and t.max() <= 1 for t, _ in first)


def test_crop_and_flip_equal_torchvision() -> None:
    from torchvision.transforms import v2

    bicubic = v2.InterpolationMode.BICUBIC
    reference = v2.Compose(
        [
            v2.RandomResizedCrop(48, scale=(0.2, 1.0), interpolation=bicubic), v2.RandomHorizontalFlip(),
            v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize((0.5,) * 3, (0.5,) * 3),
        ]
    )  # fmt: skip
    ours = train_transform(vision(48), scale=(0.2, 1.0), randaugment=None)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (70, 121, 3), dtype=np.uint8))
    for seed in range(8):
        torch.manual_seed(seed)
        want = reference(noise)
        torch.manual_seed(seed)
        assert torch.allclose(ours(noise)[0], want, rtol=0, atol=1e-6)


def test_flip_is_a_choice() -> None:
    plain = train_transform(vision(32), scale=(1.0, 1.0), flip=False, randaugment=None)
    mirrored = train_transform(vision(32), scale=(1.0, 1.0), flip=True, randaugment=None)

    def left_is_red(found: tuple[torch.Tensor, Placement]) -> bool:
        left = bool(found[0][0, 16, 2] > found[0][2, 16, 2])
        assert found[1].flipped != left
        return left

    torch.manual_seed(0)
    assert all(left_is_red(plain(halves(64, 64))) for _ in range(16))
    assert {left_is_red(mirrored(halves(64, 64))) for _ in range(32)} == {True, False}


def test_crops_keep_a_target_whole() -> None:
    targets = [(0.1, 0.2, 0.3, 0.4), (0.7, 0.5, 0.9, 0.8)]
    transform = train_transform(vision(32), scale=(0.2, 0.8), randaugment=None)
    torch.manual_seed(0)
    placements = [transform(halves(200, 100), targets)[1] for _ in range(100)]
    assert all(max(p.visible(box) for box in targets) > 1 - 1e-9 for p in placements)
    assert 30 < sum(p.crops for p in placements) < 70
    assert not any(transform(halves(200, 100), [])[1].crops for _ in range(20))
    assert all(transform(halves(200, 100))[1].crops for _ in range(20))


def test_long_side_varies_in_training() -> None:
    transform = train_transform(vision(100, "pad"), scale=(0.5, 1.0), flip=False, randaugment=None)
    torch.manual_seed(0)
    sides = []
    for _ in range(30):
        pixels, placement = transform(halves(200, 100), [])
        shown = placement.to_square((0, 0, 1, 1))
        rows, columns = (pixels != 0).any(0).nonzero().T
        want = [int(v) / 100 for v in (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)]
        assert shown == pytest.approx(want)
        sides.append(shown[2] - shown[0])
    assert min(sides) < 0.75 and max(sides) > 0.95


def test_where_places_count_randaugment_moves_nothing() -> None:
    photometric = train_transform(vision(32), boxes=True).augment
    assert set(photometric.ops) == {"identity", "autocontrast", "equalize", "brightness", "sharpness"}
    assert len(train_transform(vision(32)).augment.ops) == 10


@pytest.mark.parametrize(
    "op", ["brightness", "sharpness", "shear_x", "shear_y", "translate_x", "translate_y", "rotate"]
)
def test_every_operation_changes_the_picture_both_ways(op: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8))
    plus, minus = (np.asarray(RandAugment.apply(noise, op, level)) for level in (0.7, -0.7))
    assert plus.shape == minus.shape == (40, 40, 3)
    assert (plus != minus).any() and (plus != np.asarray(noise)).any()


def test_every_operation_is_reached() -> None:
    torch.manual_seed(0)
    for _ in range(60):
        assert RandAugment(2, 7)(halves()).size == (64, 48)
    with pytest.raises(ValueError, match="solarize"):
        RandAugment.apply(halves(), "solarize", 0.5)
