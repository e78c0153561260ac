"""A folder of golden tensors, and the comparisons of one fixture with them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from mplug_core.model.mplug import MplugModel
from mplug_core.weights.official import Conversion, convert

ACTIVATION, LOSS, EXACT = 5e-5, 1e-4, 0.0
START, END = 101, 102


class Checks:
    """The comparisons of one fixture."""

    def __init__(self) -> None:
        self.worst: list[tuple[float, float, str]] = []

    def compare(self, name: str, got: Tensor, want: Tensor, tolerance: float = ACTIVATION) -> None:
        if got.shape != want.shape:
            self.worst.append((float("inf"), tolerance, f"{name}: shape {tuple(got.shape)} != {tuple(want.shape)}"))
            return
        error = (got.double() - want.double()).abs().max().item() if got.numel() else 0.0
        self.worst.append((error if error == error else float("inf"), tolerance, name))

    def same_ids(self, name: str, got: list[list[list[int]]], want: list[list[list[int]]]) -> None:
        self.worst.append((0.0 if got == want else float("inf"), EXACT, name))

    @property
    def failed(self) -> list[tuple[float, float, str]]:
        return [check for check in self.worst if check[0] > check[1]]


class Folder:
    """A parity folder: manifest, weights and fixtures, and models built from them by stride."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest = json.loads((path / "manifest.json").read_text())
        self.weights = load_file(path / self.manifest["weights"]["file"])

    def fixture(self, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
        entry = self.manifest["fixtures"][name]
        return entry, load_file(self.path / entry["file"])

    def conversion(
        self, entry: dict[str, Any], weights: dict[str, Tensor] | None = None, image_size: int | None = None
    ) -> Conversion:
        """The folder's weights, or others of the same names, as ours, of the architecture of a fixture."""
        bert = json.loads((self.path / entry["config"]["bert_config"]).read_text())
        return convert(self.weights if weights is None else weights, bert, image_size)

    def model(self, entry: dict[str, Any], image_size: int | None = None) -> MplugModel:
        conversion = self.conversion(entry, image_size=image_size)
        conversion.require("visual", "text", "fusion", "decoder", "contrastive", "matching")
        model = MplugModel(conversion.config)
        # the masked-language head is not among the released fine-tuning weights
        model.load_state_dict(conversion.state, strict=False)
        return model.eval()


def released_part(conversion: Conversion, name: str, tensors: dict[str, Tensor]) -> Tensor:
    """What ``tensors``, by our names, hold for a released name, which may be a third or half of a fused projection."""
    value = tensors[conversion.used[name]]
    part = re.search(r"(cross)?attention\.self\.(query|key|value)\.", name)
    if part is None or (part[1] and part[2] == "query"):
        return value
    fused = ["key", "value"] if part[1] else ["query", "key", "value"]
    return value.chunk(len(fused))[fused.index(part[2])]


def record_outputs(modules: list[torch.nn.Module]) -> list[Any]:
    """A list that the modules' outputs are appended to as they run."""
    outputs: list[Any] = []
    for module in modules:
        module.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    return outputs
