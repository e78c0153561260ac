"""A loaded model small enough for a test, photos of one colour each, and a way to read them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from mplug_core.data.images import eval_transform, open_image
from mplug_core.data.text import Tokenizer
from mplug_core.weights.folder import Loaded, load_model, save_model
from tests.small import CNN, small_model


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("models") / "small"
    model = small_model(vision=CNN, vocab_size=tokenizer.vocab_size, max_positions=64)
    save_model(folder, model, tokenizer, dtype=torch.float32)
    return folder


@pytest.fixture(scope="session")
def loaded(model_folder: Path) -> Loaded:
    return load_model(str(model_folder))


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of six photos; the user's cache is in the test's own folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(6):
        Image.new("RGB", (20, 16), (40 * number, 255 - 40 * number, 90)).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def names(photos: Path) -> list[str]:
    return [str(photo) for photo in sorted(photos.glob("*.png"))]


class Reader:
    """Opens images as the model wants them, and remembers which."""

    def __init__(self, loaded: Loaded) -> None:
        vision = loaded.config.vision
        self.transform = eval_transform(vision.image_size, vision.mean, vision.std)
        self.opened: list[str] = []

    def __call__(self, name: str) -> Tensor:
        self.opened.append(Path(name).name)
        return self.transform(open_image(name))


@pytest.fixture
def reader(loaded: Loaded) -> Callable[[str], Tensor]:
    return Reader(loaded)
