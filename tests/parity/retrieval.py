"""Fixtures of fine-tuning for retrieval (losses, gradients, queue, teacher) and of its evaluation.

The training fixtures are steps of the released code with its draw of negatives replaced by the largest weight. Where it
differs from the toolkit, which is asked to do the same here:

- the teacher moves before its features are made, not after the step;
- the fusion of its teacher never moves. No loss uses it, and the toolkit's teacher doesn't have it;
- slots of its queue that hold nothing yet have the id -100 and count as negatives. The toolkit leaves slots of id -1
  out; the fixture's are filled with the released ids;
- "without distillation" still takes the keys from the teacher and the queue, with hard targets.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from mplug_core.metrics.retrieval import score_retrieval
from mplug_core.model.mplug import ImageEncoding, MplugModel
from mplug_core.model.teacher import FeatureQueue, Teacher
from mplug_core.objectives.matching import HardNegatives, hard_negatives
from mplug_core.tasks.pairs import pair_losses
from mplug_core.tasks.ranking import EncodedTexts, Rerank, match, order_by_match
from mplug_core.tasks.task import Context, Ready
from tests.parity.golden import ACTIVATION, EXACT, LOSS, Checks, Folder, released_part

TEACHER_PARTS = ("visual", "visual_projection", "image_projection", "text", "text_projection")


def student(name: str) -> str:
    """The student's tensor that a teacher's is a copy of: ``visn_fc_m.bias`` to ``visn_fc.bias``."""
    first, dot, rest = name.partition(".")
    return first.removesuffix("_m") + dot + rest


def make_teacher(folder: Folder, entry: dict[str, Any], model: MplugModel) -> Teacher:
    """A teacher of our model with the released teacher's weights."""
    theirs = {student(name): value for name, value in folder.weights.items() if name.split(".")[0].endswith("_m")}
    momentum = entry["config"]["momentum"]
    teacher = Teacher(model, momentum, [part for part in TEACHER_PARTS if getattr(model, part) is not None])
    copies = {name for name, _ in teacher.model.named_parameters()}
    state = folder.conversion(entry, {**folder.weights, **theirs}).state
    teacher.model.load_state_dict({name: value for name, value in state.items() if name in copies}, strict=False)
    return teacher


def training(folder: Folder, name: str, checks: Checks) -> None:
    entry, t = folder.fixture(name)
    model = folder.model(entry)
    teacher = make_teacher(folder, entry, model)
    queue = FeatureQueue(t["in.image_queue"].shape[1], t["in.image_queue"].shape[0])
    queue.load_state_dict(
        {"image": t["in.image_queue"].T, "text": t["in.text_queue"].T, "ids": t["in.idx_queue"][0],
         "pointer": t["in.queue_ptr"]}
    )  # fmt: skip
    alpha = stated_alpha(entry)
    for step, stated in enumerate(entry["json"]):
        checks_of_step(folder, entry, t, f"step{step}.", stated, model, teacher, queue, alpha, checks)


def stated_alpha(entry: dict[str, Any]) -> float:
    """The weight of the soft targets: ``alpha=`` of the description, 0 without distillation."""
    alpha, distilled = re.search(r"alpha=([\d.]*\d), distill=(True|False)", entry["description"]).groups()
    return float(alpha) if distilled == "True" else 0.0


