"""``mplug model info``: what files tell of a model, for people and for programs, without its weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from mplug_core.errors import CheckpointError
from mplug_core.recipe import check_recipe
from mplug_core.weights.card import model_card
from mplug_core.weights.export import export_int8, read_source
from mplug_core.weights.folder import load_model
from tests.cli.conftest import save_random


def test_parts_sizes_and_tasks(mplug, able_folder):
    done = mplug("model", "info", able_folder, "--json")
    assert (done.code, done.err) == (0, "")
    (found,) = done.objects
    loaded = load_model(str(able_folder))
    assert found["parameters"]["all"] == sum(p.numel() for p in loaded.model.parameters())
    assert found["parameters"]["text"] == sum(p.numel() for p in loaded.model.text.parameters())
    assert found["bytes"] == sum(file.stat().st_size for file in able_folder.iterdir())
    assert found["numbers"] == {"bf16": found["parameters"]["all"]}
    assert found["vocabulary"] == loaded.tokenizer.vocab_size and found["box_bins"] == 16
    with torch.no_grad():
        tokens = loaded.model.encode_image(torch.zeros(1, 3, 32, 32)).tokens.shape[1]
    assert found["image"]["size"] == 32 and found["image"]["tokens"] == tokens
    assert all(task == {"able": True, "why_not": None} for task in found["tasks"].values())
    assert found["scores"] == [] and "recipe" not in found


def test_what_a_model_cannot_do_and_why(mplug, model_folder):
    done = mplug("model", "info")  # MPLUG_MODEL
    assert done.code == 0
    text = "\n".join(" ".join(line.split()) for line in done.lines)
    assert "caption yes" in text and "grounding no: it has no box_bins" in text
    assert "statements no: it has no classifiers.statement" in text and "boxes no box tokens" in text


@pytest.mark.parametrize(
    ("absent", "able", "why_not"),
    [
        (["contrastive"], {"caption", "vqa", "grounding"}, {"retrieval": "it has no contrastive head"}),
        (
            ["text", "contrastive", "matching", "masked"],
            {"caption"},
            {"retrieval": "it has no text encoder and no contrastive head", "vqa": "it has no text encoder"},
        ),
        (["matching", "masked"], {"caption", "vqa", "grounding", "retrieval"}, {}),
    ],
)
def test_parts_that_are_left_out_can_do_nothing(mplug, tmp_path, absent, able, why_not):
    fusion = {"fusion": "none", "fusion_layers": 0} if "text" in absent else {}
    folder = save_random(tmp_path / "m", box_bins=4, absent=absent, **fusion)
    tasks = mplug("model", "info", folder, "--json").objects[0]["tasks"]
    assert {task for task, found in tasks.items() if found["able"]} == able
    assert {task: tasks[task]["why_not"] for task in why_not} == why_not


@pytest.mark.parametrize(
    ("heads", "part"), [(("itm_head",), "matching"), (("vision_proj", "text_proj"), "contrastive")]
)
def test_what_cannot_be_loaded_can_do_nothing(mplug, tmp_path, heads, part):
    from tests.released import released, write_alicemind

    tensors = {name: value for name, value in released().items() if not name.startswith(heads)}
    file = write_alicemind(tmp_path / "m.pth", tensors)
    with pytest.raises(CheckpointError):
        load_model(str(file))
    tasks = mplug("model", "info", file, "--json").objects[0]["tasks"]
    assert not any(found["able"] for found in tasks.values())
    assert tasks["caption"]["why_not"].startswith(f"the {part} head is not there")


def test_fusion_says_which_layers_connect(mplug, tmp_path):
    folder = save_random(tmp_path / "m", fusion_layers=6, stride=2)
    (found,) = mplug("model", "info", folder, "--json").objects
    assert found["fusion"] == {"kind": "skip", "layers": 6, "stride": 2, "rule": "paper", "connected": [3, 6]}
    assert "stride 2, rule paper; connected: 3, 6" in mplug("model", "info", folder).out


@pytest.fixture
def trained(able_folder: Path, tmp_path: Path) -> Path:
    """A run folder, with a recipe and a card that has scores."""
    values = {
        "name": "mine", "start": {"model": "mini"}, "model": {"size": "tiny"}, "steps": 9,
        "objectives": {"caption": 2.0}, "optimizer": {"lr": 5e-4},
        "data": {"sources": {"photos": {"path": "DATA/flickr8k", "split": "train", "tasks": {"caption": 1}}}},
        "evaluate": {"val": {"path": "DATA/flickr8k", "split": "val", "tasks": ["caption"]}},
    }  # fmt: skip
    run = tmp_path / "run"
    folder = Path(shutil.copytree(able_folder, run / "model"))
    (folder / "recipe.yaml").write_text(json.dumps(values))
    recipe, config = check_recipe(values), load_model(str(able_folder)).config
    (folder / "README.md").write_text(model_card("mine", config, recipe, 9, {"val/caption/cider": 0.5}))
    return run


def test_training_and_scores(mplug, trained):
    (found,) = mplug("model", "info", trained, "--json").objects
    assert found["path"] == str(trained / "model") and found["recipe"]["name"] == "mine"
    assert found["recipe"]["facts"]["losses"] == "caption 2" and found["recipe"]["facts"]["length"] == "9 steps"
    assert found["scores"] == [{"task": "caption", "data": "flickr8k", "split": "val", "metric": "cider", "value": 0.5}]
    text = " ".join(mplug("model", "info", trained).out.split())
    assert "from mini" in text and "data photos DATA/flickr8k, split train (caption)" in text
    assert "caption flickr8k val cider 0.5000" in text


def test_a_recipe_that_is_not_understood_is_a_note(mplug, trained):
    (trained / "model" / "recipe.yaml").write_text("name: x\nnonsense: 1\n")
    done = mplug("model", "info", trained, "--json")
    assert done.code == 0 and "recipe" not in done.objects[0] and "note: recipe.yaml is not understood" in done.err


@pytest.mark.parametrize("text", [b"---\nhello\n---\ntext\n", b"---\na: [\n---\n", b"\xff\xfe"])
def test_a_card_that_is_not_understood_is_a_note(mplug, trained, text):
    (trained / "model" / "README.md").write_bytes(text)
    done = mplug("model", "info", trained, "--json")
    assert done.code == 0 and done.objects[0]["scores"] == [] and done.err.startswith("note: ")
    assert done.err.count("\n") == 1 and "README.md" in done.err


@pytest.mark.parametrize("written", ["2024-01-01", "[mit]", "1"])
def test_fields_of_a_card_are_texts(mplug, able_folder, tmp_path, written):
    folder = Path(shutil.copytree(able_folder, tmp_path / "m"))
    result = "{task: {type: caption}, dataset: {name: x, split: 2024-01-01}, metrics: [{type: cider, value: 1}]}"
    (folder / "README.md").write_text(f"---\nlicense: {written}\nmodel-index: [{{results: [{result}]}}]\n---\nx\n")
    (found,) = mplug("model", "info", folder, "--json").objects
    assert isinstance(found["license"], str) and written.strip("[]") in found["license"]
    assert found["scores"][0]["split"] == "2024-01-01"


def test_int8(mplug, able_folder, tmp_path):
    export_int8(read_source(str(able_folder)), tmp_path / "q", "bf16", "")
    (found,) = mplug("model", "info", tmp_path / "q", "--json").objects
    assert found["kind"] == "int8 model folder" and set(found["numbers"]) == {"int8", "bf16"}
    (before,) = mplug("model", "info", able_folder, "--json").objects
    assert found["parameters"] == before["parameters"] and found["missing"] == {}


def test_missing_parts_are_named(mplug, able_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(able_folder, tmp_path / "m"))
    state = load_file(folder / "model.safetensors")
    save_file({n: v for n, v in state.items() if not n.startswith("text.")}, folder / "model.safetensors")
    (found,) = mplug("model", "info", folder, "--json").objects
    assert found["tasks"]["caption"]["able"] and found["missing"]["text"]
    assert found["tasks"]["vqa"]["why_not"] == "its text is not in the checkpoint"


@pytest.mark.parametrize("damage", ["model.safetensors", "config.json", "vocab.txt"])
def test_damage_is_one_line(mplug, able_folder, tmp_path, damage):
    folder = Path(shutil.copytree(able_folder, tmp_path / "m"))
    (folder / damage).write_bytes(b"\xff{")
    done = mplug("model", "info", folder)
    assert done.code == 5 and damage in done.error


@pytest.mark.parametrize("cache", ["hf/hub/models--org--name/snapshots/" + "a" * 40, "home/models/ms/org/name/master"])
def test_models_of_hubs_are_called_as_there(mplug, able_folder, tmp_path, monkeypatch, cache):
    monkeypatch.setenv("MPLUG_HOME", str(tmp_path / "home"))
    folder = shutil.copytree(able_folder, tmp_path / cache)
    assert mplug("model", "info", folder, "--json").objects[0]["name"] == "org/name"


def test_no_model_is_one_line(mplug):
    done = mplug("model", "info", "/nowhere")
    assert done.code == 5 and "/nowhere" in done.error


def test_released_checkpoint(mplug, tmp_path):
    """What a checkpoint of a task lacks is named, and an export of it is a model folder."""
    from mplug_core.data.text import Tokenizer
    from tests.weights.test_official import released

    tensors = {name: value for name, value in released().items() if not name.startswith("fusion_encoder.cls.")}
    count = len(tensors["text_decoder.bert.embeddings.word_embeddings.weight"])
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    Tokenizer([*pieces, *(f"word{k}" for k in range(count - len(pieces)))]).save(tmp_path / "vocab.txt")
    torch.save({"model": tensors}, tmp_path / "mplug.pth")
    (found,) = mplug("model", "info", tmp_path / "mplug.pth", "--json").objects
    assert found["kind"] == "released checkpoint" and found["name"] == "mplug"
    assert found["bytes"] == (tmp_path / "mplug.pth").stat().st_size
    assert list(found["missing"]) == ["masked"] and found["tasks"]["vqa"]["able"]
    assert found["fusion"]["rule"] == "released" and found["image"]["backbone"].startswith("vit_")
    done = mplug("model", "export", tmp_path / "mplug.pth", tmp_path / "native", "--dtype", "fp32")
    assert done.code == 0 and load_model(str(tmp_path / "native")).config.rule == "released"
    assert mplug("model", "push", tmp_path / "mplug.pth", "hf:a/b", "--dry-run").code == 5
