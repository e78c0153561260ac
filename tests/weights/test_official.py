"""Released checkpoints: every spelling, every tensor accounted for, every gap named."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mplug_core.errors import CheckpointError
from mplug_core.model.mplug import MplugModel
from mplug_core.weights.official import PARTS, canonical, convert, read_config, unwrap
from tests.released import SMALL, with_twins
from tests.released import released as checkpoint

WIDTH, VISUAL, WORDS = SMALL.width, SMALL.visual, SMALL.words
BERT = SMALL.bert


def released(visual: int = VISUAL) -> dict[str, Tensor]:
    """A released model of random tensors, with tied heads and momentum twins."""
    return with_twins(checkpoint(replace(SMALL, visual=visual)))


def respell(tensors: dict[str, Tensor], prefix: str, text: str, fusion: str) -> dict[str, Tensor]:
    """The same model in another spelling."""
    result = {}
    for name, value in tensors.items():
        name = re.sub(r"^(text_encoder(?:_m)?)\.", rf"\1.{text}", name)
        name = re.sub(r"^(fusion_encoder(?:_m)?)\.(?!cls)", rf"\1.{fusion}", name)
        result[prefix + name] = value
    return result


SPELLINGS = {
    "plain": ("", "", ""),
    "module.": ("module.", "", ""),
    "model.": ("model.", "bert.", "bert."),
    "module.model.": ("module.model.", "bert.", "fusion."),
    "bert.": ("", "bert.", "bert."),
    "fusion.": ("", "", "fusion."),
}
WRAPPINGS = {
    "none": lambda t: t,
    "model": lambda t: {"model": t, "epoch": 3, "optimizer": {"state": {}}},
    "module": lambda t: {"module": t, "global_steps": 1},
    "module in model": lambda t: {"model": {"module": t}},
    "model in module": lambda t: {"module": {"model": t}},
    "state_dict": lambda t: {"state_dict": t},
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_gives_the_same_model(spelling: str) -> None:
    want = convert(released(), BERT)
    got = convert(respell(released(), *SPELLINGS[spelling]), BERT)
    assert got.config == want.config and got.state.keys() == want.state.keys()
    assert all(torch.equal(got.state[name], value) for name, value in want.state.items())
    assert got.dropped == want.dropped and not any(got.missing.values())


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_every_wrapping_is_opened(wrapping: str) -> None:
    assert unwrap(WRAPPINGS[wrapping](released())).keys() == released().keys()


@pytest.mark.parametrize("visual", [16, 24])
def test_account_is_complete_and_the_model_loads(visual: int) -> None:
    tensors = released(visual)
    conversion = convert(tensors, BERT)
    assert conversion.used.keys() | conversion.dropped.keys() == tensors.keys()
    assert not conversion.used.keys() & conversion.dropped.keys()
    assert "unknown" not in conversion.dropped.values()
    conversion.require(*PARTS)
    model = MplugModel(conversion.config)
    model.load_state_dict(conversion.state, strict=True)
    assert (model.visual_projection is None) == (visual == WIDTH)


def test_architecture_is_read_off_the_shapes() -> None:
    config = read_config(unwrap(released()), BERT)
    assert config.vision.image_size == 16 and config.vision.options["depth"] == 2
    assert (config.width, config.intermediate, config.vocab_size, config.max_positions) == (16, 24, 30, 12)
    assert (config.text_layers, config.fusion_layers, config.decoder_layers, config.embed_dim) == (2, 4, 3, 8)
    assert (config.heads, config.stride, config.rule, config.dropout) == (2, 2, "released", 0.0)


def test_fusion_takes_the_last_layers_and_drops_what_never_runs() -> None:
    tensors = released()
    conversion = convert(tensors, BERT)
    # of layers 4..7 the third is connected (k = 2): it has no cross-attention
    assert torch.equal(
        conversion.state["fusion.layers.0.text.feed_forward.up.weight"],
        tensors["fusion_encoder.encoder.layer.4.intermediate.dense.weight"],
    )
    assert (
        conversion.used["fusion_encoder.encoder.layer.6.output.dense.bias"]
        == "fusion.layers.2.joint.feed_forward.down.bias"
    )
    reasons = {name: why for name, why in conversion.dropped.items() if name.startswith("fusion_encoder.encoder")}
    assert {why for name, why in reasons.items() if ".layer.6." in name} == {"cross-attention of a connected layer"}
    assert {why for name, why in reasons.items() if ".layer.6." not in name} == {"fusion layer that never runs"}
    assert all(int(name.split(".")[3]) < 4 or ".layer.6.cross" in name for name in reasons)


def test_file_that_holds_only_the_layers_that_run() -> None:
    tensors = {n: v for n, v in released().items() if not re.match(r"fusion_encoder(_m)?\.encoder\.layer\.[0-3]\.", n)}
    assert read_config(unwrap(tensors)).fusion_layers == 4


def test_fused_projections_are_in_order() -> None:
    tensors = released()
    state = convert(tensors, BERT).state
    layer = "text_decoder.bert.encoder.layer.1"
    qkv = state["decoder.layers.1.attention.qkv.weight"].split(WIDTH)
    for got, part in zip(qkv, ("query", "key", "value"), strict=True):
        assert torch.equal(got, tensors[f"{layer}.attention.self.{part}.weight"])
    kv = state["decoder.layers.1.cross.kv.bias"].split(WIDTH)
    for got, part in zip(kv, ("key", "value"), strict=True):
        assert torch.equal(got, tensors[f"{layer}.crossattention.self.{part}.bias"])


@pytest.mark.parametrize(
    ("part", "pattern"),
    [
        ("visual", r"visual_encoder\.visual\.transformer\.resblocks\.1\.mlp"),
        ("text", r"text_encoder\.encoder\.layer\.1"),
        ("fusion", r"fusion_encoder\.encoder\.layer\.5\.crossattention\.self\.key"),
        ("decoder", r"text_decoder\.cls"),
        ("contrastive", r"vision_proj"),
        ("matching", r"itm_head"),
        ("masked", r"fusion_encoder\.cls"),
    ],
)
def test_missing_part_is_named(part: str, pattern: str) -> None:
    conversion = convert({n: v for n, v in released().items() if not re.match(pattern, n)}, BERT)
    assert [name for name, gaps in conversion.missing.items() if gaps] == [part]
    conversion.require(*(p for p in PARTS if p != part))
    with pytest.raises(CheckpointError, match=f"lacks {part} "):
        conversion.require(*PARTS)


def test_wrong_shape_is_named() -> None:
    tensors = released()
    tensors["itm_head.weight"] = torch.zeros(3, WIDTH)
    with pytest.raises(CheckpointError, match=r"matching_head.weight has shape \(3, 16\), not \(2, 16\)"):
        convert(tensors, BERT)


def test_unknown_tensor_is_accounted_as_unknown() -> None:
    conversion = convert({**released(), "surprise.weight": torch.zeros(2)}, BERT)
    assert conversion.dropped["surprise.weight"] == "unknown"


def test_head_that_is_not_tied_is_refused() -> None:
    tensors = released()
    tensors["text_decoder.cls.predictions.decoder.weight"] = torch.zeros(WORDS, WIDTH)
    with pytest.raises(CheckpointError, match="tied"):
        convert(tensors, BERT)


def test_two_different_tensors_of_one_name_are_refused() -> None:
    tensors = released()
    name = "fusion_encoder.encoder.layer.4.output.dense.bias"
    clash = name.replace("fusion_encoder.", "fusion_encoder.bert.")
    assert convert({**tensors, clash: tensors[name]}, BERT).missing == {}
    with pytest.raises(CheckpointError, match="two different tensors"):
        convert({**tensors, clash: tensors[name] + 1}, BERT)


@pytest.mark.parametrize("checkpoint", [{}, {"model": {}}, {"epoch": 3}, {"weights": {"a": torch.zeros(1)}}])
def test_what_is_no_checkpoint(checkpoint: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="no tensors"):
        convert(checkpoint)


def test_another_models_checkpoint_is_refused() -> None:
    with pytest.raises(CheckpointError, match="is it a released mPLUG"):
        convert({"encoder.weight": torch.zeros(2, 2)})


def test_caption_checkpoint_without_text_and_fusion() -> None:
    """The released captioning models hold the visual encoder and the decoder alone."""
    kept = {n: v for n, v in released().items() if n.startswith(("visual_encoder", "text_decoder"))}
    conversion = convert(kept, BERT)
    conversion.require("visual", "decoder")
    assert conversion.config.fusion == "none"
    with pytest.raises(CheckpointError, match="lacks text"):
        conversion.require("text")


def test_image_size_resizes_positions() -> None:
    conversion = convert(released(), BERT, image_size=32)
    assert conversion.state["visual.backbone.pos_embed"].shape == (1, 17, VISUAL)
    assert conversion.config.vision.image_size == 32
    MplugModel(conversion.config).load_state_dict(conversion.state)


def test_canonical_names() -> None:
    assert canonical("module.fusion_encoder_m.fusion.encoder.x") == "fusion_encoder_m.encoder.x"
    assert canonical("text_decoder.bert.encoder.x") == "text_decoder.bert.encoder.x"


class TestGolden:
    def test_every_tensor_of_the_golden_weights(self, parity_folder: Path) -> None:
        from safetensors.torch import load_file

        manifest = json.loads((parity_folder / "manifest.json").read_text())
        weights = load_file(parity_folder / manifest["weights"]["file"])
        for bert in sorted(parity_folder.glob("bert_config_stride*.json")):
            conversion = convert(weights, json.loads(bert.read_text()))
            assert conversion.used.keys() | conversion.dropped.keys() == {canonical(name) for name in weights}
            assert "unknown" not in conversion.dropped.values(), [
                n for n, why in conversion.dropped.items() if why == "unknown"
            ]
            conversion.require("visual", "text", "fusion", "decoder", "contrastive", "matching")

    def test_every_name_of_the_real_checkpoints(self, parity_folder: Path) -> None:
        """Names and shapes of the released models, without their values."""
        lists = json.loads((parity_folder / "j10_state_dict_keys_real.json").read_text())
        needed = {
            "base/vqa": ("visual", "text", "fusion", "decoder"),
            "base/retrieval/distill": ("visual", "text", "fusion", "contrastive", "matching"),
            "base/grounding": ("visual", "fusion", "decoder"),
            "large/caption": ("visual", "decoder"),
        }
        for name, shapes in lists.items():
            tied = torch.zeros(30522, 768)  # compared by value, so it must have one
            tensors = {
                key: tied if shape == [30522, 768] else torch.zeros(shape, device="meta")
                for key, shape in shapes.items()
            }
            conversion = convert(tensors)
            unknown = [key for key, why in conversion.dropped.items() if why == "unknown"]
            assert not unknown, (name, unknown[:5])
            conversion.require(*needed[name])
            assert conversion.config.vision.options == {}
            assert conversion.config.stride == (6 if name.startswith("large") else 3)
