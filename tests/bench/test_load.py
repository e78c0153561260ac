"""The benchmark of reading images: what it reports of files and of images in memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mplug_core.api import Mplug
from mplug_core.bench.load import FILES, OPENED, bench_load
from mplug_core.bench.photos import write_photos
from mplug_core.errors import ImageError
from mplug_core.weights.folder import save_model
from tests.small import scene_tokenizer, small_model


@pytest.fixture(scope="module")
def model(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Mplug:
    tokenizer = scene_tokenizer(scenes)
    folder = tmp_path_factory.mktemp("load") / "model"
    save_model(folder, small_model(vocab_size=tokenizer.vocab_size, box_bins=tokenizer.bins), tokenizer)
    return Mplug.from_pretrained(folder, device="cpu")


def test_report(model: Mplug, tmp_path: Path) -> None:
    told: list[str] = []
    files = write_photos(tmp_path, 3, (200, 160))
    report = bench_load(model, files, repeats=2, batch_size=2, advance=told.append)
    found = json.loads(report.json())
    assert found["images"] == 3 and len(told) == 3 * len(report.rows)
    for name, seconds in found["seconds"].items():
        assert found["rates"][name] == pytest.approx(3 / sorted(seconds)[0], rel=0.9)
    assert found["share"] == pytest.approx(found["rates"][FILES] / found["rates"][OPENED])
    assert {"opening, 1 thread", "opening, 2 threads", "opening, 1 thread, in full"} <= found["rates"].keys()


def test_a_file_that_is_no_image(model: Mplug, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"no image")
    with pytest.raises(ImageError):
        bench_load(model, [tmp_path / "a.jpg"], repeats=1)
