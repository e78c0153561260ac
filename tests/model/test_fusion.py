"""The four fusions: what they connect, what they leave alone, and that padding changes nothing."""

from __future__ import annotations

import itertools

import pytest
import torch

from mplug_core.model.fusion import AsymmetricLayer, CoAttentionLayer, ConnectedLayer, Fusion
from mplug_core.model.text import TextEncoder
from tests.small import random_inputs, small_config, small_model

FUSIONS = ("skip", "connected", "co", "asymmetric")


def streams(images: int = 2, tokens: int = 5, length: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(images, tokens, 32, generator=generator)
    return image, torch.randn(images, length, 32, generator=generator)


@pytest.mark.parametrize("fusion", [*FUSIONS, "none"])
def test_shapes(fusion: str) -> None:
    image, text = streams()
    fused_image, fused_text = Fusion(small_config(fusion=fusion))(image, text)
    assert fused_image.shape == image.shape and fused_text.shape == text.shape
    assert torch.equal(fused_text, text) == (fusion == "none")


@pytest.mark.parametrize(("rule", "stride"), list(itertools.product(("paper", "released"), (1, 2, 3, 6))))
def test_skip_fusion_builds_what_the_rule_says(rule: str, stride: int) -> None:
    config = small_config(rule=rule, stride=stride, fusion_layers=6)
    kinds = [type(layer) for layer in Fusion(config).layers]
    want = [ConnectedLayer if k in config.connected_layers else AsymmetricLayer for k in range(6)]
    assert kinds == want
    # a connected layer has no cross-attention, which would be dead weight
    assert not any(
        "cross" in name for k in config.connected_layers for name, _ in Fusion(config).layers[k].named_parameters()
    )


def test_other_fusions_build_one_kind_of_layer() -> None:
    for fusion, kind in (("connected", ConnectedLayer), ("co", CoAttentionLayer), ("asymmetric", AsymmetricLayer)):
        layers = Fusion(small_config(fusion=fusion)).layers
        assert len(layers) == 4 and all(type(layer) is kind for layer in layers)
    assert len(Fusion(small_config(fusion="none")).layers) == 0


def test_asymmetric_leaves_the_image_alone() -> None:
    image, text = streams()
    fused, _ = Fusion(small_config(fusion="asymmetric"))(image, text)
    assert fused is image


def test_skip_changes_the_image_in_connected_layers_alone() -> None:
    image, text = streams()
    model = Fusion(small_config(stride=1)).eval()
    current = image
    for k, layer in enumerate(model.layers):
        ones = torch.ones(2, 5, dtype=torch.bool), torch.ones(2, 4, dtype=torch.bool)
        after, text = layer(current, text, *ones)
        assert (after is current) == (k not in (1, 3))
        current = after


def test_connected_layer_adds_the_image_without_a_norm_and_replaces_the_text() -> None:
    image, text = streams()
    layer = ConnectedLayer(small_config()).eval()
    ones = torch.ones(2, 5, dtype=torch.bool), torch.ones(2, 4, dtype=torch.bool)
    fused_image, fused_text = layer(image, text, *ones)
    both = layer.joint(torch.cat([image, text], 1))
    assert torch.allclose(fused_image, image + both[:, :5], atol=1e-6)
    assert torch.allclose(fused_text, both[:, 5:], atol=1e-6)


def test_co_attention_streams_see_each_other_at_the_same_depth() -> None:
    """The image's cross-attention looks at the text before the text's own has changed it."""
    image, text = streams()
    layer = CoAttentionLayer(small_config()).eval()
    ones = torch.ones(2, 5, dtype=torch.bool), torch.ones(2, 4, dtype=torch.bool)
    fused_image, fused_text = layer(image, text, *ones)
    a, b = layer.image.attend_self(image, None), layer.text.attend_self(text, None)
    assert torch.allclose(fused_image, layer.image.transform(layer.image.attend_other(a, b, None)), atol=1e-6)
    assert torch.allclose(fused_text, layer.text.transform(layer.text.attend_other(b, a, None)), atol=1e-6)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_text_depends_on_the_image(fusion: str) -> None:
    image, text = streams()
    fuse = Fusion(small_config(fusion=fusion)).eval()
    assert not torch.allclose(fuse(image, text)[1], fuse(image + 1, text)[1], atol=1e-4)


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_changes_nothing(fusion: str, dtype: torch.dtype) -> None:
    image, text = (t.to(dtype) for t in streams())
    fuse = Fusion(small_config(fusion=fusion)).eval().to(dtype)
    # bf16 values around 10 lie 0.06 apart: which of two neighbours comes out depends on the order of sums
    tolerance = {"atol": 1e-5} if dtype == torch.float32 else {"atol": 0.05, "rtol": 2**-7}
    with torch.no_grad():
        want_image, want_text = fuse(image, text)
        junk_image, junk_text = torch.randn(2, 3, 32, dtype=dtype) * 9, torch.randn(2, 2, 32, dtype=dtype) * 9
        image_mask = torch.tensor([[1] * 5 + [0] * 3] * 2)
        text_mask = torch.tensor([[1] * 4 + [0] * 2] * 2)
        got_image, got_text = fuse(
            torch.cat([image, junk_image], 1), torch.cat([text, junk_text], 1), image_mask, text_mask
        )
    assert torch.allclose(got_image[:, :5], want_image, **tolerance)
    assert torch.allclose(got_text[:, :4], want_text, **tolerance)


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_to_look_at_gives_no_nan(fusion: str, dtype: torch.dtype) -> None:
    image, text = (t.to(dtype).requires_grad_() for t in streams())
    fuse = Fusion(small_config(fusion=fusion)).to(dtype)
    nothing = torch.zeros(2, 5), torch.zeros(2, 4)
    fused_image, fused_text = fuse(image, text, *nothing)
    (fused_image.float().sum() + fused_text.float().square().sum()).backward()
    assert fused_image.isfinite().all() and fused_text.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in fuse.parameters())


