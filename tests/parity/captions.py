"""Fixtures of captioning: the loss, videos as frames in a row behind a prompt, and self-critical training."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from mplug_core.generation import Decoding, generate
from mplug_core.model.mplug import ImageEncoding, MplugModel
from mplug_core.objectives.prefix_language import sequence_loss
from mplug_core.objectives.self_critical import advantage_loss, log_probabilities
from mplug_core.tasks.caption import CaptionTask
from mplug_core.tasks.task import Context
from tests.parity.golden import END, LOSS, START, Checks, Folder, released_part


def loss(folder: Folder, name: str, checks: Checks) -> None:
    entry, t = folder.fixture(name)
    model = folder.model(entry)
    block = {
        "image": torch.arange(len(t["in.image"])),
        "target_ids": t["in.answer_ids"],
        "target_mask": t["in.answer_mask"],
    }
    with torch.enable_grad():
        images = model.encode_image(t["in.image"].float())
        found = CaptionTask().losses(model, images, block, Context(weights={"caption": 1.0}))["caption"]
        found.backward()
    checks.compare("out.loss", found.detach(), t["out.loss"], LOSS)
    compare_gradients(folder, name, model, checks)
    # what captioning does not use
    unused = tuple(entry["json"]["params_without_grad_prefixes"])
    used = folder.conversion(folder.manifest["fixtures"][name]).used
    gradients = {key for key, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}
    touched = [source for source, ours in used.items() if source.startswith(unused) and ours in gradients]
    checks.same_ids(f"no gradient for {touched[:3]}", [[touched]], [[[]]])


def video(folder: Folder, name: str, checks: Checks) -> None:
    """The released prompt loses its last word in generation, and that word is a label of the loss."""
    entry, t = folder.fixture(name)
    model = folder.model(entry)
    videos, frames = t["in.video"].shape[:2]
    encoded = model.encode_image(t["in.video"].float().flatten(0, 1))
    seen = ImageEncoding(
        encoded.tokens.unflatten(0, (videos, frames)).flatten(1, 2),
        encoded.feature.unflatten(0, (videos, frames)).mean(1),
        encoded.mask.unflatten(0, (videos, frames)).flatten(1, 2),
    )
    memory, mask = model.memory(seen)
    ids, target_mask = t["in.answer_ids"], t["in.answer_mask"].clone()
    words = len(entry["config"]["prompt"].split())
    target_mask[:, :words] = 0
    found = sequence_loss(model.decode(ids, memory, mask), ids, target_mask)
    checks.compare("out.loss", found, t["out.loss"], LOSS)

    prompt = ids[0, 1:words].tolist()
    decoding = released_decoding(entry["description"])
    hypotheses = [
        row[0] for row in generate(model.decoder, memory, mask, decoding, start=START, end=END, prompt=prompt)
    ]
    checks.same_ids(
        "out.gen_ids",
        [[[START, *prompt, *h.ids]] for h in hypotheses],
        [[[i for i in row if i >= 0] for row in rows] for rows in t["out.gen_ids"].tolist()],
    )
    checks.compare("out.gen_scores", torch.tensor([[h.score] for h in hypotheses]), t["out.gen_scores"], LOSS)


def self_critical(folder: Folder, name: str, checks: Checks) -> None:
    """The released loss divides a caption's log-probability by the search's penalty for its length, and again by its
    tokens with the start."""
    entry, t = folder.fixture(name)
    model = folder.model(entry)
    reward = t["in.reward"]
    decoding = released_decoding(entry["description"], reward.shape[1])
    with torch.enable_grad():
        memory, mask = model.memory(model.encode_image(t["in.image"].float()))
        found = generate(model.decoder, memory, mask, decoding, start=START, end=END)
        written = [[hypothesis.ids for hypothesis in row] for row in found]
        numbers = t["out.num_tokens"].long()
        wanted = [
            [ids[:n] for ids, n in zip(rows, counts, strict=True)]
            for rows, counts in zip(t["out.ids"].tolist(), numbers.tolist(), strict=True)
        ]
        checks.same_ids("out.ids", [[[START, *ids] for ids in row] for row in written], wanted)
        scores, lengths = log_probabilities(model.decoder, memory, mask, written, start=START, end=END)
        checks.same_ids("out.num_tokens", [(lengths + 1).tolist()], [numbers.tolist()])
        penalty = ((5 + lengths) / 6) ** decoding.length_penalty
        checks.compare("out.scores", (scores / penalty).detach(), t["out.scores"], LOSS)
        advantages = reward - reward.mean(1, keepdim=True)
        # a mean over captions, where ours is one over tokens
        twice = scores / penalty / (lengths + 1)
        released = advantage_loss(twice, torch.ones_like(lengths), advantages)
        released.backward()
    checks.compare("out.loss", released.detach(), t["out.loss"], LOSS)
    compare_gradients(folder, name, model, checks)


def released_decoding(description: str, best: int = 1) -> Decoding:
    """The search that a fixture's description names."""
    beams, shortest, longest = map(int, re.search(r"beam (\d+), min (\d+), max (\d+)", description).groups())
    return Decoding(strategy="released", beams=beams, min_tokens=shortest, max_tokens=longest, best=best)


def compare_gradients(folder: Folder, name: str, model: MplugModel, checks: Checks) -> None:
    """Each ``grad.NAME`` or ``grad.NAME.rowsFROM_TO`` of a fixture with the gradient of our parameter."""
    entry, t = folder.fixture(name)
    conversion = folder.conversion(entry)
    gradients: dict[str, Tensor] = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    for key in [key for key in t if key.startswith("grad.")]:
        source, _, span = key.removeprefix("grad.").partition(".rows")
        got = released_part(conversion, source, gradients)
        if span:
            got = got[slice(*map(int, span.split("_")))]
        # timm keeps the class token and the positions behind axes of length 1
        checks.compare(key, got.reshape(t[key].shape) if got.numel() == t[key].numel() else got, t[key], LOSS)


FIXTURES = {"f04b_": loss, "f04c_": video, "f05b_": self_critical}
