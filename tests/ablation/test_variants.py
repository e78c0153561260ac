"""Which networks are compared, and which of them are the same."""

from __future__ import annotations

import pytest

from mplug_core.ablation.variants import VARIANTS, chosen, distinct
from mplug_core.errors import UsageError
from mplug_core.model.config import MplugConfig

BASE = MplugConfig.named("base")


def test_layouts_by_the_two_rules() -> None:
    layouts = {variant.name: variant.layout(BASE) for variant in VARIANTS}
    assert layouts == {
        "co": "cccccc", "connected": "jjjjjj", "asymmetric": "aaaaaa",
        "skip1-paper": "ajajaj", "skip1-released": "ajjjjj",
        "skip2-paper": "aajaaj", "skip2-released": "aajaja",
        "skip3-paper": "aaajaa", "skip3-released": "aaajaa",
        "skip6-paper": "aaaaaa", "skip6-released": "aaaaaa",
    }  # fmt: skip


def test_the_same_network_counts_once() -> None:
    found = {first.name: [v.name for v in same] for first, same in distinct(VARIANTS, BASE).items()}
    assert len(found) == 8
    assert found["skip3-paper"] == ["skip3-paper", "skip3-released"]
    assert found["asymmetric"] == ["asymmetric", "skip6-paper", "skip6-released"]


def test_chosen_in_the_order_of_the_list() -> None:
    assert [v.name for v in chosen(["asymmetric", "co"])] == ["co", "asymmetric"]
    assert chosen(None) == list(VARIANTS)
    with pytest.raises(UsageError, match="no fusion 'asymetric', did you mean 'asymmetric'"):
        chosen(["asymetric"])
