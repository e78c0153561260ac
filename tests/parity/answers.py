"""Fixtures of visual question answering: the loss of weighted answers, ranking, and videos."""

from __future__ import annotations

import json
import random
import re

import torch
from torch import Tensor

from mplug_core.data.records import QuestionRecord
from mplug_core.data.text import Tokenizer, build_vocabulary, clean_caption
from mplug_core.generation import rank
from mplug_core.model.mplug import ImageEncoding, MplugModel
from mplug_core.model.teacher import Teacher
from mplug_core.objectives.prefix_language import sequence_nll
from mplug_core.tasks.task import Context, Texts
from mplug_core.tasks.vqa import VqaTask, decode_answers
from mplug_core.weights.official import Conversion
from tests.parity.golden import EXACT, LOSS, Checks, Folder, released_part


def loss(folder: Folder, name: str, checks: Checks) -> None:
    entry, t = folder.fixture(name)
    model = folder.model(entry)
    ids, mask, image = t["in.question_ids"], t["in.question_mask"], t["in.image"].float()
    block = {
        "image": torch.arange(len(ids)), "ids": ids, "mask": mask, "target_ids": t["in.answer_ids"],
        "target_mask": t["in.answer_mask"], "weights": t["in.weights"],
        "question": torch.arange(len(ids)).repeat_interleave(t["in.k"]),
    }  # fmt: skip
    with torch.enable_grad():
        plain = VqaTask().losses(model, model.encode_image(image), block, Context(weights={"answer": 1.0}))["answer"]
        plain.backward()
    checks.compare("out.loss_plain", plain.detach(), t["out.loss_plain"], LOSS)
    gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    conversion = folder.conversion(entry)
    for key in [key for key in t if key.startswith("grad.")]:
        checks.compare(key, released_part(conversion, key.removeprefix("grad."), gradients), t[key], LOSS)

    encoding = model.encode_image(image)
    fused_image, fused_text = model.fuse(encoding, model.encode_text(ids, mask), mask)
    checks.compare("mid.fused_image", fused_image, t["mid.fused_image"])
    checks.compare("mid.fused_question", fused_text, t["mid.fused_question"])
    memory, memory_mask = model.memory(encoding, model.encode_text(ids, mask), mask)
    hidden = decode_answers(model, memory, memory_mask, block["target_ids"], block["question"])
    losses = sequence_nll(hidden, block["target_ids"], block["target_mask"], head=model.decoder.logits)
    checks.compare("out.answer_losses_plain", losses, t["out.answer_losses_plain"], LOSS)
    distilled(folder, name, checks, model, conversion, block)


def distilled(
    folder: Folder, name: str, checks: Checks, model: MplugModel, conversion: Conversion, block: dict[str, Tensor]
) -> None:
    """Released distillation is none: its alpha never arrives. The teacher moves as ours does, but for its fusion."""
    entry, t = folder.fixture(name)
    own = {key: value for key, value in folder.weights.items() if not re.match(r"\w+_m\.", key)}
    momentum = {re.sub(r"^(\w+)_m\.", r"\1.", key): v for key, v in folder.weights.items() if key not in own}
    teacher = Teacher(model, entry["config"]["momentum"])
    teacher.model.load_state_dict(folder.conversion(entry, {**own, **momentum}).state, strict=False)
    compare_momentum(checks, conversion, teacher, t, "mom_before.")
    before = {key: value.clone() for key, value in teacher.model.state_dict().items()}
    teacher.update(model)
    compare_momentum(checks, conversion, teacher, t, "mom_after.", without="fusion_encoder_m")
    for key in [key for key in t if key.startswith("mom_after.fusion_encoder_m")]:
        # the released code forgets the fusion: its teacher has what ours had before
        ours = conversion.used[key.removeprefix("mom_after.").replace("_m.", ".", 1)]
        moved = before[ours].lerp(model.state_dict()[ours], 1 - teacher.momentum)
        checks.compare(key, teacher.model.state_dict()[ours], moved)
        checks.compare(key, t[key], t[key.replace("mom_after", "mom_before")], EXACT)

    context = Context(weights={"answer": 1.0}, teacher=teacher, alpha=0.0)
    encoding = model.encode_image(t["in.image"].float())
    checks.compare(
        "out.loss_distill", VqaTask().losses(model, encoding, block, context)["answer"], t["out.loss_distill"], LOSS
    )
    checks.compare("out.answer_losses_distill", t["out.answer_losses_distill"], t["out.answer_losses_plain"], LOSS)


