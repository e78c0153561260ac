"""What int8 weights change: captions of a model in fp32 and of its int8 export, side by side.

``python -m benchmarks.int8 [--model MODEL] [--data DATA/flickr8k --split val]`` exports the model, captions the
pictures of ``examples/`` with both, and, where there are data, scores both. Seconds are of one thread's processor time,
so that a busy machine changes them little; reading the model is not in them.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch

from mplug_core.data.images import open_image, placed_transform
from mplug_core.recipe import DataSpec
from mplug_core.tasks.caption import CaptionTask, caption_images
from mplug_core.tasks.task import EvaluateOptions
from mplug_core.weights.export import export_int8, export_safetensors, read_source
from mplug_core.weights.folder import Loaded, load_model

EXAMPLES = Path(__file__).parent.parent / "examples"


def captions(loaded: Loaded, repeats: int) -> tuple[dict[str, str], float]:
    """The caption of each example, one at a time, and seconds a caption."""
    transform = placed_transform(loaded.config.vision)
    pixels = {file.name: transform(open_image(file))[0][None] for file in sorted(EXAMPLES.glob("*.jpg"))}
    for one in pixels.values():
        caption_images(loaded, one, CaptionTask.decoding)  # int8 weights are packed at first sight
    start = time.process_time()
    for _ in range(repeats):
        texts = {name: caption_images(loaded, one, CaptionTask.decoding)[0][0].text for name, one in pixels.items()}
    return texts, (time.process_time() - start) / (repeats * len(pixels))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model")
    parser.add_argument("--data")
    parser.add_argument("--split")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--repeats", type=int, default=5)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        source = read_source(asked.model)
        export_safetensors(source, Path(place) / "fp32", "fp32", "")
        export_int8(source, Path(place) / "int8", "bf16", "")
        found = {}
        for name in ("fp32", "int8"):
            folder = Path(place) / name
            loaded = load_model(str(folder))
            texts, seconds = captions(loaded, asked.repeats)
            size = (folder / "model.safetensors").stat().st_size
            print(f"{name}: {size / 1e6:.1f} MB, {1000 * seconds:.0f} ms a caption on one thread", flush=True)
            found[name] = texts
            if asked.data:
                spec = DataSpec(path=asked.data, split=asked.split)
                started = time.process_time()
                result = CaptionTask().evaluate(loaded, spec, EvaluateOptions(limit=asked.limit))
                seconds = time.process_time() - started
                figures = ", ".join(f"{metric} {value:.4f}" for metric, value in result.metrics.items())
                print(f"{name}: {result.n} photos, {figures}; {seconds:.1f} s with scoring", flush=True)
                found[name] |= {p["image"]: p["caption"] for p in result.predictions}
    same = [image for image, text in found["fp32"].items() if found["int8"][image] == text]
    print(f"the same caption: {len(same)} of {len(found['fp32'])}")
    for image in found["fp32"].keys() - set(same):
        print(f"  {Path(image).name}: {found['fp32'][image]!r}, int8 {found['int8'][image]!r}")


if __name__ == "__main__":
    main()
