"""Fixtures of the visual encoder, the text encoder, the fusion and the position embedding."""

from __future__ import annotations

from torch import Tensor

from mplug_core.model.vision import resize_positions
from tests.parity.golden import Checks, Folder, record_outputs


def visual(folder: Folder, name: str, checks: Checks) -> None:
    entry, t = folder.fixture(name)
    model = folder.model(entry)
    backbone = model.visual.backbone
    mids = record_outputs([backbone.norm_pre, *backbone.blocks])
    image = t["in.image"].float()
    tokens = model.visual(image)
    for got, want in zip(mids, ["mid.ln_pre", *(f"mid.block{k}" for k in range(len(backbone.blocks)))], strict=True):
        checks.compare(want, got, t[want])
    checks.compare("out.visual", tokens, t["out.visual"])
    checks.compare(
        "out.visual_with_proj", mids[-1] @ folder.weights["visual_encoder.visual.proj"], t["out.visual_with_proj"]
    )
    checks.compare("out.image_embeds", model.encode_image(image).tokens, t["out.image_embeds"])


def text(folder: Folder, name: str, checks: Checks) -> None:
    entry, t = folder.fixture(name)
    model = folder.model(entry)
    mids = record_outputs([model.text.embeddings, *model.text.layers])
    got = model.encode_text(t["in.input_ids"], t["in.attention_mask"])
    for value, want in zip(mids, ["mid.embeddings", *(f"mid.layer{k}" for k in range(len(mids) - 1))], strict=True):
        checks.compare(want, value, t[want])
    checks.compare("out.last_hidden_state", got, t["out.last_hidden_state"])


def fusion(folder: Folder, name: str, checks: Checks) -> None:
    entry, t = folder.fixture(name)
    model = folder.model(entry)
    mids = record_outputs(list(model.fusion.layers))
    image, words = model.fusion(t["in.image_embeds"], t["in.text_embeds"], t["in.image_atts"], t["in.text_atts"])
    for (_, got), number in zip(mids, entry["json"]["executed_layers"], strict=True):
        # of a connected layer the fixture holds the concatenation, whose text part is what goes on
        checks.compare(f"mid.layer{number}", got, t[f"mid.layer{number}"][:, -got.shape[1] :])
    checks.compare("out.image", image, t["out.image"])
    checks.compare("out.text", words, t["out.text"])


def positions(folder: Folder, name: str, checks: Checks) -> None:
    entry, t = folder.fixture(name)
    for key in [key for key in t if key.startswith("in.pos_embed_")]:
        small = t[key]
        grown_key = next(k for k in t if k.startswith("out.pos_embed_") and "_to_" not in k)
        grown = resize_positions(small, (grid_of(t[grown_key]),) * 2)
        checks.compare(grown_key, grown, t[grown_key])
        for shrunk_key in [k for k in t if k.startswith("out.pos_embed_") and "_to_" in k]:
            shrunk = resize_positions(grown, (grid_of(t[shrunk_key]),) * 2)
            checks.compare(shrunk_key, shrunk, t[shrunk_key])
    for key in [key for key in t if key.startswith("in.image_")]:
        image = t[key].float()
        model = folder.model(entry, image_size=image.shape[-1])
        out = key.replace("in.image", "out.visual")
        checks.compare(out, model.visual(image), t[out])


def grid_of(positions: Tensor) -> int:
    """Side of the grid of a position embedding with a class token."""
    return round((len(positions) - 1) ** 0.5)


FIXTURES = {"f01_": visual, "f02_": text, "f03_": fusion, "f09_": positions}
