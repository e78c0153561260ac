"""The check before a run: what it counts is what a run does, and what is missing is found before anything begins."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mplug_cli.preflight import lines_of
from mplug_core.data.shards.pack import PackOptions, pack
from mplug_core.model.config import MplugConfig
from mplug_core.recipe import EngineSection, Recipe, load_recipe
from mplug_core.training import precision, preflight, trainer
from mplug_core.training.flops import DEVICE_FLOPS, StepFlops, peak_flops, step_flops, training_flops_per_image
from mplug_core.training.memory import Activations, count_sizes, estimate_memory
from mplug_core.training.preflight import Preflight, check_run, parts_of_check
from mplug_core.training.tracing import convolution_backward_flops
from mplug_core.training.trainer import Trainer
from mplug_core.training.workload import Workbench, build_parts
from tests.small import FUSED_ON_CPU
from tests.training.photos import photo_recipe, write_photos
from tests.training.recipes import scene_recipe
from tests.weights.test_bert import make_bert, save_bert

PAIRS = ("data.sources.scenes.tasks={pretrain: 1}", "objectives={itc: 1, itm: 1, mlm: 1, prefix_lm: 1}")


def bench_of(recipe: Recipe) -> Workbench:
    """The recipe's workbench, its texts invented."""
    return Workbench.of(recipe, MplugConfig(**recipe.model.model_dump()))


