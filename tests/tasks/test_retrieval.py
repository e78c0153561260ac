"""Retrieval: the losses on pairs, two-stage ranking against one pair at a time, evaluation by hand."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mplug_core.data.batches import Source
from mplug_core.data.images import eval_transform, open_image
from mplug_core.data.records import CaptionRecord, read_captions
from mplug_core.data.text import Tokenizer, clean_caption
from mplug_core.errors import CheckpointError, DataError
from mplug_core.model.mplug import ImageEncoding
from mplug_core.model.teacher import FeatureQueue, Teacher
from mplug_core.recipe import DataSpec, SourceSection
from mplug_core.tasks.ranking import (
    EncodedTexts,
    default_candidates,
    encode_texts,
    groups,
    match,
    order_by_match,
    to_cpu,
)
from mplug_core.tasks.registry import TASKS
from mplug_core.tasks.retrieval import right_answers
from mplug_core.tasks.task import Context, EvaluateOptions, Ready
from tests.small import CNN, random_inputs, small_model

TASK = TASKS["retrieval"]
TEXTS = ["a red circle", "two", "a large blue square and a cross", "a small green circle", "three blue crosses"]


@pytest.fixture(scope="module")
def ready(tokenizer: Tokenizer) -> Ready:
    return Ready(small_model(vision=CNN, vocab_size=tokenizer.vocab_size, max_positions=64), tokenizer)


def train(folder: Path) -> DataSpec:
    return DataSpec(path=str(folder), split="train")


def matched_alone(ready: Ready, images: ImageEncoding, image: int, text: str) -> float:
    """The match logit of one pair, fused by itself."""
    ids, mask = ready.texts.encode([text])
    with torch.no_grad():
        _, fused = ready.model.fuse(images[torch.tensor([image])], ready.model.encode_text(ids, mask), mask)
        return float(ready.model.matching_logits(fused)[0, 1])


class TestLosses:
    def block(self, ready: Ready, captions: list[str], images: list[int] | None = None) -> dict[str, torch.Tensor]:
        records = [CaptionRecord(None, (caption,), str(i)) for i, caption in enumerate(captions)]
        places = images or list(range(len(captions)))
        drawn = [((place,), record) for place, record in zip(places, records, strict=True)]
        return TASK.encode(drawn, random.Random(0), ready.texts)

    def context(self, ids: list[int], **fields: Any) -> Context:
        return Context(
            weights={"itc": 1.0, "itm": 1.0}, image_ids=torch.tensor(ids),
            generator=torch.Generator().manual_seed(0), **fields,
        )  # fmt: skip

    def test_one_of_the_captions_at_random(self, ready: Ready) -> None:
        record = CaptionRecord(None, ("a red circle", "two"), "1")
        drawn = [
            tuple(TASK.encode([((0,), record)], random.Random(seed), ready.texts)["ids"][0].tolist())
            for seed in range(8)
        ]
        assert len(set(drawn)) == 2

    @pytest.mark.parametrize("queued", [False, True])
    def test_the_same_as_in_pre_training(self, ready: Ready, queued: bool) -> None:
        """Where only ITC and ITM are wanted, pre-training and this are the same number."""
        images, _, _ = random_inputs(ready.model, images=4)
        block, found = self.block(ready, TEXTS[:4]), []
        for task in ("retrieval", "pretrain"):
            extra: dict[str, Any] = {}
            if queued:
                teacher = Teacher(ready.model, 0.9)
                extra = {"teacher": teacher, "queue": FeatureQueue(8, 16), "alpha": 0.4}
                extra["teacher_images"] = lambda: images
            found.append(TASKS[task].losses(ready.model, images, block, self.context([0, 1, 2, 3], **extra)))
        assert set(found[0]) == {"itc", "itm"} == set(found[1])
        assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])

    @pytest.mark.parametrize(("captions", "ids"), [(TEXTS[:3], [7, 7, 7]), (TEXTS[:1], [3]), (["two"] * 3, [1, 2, 3])])
    @pytest.mark.parametrize("queued", [False, True])
    def test_without_a_valid_negative(self, ready: Ready, captions: list[str], ids: list[int], queued: bool) -> None:
        """All of one image, a single pair, the same caption everywhere: nothing to tell apart, and no NaN."""
        images, _, _ = random_inputs(ready.model, images=len(captions))
        extra: dict[str, Any] = {}
        if queued:
            extra = {"teacher": Teacher(ready.model), "queue": FeatureQueue(8, 16), "alpha": 0.4}
            extra["teacher_images"] = lambda: images
        context = self.context(ids, **extra)
        ready.model.requires_grad_(True)
        losses = TASK.losses(ready.model, images, self.block(ready, captions), context)
        assert float(losses["itm"].detach()) == 0 and int(context.counts["itm_skipped"]) == 1
        assert losses["itc"].isfinite()
        sum(losses.values()).backward()
        gradients = [p.grad for p in ready.model.parameters() if p.grad is not None]
        assert gradients and all(gradient.isfinite().all() for gradient in gradients)
        # the matching head keeps its place in the graph, so that processes of a sharded run stay together
        assert ready.model.matching_head.weight.grad is not None
        ready.model.zero_grad(set_to_none=True)

    def test_batches_with_negatives_are_not_counted(self, ready: Ready) -> None:
        images, _, _ = random_inputs(ready.model)
        context = self.context([1, 1, 2])
        losses = TASK.losses(ready.model, images, self.block(ready, TEXTS[:3]), context)
        assert float(losses["itm"].detach()) > 0 and int(context.counts["itm_skipped"]) == 0

    def test_no_stand_ins_and_nothing_without_a_weight(self, ready: Ready) -> None:
        images, _, _ = random_inputs(ready.model)
        block = self.block(ready, TEXTS[:3])
        assert TASK.losses(ready.model, images, block, Context(weights={"itc": 1.0, "itm": 1.0})) == {}
        unwanted = Context(weights={"mlm": 1.0}, image_ids=torch.arange(3))
        assert TASK.losses(ready.model, images, block, unwanted) == {}
        only = Context(weights={"itc": 1.0}, image_ids=torch.arange(3))
        assert set(TASK.losses(ready.model, images, block, only)) == {"itc"}

    def test_dual_encoder_has_no_matching(self, tokenizer: Tokenizer) -> None:
        dual = Ready(
            small_model(vision=CNN, vocab_size=tokenizer.vocab_size, max_positions=64, fusion="none", decoder_layers=0),
            tokenizer,
        )
        images, _, _ = random_inputs(dual.model)
        assert set(TASK.losses(dual.model, images, self.block(dual, TEXTS[:3]), self.context([1, 2, 3]))) == {"itc"}
        assert default_candidates(dual) == 0

    def test_a_batch_has_each_image_with_one_caption(self, ready: Ready, scenes: Path) -> None:
        section = SourceSection(path=str(scenes), split="train", batch_size=6, tasks={"retrieval": 1}, augment="none")
        source = Source(
            "scenes", section, {"retrieval": TASK.read(train(scenes)).records}, ready.config.vision,
            {"retrieval": lambda drawn, rng: TASK.encode(drawn, rng, ready.texts)},
        )  # fmt: skip
        block = source.draw(0, 0).blocks["retrieval"]
        assert block["image"].tolist() == list(range(6)) and set(block) == {"image", "ids", "mask", "group"}


class TestRanking:
    def test_texts_keep_their_order_and_lose_their_padding(self, ready: Ready) -> None:
        encoded = encode_texts(ready, TEXTS, batch_size=2)
        for row, text in enumerate(TEXTS):
            ids, mask = ready.texts.encode([text])
            with torch.no_grad():
                tokens = ready.model.encode_text(ids, mask)
                feature = ready.model.text_feature(tokens, mask)
            assert torch.allclose(encoded.tokens[row], tokens[0], atol=1e-5)
            assert torch.allclose(encoded.feature[row], feature[0], atol=1e-5)
        assert encode_texts(ready, TEXTS, keep_tokens=False).tokens == []
        assert len(encode_texts(ready, [])) == 0

    @pytest.mark.parametrize("fusion", ["skip", "connected", "co", "asymmetric"])
    @pytest.mark.parametrize("batch_size", [1, 6, 256])
    def test_match_is_that_of_each_pair_alone(self, tokenizer: Tokenizer, fusion: str, batch_size: int) -> None:
        """However pairs are grouped, and whatever keys and values they share."""
        options = {"vision": CNN, "vocab_size": tokenizer.vocab_size, "max_positions": 64, "stride": 2}
        ready = Ready(small_model(fusion=fusion, **options), tokenizer)
        images, _, _ = random_inputs(ready.model, images=4)
        images = to_cpu(ImageEncoding(images.tokens.detach(), images.feature.detach(), images.mask))
        texts = encode_texts(ready, TEXTS)
        every = [(i, t) for i in range(4) for t in range(5) if (i, t) != (2, 2)]
        random.Random(0).shuffle(every)
        found = match(ready, images, texts, torch.tensor(every), batch_size)
        expected = [matched_alone(ready, images, image, TEXTS[text]) for image, text in every]
        assert found.tolist() == pytest.approx(expected, abs=1e-4)
        assert max(expected) - min(expected) > 0.01

    def test_no_pairs(self, ready: Ready) -> None:
        images, _, _ = random_inputs(ready.model)
        assert match(ready, images, encode_texts(ready, TEXTS), torch.empty(0, 2, dtype=torch.long)).shape == (0,)

    def test_groups_have_one_image_and_miss_no_pair(self) -> None:
        generator = torch.Generator().manual_seed(0)
        pairs = torch.stack(
            [torch.randint(7, (200,), generator=generator), torch.randint(90, (200,), generator=generator)], 1
        ).unique(dim=0)
        lengths = torch.randint(3, 30, (90,), generator=generator).tolist()
        seen, longest = set(), []
        for rows in groups(pairs, lengths, 64):
            assert rows.numel() <= 64 and rows.shape[1] > 1
            assert (pairs[rows][..., 0] == pairs[rows][:, :1, 0]).all()
            seen.update(rows.flatten().tolist())
            longest.append(max(lengths[t] for t in pairs[rows][..., 1].flatten().tolist()))
        assert seen == set(range(len(pairs))) and longest == sorted(longest)

    def test_order_by_match(self) -> None:
        similarity = torch.tensor([[0.9, 0.8, -0.7, 0.1], [0.1, 0.2, 0.3, 0.4]])
        best, matches = similarity.topk(2, 1).indices, torch.tensor([[-3.0, 4.0], [-40.0, -50.0]])
        ordered = order_by_match(similarity, best, matches)
        assert ordered.argsort(1, descending=True).tolist() == [[1, 0, 3, 2], [3, 2, 1, 0]]
        assert ordered[0, :2].tolist() == [-3.0, 4.0] and ordered[1, 2:].tolist() == [-50.0, -40.0]
        added = order_by_match(similarity, best, matches, "itm+itc")
        assert added[0, :2].tolist() == pytest.approx([-2.1, 4.8])
        assert added[1, 2:].tolist() == pytest.approx([-49.7, -39.6])
        assert torch.equal(order_by_match(similarity, best[:, :0], matches[:, :0]), similarity)

    def test_similarity_can_turn_an_order(self) -> None:
        similarity, best = torch.tensor([[0.9, 0.1]]), torch.tensor([[0, 1]])
        matches = torch.tensor([[1.0, 1.5]])
        assert order_by_match(similarity, best, matches, "itm").argmax() == 1
        assert order_by_match(similarity, best, matches, "itm+itc").argmax() == 0


class TestEvaluation:
    def test_right_answers(self) -> None:
        captions, counts = ["a", "b", "a", "c"], [2, 0, 2]
        right_texts, right_images = right_answers(captions, counts, by_words=False)
        assert right_texts == [[0, 1], [], [2, 3]] and right_images == [[0], [0], [2], [2]]
        right_texts, right_images = right_answers(captions, counts, by_words=True)
        # "a" is a caption of images 0 and 2
        assert right_texts == [[0, 1, 2], [], [0, 2, 3]] and right_images == [[0, 2], [0], [0, 2], [2]]

    def plant(self, ready: Ready, monkeypatch: pytest.MonkeyPatch, nearest: list[int]) -> None:
        """Features such that image i is e_i and text t is nearest to image ``nearest[t]``."""
        encode = ready.model.encode_image
        shown = iter(range(100))

        def encode_image(pixels: torch.Tensor) -> ImageEncoding:
            found = encode(pixels)
            found.feature = torch.stack([torch.eye(8)[next(shown)] for _ in pixels])
            return found

        def encode_texts_planted(ready: Ready, texts: list[str], keep_tokens: bool = True) -> EncodedTexts:
            known = encode_texts(ready, texts, keep_tokens)
            return EncodedTexts(torch.stack([torch.eye(8)[i] for i in nearest[: len(texts)]]), known.tokens)

        monkeypatch.setattr(ready.model, "encode_image", encode_image)
        monkeypatch.setattr("mplug_core.tasks.retrieval.encode_texts", encode_texts_planted)

    def records(self, scenes: Path, monkeypatch: pytest.MonkeyPatch, captions: list[tuple[str, ...]]) -> None:
        known = read_captions(scenes, "train")
        records = [
            CaptionRecord(r.image, texts, str(i))
            for i, (r, texts) in enumerate(zip(known.records, captions, strict=False))
        ]
        known = replace(known, records=records)
        monkeypatch.setattr("mplug_core.tasks.retrieval.read_captions", lambda *where: known)

    def test_by_hand(self, ready: Ready, scenes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Four images with two captions each; the second of image 1 and both of image 3 are nearest to image 0."""
        captions = [(f"red {i}", f"blue {i}") for i in "1234"]
        self.records(scenes, monkeypatch, captions)
        self.plant(ready, monkeypatch, [0, 0, 1, 0, 2, 2, 0, 0])
        result = TASK.evaluate(ready, train(scenes), EvaluateOptions(candidates=0))
        metrics = result.metrics
        assert metrics["t2i_r1"] == pytest.approx(5 / 8)
        # image 0 has five texts of similarity 1, two of them its own: behind the three wrong ones
        assert metrics["i2t_r1"] == 0.5 and metrics["i2t_r5"] == 0.75
        assert (result.n, result.skipped, result.task) == (4, 0, "retrieval")
        images, texts = result.predictions[:4], result.predictions[4:]
        assert [line["rank"] for line in images][:3] == [4, 1, 1] and len(texts) == 8
        assert texts[0]["text"] == "red 1" and texts[0]["rank"] == 1
        assert texts[0]["images"][0] == images[0]["image"] and texts[0]["scores"][0] == 1.0
        assert images[1]["texts"][0] == "red 2" and len(images[1]["texts"]) == 8
        json.dumps(result.predictions)

    def test_the_same_caption_of_two_images_is_right_for_both(
        self, ready: Ready, scenes: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.records(scenes, monkeypatch, [("A circle.", "red"), ("a circle", "blue")])
        self.plant(ready, monkeypatch, [1, 0, 0, 1])
        metrics = TASK.evaluate(ready, train(scenes), EvaluateOptions(candidates=0)).metrics
        assert metrics["t2i_r1"] == 1.0

    @pytest.mark.parametrize("how", ["itm", "itm+itc"])
    def test_reranked_by_pairs_alone(self, ready: Ready, scenes: Path, how: str) -> None:
        """Against the whole evaluation done pair by pair in plain loops."""
        k, count = 3, 6
        found = TASK.evaluate(
            ready, train(scenes), EvaluateOptions(limit=count, candidates=k, rerank=how, batch_size=4)
        )
        records = read_captions(scenes, "train").records[:count]
        vision = ready.config.vision
        transform = eval_transform(vision.image_size, vision.mean, vision.std)
        with torch.no_grad():
            images = ready.model.encode_image(torch.stack([transform(open_image(r.image)) for r in records]))
        texts = [clean_caption(text) for r in records for text in r.captions]
        owners = {text: {i for i, r in enumerate(records) if text in map(clean_caption, r.captions)} for text in texts}
        with torch.no_grad():
            similarity = images.feature @ encode_texts(ready, texts).feature.T

        def place(scores: torch.Tensor, pairs: list[tuple[int, int]], right: set[int]) -> int:
            """The first right candidate: of the k best by their match, then the others."""
            best = scores.topk(k).indices.tolist()
            key = {
                c: matched_alone(ready, images, pairs[c][0], texts[pairs[c][1]])
                + (float(scores[c]) if how == "itm+itc" else 0)
                for c in best
            }
            order = sorted(best, key=lambda c: -key[c])
            order += [c for c in scores.argsort(descending=True).tolist() if c not in best]
            return 1 + min(order.index(c) for c in right)

        expected_t2i = [
            place(similarity[:, t], [(i, t) for i in range(count)], owners[text]) for t, text in enumerate(texts)
        ]
        expected_i2t = [
            place(
                similarity[i], [(i, t) for t in range(len(texts))], {t for t, x in enumerate(texts) if i in owners[x]}
            )
            for i in range(count)
        ]
        ranks = [line["rank"] for line in found.predictions]
        assert ranks == expected_i2t + expected_t2i
        assert len(set(expected_t2i)) > 1

    def test_candidates_by_default(self, ready: Ready, scenes: Path) -> None:
        """All of a small set where there is a matching head."""
        default, every, none = (
            TASK.evaluate(ready, train(scenes), EvaluateOptions(limit=5, candidates=candidates))
            for candidates in (None, 1000, 0)
        )
        assert default.predictions == every.predictions != none.predictions
        assert default_candidates(ready) == 256

    def test_without_a_matching_head(self, tokenizer: Tokenizer, scenes: Path) -> None:
        dual = Ready(
            small_model(vision=CNN, vocab_size=tokenizer.vocab_size, max_positions=64, fusion="none", decoder_layers=0),
            tokenizer,
        )
        assert TASK.evaluate(dual, train(scenes), EvaluateOptions(limit=3)).n == 3
        with pytest.raises(CheckpointError, match="matching head"):
            TASK.evaluate(dual, train(scenes), EvaluateOptions(limit=3, candidates=4))

    def test_nothing_to_evaluate(self, ready: Ready, scenes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.records(scenes, monkeypatch, [])
        with pytest.raises(DataError, match="no records"):
            TASK.evaluate(ready, train(scenes))
        self.records(scenes, monkeypatch, [(), ()])
        with pytest.raises(DataError, match="no captions"):
            TASK.evaluate(ready, train(scenes))
