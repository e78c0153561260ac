"""A BERT of transformers, and what the model's parts make of its layers: the same numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mplug_core.data.text import Tokenizer, build_vocabulary
from mplug_core.errors import CheckpointError
from mplug_core.recipe import StartSection
from mplug_core.weights.bert import language_starts, load_language
from mplug_core.weights.pretrained import bert_pieces
from tests.small import small_model

transformers = pytest.importorskip("transformers")

PIECES = build_vocabulary(["a red ball on a green table"])
CONFIG = {
    "vocab_size": len(PIECES), "hidden_size": 32, "num_hidden_layers": 6, "num_attention_heads": 4,
    "intermediate_size": 64, "max_position_embeddings": 48, "initializer_range": 0.2,
}  # fmt: skip


def make_bert(**fields: Any) -> Any:
    """A random BERT with the heads of its pre-training, in evaluation mode."""
    torch.manual_seed(0)
    model = transformers.BertForPreTraining(transformers.BertConfig(**{**CONFIG, **fields})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def save_bert(folder: Path, model: Any, spelling: str = "new", **changes: Any) -> Path:
    """A folder as the hub has it. ``old``: gamma and beta, a pickle; ``bare``: no prefix, no heads."""
    folder.mkdir()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    if spelling == "bare":
        state = {name.removeprefix("bert."): value for name, value in state.items() if name.startswith("bert.")}
    if spelling == "old":
        state = {n.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): v for n, v in state.items()}
        state.pop("cls.predictions.decoder.bias", None)
        torch.save(state, folder / "pytorch_model.bin")
    else:
        save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**model.config.to_dict(), **changes}))
    Tokenizer(PIECES).save(folder / "vocab.txt")
    return folder


@pytest.fixture(scope="module")
def reference() -> Any:
    return make_bert()


@pytest.fixture(scope="module")
def bert(reference: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bert(tmp_path_factory.mktemp("bert") / "tiny", reference)


def whole_start(folder: Path, **fields: Any) -> StartSection:
    return StartSection(text=str(folder), fusion="text", decoder="text", **fields)


def texts(length: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask, the second row padded."""
    ids = torch.randint(5, len(PIECES), (2, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    ids[1, 4:], mask[1, 4:] = 0, 0
    return ids, mask


@pytest.mark.parametrize("spelling", ["new", "old", "bare"])
@torch.no_grad()
def test_text_encoder_is_the_first_layers(reference: Any, tmp_path: Path, spelling: str) -> None:
    folder = save_bert(tmp_path / "bert", reference, spelling)
    model = small_model(vocab_size=len(PIECES))
    load_language(model, StartSection(text=str(folder)), Tokenizer(PIECES))
    ids, mask = texts()
    theirs = reference.bert(ids, attention_mask=mask, output_hidden_states=True).hidden_states[2]
    assert torch.allclose(model.encode_text(ids, mask)[mask.bool()], theirs[mask.bool()], atol=1e-5)


@torch.no_grad()
def test_fusion_is_the_layers_behind_them(reference: Any, bert: Path) -> None:
    """Without an image each layer of the fusion computes what BERT's does; the connected one over both streams."""
    model = small_model(vocab_size=len(PIECES), stride=1)
    fresh = small_model(vocab_size=len(PIECES), stride=1)
    load_language(model, whole_start(bert), Tokenizer(PIECES))
    x = torch.randn(2, 5, 32)
    assert model.config.connected_layers == [1, 3]
    for k, layer in enumerate(model.fusion.layers):
        theirs = reference.bert.encoder.layer[2 + k](x)
        theirs = theirs[0] if isinstance(theirs, tuple) else theirs
        if k in (1, 3):
            assert torch.allclose(layer.joint(x), theirs, atol=1e-5), k
        else:
            own = layer.text
            assert torch.allclose(own.transform(own.attend_self(x, None)), theirs, atol=1e-5), k
            assert torch.equal(own.cross.kv.weight, fresh.fusion.layers[k].text.cross.kv.weight)
    hidden = torch.randn(2, 5, 32)
    head = reference.cls.predictions(hidden)
    assert torch.allclose(model.masked_logits(hidden), head, atol=1e-4)


@pytest.mark.parametrize("spelling", ["new", "old"])
@torch.no_grad()
def test_decoder_is_a_causal_bert(reference: Any, tmp_path: Path, spelling: str) -> None:
    """Without its cross-attention it predicts words as BERT does under a causal mask."""
    folder = save_bert(tmp_path / "bert", reference, spelling)
    model = small_model(vocab_size=len(PIECES), decoder_layers=6)
    fresh = small_model(vocab_size=len(PIECES), decoder_layers=6)
    load_language(model, whole_start(folder), Tokenizer(PIECES))
    assert torch.equal(model.decoder.layers[3].cross.query.weight, fresh.decoder.layers[3].cross.query.weight)
    for layer in model.decoder.layers:
        layer.cross = layer.cross_norm = None
    causal = transformers.BertLMHeadModel(transformers.BertConfig(**CONFIG, is_decoder=True)).eval()
    causal.load_state_dict(reference.state_dict(), strict=False)
    ids, _ = texts()
    ours = model.decode(ids, torch.zeros(2, 1, 32))
    assert torch.allclose(ours, causal(ids).logits, atol=1e-4)
    # and not as without that mask
    assert not torch.allclose(ours, reference.cls.predictions(reference.bert(ids).last_hidden_state), atol=1e-2)


@pytest.mark.parametrize("fusion", ["connected", "asymmetric", "co"])
@torch.no_grad()
def test_every_fusion_takes_the_layers(reference: Any, bert: Path, fusion: str) -> None:
    model = small_model(vocab_size=len(PIECES), fusion=fusion)
    said = load_language(model, whole_start(bert), Tokenizer(PIECES))
    x = torch.randn(1, 3, 32)
    theirs = reference.bert.encoder.layer[3](x)
    layer = model.fusion.layers[1]
    own = layer.joint if fusion == "connected" else layer.text
    ours = own.transform(own.attend_self(x, None))
    assert torch.allclose(ours, theirs[0] if isinstance(theirs, tuple) else theirs, atol=1e-5)
    assert ("cross-attention fresh" in said[1].text) == (fusion != "connected")
    assert ("image stream fresh" in said[1].text) == (fusion == "co")


def test_what_is_said(bert: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer([*PIECES, "[box_0]", "[box_1]"])
    model = small_model(vocab_size=len(tokenizer.pieces), box_bins=2)
    words = f"words by piece: {len(PIECES)} of {len(PIECES) + 2}"
    assert [origin.text for origin in load_language(model, whole_start(bert), tokenizer)] == [
        f"text: layers 0-1 of {bert}, {words}",
        f"fusion: layers 2-5 of {bert}, cross-attention fresh, head of masked words taken",
        f"decoder: layers 0-1 of {bert}, cross-attention fresh, {words}, prediction head taken",
        f"left out of {bert}: next-sentence head, pooler",
    ]
    bare = save_bert(tmp_path / "bare", make_bert(hidden_act="relu"), "bare")
    origins = load_language(model, whole_start(bare), tokenizer)
    assert [origin.text.rpartition(", ")[2] for origin in origins[1:3]] == [
        "head of masked words fresh",
        "prediction head fresh",
    ]
    assert origins[2].warnings == [f"{bare} was trained with relu, the model computes gelu"]


def test_fewer_layers_than_text_and_fusion_have(reference: Any, bert: Path) -> None:
    """The fusion then has the last ones, and shares some with the text encoder."""
    model = small_model(vocab_size=len(PIECES), text_layers=4)
    origins = load_language(model, whole_start(bert), Tokenizer(PIECES))
    assert "layers 0-3" in origins[0].text and "layers 2-5" in origins[1].text
    with pytest.raises(CheckpointError, match="has 6 layers, the fusion 7"):
        load_language(small_model(vocab_size=len(PIECES), fusion_layers=7), whole_start(bert), Tokenizer(PIECES))


def test_chosen_layers(reference: Any, bert: Path) -> None:
    model = small_model(vocab_size=len(PIECES))
    origins = load_language(model, whole_start(bert, layers={"text": [1, 5], "decoder": [4, 5]}), Tokenizer(PIECES))
    assert "layers 1, 5 of" in origins[0].text and "layers 4-5" in origins[2].text
    up = model.text.layers[1].feed_forward.up.weight
    assert torch.equal(up, reference.bert.encoder.layer[5].intermediate.dense.weight)
    for layers, said in (([0, 6], "has no layer 6 .its layers are 0 to 5"), ([0], "1 layers for the 2")):
        with pytest.raises(CheckpointError, match=said):
            load_language(model, whole_start(bert, layers={"decoder": layers}), Tokenizer(PIECES))


def test_text_alone_leaves_fusion_and_decoder(bert: Path) -> None:
    """Only the decoder's words come along; they are picked by piece."""
    tokenizer = Tokenizer(build_vocabulary(["a blue ball"], box_bins=2))
    model, fresh = (small_model(vocab_size=tokenizer.vocab_size) for _ in range(2))
    load_language(model, StartSection(text=str(bert)), tokenizer)
    theirs = load_file(bert / "model.safetensors")["bert.embeddings.word_embeddings.weight"]
    words, initial = model.text.embeddings.words.weight, fresh.text.embeddings.words.weight
    assert bert_pieces(str(bert)) == PIECES
    for row, piece in enumerate(tokenizer.pieces):
        assert torch.equal(words[row], theirs[PIECES.index(piece)] if piece in PIECES else initial[row]), piece
    assert torch.equal(model.decoder.embeddings.words.weight, words)
    assert model.decoder.embeddings.words.weight is not words
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, fresh.state_dict()[name])}
    assert {name for name in changed if not name.startswith("text.")} == {"decoder.embeddings.words.weight"}
    assert {name for name in fresh.state_dict() if name.startswith("text.")} <= changed


def test_sentence_encoder_starts_as_itself(bert: Path) -> None:
    tokenizer = Tokenizer(PIECES)
    model = small_model(vocab_size=len(PIECES), text_pooling="mean", embed_dim=32)
    load_language(model, StartSection(text=str(bert)), tokenizer)
    ids = torch.tensor([tokenizer.encode("a red ball")])
    hidden = model.encode_text(ids, torch.ones_like(ids))
    want = torch.nn.functional.normalize(hidden.mean(1), dim=-1)
    assert torch.allclose(model.text_feature(hidden, torch.ones_like(ids)), want, atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"width": 24}, "text: .* is 32 wide with 4 heads, the model 24"),
        ({"heads": 2}, "the model 32 with 2"),
        ({"text_layers": 7}, "has 6 layers, the text encoder 7"),
        (
            {"intermediate": 48},
            "does not fit the model: text.layers.0.feed_forward.up.weight would be 64 x 32, and is 48",
        ),
        ({"fusion_intermediate": 48}, "fusion.layers.0.text.feed_forward.up.weight would be 64 x 32, and is 48 x 32"),
        ({"decoder_width": 24}, "decoder: .* is 32 wide with 4 heads, the model 24 with 3"),
        ({"max_positions": 64}, "knows 48 positions, the model 64"),
    ],
)
def test_bert_of_another_shape(bert: Path, fields: dict[str, int], said: str) -> None:
    model = small_model(vocab_size=len(PIECES), **fields)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=said) as caught:
        load_language(model, whole_start(bert), Tokenizer(PIECES))
    assert caught.value.exit_code == 5
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), "half-filled"


