"""PyTorch's compiler on the layers of the towers, which repeat: each kind is compiled once, in minutes, at its first
use."""

from __future__ import annotations

import os
import shutil
import sys
from importlib.util import find_spec

import torch
from torch import nn

from mplug_core.errors import MplugError
from mplug_core.model.mplug import MplugModel

BACKEND = "inductor"


def compile_layers(module: nn.Module, device: torch.device) -> None:
    """Compile the layers of every model within ``module``, in place: names of parameters stay as they are.

    MplugError where ``device`` needs a compiler that isn't there.
    """
    if BACKEND == "inductor":
        check_compiler(device)
    for model in module.modules():
        if isinstance(model, MplugModel):
            for layer in model.layers:
                layer.compile(backend=BACKEND)


def check_compiler(device: torch.device) -> None:
    """MplugError without what PyTorch's compiler makes code with: a C++ compiler for CPUs, Triton for GPUs."""
    if device.type != "cpu":
        if find_spec("triton") is None:
            raise MplugError("engine.compile needs Triton", "pip install triton, or set engine.compile=false")
        return
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(compiler) is None:
        raise MplugError(
            f"engine.compile needs a C++ compiler, and there is no {compiler}",
            "install one, name it in the variable CXX, or set engine.compile=false",
        )
