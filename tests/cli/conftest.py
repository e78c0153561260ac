"""A command line in this process, and a model small enough for it. Its captions are nonsense; the lines are not."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mplug_cli.app import main
from mplug_core.recipe import CLASSES


@dataclass
class Outcome:
    """What a command line gave back."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        return self.out.splitlines()

    @property
    def objects(self) -> list[dict]:
        return [json.loads(line) for line in self.lines]

    @property
    def error(self) -> str:
        """The one line on stderr that an error is."""
        assert self.err.count("\n") == 1 and self.err.startswith("error: "), self.err
        return self.err.strip()


@pytest.fixture
def mplug(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """``mplug("caption", "x.jpg", stdin=b"...")`` in this process; standard input is empty where none is given."""

    def call(*arguments: str | Path, stdin: bytes = b"") -> Outcome:
        reader, writer = os.pipe()
        with open(reader, encoding="utf-8") as stream:
            monkeypatch.setattr("sys.stdin", stream)
            # as much as a pipe holds is written at once
            os.set_blocking(writer, False)
            assert os.write(writer, stdin) == len(stdin) if stdin else True
            os.close(writer)
            capfd.readouterr()
            code = main([str(argument) for argument in arguments])
            return Outcome(code, *capfd.readouterr())

    return call


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of the smallest kind."""
    return save_random(tmp_path_factory.mktemp("models") / "random")


@pytest.fixture(scope="session")
def able_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that has box tokens and both classifiers, too."""
    classifiers = {name: {"images": images, "labels": labels} for name, (images, labels) in CLASSES.items()}
    return save_random(tmp_path_factory.mktemp("models") / "able", box_bins=16, classifiers=classifiers)


def save_random(folder: Path, box_bins: int = 0, **fields: Any) -> Path:
    """A model folder with random weights; ``fields`` override its configuration."""
    import torch

    from mplug_core.data.text import Tokenizer, build_vocabulary
    from mplug_core.model.config import MplugConfig
    from mplug_core.model.mplug import MplugModel
    from mplug_core.weights.folder import save_model

    texts = ["a red ball on a green table", "two dogs run on the grass"]
    tokenizer = Tokenizer(build_vocabulary(texts, box_bins=box_bins))
    vision = {
        "backbone": "resnet10t",
        "image_size": 32,
        "options": {"channels": [8, 8, 8, 16], "stem_width": 8, "norm_layer": "groupnorm1"},
    }
    sizes = {"width": 16, "heads": 2, "intermediate": 16, "text_layers": 1, "fusion_layers": 2, "decoder_layers": 1}
    sizes |= {"vocab_size": tokenizer.vocab_size, "box_bins": box_bins}
    config = MplugConfig.named("tiny", vision=vision, **{**sizes, **fields})
    torch.manual_seed(0)
    save_model(folder, MplugModel(config), tokenizer)
    return folder


@pytest.fixture(autouse=True)
def default_model(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """MPLUG_MODEL is the random model wherever a test asks for it, so that command lines are as users write them."""
    monkeypatch.delenv("MPLUG_MODEL", raising=False)
    monkeypatch.delenv("MPLUG_DEBUG", raising=False)
    for name in ("model_folder", "able_folder"):
        if name in request.fixturenames:
            monkeypatch.setenv("MPLUG_MODEL", str(request.getfixturevalue(name)))


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test is a user of its own, to whom no note was shown."""
    monkeypatch.setenv("MPLUG_HOME", str(tmp_path_factory.mktemp("home")))


@pytest.fixture
def make_photo(tmp_path: Path) -> Callable[..., Path]:
    """``make_photo("a.jpg")`` saves a small picture in ``tmp_path``."""

    def make(name: str | Path = "photo.jpg", size: tuple[int, int] = (40, 30)) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise(size, 60).convert("RGB").save(path)
        return path

    return make


@pytest.fixture
def photo(make_photo: Callable[..., Path]) -> Path:
    return make_photo()
