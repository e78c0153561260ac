"""Training on packs: the vocabulary of the files, any number of workers, resumed is uninterrupted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mplug_core.data.shards.pack import PackOptions, pack
from mplug_core.errors import DataError, Preempted, RecipeError
from mplug_core.recipe import Recipe
from mplug_core.training.trainer import Trainer, train
from tests.training.recipes import scene_recipe
from tests.training.test_trainer import StopAt

TASKS = {"pretrain": 1, "caption": 1, "vqa": 2, "grounding": 1, "statements": 1, "entailment": 1}
OBJECTIVES = dict.fromkeys(
    ("itc", "itm", "mlm", "prefix_lm", "caption", "answer", "box", "statement", "entailment"), 1
)  # fmt: skip


@pytest.fixture(scope="module")
def packed_scenes(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packs") / "scenes"
    pack(PackOptions(str(scenes), split="train", shard_size=60_000), folder)
    assert len(list(folder.glob("*.tar"))) > 3
    return folder


def recipe(pack: Path, folder: Path, *overrides: str, **section: Any) -> Recipe:
    source = {"path": str(pack), "batch_size": 8, "augment": "flip", "tasks": TASKS, **section}
    data = {"vocabulary": "data", "max_text": 40, "sources": {"scenes": source}}
    return scene_recipe(pack, folder, *overrides, data=data, objectives=OBJECTIVES)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def test_trains_and_resumes_as_if_never_stopped(packed_scenes: Path, tmp_path: Path) -> None:
    whole = train(recipe(packed_scenes, tmp_path / "whole"))
    stopped = recipe(packed_scenes, tmp_path / "stopped", "data.workers=2")
    with pytest.raises(Preempted):
        train(stopped, watch=StopAt(2))
    train(stopped)
    one, other = weights(whole), weights(tmp_path / "stopped")
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert all("bad_images" not in line for line in lines) and lines[-1]["step"] == 6


def test_has_the_vocabulary_of_the_files(scenes: Path, packed_scenes: Path, tmp_path: Path) -> None:
    of_pack = Trainer(recipe(packed_scenes, tmp_path / "a"), lambda *_: None)
    of_files = Trainer(recipe(scenes, tmp_path / "b", "data.sources.scenes.split=train"), lambda *_: None)
    assert of_pack.tokenizer.pieces == of_files.tokenizer.pieces
    assert of_pack.sources["scenes"].steps_per_epoch(1) == of_files.sources["scenes"].steps_per_epoch(1) == 5


def test_texts_alone_are_a_source_like_any_other(tmp_path: Path, packed_scenes: Path) -> None:
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"caption": f"a dog {k}"}) + "\n" for k in range(9)))
    pack(PackOptions(str(tmp_path / "texts.jsonl"), text_only=True), tmp_path / "texts")
    values = recipe(packed_scenes, tmp_path / "run", "model.summary_tokens=2")
    values.data.sources["texts"] = values.data.sources["scenes"].model_copy(
        update={"path": str(tmp_path / "texts"), "text_only": True, "tasks": {"pretrain": 1}}
    )
    source = Trainer(values, lambda *_: None).sources["texts"]
    assert len(source.by_image) == 9 and source.images == [None] * 9


def test_what_a_stream_can_not_do_is_said_before_the_first_step(packed_scenes: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cached_views"):
        Trainer(recipe(packed_scenes, tmp_path / "a", cached_views=2), lambda *_: None)
    with pytest.raises(DataError, match="task patches needs generated scenes"):
        Trainer(recipe(packed_scenes, tmp_path / "b", tasks={"pretrain": 1, "patches": 1}), lambda *_: None)
    with pytest.raises(DataError, match="has no split val"):
        Trainer(recipe(packed_scenes, tmp_path / "c", split="val"), lambda *_: None)
