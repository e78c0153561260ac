"""The golden tensors of the released code, where they are."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.parity.__main__ import FIXTURES, check

PASSING = (
    "f01_", "f02_", "f03_", "f04a_", "f04b_", "f04c_", "f04d_", "f04e_", "f05_",
    "f05b_", "f06_", "f07_", "f08_", "f09_", "f10_retrieval_", "f10_video_", "f11_", "j11_grounding",
    "j11_vqa_dataset", "j08_lr", "j08_param", "j11_text", "j11_tokenizer", "j11_frame", "j10_checkpoint", "j10_param",
    "j10_state", "converted",
)  # fmt: skip


@pytest.fixture(scope="module")
def lines(parity_folder: Path) -> dict[str, str]:
    found, failures = check(parity_folder)
    assert failures == sum("FAIL" in line for line in found)
    return {line.split()[0]: line for line in found}


@pytest.mark.parametrize("prefix", PASSING)
def test_passes(lines: dict[str, str], prefix: str) -> None:
    assert prefix in FIXTURES
    mine = [line for name, line in lines.items() if name.startswith(prefix)]
    assert mine and all(line.endswith(" pass") for line in mine), mine


def test_nothing_fails(lines: dict[str, str]) -> None:
    assert not [line for line in lines.values() if "FAIL" in line]


def test_no_fixture_is_left_out(lines: dict[str, str]) -> None:
    assert not [line for line in lines.values() if not line.endswith(" pass")]
