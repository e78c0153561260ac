"""Fixtures of the decoder and of the released beam search."""

from __future__ import annotations

import torch

from mplug_core.generation import Decoding, generate
from mplug_core.objectives.prefix_language import sequence_loss
from tests.parity.golden import END, LOSS, START, Checks, Folder


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


FIXTURES = {"f04a_": decoder, "f05_": beam}