def test_text_encoder_ignores_padding() -> None:
    torch.manual_seed(0)
    encoder = TextEncoder(small_config()).eval()
    ids = torch.randint(5, 64, (2, 6))
    want = encoder(ids)
    padded = torch.cat([ids, torch.full((2, 3), 9)], 1)
    got = encoder(padded, torch.tensor([[1] * 6 + [0] * 3] * 2))
    assert torch.allclose(got[:, :6], want, atol=1e-6)


def test_text_encoder_equals_bert() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=40, attn_implementation="eager",
    )  # fmt: skip
    bert = transformers.BertModel(config, add_pooling_layer=False).eval()
    from mplug_core.weights.official import Account

    account = Account(dict(bert.state_dict()))
    account.embeddings("embeddings", "embeddings")
    for k in range(2):
        account.bert_layer(f"encoder.layer.{k}", f"layers.{k}", cross=False)
    encoder = TextEncoder(small_config()).eval()
    encoder.load_state_dict(account.state)
    ids, mask = torch.randint(5, 64, (2, 7)), torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    with torch.no_grad():
        want = bert(ids, attention_mask=mask).last_hidden_state
        got = encoder(ids, mask)
    assert torch.allclose(got * mask[..., None], want * mask[..., None], atol=1e-5)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_masked_image_tokens_of_shorter_encodings(fusion: str) -> None:
    """Encodings of several lengths joined into one batch fuse as they do alone."""
    model = small_model(fusion=fusion)
    encoding, ids, mask = random_inputs(model, images=2)
    short = type(encoding)(encoding.tokens[:1, :7], encoding.feature[:1], encoding.mask[:1, :7])
    joined = type(encoding).join([short, encoding[torch.tensor([1])]])
    text = model.encode_text(ids, mask)
    _, alone = model.fuse(short, text[:1], mask[:1])
    _, together = model.fuse(joined, text, mask)
    assert torch.allclose(together[0], alone[0], atol=1e-5)
