"""Starting from a model: what stays as it was, what is fitted, what is fresh, and that it is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mplug_core.data.text import Tokenizer, build_vocabulary
from mplug_core.errors import CheckpointError, RecipeError
from mplug_core.model.mplug import MplugModel
from mplug_core.recipe import ModelSection
from mplug_core.training.start import (
    changed_config,
    fill_from,
    grown_vocabulary,
    origins_of_pieces,
    parts_of,
    words_without_piece,
)
from mplug_core.weights.folder import Stored
from tests.small import CLASSIFIERS, CNN, small_model

WORDS = Tokenizer(build_vocabulary(["a red ball on a green table", "two dogs run"], box_bins=4))


def stored(**fields: Any) -> Stored:
    """A model of random weights as if read from a file."""
    model = small_model(vocab_size=WORDS.vocab_size, box_bins=WORDS.bins, **fields)
    return Stored(model.config, WORDS, model.state_dict(), Path("start"))


def started(start: Stored, section: dict[str, Any], tokenizer: Tokenizer = WORDS) -> tuple[MplugModel, str]:
    """The model that a recipe's section makes of a start model, and the note on it."""
    config = changed_config(start.config, ModelSection(**section), tokenizer)
    torch.manual_seed(1)
    model = MplugModel(config).eval()
    return model, fill_from(model, tokenizer, start)