@pytest.fixture(scope="module")
def checked(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Preflight]:
    folder = tmp_path_factory.mktemp("checked") / "run"
    recipe = scene_recipe(scenes, folder, *PAIRS, "data.sources.scenes.batch_size=6", "run.evaluate_every=3",
                          evaluate={"val": {"path": str(scenes), "split": "val", "tasks": ["caption"]}})  # fmt: skip
    return recipe, check_run(recipe, 2, ("a100", "cpu"))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Costs, which take seconds to trace, are of no interest here."""
    monkeypatch.setattr(preflight, "step_flops", lambda *given, **named: StepFlops(1, {"forward": 1.0}))
    monkeypatch.setattr(preflight._Check, "_memory", lambda *given: [])


# -- the report --------------------------------------------------------------------------------------------------------


def test_nothing_is_wrong_and_nothing_is_written(checked: tuple[Recipe, Preflight]) -> None:
    recipe, found = checked
    assert (found.faults, found.exit_code) == ([], 0)
    assert not Path(str(recipe.run.folder)).exists()
    (stage,) = found.stages
    assert (stage.steps, stage.images_per_step) == (6, 12)
    (source,) = found.sources
    assert source.images == source.found["pretrain"]["records"] == 40 and found.evaluations[0].found["caption"]


def test_parts_are_those_of_the_model_that_is_trained(
    checked: tuple[Recipe, Preflight], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, found = checked
    monkeypatch.setattr("mplug_core.training.trainer.Trainer._check_evaluations", lambda self: None)
    run = Trainer(recipe, lambda kind, figures: None, "never")
    assert found.vocabulary == run.tokenizer.vocab_size
    for part in ("visual", "text", "fusion", "decoder"):
        count = sum(p.numel() for p in getattr(run.model, part).parameters())
        shared = count - found.stages[0].parameters[part]["trained"]
        # the image projection belongs to the visual encoder; tied weights count once
        assert shared <= 0 if part == "visual" else shared >= 0, part
    counted = [sum(part.values()) for name, part in found.stages[0].parameters.items() if name != "teacher"]
    modules = torch.nn.ModuleList([run.model, run.tasks["patches"]])
    assert sum(counted) == sum(p.numel() for p in modules.parameters())
    assert found.steps == sum(run.steps_of(stage) for stage in run.stages)


def test_hours_follow_from_flops_and_speed(checked: tuple[Recipe, Preflight]) -> None:
    _, found = checked
    (stage,) = found.stages
    speed = found.devices["a100"]
    work = stage.flops.per_image * 12 * 6 / 2  # two devices share it
    assert (speed["precision"], speed["peak_flops"]) == ("fp32", DEVICE_FLOPS["a100"]["fp32"])
    assert stage.hours["a100"] == pytest.approx(work / (19.5e12 * speed["utilisation"]) / 3600)
    assert stage.step_seconds["a100"] * 6 / 3600 == pytest.approx(stage.hours["a100"])
    assert found.hours["cpu"] > found.hours["a100"]


def test_report_is_json(checked: tuple[Recipe, Preflight]) -> None:
    values = json.loads(json.dumps(checked[1].as_object()))
    assert values["steps"] == 6 and values["stages"][0]["flops"]["per_image"] > 0
    assert {row["zero_stage"] for row in values["stages"][0]["memory"]} == {0, 1, 2, 3}


def test_epochs_count_as_in_training(quick: None, scenes: Path, tmp_path: Path) -> None:
    epochs = ("steps=null", "epochs=3", "data.sources.scenes.batch_size=4")
    found = check_run(scene_recipe(scenes, tmp_path / "run", *PAIRS, *epochs), 2, ("a100",))
    assert found.steps == 3 * (40 // (4 * 2))


def test_packs_are_checked_by_their_index(quick: None, scenes: Path, tmp_path: Path) -> None:
    pack(PackOptions(str(scenes), split="train", tasks=("caption",)), tmp_path / "pack")
    recipe = scene_recipe(
        scenes, tmp_path / "run", *PAIRS, f"data.sources.scenes.path={tmp_path / 'pack'}",
        "data.sources.scenes.split=null", "steps=null", "epochs=1", "data.sources.scenes.batch_size=5",
    )  # fmt: skip
    found = check_run(recipe, 1, ())
    assert (found.faults, found.steps) == ([], 8)
    assert found.sources[0].images == 40 and "pack of 1 shards" in str(found.sources[0].note)
    assert any("texts of scenes are not at hand" in note for note in found.notes)


def test_disk_for_features_is_counted_once_for_all_sources(tmp_path: Path, quick: None) -> None:
    """Not for sources of stages in which the encoder learns."""
    recipe = photo_recipe(write_photos(tmp_path / "data"), tmp_path / "run")
    trained = trainer.Trainer(recipe, lambda *given: None)
    features = tmp_path / "run" / "features"
    payload = sum(array.nbytes for array in (np.load(file) for file in features.rglob("*.npy")))
    assert trained.sources["questions"].features is not None
    assert check_run(recipe, 1, ()).disk["caches"] == payload > 0
    learning = recipe.model_copy(update={"stages": recipe.stages[1:], "freeze": []})
    assert check_run(learning, 1, ()).disk["caches"] == 0


# -- faults ------------------------------------------------------------------------------------------------------------


def test_stages_that_can_not_train(scenes: Path, tmp_path: Path, quick: None) -> None:
    stages = [
        {"name": "a", "steps": 1, "freeze": ["visul"]},
        {"name": "b", "steps": 1, "objectives": {"answer": 1}},
    ]
    recipe = scene_recipe(scenes, tmp_path / "run", "data.sources.scenes.tasks={caption: 1}", stages=stages)
    found = check_run(recipe, 1, ())
    assert [fault.message for fault in found.faults] == [
        "stage a: freeze: no part 'visul', did you mean 'visual'?", "stage b: no source gives any of answer"
    ]  # fmt: skip
    assert found.exit_code == 3


def test_faults_are_all_found_at_once(
    quick: None, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate = {"val": {"path": str(tmp_path / "absent"), "split": "val", "tasks": ["caption"]}}
    recipe = scene_recipe(scenes, tmp_path / "run", *PAIRS, "data.sources.scenes.path=gone", evaluate=evaluate)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: usage(1, 1, 1000))
    found = check_run(recipe, 1, ())
    messages = [str(fault) for fault in found.faults]
    assert len(messages) == 3 and found.exit_code == 3, messages
    assert "data.sources.scenes: there is no data at gone" in messages[0]
    assert "evaluate.val: " in messages[1] and "are needed in" in messages[2]


def test_images_that_are_missing_beyond_the_budget(quick: None, scenes: Path, tmp_path: Path) -> None:
    shutil.copytree(scenes, tmp_path / "scenes")
    for image in sorted((tmp_path / "scenes" / "train" / "images").iterdir())[:10]:
        image.unlink()
    recipe = scene_recipe(tmp_path / "scenes", tmp_path / "run", *PAIRS)
    found = check_run(recipe, 1, ())
    assert [fault.exit_code for fault in found.faults] == [3] and "max_bad_fraction" in str(found.faults[0])


def test_start_model_that_is_not_there(quick: None, scenes: Path, tmp_path: Path) -> None:
    found = check_run(scene_recipe(scenes, tmp_path / "run", *PAIRS, f"start.model={tmp_path / 'gone'}"), 1, ())
    assert [fault.exit_code for fault in found.faults] == [5] and "start.model" in str(found.faults[0])


def test_what_parts_start_from(quick: None, scenes: Path, tmp_path: Path) -> None:
    """What is here is checked and told, what would be fetched is named."""
    bert = str(save_bert(tmp_path / "bert", make_bert()))
    known = ("model.max_positions=48", f"start.text={bert}", "start.fusion=text")
    found = check_run(scene_recipe(scenes, tmp_path / "run", *PAIRS, *known, "start.decoder=hf:a/b"), 1, ())
    assert not found.faults
    told = [note for note in found.notes if note.startswith(("text: layer 0 of", "fusion: layers 1-2 of"))]
    assert len(told) == 2 and f"of {found.vocabulary}" in told[0]
    assert "start.decoder: hf:a/b is fetched by the run, and not checked here" in found.notes
    fetched = scene_recipe(scenes, tmp_path / "run", *PAIRS, "start.text=hf:a/b", "start.visual=timm")
    notes = " ".join(check_run(fetched, 1, ()).notes)
    assert "the vocabulary comes with hf:a/b" in notes and "start.visual: timm is fetched by the run" in notes
    wrong = scene_recipe(scenes, tmp_path / "run", *PAIRS, *known, "model.intermediate=48", "start.visual=gone.pt")
    faults = check_run(wrong, 1, ()).faults
    assert [fault.exit_code for fault in faults] == [5, 5]
    assert "start.visual: no pretrained part gone.pt" in faults[0].message and "would be 64 x 32" in faults[1].message


# -- FLOPs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        ("objectives={prefix_lm: 1}", "teacher.alpha=0"),
        ("objectives={itc: 1, itm: 1, mlm: 1, prefix_lm: 1}",),
        ("objectives={itc: 1, mlm: 1, prefix_lm: 1}", "engine.checkpointing=[text, fusion, decoder]"),
    ],
    ids=["decoder", "all", "checkpointing"],
)
def test_traced_flops_are_those_of_a_real_step(scenes: Path, tmp_path: Path, settings: tuple[str, ...]) -> None:
    """PyTorch's own counter on the step with numbers in it says the same."""
    recipe = scene_recipe(scenes, tmp_path / "run", *PAIRS, *settings, "model.dropout=0", "model.vocab_size=128")
    bench = bench_of(recipe)
    traced = step_flops(bench, bench.stages[0])
    torch.manual_seed(0)
    objectives = bench.objectives_of(bench.stages[0])
    parts = build_parts(bench, bench.stages[0], objectives)
    batch = bench.unread("scenes", bench.stages[0]).batch(8)
    batch.pixels = torch.randn(batch.pixels.shape)
    context = parts.context(recipe, batch, objectives, torch.inference_mode if parts.teacher is None else torch.no_grad)
    with FlopCounterMode(display=False, custom_mapping=FUSED_ON_CPU) as counter:
        loss, _ = parts.step([batch], [context], objectives)
        loss.backward()
    # ITM and MLM choose rows at random, so that a few differ
    assert traced.per_image * 8 == pytest.approx(counter.get_total_flops(), rel=0.03)
    assert (traced.by_kind.get("recomputed", 0) > 0) == bool(recipe.engine.checkpointing)
    assert traced.useful_per_image <= traced.per_image


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("kind", [torch.nn.Conv2d, torch.nn.ConvTranspose2d])
@pytest.mark.parametrize("learns", [True, False])
def test_flops_of_grouped_convolutions(groups: int, kind: type[torch.nn.Module], learns: bool) -> None:
    """As many as of the groups one by one, which PyTorch counts rightly."""

    def counted(channels: int, groups: int, mapping: dict[Any, Any]) -> int:
        layer = kind(channels, channels, 3, padding=1, groups=groups).requires_grad_(learns)
        x = torch.randn(2, channels, 6, 6, requires_grad=True)
        with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
            layer(x).sum().backward()
        return counter.get_total_flops()

    def ours(*given: Any, **known: Any) -> int:
        return convolution_backward_flops(*given, **known)

    ours._get_raw = True  # given tensors, not shapes
    assert counted(8, groups, {torch.ops.aten.convolution_backward: ours}) == groups * counted(8 // groups, 1, {})


def test_flops_of_a_run_and_speeds_of_devices(scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = scene_recipe(scenes, tmp_path / "run", *PAIRS)
    assert training_flops_per_image(recipe, bench_of(recipe).config) > 1e6
    monkeypatch.setattr(Workbench, "of", lambda *given: 1 / 0)  # never a reason to end a run
    assert training_flops_per_image(recipe, bench_of.__class__) is None
    assert peak_flops("H100", "bf16") == 989e12 and peak_flops("abacus", "fp32") is None
    assert peak_flops("cpu", "fp32") > 1e9


# -- memory ------------------------------------------------------------------------------------------------------------


def test_memory_is_divided_as_zero_says(scenes: Path, tmp_path: Path) -> None:
    bench = bench_of(scene_recipe(scenes, tmp_path / "run", *PAIRS))
    stage = bench.stages[0]
    sizes, traced = count_sizes(bench, stage), Activations.of(bench, stage, "cuda")

    def memory(zero: int, processes: int = 4, **fields: Any) -> Any:
        engine = EngineSection(zero_stage=zero, precision="fp32" if zero == 0 else "bf16", **fields)
        return estimate_memory(bench, stage, engine, processes, "cuda", activations=traced, sizes=sizes)

    assert memory(0).optimizer == 8 * sizes.trained
    assert memory(1).optimizer == memory(2).optimizer == 12 * sizes.trained / 4
    assert memory(2).weights == 2 * sizes.all and memory(3).weights == 2 * sizes.all / 4
    assert memory(1).optimizer == memory(1, 8).optimizer * 2
    assert memory(2).teacher == 4 * sizes.teacher + sizes.queue_bytes
    offloaded = memory(2, offload="optimizer")
    assert offloaded.host > 0 == offloaded.optimizer and offloaded.total < memory(2).total


def test_activations_grow_with_the_batch_and_shrink_with_checkpointing(scenes: Path, tmp_path: Path) -> None:
    whole = bench_of(scene_recipe(scenes, tmp_path / "run", *PAIRS))
    towers = "engine.checkpointing=[visual, text, fusion, decoder]"
    less = bench_of(scene_recipe(scenes, tmp_path / "run", *PAIRS, towers))
    traced = Activations.of(whole, whole.stages[0], "cpu")
    assert traced.at(0.5) < traced.at(1.0) < traced.at(2.0)
    assert traced.traces[1].saved > Activations.of(less, less.stages[0], "cpu").traces[1].saved
    # of each step gradients of all that is trained are left, but of what no loss of it reaches
    sizes = count_sizes(whole, whole.stages[0])
    assert 0.8 * 4 * sizes.trained < traced.traces[1].left < 1.3 * 4 * sizes.trained


# -- precision ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("units", [True, False])
def test_auto_is_what_the_device_multiplies(units: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "multiplies_bf16", lambda device: units)
    cpu = torch.device("cpu")
    for engine in (EngineSection(zero_stage=2), EngineSection(name="plain", zero_stage=0)):
        assert precision.settled(engine, cpu).precision == ("bf16" if units else "fp32")
    assert precision.settled(EngineSection(zero_stage=0), cpu).precision == "fp32"
    assert precision.settled(EngineSection(precision="bf16"), cpu).precision == "bf16"


def test_units_of_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    for known, found in (({"avx2": True}, False), ({"avx512_bf16": True}, True), ({"amx_bf16": True}, True)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda known=known: known, raising=False)
        assert precision.multiplies_bf16(cpu) is found
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert not precision.multiplies_bf16(cpu)


def test_a_run_keeps_the_precision_that_it_began_with(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = scene_recipe(scenes, tmp_path / "run", *PAIRS, "engine.precision=auto", "steps=2", "run.save_every=2")
    monkeypatch.setattr(precision, "multiplies_bf16", lambda device: False)
    trainer.train(recipe)
    monkeypatch.setattr(precision, "multiplies_bf16", lambda device: True)
    again = trainer.Trainer(recipe, lambda kind, figures: None)
    assert again.checkpoint is not None and again.recipe.engine.precision == "fp32"
    assert trainer.Trainer(recipe, lambda kind, figures: None, "never").recipe.engine.precision == "bf16"


def test_bf16_that_a_device_lacks_is_told(scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "multiplies_bf16", lambda device: False)
    told: list[str] = []
    recipe = scene_recipe(scenes, tmp_path / "run", *PAIRS, "engine.precision=bf16")
    trainer.Trainer(recipe, lambda kind, figures: told.append(str(figures.get("text"))), "never")
    assert sum("no units for bf16" in text for text in told) == 1


@pytest.mark.slow
def test_sizes_of_a_start_model_that_is_not_there(quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    told: list[int] = []
    recipe = load_recipe("caption_large")
    large = check_run(recipe, 8, ("a100",), told.append)
    (stage,) = large.stages
    assert stage.parameters["visual"]["trained"] > 290e6 and large.vocabulary == 30522
    assert any("the sizes are those of the paper's mPLUG-large" in note for note in large.notes)
    assert any(fault.exit_code == 5 and "start.model" in fault.message for fault in large.faults)
    assert sum(told) == parts_of_check(recipe)
    # five epochs of the published photos, 64 at once on each of eight devices
    assert stage.steps == 5 * (113_287 // (64 * 8 * recipe.engine.accumulate)) and stage.hours["a100"] > 0
    assert any("coco 113,287" in note for note in large.notes)


def test_a_start_model_of_which_nothing_is_known(quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = check_run(load_recipe("caption_large", ["start.model=runs/mine"]), 1, ("a100",))
    (stage,) = found.stages
    assert (stage.parameters, stage.flops, stage.hours, found.vocabulary) == ({}, None, {}, None)
    assert found.disk["needed"] is None and any("its size is not known" in note for note in found.notes)
    json.dumps(found.as_object(), allow_nan=False)
    lines = "\n".join(lines_of(found))
    assert "the model's size is not known" in lines and "vocabulary: not known" in lines and "0.0M" not in lines


def test_steps_of_data_that_is_partly_here(quick: None, scenes: Path, tmp_path: Path) -> None:
    """Here 40 images, 4 a step; the published data set has 1,000, 10 a step, and both are seen twice."""
    away = {"path": str(tmp_path / "away"), "batch_size": 10, "published_images": 1000}
    settings = (*PAIRS, "steps=null", "epochs=2", "data.sources.scenes.batch_size=4")
    recipe = scene_recipe(scenes, tmp_path / "run", *settings, f"data.sources.away={json.dumps(away)}")
    assert check_run(recipe, 1, ()).steps == 200
    assert check_run(recipe, 4, ()).steps == 50
    away["published_images"] = None
    less = scene_recipe(scenes, tmp_path / "run", *settings, f"data.sources.away={json.dumps(away)}")
    assert check_run(less, 1, ()).steps is None
