"""What a training step of a convolutional encoder takes with PyTorch's gradients of grouped convolutions and with ours.

    python -m benchmarks.depthwise [--backbone NAME] [--size N] [--images N] [--threads N]

Forward and backward in bfloat16 under autocast, norms folded, the encoder's stem frozen as in recipe mini. The two take
turns; figures are medians.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
import torch.nn.functional as F

from mplug_core.cpu import settle_threads
from mplug_core.model import batch_norm
from mplug_core.model.config import MplugConfig
from mplug_core.model.vision import VisualEncoder

TURNS = 7


def seconds(encoder: VisualEncoder, pixels: torch.Tensor) -> float:
    start = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16):
        loss = encoder(pixels).float().mean()
    loss.backward()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--backbone", default="tf_efficientnet_lite0")
    parser.add_argument("--size", type=int, default=224, help="pixels of a side")
    parser.add_argument("--images", type=int, default=24)
    parser.add_argument("--threads", type=int, default=None)
    given = parser.parse_args()
    settle_threads(given.threads)
    vision = {"backbone": given.backbone, "image_size": given.size, "levels": [2, 3], "subcells": 2}
    encoder = VisualEncoder(MplugConfig(vocab_size=100, vision=vision)).train()
    for module in encoder.stem:
        module.requires_grad_(False)
    pixels, ours = torch.randn(given.images, 3, given.size, given.size), batch_norm.convolve
    found: dict[str, list[float]] = {"pytorch": [], "ours": []}
    for turn in range(TURNS + 1):
        for name, convolution in (("pytorch", F.conv2d), ("ours", ours)):
            batch_norm.convolve = convolution
            taken = seconds(encoder, pixels)
            if turn:
                found[name].append(taken)
    medians = {name: statistics.median(taken) for name, taken in found.items()}
    for name, median in medians.items():
        print(f"{name:10} {median:6.2f} s, {given.images / median:5.1f} images/s on {torch.get_num_threads()} threads")
    print(f"{medians['pytorch'] / medians['ours']:.2f} times as fast")


if __name__ == "__main__":
    main()
