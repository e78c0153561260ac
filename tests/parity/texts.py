"""Fixtures of texts (cleaning, tokenizer), frames, and the optimizer (rates over time, parameter groups)."""

from __future__ import annotations

import json
from typing import Any

import torch

from mplug_core.data.frames import uniform_frames
from mplug_core.data.text import Tokenizer, clean_caption, clean_question, pad
from mplug_core.model.mplug import MplugModel
from mplug_core.recipe import OptimizerSection
from mplug_core.training.optimizer import parameter_groups, scheduled_lr
from tests.parity.golden import EXACT, Checks, Folder

RATE = 1e-15
CLEANERS = {"pre_caption": clean_caption, "pre_question": clean_question}


def entry_of(folder: Folder, name: str) -> Any:
    """What a fixture's JSON file holds."""
    return json.loads((folder.path / folder.manifest["fixtures"][name]["file"]).read_text(encoding="utf-8"))


def cleaning(folder: Folder, name: str, checks: Checks) -> None:
    for number, case in enumerate(entry_of(folder, name)):
        got = CLEANERS[case["fn"]](case["text"], case["max_words"])
        same(checks, f"{case['fn']} {number}", got, case["out"])


def tokenizer(folder: Folder, name: str, checks: Checks) -> None:
    """Released texts end without a [SEP] unless they say one; ours ask for that with ``end``."""
    fixture = entry_of(folder, name)
    mine = Tokenizer.load(folder.path / fixture["vocab_file"])
    for number, case in enumerate(fixture["cases"]):
        texts = [case["texts"]] if isinstance(case["texts"], str) else case["texts"]
        most = case["kwargs"].get("max_length")
        encoded = [mine.encode(text, most, end=False) for text in texts]
        if case["kwargs"].get("padding") == "max_length":
            encoded.append([mine.pad_id] * most)
        ids, mask = (tensor[: len(texts)].tolist() for tensor in pad(encoded, mine.pad_id))
        single = isinstance(case["texts"], str)
        same(checks, f"case {number} ids", ids[0] if single else ids, case["input_ids"])
        same(checks, f"case {number} mask", mask[0] if single else mask, case["attention_mask"])
    for number, case in enumerate(fixture["decode"]):
        same(checks, f"decode {number}", mine.decode(case["ids"], skip_special=False), case["text"])


def frames(folder: Folder, name: str, checks: Checks) -> None:
    """The released step between frames is cut to a whole number, as if the clip ended with its last whole step."""
    for case in entry_of(folder, name):
        total, count = case["num_frames_in_video"], case["num_frm"]
        same(checks, f"{count} of {total}", uniform_frames(total // count * count, count), case["indices"])


def same(checks: Checks, name: str, got: Any, want: Any) -> None:
    checks.worst.append((0.0 if got == want else float("inf"), EXACT, f"{name}: {got!r}, not {want!r}"))


def schedule(folder: Folder, name: str, checks: Checks) -> None:
    """The rates by the released count t, of which the warm-up and every later epoch take one each.

    Our first step has the first rate after ``warmup_lr``, so that of the warm-up our step is t - 1; then the cosine
    starts at the base rate in both. A rate below ``warmup_lr`` comes down to its base in the released warm-up; ours
    stays at its base, so that the difference is added here.
    """
    for recipe, fixture in entry_of(folder, name).items():
        values = fixture["schedular"]
        warmup, epochs = int(values["warmup_epochs"]), int(values["epochs"])
        rates = [float(fixture["optimizer"][key]) for key in ("lr1", "lr1", "lr2", "lr2")]
        start, floor = float(values["warmup_lr"]), float(values["min_lr"])
        for key, want in fixture["step_t"].items():
            t = int(key)
            got = []
            for base in rates:
                settings = OptimizerSection(lr=base, warmup_steps=warmup, warmup_lr=start, min_lr=floor)
                if t == 0:
                    got.append(start)
                elif t <= warmup:
                    above = max(start - base, 0.0) * (1 - t / warmup)
                    got.append(scheduled_lr(t - 1, warmup + epochs, base, settings) + above)
                else:
                    got.append(scheduled_lr(t, warmup + epochs, base, settings))
            checks.compare(f"{recipe} step {t}", torch.tensor(got).double(), torch.tensor(want).double(), RATE)


def groups(folder: Folder, name: str, checks: Checks) -> None:
    """Rate and weight decay of each released parameter that our model has.

    Released weights without decay are those whose name has ``bias`` or ``LayerNorm.weight``, so that CLIP's norms, the
    class token and the projection's norm do decay; ours are all vectors. The difference is taken back here, and
    nothing else may differ. Released groups also hold the teachers, which get no gradient, and CLIP's text side.
    """
    config = next(entry["config"] for entry in folder.manifest["fixtures"].values() if "config" in entry)
    model = folder.model({"config": config})
    used = folder.conversion({"config": config}).used
    for task, fixture in entry_of(folder, name).items():
        decays = [group["weight_decay"] for group in fixture["groups"]]
        settings = OptimizerSection(lr=1.0, visual_lr=0.5, weight_decay=max(decays))
        mine = settled(model, settings)
        for key, want in fixture["defaults"].items():
            if key in OptimizerSection.model_fields:
                default = torch.tensor(getattr(OptimizerSection(), key))
                checks.compare(f"{task} {key}", default, torch.tensor(want), EXACT)
        compared = 0
        for group in fixture["groups"]:
            want = ({"lr1": 1.0, "lr2": 0.5}[group["lr"]], group["weight_decay"])
            for released in group["params"]:
                if released not in used:
                    continue
                ours = used[released]
                rate, decay = mine[ours]
                vector = model.get_parameter(ours).dim() == 1
                if vector and "bias" not in released and "LayerNorm.weight" not in released:
                    decay = settings.weight_decay
                same(checks, f"{task} {released}", (rate, decay), want)
                compared += 1
        same(checks, f"{task}: parameters of ours", compared > 0, True)


def settled(model: MplugModel, settings: OptimizerSection) -> dict[str, tuple[float, float]]:
    """(rate, weight decay) of our parameters by name."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(parameter)]: (group["lr"], group["weight_decay"])
        for group in parameter_groups(model, settings)
        for parameter in group["params"]
    }


FIXTURES = {
    "j08_lr": schedule, "j08_param": groups, "j11_text": cleaning, "j11_tokenizer": tokenizer, "j11_frame": frames
}  # fmt: skip