def compare_momentum(
    checks: Checks, conversion: Conversion, teacher: Teacher, t: dict[str, Tensor], prefix: str, without: str = "-"
) -> None:
    state = teacher.model.state_dict()
    for key in [key for key in t if key.startswith(prefix) and without not in key]:
        source = key.removeprefix(prefix).replace("_m.", ".", 1)
        # a fixture holds the first rows or columns of a momentum weight
        part = released_part(conversion, source, state)[tuple(map(slice, t[key].shape))]
        checks.compare(key, part, t[key])


def ranking(folder: Folder, name: str, checks: Checks) -> None:
    entry, t = folder.fixture(name)
    compare_ranking(checks, folder.model(entry), t["in.question_states"], t["in.question_atts"], t)


def compare_ranking(checks: Checks, model: MplugModel, memory: Tensor, mask: Tensor, t: dict[str, Tensor]) -> None:
    """The released score counts the first token twice; the order by it differs from ours."""
    found = rank(model.decoder, memory, mask, t["in.answer_ids"], t["in.answer_mask"], first=int(t["in.k"]))
    twice, order = (found.log_likelihood + found.first).sort(-1, descending=True)
    checks.same_ids("out.topk_ids", found.candidates.gather(1, order).tolist(), t["out.topk_ids"].tolist())
    checks.compare("out.topk_probs", twice.softmax(-1), t["out.topk_probs"], LOSS)
    # the log-likelihood itself, from the decoder without a cache
    ids, answers = t["in.answer_ids"], t["in.answer_mask"]
    rows = torch.arange(len(memory)).repeat_interleave(len(ids))
    logits = model.decode(ids.repeat(len(memory), 1), memory[rows], mask[rows])
    whole = -sequence_nll(logits, ids.repeat(len(memory), 1), answers.repeat(len(memory), 1)).view(len(memory), -1)
    checks.compare("log_likelihood", found.log_likelihood, whole.gather(1, found.candidates), LOSS)


def video(folder: Folder, name: str, checks: Checks) -> None:
    entry, t = folder.fixture(name)
    model = folder.model(entry)
    videos, frames = t["in.video"].shape[:2]
    encoded = model.encode_image(t["in.video"].float().flatten(0, 1))
    seen = ImageEncoding(
        encoded.tokens.unflatten(0, (videos, frames)).flatten(1, 2),
        encoded.feature.unflatten(0, (videos, frames)).mean(1),
        encoded.mask.unflatten(0, (videos, frames)).flatten(1, 2),
    )
    mask = t["in.question_mask"]
    text = model.encode_text(t["in.question_ids"], mask)
    fused_image, fused_text = model.fuse(seen, text, mask)
    checks.compare("out.fused_image", fused_image, t["out.fused_image"])
    checks.compare("out.fused_question", fused_text, t["out.fused_question"])
    compare_ranking(checks, model, *model.memory(seen, text, mask), t)


def dataset(folder: Folder, name: str, checks: Checks) -> None:
    """Answers and weights of a batch. Data sets with one answer weigh half there, here by the weight of their source.

    Questions are not compared: they are cleaned here, and left as they are there.
    """
    given = json.loads((folder.path / folder.manifest["fixtures"][name]["file"]).read_text())
    records, halves = [], []
    for annotation in given["annotations"]:
        said = annotation["answer"] if annotation["dataset"] == "vqa" else [annotation["answer"]]
        distinct = tuple(dict.fromkeys(said))
        shares = tuple(said.count(answer) / len(said) for answer in distinct)
        annotators = tuple(said) if annotation["dataset"] == "vqa" else ()
        records.append(QuestionRecord(None, annotation["question"], distinct, shares, "", annotators=annotators))
        halves += [1.0 if annotation["dataset"] == "vqa" else 0.5] * len(distinct)
    words = [text for record in records for text in (clean_caption(record.question), *record.answers)]
    tokenizer = Tokenizer(build_vocabulary(words))
    block = VqaTask().encode([((0,), record) for record in records], random.Random(0), Texts(tokenizer, 40))
    decoded = [tokenizer.decode(row, skip_special=False) for row in block["target_ids"]]
    texts = [re.sub(r"^\[CLS\] (.*?) ?(\[SEP\])( \[PAD\])*$", r"\1\2", text) for text in decoded]
    for output in given["outputs"]:
        if output["collated"] is not None:
            want = output["collated"]
            checks.same_ids("answers", texts, want["answers"])
            checks.compare("weights", block["weights"] * torch.tensor(halves), torch.tensor(want["weights"]))
            checks.same_ids("n", torch.bincount(block["question"]).tolist(), want["n"])


FIXTURES = {"f04d_": loss, "f04e_": ranking, "f08_": video, "j11_vqa_dataset": dataset}
