"""What mPLUG is measured against: HF transformers' BLIP, of the same widths and depths, with the same weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mplug_core.model.attention import CrossAttention, SelfAttention
from mplug_core.model.config import MplugConfig
from mplug_core.model.decoder import Decoder
from mplug_core.model.mplug import MplugModel
from mplug_core.model.text import BertLayer


def blip_decoder(decoder: Decoder, config: MplugConfig) -> Any:
    """BLIP's ``BlipTextLMHeadModel`` that computes what ``decoder`` computes, in evaluation mode.

    Both are BERT layers with cross-attention and BERT's tied head, so that equal weights give equal logits.
    """
    from transformers import BlipTextConfig
    from transformers.models.blip.modeling_blip_text import BlipTextLMHeadModel

    words, positions = decoder.embeddings.words, decoder.embeddings.positions
    theirs = BlipTextConfig(
        vocab_size=words.num_embeddings, hidden_size=words.embedding_dim, encoder_hidden_size=config.width,
        intermediate_size=decoder.layers[0].feed_forward.up.out_features, num_hidden_layers=len(decoder.layers),
        num_attention_heads=decoder.layers[0].attention.heads, max_position_embeddings=positions.num_embeddings,
        layer_norm_eps=config.layer_norm_eps, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        bos_token_id=None, eos_token_id=None, sep_token_id=None, pad_token_id=0,
    )  # fmt: skip
    with torch.device(words.weight.device):
        blip = BlipTextLMHeadModel(theirs).eval()
    embeddings, head = blip.bert.embeddings, blip.cls.predictions
    with torch.no_grad():
        embeddings.word_embeddings.weight.copy_(words.weight)
        # BLIP has no segments: ours is one vector
        embeddings.position_embeddings.weight.copy_(positions.weight + decoder.embeddings.segment)
        for ours, layer in zip(decoder.layers, blip.bert.encoder.layer, strict=True):
            _copy_layer(ours, layer)
        # the output bias may be in one place or two, tied or not
        for bias in (head.bias, head.decoder.bias):
            bias.copy_(decoder.head.bias)
    for ours, part in (
        (decoder.embeddings.norm, embeddings.LayerNorm),
        (decoder.head.dense, head.transform.dense),
        (decoder.head.norm, head.transform.LayerNorm),
    ):
        part.load_state_dict(ours.state_dict())
    return blip


def _copy_layer(ours: BertLayer, layer: Any) -> None:
    """The weights of one of our layers with cross-attention to one of BLIP's."""
    for attention, norm, theirs in (
        (ours.attention, ours.attention_norm, layer.attention),
        (ours.cross, ours.cross_norm, layer.crossattention),
    ):
        parts = (theirs.self.query, theirs.self.key, theirs.self.value)
        for part, weight, bias in zip(parts, *_projections(attention), strict=True):
            part.weight.copy_(weight)
            part.bias.copy_(bias)
        theirs.output.dense.load_state_dict(attention.out.state_dict())
        theirs.output.LayerNorm.load_state_dict(norm.state_dict())
    layer.intermediate.dense.load_state_dict(ours.feed_forward.up.state_dict())
    layer.output.dense.load_state_dict(ours.feed_forward.down.state_dict())
    layer.output.LayerNorm.load_state_dict(ours.feed_forward_norm.state_dict())


def _projections(attention: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and biases of query, key and value."""
    if isinstance(attention, SelfAttention):
        return list(attention.qkv.weight.chunk(3)), list(attention.qkv.bias.chunk(3))
    assert isinstance(attention, CrossAttention)
    query, kv = attention.query, attention.kv
    return [query.weight, *kv.weight.chunk(2)], [query.bias, *kv.bias.chunk(2)]


def blip_matching(model: MplugModel) -> Any:
    """``BlipForImageTextRetrieval`` of the model's widths and depths with random weights, in evaluation mode.

    Its text encoder has as many layers as our text encoder and fusion together. Its image encoder is the model's vision
    transformer, or in the place of a convolutional network one of 12 layers and the model's width.
    """
    from transformers import BlipConfig, BlipForImageTextRetrieval

    config, backbone = model.config, model.visual.backbone
    vision = {"image_size": config.vision.image_size, "initializer_range": 0.02}
    if model.visual.is_transformer:
        first = backbone.blocks[0]
        vision |= {
            "hidden_size": backbone.embed_dim, "num_hidden_layers": len(backbone.blocks),
            "num_attention_heads": first.attn.num_heads, "intermediate_size": first.mlp.fc1.out_features,
            "patch_size": backbone.patch_embed.patch_size[0],
        }  # fmt: skip
    else:
        vision |= {
            "hidden_size": config.width, "num_attention_heads": config.heads, "intermediate_size": config.intermediate
        }  # fmt: skip
    text = {
        "hidden_size": config.width, "intermediate_size": config.intermediate, "vocab_size": config.vocab_size,
        "encoder_hidden_size": vision["hidden_size"], "num_attention_heads": config.heads,
        "num_hidden_layers": config.text_layers + config.fusion_layers, "max_position_embeddings": config.max_positions,
        "bos_token_id": None, "eos_token_id": None, "sep_token_id": None, "pad_token_id": 0,
    }  # fmt: skip
    return BlipForImageTextRetrieval(BlipConfig(vision_config=vision, text_config=text)).eval()