def checks_of_step(
    folder: Folder,
    entry: dict[str, Any],
    t: dict[str, Tensor],
    step: str,
    stated: dict[str, Any],
    model: MplugModel,
    teacher: Teacher,
    queue: FeatureQueue,
    alpha: float,
    checks: Checks,
) -> None:
    """One step: what comes in, what it gives, what it leaves behind."""
    conversion = folder.conversion(entry)
    before = {key.removeprefix(f"{step}mom_before."): key for key in t if key.startswith(f"{step}mom_before.")}
    for name, key in before.items():
        if student(name).split(".")[0] != "fusion_encoder":
            mine = released_part(conversion, student(name), teacher.model.state_dict()).view(t[key].shape)
            checks.compare(key, mine, t[key], EXACT)
    teacher.update(model)
    for name, key in before.items():
        after = t[key.replace("mom_before", "mom_after")]
        if student(name).split(".")[0] == "fusion_encoder":
            checks.compare(f"{key} does not move", after, t[key], EXACT)
        else:
            mine = released_part(conversion, student(name), teacher.model.state_dict()).view(after.shape)
            checks.compare(key.replace("mom_before", "mom_after"), mine, after)

    seen: list[tuple[Tensor, Tensor]] = []
    hook = model.matching_head.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    drawn: list[HardNegatives] = []
    with torch.enable_grad(), largest_instead_of_drawn(drawn):
        losses = step_losses(model, teacher, queue, t, step, alpha)
        model.zero_grad()
        sum(losses.values()).backward()
    hook.remove()
    checks.compare(f"{step}out.loss_ita", losses["itc"].detach(), t[f"{step}out.loss_ita"], LOSS)
    checks.compare(f"{step}out.loss_itm", losses["itm"].detach(), t[f"{step}out.loss_itm"], LOSS)
    (negatives,) = drawn
    for ours, theirs in (("image_of_text", "neg_image_idx"), ("text_of_image", "neg_text_idx")):
        checks.compare(f"{step}out.{theirs}", getattr(negatives, ours), t[f"{step}out.{theirs}"], EXACT)
    ((entered, logits),) = seen
    # ours are in the order: true pairs, wrong texts, wrong images; theirs has the wrong images first
    for ours, theirs in ((entered, "itm_input_cls"), (logits, "itm_logits")):
        true, wrong_text, wrong_image = ours.detach().chunk(3)
        checks.compare(f"{step}out.{theirs}", torch.cat([true, wrong_image, wrong_text]), t[f"{step}out.{theirs}"])
    checks.compare(f"{step}out.image_queue", queue.image.T, t[f"{step}out.image_queue"])
    checks.compare(f"{step}out.text_queue", queue.text.T, t[f"{step}out.text_queue"])
    checks.compare(f"{step}out.idx_queue", queue.ids[None], t[f"{step}out.idx_queue"], EXACT)
    checks.compare(f"{step}out.queue_ptr", queue.pointer, t[f"{step}out.queue_ptr"], EXACT)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for key in (key for key in t if key.startswith(f"{step}grad.")):
        mine = released_part(conversion, key.removeprefix(f"{step}grad."), gradients).view(t[key].shape)
        checks.compare(key, mine, t[key], LOSS)


def step_losses(
    model: MplugModel, teacher: Teacher, queue: FeatureQueue, t: dict[str, Tensor], step: str, alpha: float
) -> dict[str, Tensor]:
    pixels, ids, mask = t[f"{step}in.image"].float(), t[f"{step}in.input_ids"], t[f"{step}in.attention_mask"]
    here = torch.arange(len(ids))
    context = Context(
        alpha=alpha, weights={"itc": 1.0, "itm": 1.0}, teacher=teacher, queue=queue, image_ids=t[f"{step}in.idx"],
        teacher_images=lambda: teacher.model.encode_image(pixels),
    )  # fmt: skip
    # the released code looks at the ids alone: equal texts of different images stay negatives of each other
    block = {"image": here, "ids": ids, "mask": mask, "group": here}
    return pair_losses(model, model.encode_image(pixels), block, context)


@contextmanager
def largest_instead_of_drawn(seen: list[HardNegatives]) -> Iterator[None]:
    """Negatives are those of the largest similarity; what was taken is put into ``seen``."""

    def take(*arguments: Any, **options: Any) -> HardNegatives:
        # without noise the largest sum of similarity and noise is the largest similarity
        with mock.patch.object(torch.Tensor, "exponential_", lambda self, generator=None: self.fill_(1.0)):
            seen.append(hard_negatives(*arguments, **options))
        return seen[-1]

    with mock.patch("mplug_core.tasks.pairs.hard_negatives", take):
        yield


