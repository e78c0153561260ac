"""What a fusion network costs, at equal width, depth and tokens: parameters, operations, time, memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from mplug_core.ablation.variants import Variant, distinct, of_all
from mplug_core.allocator import keep_freed_memory
from mplug_core.bench.measure import Timing, take_turns
from mplug_core.model.config import MplugConfig
from mplug_core.model.fusion import Fusion
from mplug_core.model.hollow import hollow
from mplug_core.training.tracing import ShapeMode


@dataclass(frozen=True)
class Shape:
    """Of one pass: examples, tokens of an image and of a text."""

    batch: int = 1
    image_tokens: int = 577
    text_tokens: int = 25


@dataclass(frozen=True)
class Cost:
    """``forward_flops`` of the batch; ``saved_bytes``: what autograd keeps for the backward pass; ``peak_bytes`` at
    once in forward and backward, without weights; ``seconds`` of a forward and a backward pass."""

    parameters: int
    forward_flops: int
    backward_flops: int
    saved_bytes: int
    peak_bytes: int
    seconds: Timing

    def as_object(self) -> dict[str, Any]:
        return asdict(self) | {"median_seconds": self.seconds.median}


def costs(
    variants: Sequence[Variant],
    config: MplugConfig,
    shape: Shape,
    repeats: int = 5,
    device: str = "cpu",
    advance: Callable[[str], None] = lambda name: None,
) -> dict[str, Cost]:
    """The cost of each variant's fusion network by its name, with random weights, without dropout.

    Networks that are the same are measured once. Operations and memory are counted on the real layers (see
    :mod:`mplug_core.training.tracing`); passes take turns on the device, and ``advance`` is called after each.
    """
    config = config.model_copy(update={"dropout": 0.0})
    if device == "cpu":
        keep_freed_memory()  # as runs do: else much of a pass is fresh pages for the gradients
    networks = distinct(variants, config)
    passes = {first.name: _pass(first.configure(config), shape, torch.device(device)) for first in networks}
    timings = take_turns(passes, repeats, advance=advance)
    found: dict[str, Cost] = {}
    for first in networks:
        own = first.configure(config)
        mode = traced_pass(own, shape)
        with hollow():
            parameters = sum(p.numel() for p in Fusion(own).parameters())
        flops = mode.trace.flops
        found[first.name] = Cost(
            parameters, flops["forward"], flops["backward"], mode.trace.saved, mode.trace.peak, timings[first.name]
        )
    return of_all(networks, found)


def _streams(config: MplugConfig, shape: Shape, device: torch.device) -> tuple[Tensor, Tensor]:
    """Image and text streams as encoders that are trained would give them."""
    generator = torch.Generator().manual_seed(0)
    sizes = ((shape.batch, tokens, config.width) for tokens in (shape.image_tokens, shape.text_tokens))
    image, text = (torch.randn(size, generator=generator).to(device).requires_grad_() for size in sizes)
    return image, text


def _both(fusion: Fusion, image: Tensor, text: Tensor) -> Tensor:
    """A loss that reaches both streams: what looks at the fused image, the decoder, needs its gradient, too."""
    fused_image, fused_text = fusion(image, text)
    return fused_image.sum() + fused_text.sum()


def _pass(config: MplugConfig, shape: Shape, device: torch.device) -> Callable[[], None]:
    fusion = Fusion(config).to(device)
    image, text = _streams(config, shape, device)

    def forward_backward() -> None:
        _both(fusion, image, text).backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        for tensor in (image, text, *fusion.parameters()):
            tensor.grad = None

    return forward_backward


def traced_pass(config: MplugConfig, shape: Shape) -> ShapeMode:
    """One forward and backward pass on shapes alone."""
    mode = ShapeMode()
    with hollow():
        fusion = Fusion(config)
    mode.empty_like_module(fusion)
    image, text = (mode.fake(stream).requires_grad_() for stream in _streams(config, shape, torch.device("cpu")))
    with mode:
        loss = _both(fusion, image, text)
        with mode.backward():
            loss.backward()
    return mode
