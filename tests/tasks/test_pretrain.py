"""ITM, MLM and PrefixLM on a share of the pairs: ITC still compares all."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from mplug_core.data.records import CaptionRecord
from mplug_core.data.text import Tokenizer
from mplug_core.model.mplug import MplugModel
from mplug_core.objectives.masked_language import IGNORED
from mplug_core.tasks.pretrain import PretrainTask
from mplug_core.tasks.task import Context, Texts
from mplug_core.training.merging import join_blocks
from tests.small import small_config

COLOURS, SHAPES = ("red", "blue", "green"), ("circle", "square", "triangle")
CAPTIONS = [f"the {colour} {shape}" for colour in COLOURS for shape in SHAPES]


def block_of(tokenizer: Tokenizer, share: float, count: int = 8) -> dict[str, torch.Tensor]:
    drawn = [((k,), CaptionRecord(Path(f"{k}.png"), (CAPTIONS[k],), str(k))) for k in range(count)]
    return PretrainTask().encode(drawn, random.Random(0), Texts(tokenizer, 30, fused_share=share))


@pytest.mark.parametrize(("share", "fused"), [(0.25, 2), (0.5, 4), (0.01, 1)])
def test_a_share_is_fused(tokenizer: Tokenizer, share: float, fused: int) -> None:
    block = block_of(tokenizer, share)
    assert len(block["ids"]) == len(block["image"]) == len(block["group"]) == 8
    assert len(block["fused"]) == len(set(block["fused"].tolist())) == fused
    assert all(len(block[name]) == fused for name in ("masked", "labels", "prefix_ids", "target_ids"))
    kept = block["labels"] == IGNORED
    assert torch.equal(block["masked"][kept], block["ids"][block["fused"]][kept])
    assert "fused" not in block_of(tokenizer, 1.0)


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_losses(tokenizer: Tokenizer, share: float) -> None:
    torch.manual_seed(0)
    model = MplugModel(small_config(vocab_size=tokenizer.vocab_size)).eval()
    images = model.encode_image(torch.randn(8, 3, 32, 32))
    weights = {"itc": 1.0, "itm": 1.0, "mlm": 1.0, "prefix_lm": 1.0}
    fuse, fused_rows = model.fuse, []

    def counting(image, text, mask):
        fused_rows.append(len(text))
        return fuse(image, text, mask)

    model.fuse = counting
    context = Context(weights=weights, image_ids=torch.arange(8), generator=torch.Generator().manual_seed(0))
    losses = PretrainTask().losses(model, images, block_of(tokenizer, share), context)
    assert losses.keys() == weights.keys() and all(loss.isfinite() for loss in losses.values())
    assert fused_rows == [round(24 * share), round(8 * share), round(8 * share)]
    whole = PretrainTask().losses(model, images, block_of(tokenizer, 1.0), context)
    torch.testing.assert_close(losses["itc"], whole["itc"])


def test_fused_rows_stay_with_their_pairs_when_sources_are_merged(tokenizer: Tokenizer) -> None:
    first, second = block_of(tokenizer, 0.5, 4), block_of(tokenizer, 0.5, 6)
    joined = join_blocks([first, second], [0, 4])
    assert joined["fused"].tolist() == [*first["fused"].tolist(), *(k + 4 for k in second["fused"].tolist())]
    rows = joined["ids"][joined["fused"]]
    kept = joined["labels"] == IGNORED
    width = joined["masked"].shape[1]
    assert torch.equal(joined["masked"][kept], rows[:, :width][kept])
