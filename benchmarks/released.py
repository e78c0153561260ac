"""Time and memory of released checkpoints on this CPU: ``python benchmarks/released.py [--folder DIR]``.

A full-size base model with random weights in half precision, about 1 GB, is written as AliceMind's file and as
ModelScope's folder. Each row is a process of its own that loads, converts, captions, answers or retrieves in fp32:
seconds without the start of Python, and the peak of its resident set (``VmHWM``) less what was resident with torch
imported, also as a multiple of the weights in use at 4 bytes each. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
IMAGES = 4
"""Pictures that are looked through by retrieve."""


def status(name: str) -> int:
    """A figure of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


def write_checkpoints(folder: Path, twins: bool) -> None:
    """Both layouts, which share nothing on the disk."""
    import torch

    from tests.released import BASE, released, with_twins, write_alicemind, write_modelscope

    tensors = released(BASE, torch.float16, 0.02)
    settings = {"image_res": 384, "beam_size": 5, "min_length": 1, "max_length": 10}
    write_modelscope(folder / "modelscope", tensors, "visual-question-answering", BASE, **settings)
    write_alicemind(folder / "alicemind" / "mplug.pth", with_twins(tensors) if twins else tensors, sizes=BASE)


def load(place: Path, **options: Any) -> Any:
    from mplug_core.weights.folder import load_model

    return load_model(str(place), **options)


def pixels(loaded: Any, count: int) -> Any:
    import torch

    size = loaded.config.vision.image_size
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def run_load(place: Path, work: Path) -> Any:
    return load(place)


def run_convert(place: Path, work: Path) -> Any:
    from mplug_core.weights.conversion import convert_model

    convert_model(str(place), work / "native", force=True)


def run_caption(place: Path, work: Path) -> Any:
    from mplug_core.tasks.caption import CaptionTask, caption_images

    loaded = load(place, without=("text", "fusion"))
    caption_images(loaded, pixels(loaded, 1), loaded.decoding("caption", CaptionTask.decoding))
    return loaded


def run_answer(place: Path, work: Path) -> Any:
    import torch

    from mplug_core.tasks.vqa import VqaTask, answer_questions

    loaded = load(place)
    with torch.inference_mode():
        images = loaded.model.encode_image(pixels(loaded, 1))
        answer_questions(loaded, images, [0], ["what is it"], loaded.decoding("vqa", VqaTask.decoding))
    return loaded


def run_retrieve(place: Path, work: Path) -> Any:
    import torch

    loaded = load(place, without=("decoder",))
    model = loaded.model
    with torch.inference_mode():
        images = model.encode_image(pixels(loaded, IMAGES))
        ids, mask = loaded.texts.encode(["word1 word2 word3"])
        text = model.encode_text(ids, mask)
        (images.feature @ model.text_feature(text, mask).T).argsort(0)
        rows = torch.zeros(IMAGES, dtype=torch.long)
        _, fused = model.fuse(images, text[rows], mask[rows])
        model.matching_logits(fused)
    return loaded


ACTIONS: dict[str, Callable[[Path, Path], Any]] = {
    "load": run_load, "convert": run_convert, "caption": run_caption, "answer": run_answer, "retrieve": run_retrieve,
}  # fmt: skip


def work(action: str, place: Path, folder: Path) -> None:
    """One row, in this process; prints its figures."""
    import mplug_core.tasks.vqa
    import mplug_core.weights.conversion  # noqa: F401 (resident before anything is measured)

    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    start = time.perf_counter()
    loaded = ACTIONS[action](place, folder)
    seconds, peak = time.perf_counter() - start, status("VmHWM") - before
    weights = sum(p.numel() for p in loaded.model.parameters() if not p.is_meta) * 4 if loaded is not None else 0
    print(json.dumps({"seconds": seconds, "peak": peak, "weights": weights}))


def measure(action: str, place: Path, folder: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--work", action, str(place), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    if done.returncode:
        sys.exit(f"error: {action} of {place} failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where the files are written and kept; default: nowhere")
    parser.add_argument("--twins", action="store_true", help="AliceMind's file holds momentum twins, too: 2 GB")
    parser.add_argument("--work", nargs=3, metavar=("ACTION", "PLACE", "FOLDER"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        work(given.work[0], Path(given.work[1]), Path(given.work[2]))
        return
    with tempfile.TemporaryDirectory() as made:
        folder = given.folder or Path(made)
        if not (folder / "alicemind" / "mplug.pth").is_file():
            write_checkpoints(folder, given.twins)
        places = {
            "AliceMind": folder / "alicemind" / "mplug.pth",
            "ModelScope": folder / "modelscope",
            "native": folder / "native",
        }
        print("| layout | | seconds | peak GB | of the weights |\n|---|---|---|---|---|")
        for layout, place in places.items():
            for action in ACTIONS:
                if layout == "native" and action == "convert":
                    continue
                row = measure(action, place, folder)
                share = f"{row['peak'] / row['weights']:.2f}" if row["weights"] else ""
                print(f"| {layout} | {action} | {row['seconds']:.1f} | {row['peak'] / 1e9:.2f} | {share} |", flush=True)


if __name__ == "__main__":
    main()
