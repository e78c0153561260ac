"""Int8 weights: how they are stored, and the linear layers that compute with them on a CPU.

A weight of a linear layer or an embedding is stored as int8 rows under its own name, with a fp32 scale per row under
the name with ``_scale`` behind it; all other tensors stay floats. On a CPU with int8 kernels the linear layers multiply
in int8 (activations are quantised as they come, with one scale a call); everywhere else, and for training, the weights
are floats again. ``quantization.json`` beside the weights says so.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from mplug_core.bounded import read_json
from mplug_core.errors import CheckpointError
from mplug_core.json_text import to_json
from mplug_core.model.hollow import hollow

QUANTISATION = "quantization.json"
SCALE = "_scale"
METHOD = {"method": "int8", "weights": "symmetric, a scale per row", "activations": "dynamic, a scale per call"}
ENGINES = ("x86", "fbgemm", "onednn")
"""PyTorch's int8 engines that take a scale per row."""


def quantise_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """``weight`` [O, I] to int8 rows in -127 .. 127 and their scales [O] in fp32."""
    weight = weight.float()
    scale = (weight.abs().amax(1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
    return (weight / scale[:, None]).round().clamp(-127, 127).to(torch.int8), scale


def quantise(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``state`` with the weights of all linear layers and embeddings of ``model`` as int8 rows and scales."""
    named = {f"{name}.weight" for name, layer in model.named_modules() if isinstance(layer, nn.Linear | nn.Embedding)}
    quantised: dict[str, Tensor] = {}
    for name, value in state.items():
        if name in named:
            quantised[name], quantised[name + SCALE] = quantise_rows(value)
        else:
            quantised[name] = value
    return quantised


def quantised_names(state: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors of a state that are int8 rows; their scales are beside them."""
    return sorted(name for name, value in state.items() if value.dtype == torch.int8 and name + SCALE in state)


def is_quantised(state: Mapping[str, Tensor]) -> bool:
    """Whether a state holds int8 rows."""
    return bool(quantised_names(state))


def dequantise(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state of floats: int8 rows times their scales in fp32, the rest as it is."""
    floats: dict[str, Tensor] = {}
    for name, value in state.items():
        if value.dtype == torch.int8 and name + SCALE in state:
            floats[name] = value.float() * state[name + SCALE][:, None]
        elif not (name.endswith(SCALE) and name.removesuffix(SCALE) in state):
            floats[name] = value
    return floats


def computes_int8(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether PyTorch multiplies int8 on ``device`` for activations of ``dtype``."""
    known = hasattr(torch, "_make_per_channel_quantized_tensor") and hasattr(torch.ops.quantized, "linear_dynamic")
    return known and device.type == "cpu" and dtype == torch.float32 and torch.backends.quantized.engine in ENGINES


class Int8Linear(nn.Module):
    """A linear layer for inference with int8 weights, each output with its scale, by PyTorch's own kernels."""

    def __init__(self, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = inputs, outputs
        self.register_buffer("weight", torch.zeros(outputs, inputs, dtype=torch.int8))
        self.register_buffer("weight" + SCALE, torch.ones(outputs))
        self.bias = nn.Parameter(torch.zeros(outputs), requires_grad=False) if bias else None
        self._packed = None

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] to [..., O], both fp32."""
        if self._packed is None:
            zeros = torch.zeros(self.out_features, dtype=torch.int64)
            with warnings.catch_warnings():  # the day it goes, computes_int8 says so
                warnings.simplefilter("ignore")
                weight = torch._make_per_channel_quantized_tensor(self.weight, self.weight_scale, zeros, 0)
            self._packed = torch.ops.quantized.linear_prepack(weight, self.bias)
        # without the eighth bit of the activations AVX2's sums of products can't overflow
        return torch.ops.quantized.linear_dynamic(x, self._packed, True)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def to_float_layers(model: nn.Module) -> None:
    """Replace the int8 layers of ``model`` by linear ones with their weights as floats."""
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, Int8Linear):
            continue
        owner, _, last = name.rpartition(".")
        with hollow():
            linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
        floats = dequantise(dict(layer.state_dict()))
        linear.load_state_dict(floats, assign=True)
        setattr(model.get_submodule(owner), last, linear.train(layer.training).requires_grad_(False))


def with_int8_layers(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give ``model`` int8 layers where ``state`` has int8 weights of linear ones; returns the state that it takes.

    Embeddings are looked up, and tied to the output of a decoder, as floats.
    """
    rows = {name.removesuffix(".weight") for name, value in state.items() if value.dtype == torch.int8}
    linear = {name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)} & rows
    for name in linear:
        layer = model.get_submodule(name)
        owner, _, last = name.rpartition(".")
        with torch.device(layer.weight.device):
            quantised = Int8Linear(layer.in_features, layer.out_features, layer.bias is not None)
        setattr(model.get_submodule(owner), last, quantised)
    kept = {f"{name}.weight{end}" for name in linear for end in ("", SCALE)}
    others = {name: value for name, value in state.items() if name not in kept}
    return dequantise(others) | {name: value for name, value in state.items() if name in kept}


def describe_quantisation(state: Mapping[str, Tensor]) -> str:
    """``quantization.json`` of a quantised state."""
    return to_json({**METHOD, "tensors": quantised_names(state)}, indent=1) + "\n"


def check_quantisation(folder: Path) -> None:
    """CheckpointError where ``quantization.json`` names a method that this version can't read."""
    file = folder / QUANTISATION
    if not file.exists():
        return
    try:
        method = read_json(file)["method"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"cannot read {file}", "copy the folder again") from error
    if method != METHOD["method"]:
        raise CheckpointError(f"{folder} is quantised by {method!r}, which this version can't read", "update mplug")
