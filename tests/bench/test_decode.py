"""The decoding benchmark on a small decoder: what it reports, equal ids on all sides, and memory that beams share."""

from __future__ import annotations

import json

import pytest
import torch

from mplug_core.bench.allocations import peak_bytes
from mplug_core.bench.decode import Captioning, Contest, bench_decode
from mplug_core.bench.peers import blip_decoder
from mplug_core.bench.sizes import IMAGES, image_tokens, measured_config
from mplug_core.errors import MplugError, RecipeError
from mplug_core.model.decoder import Decoder
from mplug_core.model.vision import VisualEncoder
from tests.small import small_config, small_model

SMALL = Captioning(image_tokens=9, beams=3, tokens=4)


def test_report() -> None:
    turns: list[str] = []
    against = ("hf-blip", "plain", "no-cache")
    report = bench_decode(small_config(), SMALL, against, (1, 2), repeats=2, advance=turns.append)
    # what is slow has one turn
    assert len(turns) == 2 * (2 * (1 + 2) + 2)
    assert [row[:2] for row in report.rows] == [
        (images, name)
        for images in "12"
        for name in ("mPLUG", "HF BLIP, cached", "mPLUG, no cache, nothing shared", "mPLUG, no cache")
    ]
    assert all(len(row) == len(report.columns) for row in report.rows)
    found = json.loads(report.json())
    assert found["benchmark"] == "decode" and found["same_ids"] == dict.fromkeys(against, True)
    assert [len(entry["all"]) for entry in found["seconds"]] == [2, 2, 1, 1] * 2
    assert {entry["decoder"] for entry in found["seconds"]} == {"mplug", *against}
    assert found["seconds"][0]["ratio"] == 1.0
    assert set(found["peak_bytes"]) == {"images", "mplug", "hf-blip"}


def test_beams_share_the_cross_attention_cache() -> None:
    config = small_config()
    found = bench_decode(config, SMALL, (), (1, 2), repeats=1).figures
    # keys and values of 2 images in fp32
    expected = config.decoder_layers * 2 * 2 * SMALL.image_tokens * config.width * 4
    assert found["cross_bytes"] == {"images": 2, "beams": expected, "one_beam": expected, "ratio": 1.0}


def test_other_ids_without_the_cache_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Contest, "plain", lambda self, memory: [[7]] * len(memory))
    with pytest.raises(MplugError, match="gave different ids"):
        bench_decode(small_config(), SMALL, ("plain",), (1,), repeats=1)


def test_exactly_so_many_tokens_without_an_end() -> None:
    contest = Contest(small_config(), SMALL, ("hf-blip",), "cpu")
    with torch.no_grad():
        contest.decoder.head.bias[contest.end] = 9.0
        contest.blip.cls.predictions.bias[contest.end] = 9.0
    for way in contest.ways(("hf-blip", "plain", "no-cache")).values():
        for ids in way(contest.memory(2)):
            assert len(ids) == SMALL.tokens and contest.end not in ids


def test_blip_with_our_weights_gives_our_logits() -> None:
    model = small_model(seed=1)
    with torch.no_grad():
        model.decoder.embeddings.segment.add_(1.0)
    ids, memory = torch.tensor([[2, 7, 9], [2, 30, 4]]), torch.randn(2, 5, 32)
    blip = blip_decoder(model.decoder, model.config)
    with torch.no_grad():
        theirs = blip(ids, encoder_hidden_states=memory, is_decoder=True).logits
        assert torch.allclose(theirs, model.decode(ids, memory), atol=1e-4)


def test_blip_of_a_decoder_with_its_own_width() -> None:
    config = small_config(decoder_width=16)
    decoder = Decoder(config).eval()
    ids, memory = torch.tensor([[2, 7, 9]]), torch.randn(1, 5, 32)
    with torch.no_grad():
        theirs = blip_decoder(decoder, config)(ids, encoder_hidden_states=memory, is_decoder=True).logits
        assert torch.allclose(theirs, decoder.logits(decoder(ids, memory)), atol=1e-4)


def test_peak_counts_what_lives_at_once() -> None:
    held = torch.zeros(1000)

    def action() -> None:
        for _ in range(3):
            first = held + 1
            del first
        both = held + 1, held.view(10, 100), held + 2
        assert both

    assert peak_bytes(action, [held]) == 2 * 4000


@pytest.mark.parametrize("size", IMAGES)
def test_tokens_of_the_named_sizes(size: str) -> None:
    with torch.device("cpu" if size == "tiny" else "meta"):
        visual = VisualEncoder(measured_config(size))
    rows, columns = visual.grid
    assert rows * columns + visual.is_transformer == image_tokens(size)


def test_unknown_size() -> None:
    with pytest.raises(RecipeError, match="did you mean 'base'"):
        measured_config("bas")