def test_a_bert_that_lacks_tensors(reference: Any, tmp_path: Path) -> None:
    folder = save_bert(tmp_path / "bert", reference)
    state = load_file(folder / "model.safetensors")
    del state["bert.encoder.layer.4.attention.self.key.weight"]
    save_file(state, folder / "model.safetensors")
    model = small_model(vocab_size=len(PIECES))
    with pytest.raises(CheckpointError, match=r"lacks tensors of fusion.layers.2.text.attention.qkv.weight"):
        load_language(model, whole_start(folder), Tokenizer(PIECES))
    load_language(model, StartSection(text=str(folder)), Tokenizer(PIECES))  # which doesn't use it


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("config.json", b"{}", "is no BERT folder: no 'hidden_size'"),
        ("config.json", b"{", "is no BERT folder"),
        ("config.json", None, "is no BERT folder"),
        ("model.safetensors", None, "has no weights"),
        ("model.safetensors", b"\x10\x00", "cannot read"),
        ("vocab.txt", None, "does not exist"),
        ("vocab.txt", b"a\n", "lacks .PAD."),
    ],
)
def test_a_damaged_bert_folder(reference: Any, tmp_path: Path, file: str, content: bytes | None, said: str) -> None:
    folder = save_bert(tmp_path / "bert", reference)
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_bytes(content)
    with pytest.raises(CheckpointError, match=said):
        load_language(small_model(vocab_size=len(PIECES)), whole_start(folder), Tokenizer(PIECES))


def test_what_is_no_bert(reference: Any, tmp_path: Path) -> None:
    folder = save_bert(tmp_path / "bert", reference, model_type="roberta")
    with pytest.raises(CheckpointError, match="is a roberta, not a BERT"):
        load_language(small_model(vocab_size=len(PIECES)), whole_start(folder), Tokenizer(PIECES))
    with pytest.raises(CheckpointError, match="no pretrained part"):
        load_language(small_model(vocab_size=len(PIECES)), StartSection(text=str(tmp_path / "no")), Tokenizer(PIECES))


def test_nothing_is_allocated_to_look(bert: Path) -> None:
    """Before a run the model is on the meta device, and the vocabulary may not be known."""
    from mplug_core.model.mplug import MplugModel
    from tests.small import small_config

    config = small_config(vocab_size=99)
    with torch.device("meta"):
        model = MplugModel(config)
    starts = language_starts(whole_start(bert), config, None, model.state_dict())
    assert starts[0].origin.text.endswith(", words by piece") and len(starts) == 4
