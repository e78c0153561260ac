"""Scene -> picture: textured, noisy backgrounds; objects drawn with supersampled edges.

Backgrounds are greyish and of middle brightness: no object's colour, and brighter than the curtain. Pixels vary much
more than the scene graph does, so that a model can't learn a scene by heart from a few values.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from .world import WORLD, Scene, SceneObject, World, outline

_SUPERSAMPLING = 4


def render(scene: Scene, size: int = 96, seed: tuple[int, ...] = (0,), world: World = WORLD) -> Image.Image:
    """RGB picture of ``size`` x ``size`` pixels; ``seed`` decides background, shades and noise."""
    rng = np.random.default_rng(seed)
    pixels = _background(size, rng)
    if scene.curtain is not None:
        _draw_curtain(pixels, scene, rng)
    for thing in scene.objects:
        _draw_object(pixels, thing, rng, world)
    pixels += rng.standard_normal((size, size, 3), dtype=np.float32) * np.float32(rng.uniform(2, 7))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _background(size: int, rng: np.random.Generator) -> np.ndarray:
    """float32 [size, size, 3]: clouds of a random coarseness, sometimes with stripes."""
    cells = int(rng.integers(2, 9))
    level, contrast = rng.uniform(115, 180), rng.uniform(5, 28)
    clouds = level + contrast * rng.uniform(-1, 1, (cells, cells, 1)) + rng.uniform(-9, 9, 3)
    clouds = clouds + rng.uniform(-5, 5, (cells, cells, 3))
    grid = Image.fromarray(clouds.astype(np.uint8)).resize((size, size), Image.Resampling.BICUBIC)
    pixels = np.asarray(grid, dtype=np.float32)
    if rng.random() < 0.5:
        angle, waves = rng.uniform(0, np.pi), rng.uniform(2, 12)
        axis = np.linspace(0, 2 * np.pi * waves, size, dtype=np.float32)
        ripple = np.sin(axis * np.float32(np.cos(angle)) + (axis * np.float32(np.sin(angle)))[:, None])
        return pixels + (ripple * np.float32(rng.uniform(3, 14)))[..., None]
    return pixels.copy()


def _draw_curtain(pixels: np.ndarray, scene: Scene, rng: np.random.Generator) -> None:
    """A dark grey panel with folds."""
    size = len(pixels)
    x0, y0, x1, y1 = (round(v * size) for v in scene.curtain)
    folds = np.sin(np.arange(size, dtype=np.float32) * np.float32(2 * np.pi * rng.uniform(9, 13) / size))
    shade = np.float32(rng.uniform(48, 62)) + np.float32(14) * folds
    panel = pixels[y0:y1, x0:x1]
    panel[:] = shade[x0:x1, None] if rng.random() < 0.5 else shade[y0:y1, None, None]


def _draw_object(pixels: np.ndarray, thing: SceneObject, rng: np.random.Generator, world: World) -> None:
    size = len(pixels)
    x0, y0, x1, y1 = (v * size for v in thing.box)
    left, top = int(x0), int(y0)
    width, height = min(int(x1) + 1, size) - left, min(int(y1) + 1, size) - top
    # Corners relative to the window of whole pixels around the object, on the finer grid.
    cx, cy, side = (x0 + x1) / 2 - left, (y0 + y1) / 2 - top, max(x1 - x0, y1 - y0)
    corners = [
        ((cx + x * side) * _SUPERSAMPLING, (cy + y * side) * _SUPERSAMPLING)
        for x, y in outline(world, thing.shape, thing.angle)
    ]
    fine = Image.new("L", (width * _SUPERSAMPLING, height * _SUPERSAMPLING))
    ImageDraw.Draw(fine).polygon(corners, fill=255)
    mask = np.asarray(fine.reduce(_SUPERSAMPLING), dtype=np.float32)[..., None] / 255
    color = np.array(world.colors[thing.color], np.float32) * np.float32(rng.uniform(0.85, 1.05))
    color += rng.uniform(-10, 10, 3).astype(np.float32)
    light = rng.uniform(-20, 20, 2).astype(np.float32)  # brightness changes across the object, as if lit from a side
    ramp_x = np.linspace(-0.5, 0.5, width, dtype=np.float32)[None, :, None]
    ramp_y = np.linspace(-0.5, 0.5, height, dtype=np.float32)[:, None, None]
    window = pixels[top : top + height, left : left + width]
    window += mask * (color + light[0] * ramp_x + light[1] * ramp_y - window)
