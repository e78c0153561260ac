"""Compare the model with golden tensors of the released code: ``python -m tests.parity DIR``.

DIR holds ``manifest.json``, the weights in the released names and one safetensors file per fixture. The model is built
from what is found there, and computes in float32 whatever the machine prefers. Prints a line per fixture: name, maximal
error, tolerance, pass or FAIL or "not yet"; ends with 1 if one fails.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from tests.parity import answers, captions, checkpoints, decoding, encoders, grounding, retrieval, texts
from tests.parity.golden import Checks, Folder

FIXTURES: dict[str, Callable[[Folder, str, Checks], None]] = {
    **encoders.FIXTURES,
    **decoding.FIXTURES,
    **retrieval.FIXTURES,
    **answers.FIXTURES,
    **grounding.FIXTURES,
    **captions.FIXTURES,
    **texts.FIXTURES,
    **checkpoints.FIXTURES,
}
CONVERTED = "converted"
"""No fixture, but a check of its own: a native folder made of the weights answers as they do."""


@torch.no_grad()
def check(path: Path) -> tuple[list[str], int]:
    """A line per fixture, and how many fail."""
    folder = Folder(path)
    lines, failures = [], 0
    for name in sorted([*folder.manifest["fixtures"], CONVERTED]):
        run = next((check for prefix, check in FIXTURES.items() if name.startswith(prefix)), None)
        if run is None:
            lines.append(f"{name:32} not yet")
            continue
        checks = Checks()
        run(folder, name, checks)
        error, tolerance, where = max(checks.worst, key=lambda check: check[0] / (check[1] or 1e-30))
        failures += bool(checks.failed)
        verdict = f"FAIL at {where}" if checks.failed else "pass"
        lines.append(f"{name:32} max error {error:.2e}  tolerance {tolerance:.0e}  {verdict}")
    return lines, failures


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.parity", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    path = parser.parse_args().folder
    os.environ["MPLUG_DTYPE"] = "float32"  # the golden tensors' type
    if not (path / "manifest.json").is_file():
        sys.exit(f"error: no manifest.json in {path}")
    lines, failures = check(path)
    print("\n".join(lines))
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
