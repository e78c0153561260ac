"""The assembly: no dead weights, no leaks of padding, recomputed activations, cached decoding."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mplug_core.model.attention import DecoderCache
from mplug_core.model.mplug import ImageEncoding, MplugModel
from mplug_core.objectives.contrastive import contrastive_loss
from tests.small import CLASSIFIERS, CNN, VIT, random_inputs, small_config, small_model

FUSIONS = ("skip", "connected", "co", "asymmetric", "none")


def full_loss(model: MplugModel) -> torch.Tensor:
    """Something of every output that a training run reads: features, matching, masked words, decoder, classifiers."""
    image, ids, mask = random_inputs(model)
    text = model.encode_text(ids, mask)
    features = contrastive_loss(
        image.feature, model.text_feature(text, mask), model.temperature, torch.arange(len(ids))
    ).loss
    _, fused = model.fuse(image, text, mask)
    loss = features + model.masked_logits(fused).logsumexp(-1).mean()
    if model.matching_head is not None:
        loss = loss + model.matching_logits(fused).log_softmax(-1)[:, 0].sum()
    for name, section in model.config.classifiers.items():
        loss = loss + model.classify(name, [fused] * section.images).log_softmax(-1)[:, 0].sum()
    memory, memory_mask = model.memory(image, text, mask)
    return loss + model.decode(ids, memory, memory_mask).log_softmax(-1)[..., 7].sum()


VARIANTS: dict[str, dict[str, Any]] = {
    **{fusion: {"fusion": fusion} for fusion in FUSIONS},
    "released": {"rule": "released", "stride": 2},
    "convolutional": {"vision": CNN},
    "narrow": {"width": 24, "heads": 3, "vision": VIT},
    "summary": {"vision": CNN, "summary_tokens": 3},
    "pooled": {"text_pooling": "mean", "decoder_intermediate": 48, "fusion_intermediate": 40},
    "wide decoder": {"decoder_width": 16},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_is_used(variant: str) -> None:
    model = small_model(classifiers=CLASSIFIERS, **VARIANTS[variant])
    full_loss(model).backward()
    unused = [name for name, p in model.named_parameters() if p.grad is None]
    assert not unused
    # a bias that softmax cancels has a gradient of zero; a whole weight without any signal is dead
    silent = [name for name, p in model.named_parameters() if p.dim() > 1 and not p.grad.abs().max() > 0]
    assert not silent


def test_dual_encoder_has_no_matching_head() -> None:
    assert small_model(fusion="none").matching_head is None


def test_no_decoder_where_it_has_no_layers() -> None:
    assert small_model(decoder_layers=0).decoder is None


@pytest.mark.parametrize("fusion", FUSIONS)
def test_padding_of_texts_changes_no_loss(fusion: str) -> None:
    model = small_model(fusion=fusion)
    image, ids, mask = random_inputs(model)
    padded, longer = torch.nn.functional.pad(ids, (0, 4), value=9), torch.nn.functional.pad(mask, (0, 4))
    text, same = model.encode_text(ids, mask), model.encode_text(padded, longer)
    assert torch.allclose(model.text_feature(text, mask), model.text_feature(same, longer), atol=1e-5)
    memory, memory_mask = model.memory(image, text, mask)
    padded_memory, padded_mask = model.memory(image, same, longer)
    want, got = model.decode(ids, memory, memory_mask), model.decode(ids, padded_memory, padded_mask)
    assert torch.allclose(got, want, atol=2e-4)
    # right padding of the decoder's input changes nothing before it
    assert torch.allclose(model.decode(padded, memory, memory_mask)[:, :6], want, atol=2e-4)


@pytest.mark.parametrize("variant", ["skip", "co", "convolutional", "wide decoder"])
@pytest.mark.parametrize("tower", ["visual", "text", "fusion", "decoder"])
def test_checkpointing_gives_equal_gradients(variant: str, tower: str) -> None:
    gradients = []
    for towers in ((), (tower,)):
        model = small_model(**VARIANTS[variant]).train()
        model.set_checkpointing(towers)
        full_loss(model).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    plain, recomputed = gradients
    for name, want in plain.items():
        assert torch.allclose(recomputed[name], want, atol=1e-6, rtol=1e-4), name


def test_checkpointing_keeps_dropout() -> None:
    """The recomputed pass draws the same dropout, so that gradients belong to the loss that was reported."""
    gradients = []
    for towers in ((), ("text", "fusion", "decoder")):
        model = small_model(dropout=0.3).train()
        model.set_checkpointing(towers)
        torch.manual_seed(5)
        full_loss(model).backward()
        gradients.append(model.text.layers[0].attention.qkv.weight.grad)
    assert torch.allclose(*gradients, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("variant", ["skip", "convolutional", "wide decoder"])
def test_cached_decoding_equals_the_whole_prefix(variant: str) -> None:
    model = small_model(**VARIANTS[variant])
    image, ids, mask = random_inputs(model)
    memory, memory_mask = model.memory(image, model.encode_text(ids, mask), mask)
    want = model.decode(ids, memory, memory_mask)
    cache = DecoderCache(len(model.decoder.layers))
    parts = [model.decode(ids[:, :2], memory, memory_mask, cache)]
    parts += [model.decode(ids[:, t : t + 1], memory, memory_mask, cache) for t in range(2, ids.shape[1])]
    assert torch.allclose(torch.cat(parts, 1), want, atol=1e-5)


def test_sequences_share_the_memory_of_their_image() -> None:
    model = small_model()
    image, ids, mask = random_inputs(model)
    memory, memory_mask = model.memory(image, model.encode_text(ids, mask), mask)
    sequences = torch.randint(5, 64, (6, 4))
    shared = model.decode(sequences, memory, memory_mask)
    repeated = model.decode(sequences, memory.repeat_interleave(2, 0), memory_mask.repeat_interleave(2, 0))
    assert torch.allclose(shared, repeated, atol=1e-5)


def test_memory_of_a_caption_is_the_image_alone() -> None:
    model = small_model()
    image, ids, mask = random_inputs(model)
    memory, memory_mask = model.memory(image)
    assert memory is image.tokens and memory_mask is image.mask
    joined, joined_mask = model.memory(image, model.encode_text(ids, mask), mask)
    assert joined.shape == (3, 17 + 6, 32)
    assert joined_mask.sum(1).tolist() == [23, 20, 23]


def test_decoder_is_causal() -> None:
    model = small_model()
    image, ids, _ = random_inputs(model)
    changed = ids.clone()
    changed[:, 4] = 11
    want, got = model.decode(ids, image.tokens), model.decode(changed, image.tokens)
    assert torch.equal(got[:, :4], want[:, :4]) and not torch.equal(got[:, 4], want[:, 4])


@pytest.mark.parametrize("variant", ["skip", "convolutional", "summary", "pooled"])
def test_features_are_of_unit_length(variant: str) -> None:
    model = small_model(**VARIANTS[variant])
    image, ids, mask = random_inputs(model)
    text = model.text_feature(model.encode_text(ids, mask), mask)
    assert torch.allclose(image.feature.norm(dim=-1), torch.ones(3)) and torch.allclose(
        text.norm(dim=-1), torch.ones(3)
    )


def test_mean_pooling_leaves_padding_out() -> None:
    model = small_model(text_pooling="mean")
    hidden = torch.randn(2, 4, 32)
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0]])
    want = torch.nn.functional.normalize(model.text_projection(hidden[0, :2].mean(0)), dim=-1)
    got = model.text_feature(hidden, mask)
    assert torch.allclose(got[0], want, atol=1e-6) and got[1].isfinite().all()


def test_summary_tokens_can_be_imagined() -> None:
    model = small_model(**VARIANTS["summary"])
    image, *_ = random_inputs(model)
    imagined = model.imagine(image.feature)
    assert image.tokens.shape == (3, 4 + 3, 32) and imagined.tokens.shape == (3, 3, 32)
    assert torch.allclose(imagined.tokens, image.tokens[:, :3], atol=1e-6)


def test_bf16_is_near_fp32() -> None:
    model = small_model()
    image, ids, mask = random_inputs(model)
    memory, memory_mask = model.memory(image, model.encode_text(ids, mask), mask)
    want = model.decode(ids, memory, memory_mask).softmax(-1)
    half = small_model().bfloat16()
    half_image = ImageEncoding(image.tokens.bfloat16(), image.feature.bfloat16(), image.mask)
    memory, memory_mask = half.memory(half_image, half.encode_text(ids, mask), mask)
    got = half.decode(ids, memory, memory_mask).float().softmax(-1)
    assert (got - want).abs().max() < 0.05


def test_rows_of_an_encoding() -> None:
    model = small_model()
    image, *_ = random_inputs(model)
    picked = image[torch.tensor([2, 0, 2])]
    assert len(picked) == 3 and torch.equal(picked.tokens[0], image.tokens[2])
    assert not picked.detach().tokens.requires_grad


def test_temperature_is_no_scalar() -> None:
    assert small_model(temperature=0.05).temperature.shape == (1,)


def test_configuration_determines_the_shapes() -> None:
    with torch.device("meta"):
        model = MplugModel(small_config(fusion="co", classifiers=CLASSIFIERS, box_bins=4))
    assert all(p.is_meta for p in model.parameters())
    assert model.classifiers["statement"].hidden.in_features == 64
