"""Model cards: written from a recipe and scores, read back, and completed without losing a word."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from mplug_core.errors import CheckpointError
from mplug_core.model.config import MplugConfig
from mplug_core.recipe import Recipe, check_recipe
from mplug_core.weights.card import Card, architecture, data_name, model_card, published_card, read_card
from mplug_core.weights.folder import EMBEDDED

METRICS = {"val/caption/cider": 0.46412345, "val/caption/bleu4": 0.174, "val/vqa/accuracy": 0.5}


@pytest.fixture
def recipe() -> Recipe:
    return check_recipe(
        {
            "name": "mine",
            "start": {"model": "hf:org/begun@v1"},
            "model": {"size": "tiny"},
            "steps": 70,
            "objectives": {"caption": 1.0, "answer": 0.5, "itm": 0.0},
            "data": {
                "sources": {
                    "photos": {"path": "{root}/flickr8k", "split": "train", "tasks": {"caption": 1}, "batch_size": 6},
                    "rooms": {"path": "data/rooms.jsonl", "tasks": {"vqa": 1}, "batch_size": 2},
                }
            },
            "optimizer": {"lr": 3e-4, "warmup_steps": 11},
            "evaluate": {"val": {"path": "{root}/flickr8k", "split": "val", "tasks": ["caption", "vqa"], "limit": 9}},
        }
    )


@pytest.fixture
def config() -> MplugConfig:
    return MplugConfig.named("tiny", stride=2)


def test_says_what_it_was_trained_from_and_on_and_how(recipe: Recipe, config: MplugConfig) -> None:
    card = Card.parse(model_card("mine", config, recipe, 64, METRICS))
    assert card.body.startswith("# mine\n") and "stride 2" in card.body
    assert "Trained from hf:org/begun@v1 for 64 steps as `recipe.yaml` says, on:" in card.body
    assert "- {root}/flickr8k, split train (caption)\n- data/rooms.jsonl (vqa)\n" in card.body
    assert "| losses | caption 1, answer 0.5 |" in card.body, "a loss without weight is none"
    assert "| batch | 8 images a process |" in card.body and "rate 0.0003, warm-up 11 steps" in card.body
    assert (
        "| val/caption/cider | 0.4641 |" in card.body and "`val`: {root}/flickr8k, split val, the first 9." in card.body
    )


def test_front_matter_is_what_hubs_read(recipe: Recipe, config: MplugConfig) -> None:
    fields = Card.parse(model_card("mine", config, recipe, 64, METRICS)).fields
    assert fields["library_name"] == "mplug" and fields["pipeline_tag"] == "image-to-text"
    assert fields["base_model"] == "org/begun" and fields["datasets"] == ["flickr8k", "rooms"]
    assert fields["tags"] == ["mplug", "vision-language", "image-to-text", "visual-question-answering"]
    assert "license" not in fields, "nobody has said one"
    (model,) = fields["model-index"]
    assert model["name"] == "mine"
    first = model["results"][0]
    assert first["task"] == {"type": "image-to-text", "name": "caption"}
    assert first["dataset"] == {"name": "flickr8k", "type": "flickr8k", "split": "val", "args": {"limit": 9}}
    assert first["metrics"] == [{"type": "cider", "value": 0.464123}, {"type": "bleu4", "value": 0.174}]


def test_scores_are_read_back_from_the_index_and_from_the_table(recipe: Recipe, config: MplugConfig) -> None:
    card = Card.parse(model_card("mine", config, recipe, 64, METRICS))
    indexed, tabled = card.scores(), Card({}, card.body).scores()
    assert [(s.task, s.metric) for s in indexed] == [("caption", "cider"), ("caption", "bleu4"), ("vqa", "accuracy")]
    assert [s.value for s in tabled] == [0.4641, 0.174, 0.5]
    assert (tabled[0].data, tabled[0].split, tabled[0].limit) == ("{root}/flickr8k", "val", 9)
    assert (indexed[0].data, indexed[0].split) == ("flickr8k", "val")


@pytest.mark.parametrize("cell", ["-", "--", "1.2.3", "e"])
def test_a_cell_without_a_figure_is_no_score(cell: str) -> None:
    card = Card({}, f"| metric | score |\n|---|---|\n| val/vqa/accuracy | {cell} |\n| val/caption/cider | 0.5 |\n")
    assert [(score.metric, score.value) for score in card.scores()] == [("cider", 0.5)]


def test_a_model_of_which_nothing_is_known_claims_nothing(config: MplugConfig) -> None:
    card = Card.parse(model_card("bare", config))
    assert "Trained" not in card.body and "Scores" not in card.body and card.scores() == []
    assert set(card.fields) == {"library_name", "pipeline_tag", "tags"}
    retriever = Card.parse(model_card("bare", config.model_copy(update={"decoder_layers": 0})))
    assert "pipeline_tag" not in retriever.fields


def test_parts_that_are_left_out_are_not_described(config: MplugConfig) -> None:
    update = {"absent": ["text"], "fusion": "none", "fusion_layers": 0}
    captioner = architecture(config.model_copy(update=update))
    assert captioner.endswith(f" pixels and a decoder of {config.decoder_layers} layers.")
    assert architecture(config.model_copy(update={**update, "decoder_layers": 0})).endswith(" pixels.")


def test_an_existing_card_keeps_its_text_its_fields_and_its_scores(recipe: Recipe, config: MplugConfig) -> None:
    text = "---\nlicense: mit\npipeline_tag: visual-question-answering\n---\n# My model\n\nIt is good.\n\n"
    text += "| metric | score |\n|---|---|\n| val/vqa/accuracy | 0.7100 |\n\n`val`: DATA/vqa2, split val.\n"
    card = published_card(Card.parse(text), "other", config, recipe, "hf:org/other")
    assert card.body.startswith("# My model\n\nIt is good.\n") and "0.7100" in card.body
    assert card.fields["license"] == "mit" and card.fields["pipeline_tag"] == "visual-question-answering"
    assert card.fields["library_name"] == "mplug"
    (result,) = card.fields["model-index"][0]["results"]
    assert result["dataset"]["name"] == "vqa2" and result["metrics"] == [{"type": "accuracy", "value": 0.71}]
    assert "mplug caption photo.jpg --model hf:org/other" in card.body
    again = published_card(Card.parse(card.text), "other", config, recipe, "hf:org/other")
    assert again.text == card.text, "what is complete is not touched"


def test_without_a_card_one_is_written(recipe: Recipe, config: MplugConfig) -> None:
    card = published_card(None, "new", config, recipe, "ms:org/new")
    assert card.body.startswith("# new\n") and 'mplug_core.load("ms:org/new")' in card.body
    assert yaml.safe_load(card.text.split("---\n")[1])["library_name"] == "mplug"


@pytest.mark.parametrize("front", ["---\na: [1\n---\n", "---\n- a\n---\n"])
def test_front_matter_that_is_none_is_named(front: str) -> None:
    with pytest.raises(CheckpointError, match="front matter of README.md"):
        Card.parse(front + "# x\n")


@pytest.mark.parametrize("text", ["# x\n", "---\n---\n# x\n", "\ufeff---\r\n---\r\n# x\n", ""])
def test_cards_without_fields(text: str) -> None:
    card = Card.parse(text)
    assert card.fields == {} and card.scores() == [] and "---" not in card.body


@pytest.mark.parametrize("index", [{"results": 1}, [{"results": [{"task": {}}]}], "x", [1], [{"results": [None]}]])
def test_an_index_that_is_none_gives_no_scores(index: object) -> None:
    assert Card({"model-index": index}, "").scores() == []


def test_tables_are_read_as_rows() -> None:
    card = Card({}, "| a | b |\n|---|:-:|\n| 1 | x y |\n\ntext | no table\n\n| c |\n|---|\n| 2 |\n")
    assert card.tables() == [[["a", "b"], ["1", "x y"]], [["c"], ["2"]]]


@pytest.mark.parametrize(
    ("path", "name"), [("{root}/flickr8k", "flickr8k"), ("a/b.jsonl", "b"), ("coco/", "coco"), ("/", "/")]
)
def test_data_is_called_by_the_last_part_of_its_path(path: str, name: str) -> None:
    assert data_name(path) == name


def test_embedded_card_is_understood() -> None:
    card = read_card(EMBEDDED)
    assert card is not None
    assert any("captions of Flickr8k" in cell for table in card.tables() for row in table for cell in row)


def test_card_that_cannot_be_read(tmp_path: Path) -> None:
    assert read_card(tmp_path) is None
    (tmp_path / "README.md").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(CheckpointError, match="not UTF-8"):
        read_card(tmp_path)
