"""Going on: the same recipe, the same global batch, the same random states, a log without what is computed again."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from mplug_core.data.batches import Lots
from mplug_core.errors import CheckpointError
from mplug_core.training.distributed import World
from mplug_core.training.resume import refuse_other_recipe, restore_random, save_random, share_lots
from mplug_core.training.step import TrainStep, begin_lot, build_context, lot_of
from mplug_core.training.trainer import Trainer
from tests.training.photos import write_photos
from tests.training.recipes import scene_recipe

ALONE = World(0, 1, 0)


def test_every_difference_is_told_and_counted() -> None:
    old = {"seed": 0, "stages": [{"name": "a", "steps": 3}, {"name": "b"}], "objectives": {"itc": 1.0}}
    new = {**old, "stages": [{"name": "a", "steps": 4}, {"name": "b"}], "objectives": {"itc": 1.0, "mlm": 0.5}}
    with pytest.raises(CheckpointError) as caught:
        refuse_other_recipe(old, new, Path("r"))
    assert "(objectives.mlm: None -> 0.5, stages.0.steps: 3 -> 4)" in caught.value.message
    many = {f"key{i:02d}": i for i in range(14)}
    with pytest.raises(CheckpointError, match=r"key09: 9 -> None and 4 more\)"):
        refuse_other_recipe(many, {}, Path("r"))
    with pytest.raises(CheckpointError, match=r"text: x{57}\.\.\. -> y"):
        refuse_other_recipe({"text": "x" * 90}, {"text": "y"}, Path("r"))


def test_how_it_is_computed_may_change_and_is_told() -> None:
    engine = {"name": "plain", "zero_stage": 2, "accumulate": 1, "checkpointing": [], "offload": "none", "threads": 1}
    other = {
        "name": "deepspeed",
        "zero_stage": 3,
        "accumulate": 4,
        "checkpointing": ["text"],
        "compile": True,
        "offload": "optimizer",
    }
    old = {"engine": {**engine, "precision": "bf16"}, "run": {"keep": 1}, "evaluate": {"val": {"limit": 3}}}
    new = {"engine": {**other, "precision": "bf16", "threads": None}, "run": {"keep": 5}, "evaluate": {}}
    data = {"root": "there", "workers": 3, "max_bad_fraction": 0.5, "cache": "/fast", "cache_gb": 9}
    told = refuse_other_recipe(old, {**new, "data": data}, Path("r"))
    assert [line.split(":")[0] for line in told] == [
        "data.root", "engine.checkpointing", "engine.compile", "engine.name", "engine.offload", "engine.threads",
        "engine.zero_stage",
    ]  # fmt: skip
    with pytest.raises(CheckpointError, match=r"engine\.precision: bf16 -> fp32"):
        refuse_other_recipe(old, {"engine": {**engine, "precision": "fp32"}}, Path("r"))


def test_recipe_of_before_a_field_came_is_the_same() -> None:
    from mplug_core.recipe import Recipe

    new = Recipe(name="r").model_dump(mode="json")
    old = {**new, "run": {}, "optimizer": {k: v for k, v in new["optimizer"].items() if k != "clip"}}
    assert refuse_other_recipe(old, new, Path("r")) == []


@pytest.mark.parametrize(
    ("lots", "world", "parts", "pieces"),
    [(8, 1, 8, 1), (8, 2, 4, 1), (8, 8, 1, 1), (3, 3, 1, 1), (1, 2, 1, 2), (2, 8, 1, 4), (3, 2, 3, 2), (6, 4, 3, 2)],
)
def test_global_batch_is_shared(lots: int, world: int, parts: int, pieces: int) -> None:
    assert share_lots(lots, world, [16, 4]) == (parts, pieces)


@pytest.mark.parametrize(("lots", "world", "able"), [(8, 3, "1, 2, 4, 8"), (1, 32, "1"), (6, 5, "1, 2, 3, 6")])
def test_numbers_that_cannot_share_it(lots: int, world: int, able: str) -> None:
    with pytest.raises(CheckpointError, match=f"{world} processes can't share .*start {able} processes"):
        share_lots(lots, world, [16, 4])


def test_random_states(tmp_path: Path) -> None:
    torch.manual_seed(3)
    save_random(tmp_path, ALONE)
    want = torch.rand(4)
    torch.manual_seed(99)
    restore_random(tmp_path, ALONE, seed=0, step=5)
    assert torch.equal(torch.rand(4), want)
    drawn = []
    for rank, step in ((1, 5), (1, 5), (2, 5), (1, 6)):
        restore_random(tmp_path, World(rank, 3, rank), seed=0, step=step)
        drawn.append(torch.rand(4))
    assert torch.equal(drawn[0], drawn[1])
    assert not any(torch.equal(drawn[0], other) for other in (*drawn[2:], want))


@pytest.mark.parametrize("content", [b"", b"junk", b"\x80\x04\x95."])
def test_damaged_random_states(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "random-00000.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="cannot read"):
        restore_random(tmp_path, ALONE, seed=0, step=5)


def test_a_lot_is_the_same_on_any_number_of_processes(tmp_path: Path) -> None:
    """The images, the captions, the masks and the dropout, so that its loss is equal bit for bit: what the README says
    of a run that goes on with another number of processes, as long as no lot has to be cut."""
    photos = write_photos(tmp_path / "data")
    source = {"path": str(photos), "split": "train", "batch_size": 4, "augment": "crop", "tasks": {"pretrain": 1}}
    recipe = scene_recipe(
        photos, tmp_path / "run", "model.dropout=0.3", data={"vocabulary": "data", "sources": {"photos": source}},
        objectives={"itm": 1, "itc": 1, "mlm": 1, "prefix_lm": 1}, teacher={"alpha": 0, "queue_size": 0},
    )  # fmt: skip
    trainer = Trainer(recipe, lambda *event: None)
    sources = [trainer.sources[name] for name in recipe.data.sources]
    step = TrainStep(trainer.model, trainer.tasks).train()
    found: dict[tuple[int, int], dict[int, tuple[float, list[int]]]] = {}
    for world, accumulate in ((1, 4), (2, 2), (4, 1)):
        losses = found[world, accumulate] = {}
        for rank in reversed(range(world)):
            lots = Lots(sources, recipe.seed, rank, world)
            for micro_step in range(2 * accumulate):
                lot = lot_of(micro_step, rank, world)
                generator = begin_lot(recipe.seed, lot)
                batches = lots[micro_step]
                contexts = [
                    build_context(recipe, batch, recipe.objectives, 0.0, None, None, nullcontext, generator)
                    for batch in batches
                ]
                loss, _ = step(batches, contexts, recipe.objectives)
                losses[lot] = float(loss.detach()), batches[0].image_ids.tolist()
    assert found[1, 4] == found[2, 2] == found[4, 1] and len(found[1, 4]) == 8
    assert len({loss for loss, _ in found[1, 4].values()}) == 8


def test_dropout_is_drawn_by_lot() -> None:
    drawn = {}
    for lot in (0, 1, 2, 1):
        generator = begin_lot(3, lot)
        drawn.setdefault(lot, []).append((torch.rand(3).tolist(), torch.rand(3, generator=generator).tolist()))
    assert drawn[1][0] == drawn[1][1] and drawn[0] != drawn[1][:1] != drawn[2]
    assert drawn[0][0][0] != drawn[0][0][1]