def encodings(model: MplugModel, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([WORDS.encode("a red ball"), WORDS.encode("two dogs run")])
    with torch.no_grad():
        images, text = model.encode_image(pixels), model.encode_text(ids, torch.ones_like(ids))
        memory, mask = model.memory(images, text, torch.ones_like(ids))
        return images.tokens, model.decode(ids, memory, mask)


def test_section_left_out_is_the_same_model() -> None:
    start = stored()
    model, note = started(start, {})
    assert note == "weights: start"
    assert all(torch.equal(value, start.state[name]) for name, value in model.state_dict().items())


def test_a_section_changes_only_what_it_sets() -> None:
    section = ModelSection(**{"vision": {"image_size": 48}, "dropout": 0.3})
    config = changed_config(stored().config, section, WORDS)
    assert config.vision.image_size == 48 and config.dropout == 0.3
    assert config.vision.backbone == stored().config.vision.backbone and config.width == 32
    with pytest.raises(RecipeError, match="width 30 is not a multiple of heads 4"):
        changed_config(stored().config, ModelSection.model_construct({"width"}, width=30), WORDS)


def test_transformer_at_another_size_has_resized_positions() -> None:
    start = stored()
    model, note = started(start, {"vision": {"image_size": 48}})
    assert "resized to 6 x 6" in note
    positions = model.visual.backbone.pos_embed
    assert positions.shape == (1, 37, 32)
    assert torch.equal(positions[0, 0], start.state["visual.backbone.pos_embed"][0, 0])
    # bilinear without aligned corners: a corner cell of 6 is the corner cell of 4
    assert torch.allclose(positions[0, 1], start.state["visual.backbone.pos_embed"][0, 1])
    assert torch.equal(model.text.embeddings.words.weight, start.state["text.embeddings.words.weight"])


def test_convolutional_network_at_another_size_has_the_sines_of_that_size() -> None:
    start = stored(vision=CNN)
    model, note = started(start, {"vision": {"image_size": 64}})
    fresh = MplugModel(model.config)
    assert "positions of cells computed for 4 x 4" in note
    assert torch.equal(model.grid_positions, fresh.grid_positions)


def test_classifiers_are_added_fresh_beside_those_that_are_there() -> None:
    start = stored(classifiers={"statement": CLASSIFIERS["statement"]})
    model, note = started(start, {"classifiers": {"entailment": CLASSIFIERS["entailment"]}})
    assert set(model.classifiers) == {"statement", "entailment"}
    assert note == "weights: start; from nothing: classifiers.entailment"
    assert torch.equal(model.classifiers["statement"].out.weight, start.state["classifiers.statement.out.weight"])


@pytest.mark.parametrize("section", [{"rule": "released", "stride": 3}, {"stride": 3}, {"fusion": "asymmetric"}])
def test_another_stride_keeps_what_both_kinds_of_layer_have(section: dict[str, Any]) -> None:
    start = stored()
    assert start.config.connected_layers == [1, 3]
    model, note = started(start, section)
    now = model.config.connected_layers
    for k in range(4):
        was, new = ("joint" if k in layers else "text" for layers in ([1, 3], now))
        for part in ("attention.qkv.weight", "feed_forward.up.weight"):
            old = start.state[f"fusion.layers.{k}.{was}.{part}"]
            assert torch.equal(model.state_dict()[f"fusion.layers.{k}.{new}.{part}"], old)
        assert (f"fusion.layers.{k} (cross-attention)" in note) == (was != new)


def test_words_without_a_piece() -> None:
    texts = ["a red sofa", "two red sofas on a table", "sofa (big)"]
    assert words_without_piece(WORDS, texts) == ["sofa", "big", "sofas"]
    assert words_without_piece(WORDS, texts, min_count=2) == ["sofa"]


def test_new_words_start_as_the_mean_of_their_pieces() -> None:
    start = stored()
    tokenizer = grown_vocabulary(WORDS, None, ["sofa"])
    assert tokenizer.pieces == (*WORDS.pieces, "sofa") and tokenizer.bins == WORDS.bins
    model, note = started(start, {}, tokenizer)
    assert f"vocabulary: {WORDS.vocab_size} pieces, now {WORDS.vocab_size + 1}" in note
    ids = WORDS.encode("sofa", end=False)[1:]
    assert len(ids) == 4
    for name in ("text.embeddings.words.weight", "decoder.embeddings.words.weight", "decoder.head.bias"):
        old, new = start.state[name], model.state_dict()[name]
        assert torch.equal(new[:-1], old) and torch.allclose(new[-1], old[ids].mean(0))
    # on the old words nothing has changed
    config = changed_config(start.config, ModelSection(), WORDS)
    same = MplugModel(config).eval()
    fill_from(same, WORDS, start)
    for one, other in zip(encodings(same, 32), encodings(model, 32), strict=True):
        assert torch.allclose(one, other[..., : one.shape[-1]], atol=1e-5)


def test_a_word_of_unknown_characters_starts_fresh() -> None:
    tokenizer = grown_vocabulary(WORDS, None, ["ж"])
    assert origins_of_pieces(WORDS, tokenizer) == {WORDS.vocab_size: []}


def test_box_tokens_are_added() -> None:
    bare = Tokenizer(build_vocabulary(["a ball"]))
    model = small_model(vocab_size=bare.vocab_size)
    start = Stored(model.config, bare, model.state_dict(), Path("start"))
    tokenizer = grown_vocabulary(bare, 8)
    assert tokenizer.bins == 8 and tokenizer.pieces[: bare.vocab_size] == bare.pieces
    grown, note = started(start, {"box_bins": 8}, tokenizer)
    assert grown.config.box_bins == 8 and f"now {bare.vocab_size + 8}" in note
    assert grown.decoder.head.bias.shape == (tokenizer.vocab_size,)


def test_finer_boxes_start_where_the_coarse_ones_were() -> None:
    start = stored()
    tokenizer = grown_vocabulary(WORDS, 8)
    model, _ = started(start, {"box_bins": 8}, tokenizer)
    old, new = start.state["decoder.embeddings.words.weight"], model.decoder.embeddings.words.weight
    for k in range(8):
        assert torch.equal(new[tokenizer.box_id(k)], old[WORDS.box_id(k // 2)])
    with pytest.raises(RecipeError, match="model.box_bins: 2, and start.model has 4"):
        grown_vocabulary(WORDS, 2)


def test_longer_texts_keep_the_positions_that_there_were() -> None:
    start = stored()
    model, note = started(start, {"max_positions": 50})
    assert torch.equal(model.text.embeddings.positions.weight[:40], start.state["text.embeddings.positions.weight"])
    assert "50 positions of text, the first 40" in note


def test_temperature_is_what_the_recipe_says() -> None:
    start = stored()
    model = MplugModel(start.config)
    fill_from(model, WORDS, start, temperature=0.5)
    assert model.temperature.item() == 0.5


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(CheckpointError, match=r"start.model does not fit the recipe's model: \S+ has shape"):
        started(stored(), {"intermediate": 48})


def test_parts_that_are_left_out_are_said() -> None:
    _, note = started(stored(), {"decoder_layers": 0})
    assert note == "weights: start; left out: decoder"


def test_parts() -> None:
    names = ["decoder.head.bias", "classifiers.a.out.bias", "fusion.layers.2.text.cross_norm.bias", "temperature"]
    assert parts_of(names) == ["classifiers.a", "decoder", "fusion.layers.2 (cross-attention)", "temperature"]


def test_finer_levels_change_no_token_at_first() -> None:
    start = stored(vision=CNN)
    model, note = started(start, {"vision": {"levels": [1, 2]}})
    assert "channels of finer levels join the image tokens" in note and "from nothing" not in note
    plain = MplugModel(start.config).eval()
    plain.load_state_dict(start.state)
    for mine, before in zip(encodings(model, 32), encodings(plain, 32), strict=True):
        assert torch.allclose(mine, before, atol=1e-5)


def test_image_head_of_another_size_is_fresh() -> None:
    head = {"classes": 0, "hidden": 20}
    model, note = started(stored(vision=CNN, image_head=head), {"image_head": {"hidden": 12}})
    assert "from nothing: image_projection" in note
    assert model.image_projection.layers[1].out_features == 12
