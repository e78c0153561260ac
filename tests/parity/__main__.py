"""Compare the model with golden tensors of the released code: ``python -m tests.parity DIR``.

DIR holds ``manifest.json``, the weights in the released names and one safetensors file per fixture. The model is built
from what is found there. Prints a line per fixture: name, maximal error, tolerance, pass or FAIL or "not yet"; ends
with 1 if one fails.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from mplug_core.generation import Decoding, generate
from mplug_core.model.mplug import Mplug
from mplug_core.model.vision import resize_positions
from mplug_core.objectives.prefix_language import sequence_loss
from mplug_core.weights.official import convert

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

    def model(self, entry: dict[str, Any], image_size: int | None = None) -> Mplug:
        bert = json.loads((self.path / entry["config"]["bert_config"]).read_text())
        conversion = convert(self.weights, bert, image_size)
        conversion.require("visual", "text", "fusion", "decoder", "contrastive", "matching")
        model = Mplug(conversion.config)
        # the masked-language head is not among the released fine-tuning weights
        model.load_state_dict(conversion.state, strict=False)
        return model.eval()


def record_outputs(modules: list[torch.nn.Module]) -> list[Any]:
    """A list that the modules' outputs are appended to as they run."""
    outputs: list[Any] = []
    for module in modules:
        module.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    return outputs


def visual(folder: Folder, name: str, checks: Checks) -> None:
    entry, t = folder.fixture(name)
    model = folder.model(entry)
    backbone = model.visual.backbone
    mids = record_outputs([backbone.norm_pre, *backbone.blocks])
    image = t["in.image"].float()
    tokens = model.visual(image)
    for got, want in zip(mids, ["mid.ln_pre", *(f"mid.block{k}" for k in range(len(backbone.blocks)))], strict=True):
        checks.compare(want, got, t[want])
    checks.compare("out.visual", tokens, t["out.visual"])
    checks.compare(
        "out.visual_with_proj", mids[-1] @ folder.weights["visual_encoder.visual.proj"], t["out.visual_with_proj"]
    )
    checks.compare("out.image_embeds", model.encode_image(image).tokens, t["out.image_embeds"])


def text(folder: Folder, name: str, checks: Checks) -> None:
    entry, t = folder.fixture(name)
    model = folder.model(entry)
    mids = record_outputs([model.text.embeddings, *model.text.layers])
    got = model.encode_text(t["in.input_ids"], t["in.attention_mask"])
    for value, want in zip(mids, ["mid.embeddings", *(f"mid.layer{k}" for k in range(len(mids) - 1))], strict=True):
        checks.compare(want, value, t[want])
    checks.compare("out.last_hidden_state", got, t["out.last_hidden_state"])


def fusion(folder: Folder, name: str, checks: Checks) -> None:
    entry, t = folder.fixture(name)
    model = folder.model(entry)
    mids = record_outputs(list(model.fusion.layers))
    image, words = model.fusion(t["in.image_embeds"], t["in.text_embeds"], t["in.image_atts"], t["in.text_atts"])
    for (_, got), number in zip(mids, entry["json"]["executed_layers"], strict=True):
        # of a connected layer the fixture holds the concatenation, whose text part is what goes on
        checks.compare(f"mid.layer{number}", got, t[f"mid.layer{number}"][:, -got.shape[1] :])
    checks.compare("out.image", image, t["out.image"])
    checks.compare("out.text", words, t["out.text"])


def decoder(folder: Folder, name: str, checks: Checks) -> None:
    entry, t = folder.fixture(name)
    decoder = folder.model(entry).decoder
    ids, mask = t["in.input_ids"], t["in.attention_mask"]
    memory, memory_mask = t["in.encoder_hidden_states"], t["in.encoder_attention_mask"]
    logits = decoder.logits(decoder(ids, memory, memory_mask, mask=mask))
    checks.compare("out.logits", logits, t["out.logits"])
    unmasked = decoder.logits(decoder(ids, memory, memory_mask))
    checks.compare("out.logits_no_attention_mask", unmasked, t["out.logits_no_attention_mask"])
    checks.compare("out.prefix_loss_mean", sequence_loss(logits, ids, mask), t["out.prefix_loss_mean"], LOSS)
    rows = [
        sequence_loss(logits[i : i + 1], ids[i : i + 1], mask[i : i + 1], reduction="sequence") for i in range(len(ids))
    ]
    checks.compare("out.lm_loss_per_sequence", torch.stack(rows), t["out.lm_loss_per_sequence"], LOSS)


def beam(folder: Folder, name: str, checks: Checks) -> None:
    entry, t = folder.fixture(name)
    model = folder.model(entry)
    encoding = model.encode_image(t["in.image"].float())
    if "in.question_ids" in t:
        question = model.encode_text(t["in.question_ids"], t["in.question_mask"])
        memory, mask = model.memory(encoding, question, t["in.question_mask"])
    else:
        memory, mask = model.memory(encoding)
    for run in entry["json"]:
        want_ids, want_scores = run["ids"], torch.tensor([row[: len(run["ids"][0])] for row in run["scores"]])
        decoding = Decoding(
            strategy="released",
            beams=run["beam_size"],
            min_tokens=run["min_length"],
            max_tokens=run["max_length"],
            best=max(len(row) for row in want_ids),
        )
        found = generate(model.decoder, memory, mask, decoding, start=START, end=END)
        checks.same_ids(f"{run['name']}.ids", [[[START, *h.ids] for h in row] for row in found], want_ids)
        if [len(row) for row in found] == [len(row) for row in run["scores"]]:
            checks.compare(
                f"{run['name']}.scores", torch.tensor([[h.score for h in row] for row in found]), want_scores, LOSS
            )
        else:
            checks.same_ids(f"{run['name']}.scores", [], [[[0]]])


def positions(folder: Folder, name: str, checks: Checks) -> None:
    entry, t = folder.fixture(name)
    for key in [key for key in t if key.startswith("in.pos_embed_")]:
        small = t[key]
        grown_key = next(k for k in t if k.startswith("out.pos_embed_") and "_to_" not in k)
        grown = resize_positions(small, (grid_of(t[grown_key]),) * 2)
        checks.compare(grown_key, grown, t[grown_key])
        for shrunk_key in [k for k in t if k.startswith("out.pos_embed_") and "_to_" in k]:
            shrunk = resize_positions(grown, (grid_of(t[shrunk_key]),) * 2)
            checks.compare(shrunk_key, shrunk, t[shrunk_key])
    for key in [key for key in t if key.startswith("in.image_")]:
        image = t[key].float()
        model = folder.model(entry, image_size=image.shape[-1])
        out = key.replace("in.image", "out.visual")
        checks.compare(out, model.visual(image), t[out])


def grid_of(positions: Tensor) -> int:
    """Side of the grid of a position embedding with a class token."""
    return round((len(positions) - 1) ** 0.5)


FIXTURES: dict[str, Callable[[Folder, str, Checks], None]] = {
    "f01_": visual,
    "f02_": text,
    "f03_": fusion,
    "f04a_": decoder,
    "f05_": beam,
    "f09_": positions,
}


@torch.no_grad()
def check(path: Path) -> tuple[list[str], int]:
    """A line per fixture, and how many fail."""
    folder = Folder(path)
    lines, failures = [], 0
    for name in sorted(folder.manifest["fixtures"]):
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
    if not (path / "manifest.json").is_file():
        sys.exit(f"error: no manifest.json in {path}")
    lines, failures = check(path)
    print("\n".join(lines))
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
