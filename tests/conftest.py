"""One thread a process, decided before torch is imported, and the fixtures that several folders share."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
# busy neighbours and spinning threads make small kernels crawl
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
# or tests would compute in what the processor is good at
os.environ["MPLUG_DTYPE"] = "float32"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from pathlib import Path

import pytest
import torch

from mplug_core.data.scenes import write_scenes
from mplug_core.data.text import Tokenizer
from tests.small import scene_tokenizer

# where the tests share the cores, one each
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)

SHARED = Path(__file__).parent.parent.parent / "shared"


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of scenes with 40 training images."""
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder, n=40, seed=0)
    return folder


@pytest.fixture(scope="session")
def tokenizer(scenes: Path) -> Tokenizer:
    """The words of the scenes, and 16 box tokens."""
    return scene_tokenizer(scenes)


@pytest.fixture(scope="session")
def parity_folder() -> Path:
    """The golden tensors of the released code; skips where there are none."""
    folder = SHARED / "parity"
    if not (folder / "manifest.json").is_file():
        pytest.skip(f"no golden tensors in {folder}")
    return folder
