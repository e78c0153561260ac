"""Fixtures of grounding: logits, loss, gradients and boxes, the transforms, and the encoding of phrases.

Where the released code differs from the toolkit:

- its text encoder is cut to ``stride`` layers, so the model is built with as many;
- its loss multiplies each sample's token losses with the L1 and GIoU of every sample. The outer product is composed
  here from our parts; the toolkit's loss weighs each sample by its own;
- its decoder starts with a token of its own, and its boxes are the lower edges of their bins;
- it tests with ImageNet's mean and deviation, trains with CLIP's, and resizes bilinearly where it pads;
- it leaves the punctuation of phrases in, which is cut here as that of questions.
"""

from __future__ import annotations

import json

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mplug_core.data.images import PlacedTransform, placed_transform
from mplug_core.data.text import Tokenizer, pad
from mplug_core.objectives.box import box_token_loss, generalized_box_iou
from mplug_core.objectives.cross_entropy import token_cross_entropy
from mplug_core.recipe import VisionSection
from mplug_core.tasks.grounding import decode_bins
from tests.parity.golden import LOSS, Checks, Folder, released_part

PREFIX, FIRST_BOX, BINS = 344, 345, 337
"""[unused339] of BERT's vocabulary starts the decoder; [unused340] is the first of 337 bins."""
FIRST_SHOWN = 340
"""The fixtures hold the logits from this token on."""
BARRED = -10000.0
"""Added to the logits of all other tokens."""
LONGEST_PHRASE = 20
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def grounding(folder: Folder, name: str, checks: Checks) -> None:
    entry, t = folder.fixture(name)
    model = folder.model(entry)
    model.text.layers = model.text.layers[: entry["json"]["text_layers"]]
    ids, mask = t["in.input_ids"], t["in.attention_mask"]
    box_ids = torch.arange(FIRST_BOX, FIRST_BOX + BINS)
    bins = ((t["in.targets_cxcywh"].clamp(0, 1) * (BINS - 1)).floor()).long()
    checks.same_ids("out.target_token_ids", (bins + FIRST_BOX).tolist(), t["out.target_token_ids"].tolist())
    inputs = torch.cat([torch.full((len(ids), 1), PREFIX), box_ids[bins]], 1)
    with torch.enable_grad():
        image = model.encode_image(t["in.image"].float())
        memory, memory_mask = model.memory(image, model.encode_text(ids, mask), mask)
        logits = model.decode(inputs, memory, memory_mask)
        barred = torch.full_like(logits[0, 0], BARRED)
        barred[box_ids] = 0
        shown = t["out.logits"].shape[-1]
        checks.compare(
            "out.logits", (logits + barred).detach()[..., FIRST_SHOWN : FIRST_SHOWN + shown], t["out.logits"]
        )
        scores = logits[:, :4, box_ids]
        nll = token_cross_entropy(scores.flatten(0, 1), bins.flatten())
        checks.compare("out.token_ce", nll.detach(), t["out.token_ce"], LOSS)
        loss = released_loss(nll.view(-1, 4), scores.argmax(-1), t["in.targets_cxcywh"])
        checks.compare("out.loss_seq", loss.detach(), t["out.loss_seq"], LOSS)
        model.zero_grad()
        loss.backward()
    conversion = folder.conversion(entry)
    gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    for key in [key for key in t if key.startswith("grad.")]:
        mine = released_part(conversion, key.removeprefix("grad."), gradients).view(t[key].shape)
        checks.compare(key, mine, t[key], LOSS)
    # without the weights ours is the same mean of the same token losses
    ours = box_token_loss(logits.detach()[:, :4], bins, box_ids, base=1.0, l1=0.0, giou=0.0)
    checks.compare("mean of out.token_ce", ours, t["out.token_ce"].mean(), LOSS)

    with torch.no_grad():
        found, _ = decode_bins(model, memory.detach(), memory_mask, box_ids, PREFIX)
    checks.same_ids("out.pred_token_ids", (found + FIRST_BOX).tolist(), t["out.pred_token_ids"].tolist())
    checks.compare("out.pred_box", found / (BINS - 1), t["out.pred_box"])


def released_loss(nll: Tensor, greedy: Tensor, target: Tensor) -> Tensor:
    """The mean over all pairs of samples and all tokens of ``nll`` [B, 4] of the one times the weights of the other."""
    predicted = greedy / (BINS - 1)
    distance = (predicted - target).abs().clamp(0, 5)
    apart = 1 - generalized_box_iou(corners(predicted), corners(target))
    return (nll[:, None] * (distance * apart[:, None])[None]).mean()


def corners(box: Tensor) -> Tensor:
    cx, cy, w, h = box.unbind(-1)
    return torch.stack([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], -1)


def transforms(folder: Folder, name: str, checks: Checks) -> None:
    entry, t = folder.fixture(name)
    size = entry["config"]["image_res"]
    picture = Image.fromarray(t["in_uint8.image_hwc"].numpy())
    squashed, _ = placed_transform(VisionSection(image_size=size))(picture)
    checks.compare("out.test_transform", squashed, t["out.test_transform"])

    padded, placement = PlacedTransform(size, *IMAGENET, "pad", Image.Resampling.BILINEAR)(picture)
    checks.compare("out.grounding_val_img", padded, t["out.grounding_val_img"])
    left, top, right, bottom = (round(v * size) for v in placement.to_square((0, 0, 1, 1)))
    inside = F.pad(torch.ones(bottom - top, right - left), (left, size - right, top, size - bottom))
    checks.compare("out.grounding_val_mask", 1 - inside, t["out.grounding_val_mask"])
    width, height = picture.size
    x0, y0, x1, y1 = placement.to_square(t["in_box.xyxy"] / torch.tensor([width, height] * 2))
    box = torch.tensor([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0])
    # the released box is scaled by the ratio itself, ours by what is left of it in whole pixels
    rounding = max(
        abs(round(side * size / max(picture.size)) / size - side / max(picture.size)) for side in picture.size
    )
    checks.compare("out.grounding_val_box", box, t["out.grounding_val_box"], 5e-5 + rounding)


def phrases(folder: Folder, name: str, checks: Checks) -> None:
    given, of_tokenizer = (
        json.loads((folder.path / folder.manifest["fixtures"][key]["file"]).read_text())
        for key in (name, "j11_tokenizer")
    )
    tokenizer = Tokenizer.load(folder.path / of_tokenizer["vocab_file"])
    for case in given:
        # as long as the released one pads: one row of the longest phrase is put beside it
        longest = [tokenizer.pad_id] * LONGEST_PHRASE
        ids, mask = pad([tokenizer.encode(case["phrase"], LONGEST_PHRASE), longest], tokenizer.pad_id)
        checks.same_ids(f"input_ids of {case['phrase']!r}", ids[0].tolist(), case["input_ids"])
        checks.same_ids(f"input_mask of {case['phrase']!r}", mask[0].tolist(), case["input_mask"])


FIXTURES = {"f07_": grounding, "f11_": transforms, "j11_grounding": phrases}
