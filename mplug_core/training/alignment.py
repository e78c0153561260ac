"""The aligning stage: the image side's contrastive head on features computed once, against a frozen text side.

With a thousand photos, a head scores far better on photos that it has seen than on others, and whatever is trained
behind it would learn to trust it too much. So the head is cross-fitted: photos get their features from heads trained
without them, and the map and noise of stand-ins (:class:`~mplug_core.training.stand_in.StandIn`) come from these.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from mplug_core.data.batches import Source
from mplug_core.data.text import clean_caption
from mplug_core.device import multiplies_bf16
from mplug_core.errors import RecipeError
from mplug_core.model.mplug import MplugModel
from mplug_core.objectives.contrastive import contrastive_loss, one_way
from mplug_core.recipe import WITH_CAPTIONS, AlignSection, OptimizerSection
from mplug_core.tasks.task import Texts
from mplug_core.training.features import Progress, Watch
from mplug_core.training.optimizer import scheduled_lr
from mplug_core.training.stand_in import StandIn


def low_precision() -> AbstractContextManager:
    """bf16 where the CPU has units for it: on others it is tens of times slower than fp32."""
    return torch.autocast("cpu", torch.bfloat16, enabled=multiplies_bf16(torch.device("cpu")))


class Alignment:
    """Runs the stage, or reads what it left in ``file``; sets the model's head and the sources' ``aligned``."""

    def __init__(
        self,
        model: MplugModel,
        texts: Texts,
        sources: Sequence[Source],
        settings: AlignSection,
        optimizer: OptimizerSection,
        steps: int,
        seed: int,
        watch: Watch,
        others: Sequence[Source] = (),
    ) -> None:
        """``others``: sources that the stage does not learn from, whose photos' features it tells all the same."""
        self.model, self.texts, self.settings, self.optimizer, self.steps = model, texts, settings, optimizer, steps
        self.photos = [source for source in sources if source.features is not None]
        self.captions = [source for source in sources if source.section.text_only]
        self.others = [source for source in others if source.features is not None and source not in self.photos]
        self.seed, self.watch = seed, watch
        self.figures: dict[str, float] = {}
        """How many captions were read, and what that and a step took; empty where all of it was there."""

    def run(self, file: Path) -> StandIn:
        """The fitted stand-ins; everything else is set in place."""
        if file.exists():
            state = load_file(file)
        else:
            with torch.random.fork_rng(devices=[]):  # whoever finds the file goes on with the same random state
                state = self._compute()
        if not file.exists():
            beside = file.with_suffix(".part")
            save_file(state, beside)
            beside.rename(file)
        head = {name.removeprefix("head."): t for name, t in state.items() if name.startswith("head.")}
        self.model.image_projection.load_state_dict(head)
        for source in (*self.photos, *self.captions):
            source.aligned = state[f"aligned.{source.name}"].numpy()
        for source in self.others:
            source.aligned = self._told(source)
        stand_in = StandIn(self.model.config.embed_dim)
        stand_in.load_state_dict(
            {k.removeprefix("stand_in."): t for k, t in state.items() if k.startswith("stand_in.")}
        )
        if self.model.summary is not None:
            self.model.summary.fit(torch.cat([state[f"aligned.{source.name}"][0] for source in self.photos]))
        return stand_in

    @torch.no_grad()
    def _told(self, source: Source) -> np.ndarray:
        """Features [views, images, E] of photos of another source: what a photo of the stage's sources has there, in
        the views that it has; of a photo that no member has seen, the joined head's."""
        known = {path: (given, i) for given in self.photos for i, path in enumerate(given.images)}
        head = self.model.image_projection.eval()
        raw = self._inputs(source)
        found = torch.stack([F.normalize(head.layers(head.standardise(view)), dim=-1) for view in raw]).numpy()
        for i, path in enumerate(source.images):
            if path in known:
                given, row = known[path]
                for view in range(len(found)):
                    found[view, i] = given.aligned[view % len(given.aligned), row]
        return found

    def note(self, text: str) -> None:
        self.watch("note", {"text": text})

    @torch.no_grad()
    def caption_features(self, captions: Sequence[str], progress: Progress) -> Tensor:
        """[n, E] of texts."""
        order = sorted(range(len(captions)), key=lambda i: len(captions[i]))
        features = torch.empty(len(captions), self.model.config.embed_dim)
        for start in range(0, len(order), 256):
            chunk = order[start : start + 256]
            ids, mask = self.texts.read([captions[i] for i in chunk])
            with low_precision():
                features[chunk] = self.model.text_feature(self.model.encode_text(ids, mask), mask).float()
            progress.add(len(chunk))
        return features

    def _records(self, source: Source) -> list[tuple[str, ...]]:
        """The captions of each image of a source, cleaned."""
        records = [next(iter(tasks[t] for t in WITH_CAPTIONS if t in tasks))[0][1] for tasks in source.by_image]
        return [tuple(clean_caption(text) for text in record.captions) for record in records]

    @torch.no_grad()
    def _inputs(self, source: Source) -> Tensor:
        """Raw inputs of the head [views, images, P]."""
        visual, head = self.model.visual, self.model.image_projection
        views = []
        images = len(source.images)
        for view in range(len(source.features)):
            parts = []
            for start in range(0, images, 64):
                chunk = range(start, min(start + 64, images))
                tokens = source.features.read([view] * len(chunk), chunk).float()
                classes = visual.class_probabilities(tokens) if head.class_names is not None else None
                parts.append(head.gather(visual.pool(tokens), classes))
            views.append(torch.cat(parts))
        return torch.stack(views)

    def _compute(self) -> dict[str, Tensor]:
        self.model.eval()
        began = time.perf_counter()
        captions = [texts for source in self.photos for texts in self._records(source)]
        written = {source.name: self._records(source) for source in self.captions}
        total = sum(len(texts) for records in (captions, *written.values()) for texts in records)
        progress = Progress(self.watch, total, "captions")
        flat = self.caption_features([text for texts in captions for text in texts], progress)
        of_image = flat.split([len(texts) for texts in captions])
        pools, text_only = [flat], {}
        for source in self.captions:
            records = written[source.name]
            features = self.caption_features([text for texts in records for text in texts], progress)
            owner = torch.repeat_interleave(torch.arange(len(records)), torch.tensor([len(r) for r in records]))
            summed = torch.zeros(len(records), features.shape[1]).index_add_(0, owner, features)
            text_only[f"aligned.{source.name}"] = F.normalize(summed, dim=-1)[None].contiguous()
            pools.append(features)
        progress.end()
        pool = torch.cat(pools)
        self.note(f"align: {len(captions)} photos, {len(pool)} captions")
        self.figures = {"captions": len(pool), "text_seconds": time.perf_counter() - began}

        # sources may have different numbers of views: short ones repeat theirs
        count = max(source.section.cached_views for source in self.photos)
        inputs = torch.cat([self._inputs(s)[torch.arange(count) % s.section.cached_views] for s in self.photos], 1)
        head = self.model.image_projection
        head.fit(inputs[0])
        inputs = head.standardise(inputs)

        rng = random.Random(self.seed)
        folds = self.settings.folds
        fold = [rng.randrange(folds) for _ in captions]
        left_out = torch.zeros(count, len(captions), self.model.config.embed_dim)
        members = []
        began = time.perf_counter()
        for k in range(folds):
            seen = [i for i, f in enumerate(fold) if f != k]
            unseen = [i for i, f in enumerate(fold) if f == k]
            members.append(self._train(head.new_layers(head.settings.hidden // folds), inputs, of_image, seen, pool, k))
            with torch.no_grad():
                left_out[:, unseen] = F.normalize(members[-1](inputs[:, unseen]), dim=-1)
            mean = torch.stack([F.normalize(of_image[i].mean(0), dim=-1) for i in unseen])
            cosine = (F.normalize(left_out[:, unseen].mean(0), dim=-1) * mean).sum(-1).mean()
            self.note(f"align: fold {k + 1} of {folds}, cosine on photos left out {cosine:.3f}")
        self.figures["step_seconds"] = (time.perf_counter() - began) / (folds * self.steps)
        head.join(members)

        stand_in = StandIn(self.model.config.embed_dim)
        mean = torch.stack([F.normalize(features.mean(0), dim=-1) for features in of_image])
        explained = stand_in.fit(mean, F.normalize(left_out.mean(0), dim=-1), self.settings.ridge)
        self.note(f"align: the texts' linear map explains {explained:.2f} of the photos' variance")
        state = {f"head.{name}": t.float().contiguous() for name, t in head.state_dict().items()}
        state |= {f"stand_in.{name}": t.float().contiguous() for name, t in stand_in.state_dict().items()} | text_only
        start = 0
        for source in self.photos:
            stop = start + len(source.images)
            state[f"aligned.{source.name}"] = left_out[:, start:stop].contiguous()
            start = stop
        return state

    def _train(
        self,
        layers: torch.nn.Sequential,
        inputs: Tensor,
        of_image: Sequence[Tensor],
        seen: list[int],
        pool: Tensor,
        fold: int,
    ) -> torch.nn.Sequential:
        """Train a member's ``layers`` on standardised ``inputs`` [views, images, P] of the images ``seen``."""
        settings = self.settings
        generator = torch.Generator().manual_seed(self.seed * 100 + fold)
        torch.default_generator.manual_seed(self.seed * 100 + fold)
        every = torch.cat([of_image[i] for i in seen])
        with torch.no_grad():
            layers[-1].weight.mul_(0.3)
            layers[-1].bias.copy_(every.mean(0))
        layers.train().requires_grad_(True)
        optimizer = torch.optim.AdamW(
            layers.parameters(),
            lr=self.optimizer.lr,
            weight_decay=self.optimizer.weight_decay,
            betas=self.optimizer.betas,
        )
        mean = torch.stack([F.normalize(features.mean(0), dim=-1) for features in of_image])
        images = torch.tensor(seen)
        mix = torch.distributions.Dirichlet(torch.ones(settings.views))
        size = min(settings.batch_size, len(images))
        for step in range(self.steps):
            for group in optimizer.param_groups:
                group["lr"] = scheduled_lr(step, self.steps, self.optimizer.lr, self.optimizer)
            chosen = images[torch.randperm(len(images), generator=generator)[:size]]
            shares = mix.sample((size,))
            views = torch.randint(len(inputs), (settings.views, size), generator=generator)
            x = sum(inputs[views[v], chosen] * shares[:, v : v + 1] for v in range(settings.views))
            text = torch.stack(
                [of_image[i][torch.randint(len(of_image[i]), (1,), generator=generator)[0]] for i in chosen.tolist()]
            )
            with low_precision():
                feature = layers(x)
            feature = F.normalize(feature.float(), dim=-1)
            loss = contrastive_loss(feature, text, settings.temperature, chosen).loss
            if settings.pool:
                further = pool[torch.randint(len(pool), (settings.pool,), generator=generator)]
                keys = torch.cat([text, further])
                target = F.pad(torch.eye(size), (0, len(further)))
                nothing_empty = torch.zeros(1, len(keys), dtype=torch.bool)
                loss = (loss + one_way(feature, keys, None, settings.temperature, target, nothing_empty, 0.0)) / 2
            loss = loss + settings.cosine * (1 - (feature * mean[chosen]).sum(-1)).mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        if not math.isfinite(float(loss.detach())):
            raise RecipeError("the align stage diverged", "lower its lr")
        return layers.eval().requires_grad_(False)