def evaluation(folder: Folder, name: str, checks: Checks) -> None:
    """Candidates by ITC, scores by the match logit, -100 for the others."""
    entry, t = folder.fixture(name)
    model = folder.model(entry)
    images = model.encode_image(t["in.image"].float())
    i2t, t2i = both_ways(model, images, t["in.input_ids"], t["in.attention_mask"], entry["config"]["k_test"], "itm")
    checks.compare("out.score_i2t", i2t, t["out.score_i2t"])
    checks.compare("out.score_t2i", t2i, t["out.score_t2i"])
    # text t is of image t modulo the number of images
    owners = torch.arange(len(t["in.input_ids"])) % len(images)
    relevant = owners == torch.arange(len(images))[:, None]
    compare_metrics(checks, "metrics", t["out.score_i2t"], t["out.score_t2i"], relevant, entry["json"]["metrics"])
    plain = entry["json"]["random_scores"]
    scores = (torch.tensor(plain["i2t"]), torch.tensor(plain["t2i"]))
    compare_metrics(checks, "random_scores", *scores, relevant, plain["metrics"])


def video(folder: Folder, name: str, checks: Checks) -> None:
    """The frames' tokens in a row; their contrastive features averaged before they get unit length; ITM plus ITC."""
    entry, t = folder.fixture(name)
    model = folder.model(entry)
    clips, frames = t["in.video"].shape[:2]
    tokens = model.encode_image(t["in.video"].float().flatten(0, 1)).tokens
    feature = F.normalize(model.image_projection(tokens[:, 0]).view(clips, frames, -1).mean(1), dim=-1)
    tokens = tokens.reshape(clips, -1, tokens.shape[-1])
    videos = ImageEncoding(tokens, feature, torch.ones(tokens.shape[:2], dtype=torch.bool))
    ids, mask = t["in.input_ids"], t["in.attention_mask"]
    v2t, t2v = both_ways(model, videos, ids, mask, entry["config"]["k_test"], "itm+itc")
    checks.compare("out.score_v2t", v2t, t["out.score_v2t"])
    checks.compare("out.score_t2v", t2v, t["out.score_t2v"])
    relevant = torch.eye(clips, dtype=torch.bool)
    compare_metrics(checks, "metrics", t["out.score_v2t"], t["out.score_t2v"], relevant, entry["json"]["metrics"])


def both_ways(
    model: MplugModel, images: ImageEncoding, ids: Tensor, mask: Tensor, k: int, how: Rerank
) -> tuple[Tensor, Tensor]:
    """Scores [I, T] of images for texts and [T, I] of texts for images, with -100 where nothing was matched."""
    encoded = model.encode_text(ids, mask)
    feature = model.text_feature(encoded, mask)
    lengths = mask.sum(1).tolist()
    texts = EncodedTexts(feature, [row[:length] for row, length in zip(encoded, lengths, strict=True)])
    similarity = images.feature @ feature.T
    ready = Ready(model, None)

    def one_way(similarity: Tensor, by_image: bool) -> Tensor:
        best = similarity.topk(min(k, similarity.shape[1]), 1).indices
        rows = torch.arange(len(best))[:, None].expand_as(best)
        sides = (rows, best) if by_image else (best, rows)
        matches = match(ready, images, texts, torch.stack([side.flatten() for side in sides], 1)).view(best.shape)
        ordered = order_by_match(similarity, best, matches, how)
        return torch.full_like(ordered, -100.0).scatter(1, best, ordered.gather(1, best))

    return one_way(similarity, True), one_way(similarity.T, False)


def compare_metrics(
    checks: Checks, name: str, i2t: Tensor, t2i: Tensor, relevant: Tensor, stated: dict[str, float]
) -> None:
    """Recall in percent. Where scores tie, the released value depends on a sort that isn't stable: it must then be
    between ours, which decides ties against the model, and the value with all ties decided for it."""
    for_it = [scores.double() + 1e-9 * right for scores, right in ((i2t, relevant), (t2i, relevant.T))]
    low, high = score_retrieval(i2t, t2i, relevant), score_retrieval(*for_it, relevant)
    for key in low:
        theirs = key.replace("i2t", "txt").replace("t2i", "img" if "img_r1" in stated else "vid")
        nearest = min(max(stated[theirs], 100 * low[key]), 100 * high[key])
        checks.compare(f"{name}.{theirs}", torch.tensor(nearest), torch.tensor(stated[theirs]), ACTIVATION)


FIXTURES = {"f06_": training, "f10_retrieval_": evaluation, "f10_video_": video}
