"""Every kind of picture opens upright and in RGB, every bad file is one clear error, tensors are torchvision's."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import socket
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

from mplug_core.data import images
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


def png_chunk(kind: bytes, data: bytes, broken: bool = False) -> bytes:
    check = zlib.crc32(kind + data) ^ (1 if broken else 0)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)


LARGE = zlib.compress(bytes(3 << 20))


@pytest.mark.parametrize(
    "chunk",
    [
        png_chunk(b"iCCP", b"profile\0\0" + LARGE), png_chunk(b"zTXt", b"Comment\0\0" + LARGE),
        png_chunk(b"iTXt", b"Comment\0\1\0\0\0" + LARGE), png_chunk(b"tEXt", b"Comment\0x", broken=True),
        png_chunk(b"iCCP", b"profile\0\0x", broken=True), png_chunk(b"iCCP", b"profile\0\7x"),
        png_chunk(b"iTXt", b"\xff"), png_chunk(b"gAMA", b"x", broken=True), png_chunk(b"pHYs", b""),
        png_chunk(b"tRNS", b"\0\0", broken=True), png_chunk(b"eXIf", b"MM\0*", broken=True),
        png_chunk(b"zzZz", b"x", broken=True), png_chunk(b"acTL", b"x"), png_chunk(b"fcTL", b"x"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("place", ["head", "tail"])
def test_only_pixels_decide_about_a_png(chunk: bytes, place: str) -> None:
    data = encoded(halves(), "PNG")
    at = 33 if place == "head" else len(data) - 12
    assert near(open_image(data[:at] + chunk + data[at:]).getpixel((5, 20)), RED)


def test_a_png_that_is_cleaned_keeps_orientation_and_transparency() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.new("RGBA", (40, 20), (0, 0, 0, 0))
    data = encoded(image.convert("P"), "PNG", transparency=0, exif=exif)
    at = data.index(b"IDAT") - 4
    found = open_image(data[:at] + png_chunk(b"tEXt", b"x\0y", broken=True) + data[at:])
    assert found.size == (20, 40) and found.getpixel((0, 0)) == (255, 255, 255)


def test_damaged_pixels_are_still_an_error() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    data = encoded(noise, "PNG")
    bad_text = png_chunk(b"tEXt", b"x\0y", broken=True)
    for cut in (data[:500], data[:33] + bad_text + data[33:500], data[:33] + png_chunk(b"IDAT", b"x") + data[-12:]):
        with pytest.raises(ImageError) as caught:
            open_image(cut)
        assert caught.value.code == "broken"
    huge = png_header_only(30_000, 30_000)
    with pytest.raises(ImageError) as caught:
        open_image(huge[:33] + bad_text + huge[33:])
    assert caught.value.code == "too_large"


@pytest.mark.parametrize("tag", [270, 305, 700, 33723, 34665, 34675])
def test_a_tiff_with_a_tag_that_leads_nowhere(tag: int) -> None:
    data = bytearray(encoded(halves(), "TIFF", tiffinfo={270: "x" * 50}))
    (place,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, place)
    entries = [bytes(data[place + 2 + 12 * k : place + 14 + 12 * k]) for k in range(count)]
    entries = [entry for entry in entries if struct.unpack_from("<H", entry)[0] != 270]
    entries.append(struct.pack("<HHII", tag, 1, 5000, 1 << 30))
    entries.sort(key=lambda entry: struct.unpack_from("<H", entry)[0])
    data[place + 2 : place + 2 + 12 * count] = b"".join(entries)
    assert near(open_image(bytes(data)).getpixel((5, 20)), RED)


def test_a_webp_with_broken_metadata() -> None:
    data = encoded(halves(), "WEBP", lossless=True, exif=b"Exif\0\0MM\0*", xmp=b"x" * 100)
    at = data.index(b"XMP ")
    broken = data[:at] + b"XMP " + struct.pack("<I", 1 << 20) + b"x"
    assert near(open_image(broken).getpixel((5, 20)), RED)


@pytest.mark.parametrize("brand", [b"heic", b"heix", b"mif1", b"msf1", b"hevc"])
def test_heic_says_what_is_needed(brand: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    head = b"\0\0\0\x18ftyp" + brand + b"\0\0\0\0mif1heic" + bytes(200)
    assert "pillow-heif is needed (pip install 'mplug[heif]'" in str(_error(head))


def _error(source: object) -> ImageError:
    with pytest.raises(ImageError) as caught:
        open_image(source)  # type: ignore[arg-type]
    return caught.value


def test_heic_is_opened_with_its_package() -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    pillow_heif.from_pillow(halves()).save(file, exif=exif.tobytes())
    assert open_image(file.getvalue()).size == (48, 64)
    with pytest.raises(ImageError, match="too large"):
        open_image(file.getvalue(), max_pixels=1000)


def test_libtiff_says_nothing_by_itself(capfd: pytest.CaptureFixture[str]) -> None:
    random = np.random.default_rng(0)
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits"):
        clean = np.frombuffer(encoded(halves(), "TIFF", compression=compression), dtype=np.uint8)
        for _ in range(30):
            data = clean.copy()
            data[random.integers(0, len(data), 4)] = random.integers(0, 256, 4)
            data[len(data) - 1 - random.integers(0, 150)] = random.integers(0, 256)
            with contextlib.suppress(ImageError):
                open_image(data.tobytes())
    assert capfd.readouterr().err == ""


def test_whatever_the_bytes_it_is_a_picture_or_one_line() -> None:
    """Heads of all formats with anything behind them, and files with bytes put in, taken out and doubled."""
    random = np.random.default_rng(3)
    formats = ("JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "JPEG2000", "ICO", "PPM")
    whole = [encoded(halves(), format) for format in formats]
    heads = [data[:16] for data in whole] + [b"", b"\0\0\0\x18ftypheic", b"\0\0\0\x18ftypavif", b"qoif", b"%PDF"]
    for round in range(600):
        if round % 2:
            data = heads[round % len(heads)] + random.bytes(int(random.integers(0, 400)))
        else:
            clean = whole[round % len(whole)]
            a, b = sorted(random.integers(0, len(clean), 2))
            data = clean[:a] + random.bytes(int(random.integers(0, 20))) + clean[(a, b)[round // 2 % 2] :]
        start = time.perf_counter()
        try:
            assert open_image(data, max_pixels=10_000_000).mode == "RGB"
        except ImageError as error:
            assert len(f"error: {error}") <= 300 and str(error).isprintable()
        assert time.perf_counter() - start < 2


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
    monkeypatch.setattr("mplug_core.data.folders.open", refuse, raising=False)
    assert code(path) == "unreadable"


def test_names_are_safe_to_print() -> None:
    message = _message(os.fsdecode(b"caf\xe9\x1b[31m\n.jpg"))
    assert message.isprintable()
    message.encode("utf-8")


def test_a_pipe_of_the_shell_is_read() -> None:
    read, write = os.pipe()
    os.write(write, encoded(halves(), "PNG"))
    os.close(write)
    assert open_image(f"/dev/fd/{read}").size == (64, 48)
    os.close(read)


def test_what_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "to_zero.jpg").symlink_to("/dev/zero")
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    with socket.socket(socket.AF_UNIX) as there:
        there.bind(str(tmp_path / "socket.jpg"))
        start = time.perf_counter()
        wanted = {"pipe": "named pipe", "to_zero": "a device", "socket": "a socket", "loop": "levels"}
        for name, words in wanted.items():
            with pytest.raises(ImageError, match=words) as caught:
                open_image(tmp_path / f"{name}.jpg")
            assert caught.value.code == "unreadable"
    assert time.perf_counter() - start < 1


def test_a_huge_file_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_BYTES", 1 << 20)
    with open(tmp_path / "large.png", "wb") as file:
        file.truncate((1 << 20) + 1)
    with pytest.raises(ImageError) as caught:
        open_image(tmp_path / "large.png")
    assert caught.value.code == "too_large"


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
