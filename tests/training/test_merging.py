"""A step's sources in one pass teach what they teach one by one."""

from __future__ import annotations

import random

import pytest
import torch

from mplug_core.data.batches import Batch
from mplug_core.model.mplug import MplugModel
from mplug_core.objectives.masked_language import IGNORED
from mplug_core.recipe import check_recipe
from mplug_core.tasks.registry import TASKS
from mplug_core.training.merging import join_blocks, merge
from mplug_core.training.step import TrainStep, build_context
from mplug_core.training.workload import Workbench
from tests.small import CLASSIFIERS, CNN, small_config

WEIGHTS = {"caption": 1.0, "answer": 1.0, "box": 1.0, "entailment": 1.0, "mlm": 1.0, "prefix_lm": 1.0, "itm": 1.0}


@pytest.fixture(scope="module")
def bench() -> Workbench:
    config = small_config(
        vision=CNN, box_bins=8, classifiers=CLASSIFIERS, summary_tokens=2, vocab_size=80, text_pooling="mean"
    )
    source = {"path": "nowhere", "augment": "none"}
    recipe = check_recipe({
        "name": "test", "model": config.model_dump(exclude={"size", "calibration"}),
        "engine": {"name": "plain", "precision": "fp32"},
        "teacher": {"alpha": 0, "queue_size": 0}, "objectives": WEIGHTS,
        "data": {"sources": {
            "one": {**source, "batch_size": 4, "tasks": {"caption": 1, "vqa": 2, "grounding": 1}},
            "two": {**source, "batch_size": 6, "tasks": {"caption": 1, "vqa": 1, "entailment": 1}},
            "heavy": {**source, "batch_size": 3, "weight": 2, "tasks": {"caption": 1}},
        }},
    })  # fmt: skip
    return Workbench.of(recipe, config)


def drawn(bench: Workbench, *names: str) -> list[Batch]:
    """Batches with pictures of noise, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for name in names:
        unread = bench.unread(name, bench.stages[0])
        batch = unread.batch(bench.recipe.data.sources[name].batch_size, seed=1)
        batch.pixels = torch.randn(batch.pixels.shape, generator=generator)
        batches.append(batch)
    return batches


def losses(bench: Workbench, batches: list[Batch]) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = MplugModel(bench.config).eval()
    contexts = [
        build_context(bench.recipe, batch, WEIGHTS, 0.0, None, None, torch.no_grad, torch.Generator().manual_seed(0))
        for batch in batches
    ]
    return TrainStep(model, TASKS)(batches, contexts, WEIGHTS)[1]


def test_losses_are_means_over_the_records_of_all_sources(bench: Workbench) -> None:
    names = list(bench.recipe.data.sources)
    apart = drawn(bench, "one", "two")
    (merged,) = merge(drawn(bench, "one", "two"), names)
    assert len(merged.image_ids) == 10 and merged.image_ids.unique().numel() == 10
    got = losses(bench, [merged])
    first, second = (losses(bench, merge([batch], names)) for batch in apart)
    tokens = [int(batch.blocks["caption"]["target_mask"][:, 1:].sum()) for batch in apart]
    questions = [len(batch.blocks["vqa"]["ids"]) for batch in apart]
    for name, counts in {"caption": tokens, "answer": questions}.items():
        want = (first[name] * counts[0] + second[name] * counts[1]) / sum(counts)
        torch.testing.assert_close(got[name], want)
    torch.testing.assert_close(got["box"], first["box"])
    torch.testing.assert_close(got["entailment"], second["entailment"])


def test_sources_of_another_weight_and_those_that_stay_alone_are_not_merged(bench: Workbench) -> None:
    names = list(bench.recipe.data.sources)
    merged = merge(drawn(bench, "one", "heavy", "two"), names)
    assert [batch.source for batch in merged] == ["one+two", "heavy"]
    batches = drawn(bench, "one", "two")
    batches[1].alone = True
    assert [batch.source for batch in merge(batches, names)] == ["one", "two"]


def test_a_task_of_one_source_counts_with_its_own_images(bench: Workbench) -> None:
    (merged,) = merge(drawn(bench, "one", "two"), list(bench.recipe.data.sources))
    assert [merged.images_of(task) for task in ("caption", "grounding", "entailment")] == [10, 4, 6]
    assert merged.blocks["entailment"]["image"].min() >= 4 and merged.blocks["grounding"]["image"].max() < 4


def test_ids_of_different_sources_differ(bench: Workbench) -> None:
    merged = merge(drawn(bench, "one", "two", "heavy"), list(bench.recipe.data.sources))
    ids = torch.cat([batch.image_ids for batch in merged])
    assert ids.unique().numel() == len(ids)


def test_blocks_of_other_lengths_are_padded() -> None:
    short = {"image": torch.tensor([0, 1]), "ids": torch.ones(2, 3, dtype=torch.long), "labels": torch.full((2, 3), 7)}
    long = {"image": torch.tensor([1]), "ids": torch.full((1, 5), 2), "labels": torch.full((1, 5), 8)}
    joined = join_blocks([short, long], [0, 2])
    assert joined["image"].tolist() == [0, 1, 3]
    assert joined["ids"].tolist() == [[1, 1, 1, 0, 0]] * 2 + [[2] * 5]
    assert joined["labels"].tolist() == [[7, 7, 7, IGNORED, IGNORED]] * 2 + [[8] * 5]


def test_answers_stay_with_their_questions(bench: Workbench) -> None:
    rng = random.Random(0)
    blocks = [batch.blocks["vqa"] for batch in drawn(bench, "one", "two")]
    joined = join_blocks(blocks, [0, 4])
    for block, start in zip(blocks, (0, len(blocks[0]["ids"])), strict=True):
        row = rng.randrange(len(block["target_ids"]))
        place = row + (len(blocks[0]["target_ids"]) if start else 0)
        assert int(joined["question"][place]) == int(block["question"][row]) + start
