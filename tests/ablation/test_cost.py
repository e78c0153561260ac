"""Counted costs, against the figures of the paper's sizes and PyTorch's own counter."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mplug_core.ablation.cost import Shape, costs, traced_pass
from mplug_core.ablation.variants import VARIANTS, chosen
from mplug_core.model.config import MplugConfig
from mplug_core.model.fusion import Fusion
from tests.small import FUSED_ON_CPU, small_config

PUBLISHED = {"co": 74.9, "connected": 57.8, "skip3-released": 18.7, "asymmetric": 10.9}
"""Forward GFLOPs of six layers of width 768 at 577 + 25 tokens."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_operations_of_the_base_size(name: str) -> None:
    for dropout in (0.0, 0.1):  # fused attention, and the plain operations
        config = chosen([name])[0].configure(MplugConfig.named("base", dropout=dropout))
        flops = traced_pass(config, Shape()).trace.flops
        assert flops["forward"] / 1e9 == pytest.approx(PUBLISHED[name], abs=0.05)
        # fused attention computes its weights again
        assert flops["backward"] / flops["forward"] == pytest.approx(2, rel=0.04 if dropout == 0 else 0.01)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_operations_are_those_that_run(variant) -> None:
    config, shape = variant.configure(small_config(fusion_layers=6)), Shape(2, 17, 5)
    fusion = Fusion(config)
    with FlopCounterMode(display=False, custom_mapping=FUSED_ON_CPU) as counter:
        fusion(torch.randn(2, 17, 32), torch.randn(2, 5, 32))
    assert traced_pass(config, shape).trace.flops["forward"] == counter.get_total_flops()


def test_costs_of_equal_networks_are_one() -> None:
    advanced: list[str] = []
    found = costs(chosen(["connected", "skip6-paper", "asymmetric"]), small_config(fusion_layers=6), Shape(1, 9, 4),
                  repeats=2, advance=advanced.append)  # fmt: skip
    assert found["skip6-paper"] is found["asymmetric"]
    assert set(advanced) == {"connected", "asymmetric"} and len(found["connected"].seconds.seconds) == 2
    # cross-attention has weights of its own, activations of the long image stream cost more
    assert found["connected"].parameters < found["asymmetric"].parameters
    assert found["connected"].saved_bytes > found["asymmetric"].saved_bytes
