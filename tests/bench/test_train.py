"""The naive steps compute the loss of ours, and do undo what they say."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from torch.nn import functional as F

from mplug_core.bench.opponents import NAIVE, TOGETHER
from mplug_core.bench.train import OPPONENTS, TOWERS, Pretraining, Trial, bench_train
from mplug_core.model.attention import CrossAttention
from mplug_core.model.config import MplugConfig
from mplug_core.model.decoder import LanguageHead
from mplug_core.model.teacher import Teacher
from mplug_core.model.text import Embeddings
from mplug_core.model.vision import VisualEncoder
from tests.small import small_config


def config() -> MplugConfig:
    return small_config(vocab_size=200)


@pytest.fixture(scope="module")
def trial() -> Trial:
    return Trial(config(), Pretraining(batch=4, max_text=30))


@contextmanager
def inputs(kind: type) -> Iterator[list[torch.Size]]:
    """Shapes that modules of a kind are called with."""
    seen: list[torch.Size] = []
    forward = kind.forward

    def noted(self, first, *others, **options):
        seen.append(first.shape)
        return forward(self, first, *others, **options)

    with mock.patch.object(kind, "forward", noted):
        yield seen


def loss_of(trial: Trial, name: str) -> float:
    with trial.way(name)():
        return float(trial.step.loss(trial.engine).detach())


@pytest.mark.parametrize("name", [*NAIVE, *TOGETHER, "checkpointing"])
def test_every_step_computes_the_same_loss_and_gradients(trial: Trial, name: str) -> None:
    found = []
    for way in ("mplug", name):
        trial.model.zero_grad()
        with trial.way(way)():
            loss = trial.step.loss(trial.engine)
            loss.backward()
        found.append((float(loss.detach()), {n: p.grad for n, p in trial.model.named_parameters()}))
    (ours, gradients), (theirs, others) = found
    assert theirs == pytest.approx(ours, abs=1e-4)
    for parameter, want in gradients.items():
        assert torch.allclose(others[parameter], want, atol=1e-4), parameter


def test_our_step_runs_no_teacher_and_encodes_each_image_and_text_once(trial: Trial) -> None:
    assert trial.step.parts.teacher is None and trial.step.parts.queue is None
    with inputs(VisualEncoder) as images, inputs(Embeddings) as texts, inputs(LanguageHead) as rows:
        loss_of(trial, "mplug")
    block = trial.step.batches[0].blocks["pretrain"]
    assert images == [(4, 3, 32, 32)]
    # ITC's and ITM's, the masked one, the prefix, and what the decoder is given
    written = block["target_ids"][:, :-1]
    assert texts == [block[name].shape for name in ("ids", "masked", "prefix_ids")] + [written.shape]
    assert [len(shape) for shape in rows] == [2, 2]
    assert [shape[0] for shape in rows] == [(block["labels"] >= 0).sum(), block["target_mask"][:, 1:].sum()]


def test_a_batch_is_as_long_as_its_longest_text(trial: Trial) -> None:
    block = trial.step.batches[0].blocks["pretrain"]
    lengths = block["mask"].sum(1)
    assert len(set(lengths.tolist())) > 1
    assert block["ids"].shape[1] == lengths.max() < 30
    for name in ("prefix", "target"):
        assert block[f"{name}_ids"].shape[1] == block[f"{name}_mask"].sum(1).max() <= lengths.max()


@pytest.mark.parametrize(("name", "passes"), [("teacher", 1), ("teacher-images", 2)])
def test_teacher_is_run_and_updated(trial: Trial, name: str, passes: int) -> None:
    bias = trial.teacher.model.text.layers[0].attention.out.bias
    before = bias.clone()
    with torch.no_grad():
        trial.model.text.layers[0].attention.out.bias.add_(1)
    with inputs(VisualEncoder) as images:
        trial.take(name)()
    assert len(images) == 1 + passes
    assert not torch.equal(bias, before)
    with mock.patch.object(Teacher, "update") as update:
        trial.take("mplug")()
    assert not update.called


def test_negatives_are_encoded_again(trial: Trial) -> None:
    with inputs(VisualEncoder) as images, inputs(Embeddings) as texts:
        loss_of(trial, "itm")
    assert len(images) == 3 and len(texts) == 6


def test_texts_are_padded(trial: Trial) -> None:
    with inputs(Embeddings) as texts:
        loss_of(trial, "padding")
    assert [shape[1] for shape in texts] == [30, 30, 30, 29]


@pytest.mark.parametrize(("name", "head"), [("mlm", 0), ("logits", 1)])
def test_head_is_on_all_positions(trial: Trial, name: str, head: int) -> None:
    with inputs(LanguageHead) as rows:
        loss_of(trial, name)
    block = trial.step.batches[0].blocks["pretrain"]
    assert rows[head][:2] == block["labels" if name == "mlm" else "target_ids"].shape
    assert len(rows[1 - head]) == 2


def test_projections_are_separate(trial: Trial) -> None:
    widths = {}
    for name in ("mplug", "qkv"):
        with mock.patch.object(F, "linear", wraps=F.linear) as linear:
            loss_of(trial, name)
        widths[name] = [call.args[1].shape[0] for call in linear.call_args_list]
    assert 3 * 32 in widths["mplug"] and 3 * 32 not in widths["qkv"]
    # where there was one product there are three, and two for keys and values of another stream
    with inputs(CrossAttention) as crossed:
        loss_of(trial, "mplug")
    assert len(widths["qkv"]) == len(widths["mplug"]) + 2 * widths["mplug"].count(96) + len(crossed)


def test_attention_is_unfused(trial: Trial) -> None:
    with mock.patch.object(F, "scaled_dot_product_attention", side_effect=AssertionError):
        loss_of(trial, "attention")
        with pytest.raises(AssertionError):
            loss_of(trial, "mplug")


def test_what_is_undone_is_done_again_after(trial: Trial) -> None:
    with inputs(VisualEncoder) as images, inputs(LanguageHead) as rows:
        for name in NAIVE:
            loss_of(trial, name)
        images.clear(), rows.clear()
        loss_of(trial, "mplug")
    assert len(images) == 1 and {len(shape) for shape in rows} == {2}
    assert not trial.model.text.checkpointing


def test_every_tower_saves_memory_when_it_is_checkpointed() -> None:
    """On shapes: bytes that the forward pass keeps, of a model deep enough that layers are most of it."""
    from mplug_core.training.flops import trace_step

    vision = {**config().vision.model_dump(), "options": {**config().vision.options, "depth": 4}}
    towers = {"text_layers": 4, "fusion_layers": 4, "decoder_layers": 4}
    bench = Pretraining(4).workbench(small_config(vocab_size=200, vision=vision, **towers))

    def saved(*checkpointed: str) -> int:
        engine = bench.recipe.engine.model_copy(update={"checkpointing": list(checkpointed)})
        bench.recipe = bench.recipe.model_copy(update={"engine": engine})
        return trace_step(bench, bench.stages[0], {"pairs": 4}).saved

    plain = saved()
    gains = {tower: plain - saved(tower) for tower in TOWERS}
    assert all(gain > 0.05 * plain for gain in gains.values()), (plain, gains)
    assert saved(*TOWERS) < 0.4 * plain


def test_report_has_a_row_for_each_way() -> None:
    turns: list[str] = []
    report = bench_train(config(), Pretraining(2), ["mlm", "naive"], repeats=1, advance=turns.append)
    assert len(report.rows) == 3 and len(turns) == 6
    assert [step["step"] for step in report.figures["steps"]] == ["mplug", "mlm", "naive"]
    assert report.figures["steps"][0]["ratio"] == 1 and report.figures["image_tokens"] == 17
    assert all(step["peak_bytes"] > 0 for step in report.figures["steps"])


def test_the_command_knows_the_same_names() -> None:
    from mplug_cli import bench_train as command

    assert command.OPPONENTS == OPPONENTS
