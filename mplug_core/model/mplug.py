"""The assembly: encode the image, encode the text, fuse, decode; and the heads (paper figure 2)."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mplug_core.errors import CheckpointError
from mplug_core.model.attention import DecoderCache
from mplug_core.model.config import MplugConfig
from mplug_core.model.decoder import Decoder, LanguageHead, Reduce
from mplug_core.model.fusion import Fusion
from mplug_core.model.kernels import made_for_shapes
from mplug_core.model.lengths import Piece, in_pieces, pieces_by_length, places
from mplug_core.model.text import TextEncoder
from mplug_core.model.vision import VisualEncoder
from mplug_core.recipe import ImageHeadSection


@dataclass
class ImageEncoding:
    """What the model knows of a batch of images, computed once and shared by all texts on them.

    ``tokens`` [B, N, W], ``feature`` [B, E] (normalised, contrastive), ``mask`` [B, N] (True = real).
    """

    tokens: Tensor
    feature: Tensor
    mask: Tensor

    def __getitem__(self, index: Tensor) -> ImageEncoding:
        """Rows by index, a row as often as it is named."""
        return ImageEncoding(self.tokens[index], self.feature[index], self.mask[index])

    def __len__(self) -> int:
        return len(self.tokens)

    def detach(self) -> ImageEncoding:
        return ImageEncoding(self.tokens.detach(), self.feature.detach(), self.mask)

    def to(self, device: torch.device, dtype: torch.dtype) -> ImageEncoding:
        return ImageEncoding(self.tokens.to(device, dtype), self.feature.to(device, dtype), self.mask.to(device))

    @classmethod
    def join(cls, parts: Iterable[ImageEncoding]) -> ImageEncoding:
        """Images of several encodings in one; shorter ones are padded and masked."""
        parts = list(parts)
        longest = max(part.tokens.shape[1] for part in parts)
        tokens = [F.pad(p.tokens, (0, 0, 0, longest - p.tokens.shape[1])) for p in parts]
        masks = [F.pad(p.mask, (0, longest - p.mask.shape[1])) for p in parts]
        return cls(torch.cat(tokens), torch.cat([p.feature for p in parts]), torch.cat(masks))


class SummaryTokens(nn.Module):
    """Image tokens made from a contrastive feature, so that a text's feature can stand in for an image.

    ``centre`` and ``scale`` bring features of unit length, which crowd around their mean, to zero mean and unit
    variance; they are set once from real features (:meth:`fit`).
    """

    def __init__(self, config: MplugConfig) -> None:
        super().__init__()
        self.count = config.summary_tokens
        self.register_buffer("centre", torch.zeros(config.embed_dim))
        self.register_buffer("scale", torch.tensor([config.embed_dim**0.5]))
        self.hidden = nn.Linear(config.embed_dim, config.width)
        self.tokens = nn.Linear(config.width, self.count * config.width)
        self.norm = nn.LayerNorm(config.width)

    @torch.no_grad()
    def fit(self, features: Tensor) -> None:
        """Centre and scale from features [R, E]."""
        self.centre.copy_(features.mean(0))
        self.scale.copy_(1 / (features - features.mean(0)).square().mean().sqrt())

    def forward(self, feature: Tensor) -> Tensor:
        """[B, E] of unit length to [B, K, W]."""
        # an engine may keep buffers in fp32 where the weights are bf16
        centred = ((feature - self.centre) * self.scale).to(feature.dtype)
        hidden = F.gelu(self.hidden(centred))
        return self.norm(self.tokens(hidden).view(feature.shape[0], self.count, -1))


class GridProjection(nn.Module):
    """The cells of a convolutional network's last grid, and its finer levels, to image tokens of the token grid.

    A cell's own projection is computed once and belongs to all tokens that it is divided into; each adds what its part
    of the finer levels says.
    """

    def __init__(self, visual: VisualEncoder, width: int, eps: float) -> None:
        super().__init__()
        self.rows, self.columns, self.subcells = *visual.grid, visual.subcells
        self.last = nn.Linear(visual.last_width, width)
        inputs = [wide // visual.subcells**2 for wide in visual.level_widths]
        self.levels = nn.ModuleList(nn.Linear(channels, width, bias=False) for channels in inputs)
        self.norm = nn.LayerNorm(width, eps=eps)

    def forward(self, last: Tensor, levels: list[Tensor]) -> Tensor:
        """Of :meth:`VisualEncoder.split_levels`: [B, N, C] and each [B, N k^2, C'] to [B, N k^2, W]."""
        k = self.subcells
        cells = self.last(last).unflatten(1, (self.rows, 1, self.columns, 1))
        tokens = cells.expand(-1, -1, k, -1, k, -1).flatten(1, 4)
        for level, projection in zip(levels, self.levels, strict=True):
            tokens = tokens + projection(level)
        return self.norm(tokens)


class Classifier(nn.Module):
    """Labels from the fused [CLS] of each image of an example, joined (two images: NLVR2; one: SNLI-VE)."""

    def __init__(self, images: int, width: int, labels: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(images * width, width)
        self.out = nn.Linear(width, labels)

    def forward(self, joined: Tensor) -> Tensor:
        """``joined`` [B, images * W] to logits [B, labels]."""
        return self.out(F.gelu(self.hidden(joined)))


class ImageHead(nn.Module):
    """Contrastive head for a frozen convolutional backbone and few photos.

    Pooled features and, with a classifier, the expected feature of the class names, are standardised by fixed numbers
    (:meth:`fit`); one hidden layer with much dropout learns from a thousand photos. Heads trained on different parts of
    the photos join to one (:meth:`join`).
    """

    CLASS_WEIGHT = 0.7
    """Root mean square of the class-name inputs against that of the pooled ones."""

    def __init__(self, head: ImageHeadSection, pooled: int, outputs: int) -> None:
        super().__init__()
        self.settings, self.outputs = head, outputs
        self.class_names = nn.Linear(head.classes, outputs, bias=False) if head.classes else None
        self.blocks = [pooled // 2, pooled // 2] + ([outputs] if head.classes else [])
        self.register_buffer("centre", torch.zeros(sum(self.blocks)))
        self.register_buffer("scale", torch.ones(sum(self.blocks)))
        self.layers = self.new_layers(head.hidden)

    def new_layers(self, hidden: int) -> nn.Sequential:
        """Untrained layers with ``hidden`` units."""
        return nn.Sequential(
            nn.Dropout(self.settings.input_dropout),
            nn.Linear(sum(self.blocks), hidden),
            nn.GELU(),
            nn.Dropout(self.settings.dropout),
            nn.Linear(hidden, self.outputs),
        )

    def gather(self, pooled: Tensor, probabilities: Tensor | None) -> Tensor:
        """The raw inputs: pooled features [B, P], and the expected class-name feature from ``probabilities``."""
        if self.class_names is None:
            return pooled
        return torch.cat([pooled, self.class_names(probabilities)], -1)

    @torch.no_grad()
    def fit(self, inputs: Tensor) -> None:
        """Centre and scale from raw inputs [R, P]: mean (average), maximum and class names count as one block each."""
        centre = inputs.mean(0)
        weights = (1.0, 1.0, self.CLASS_WEIGHT)
        scales = [
            (weight / block.square().mean().sqrt()).expand(block.shape[1])
            for weight, block in zip(weights, (inputs - centre).split(self.blocks, 1), strict=False)
        ]
        self.centre.copy_(centre)
        self.scale.copy_(torch.cat(scales))

    def standardise(self, inputs: Tensor) -> Tensor:
        # an engine may keep buffers in fp32 where the weights are bf16
        return ((inputs - self.centre) * self.scale).to(inputs.dtype)

    @torch.no_grad()
    def join(self, members: list[nn.Sequential]) -> None:
        """The mean of the members' outputs, as one network whose hidden layer is all of theirs."""
        self.layers[1].weight.copy_(torch.cat([m[1].weight for m in members]))
        self.layers[1].bias.copy_(torch.cat([m[1].bias for m in members]))
        self.layers[4].weight.copy_(torch.cat([m[4].weight for m in members], 1) / len(members))
        self.layers[4].bias.copy_(torch.stack([m[4].bias for m in members]).mean(0))

    def forward(self, pooled: Tensor, probabilities: Tensor | None = None) -> Tensor:
        """[B, P] to [B, E], not normalised."""
        return self.layers(self.standardise(self.gather(pooled, probabilities)))


class MplugModel(nn.Module):
    """mPLUG: visual encoder, text encoder, skip-connected fusion, decoder. Tensors in, tensors out."""

    def __init__(self, config: MplugConfig) -> None:
        super().__init__()
        self.config = config
        width, embed = config.width, config.embed_dim
        self.visual = VisualEncoder(config)
        grid = self.visual.token_grid
        self.pooling = 1
        self.by_length = True
        self.grid_positions = None
        self.visual_projection = None
        if not self.visual.is_transformer:
            # a convolutional grid says nothing of where a cell lies
            with torch.device("cpu"):  # a few numbers: on the meta device they would be a second of imports
                sines = grid_sines(*grid, width)
            self.grid_positions = nn.Parameter(sines.to(torch.get_default_device()))
        if not self.visual.is_transformer and self.visual.subcells > 1:
            self.visual_projection = GridProjection(self.visual, width, config.layer_norm_eps)
        elif not self.visual.is_transformer or self.visual.width != width:
            norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
            self.visual_projection = nn.Sequential(nn.Linear(self.visual.width, width), norm)
        pooled = width if self.visual.is_transformer else self.visual.pooled_width
        if "contrastive" in config.absent:
            self.image_projection = None
        elif config.image_head is None:
            self.image_projection = nn.Linear(pooled, embed)
        else:
            self.image_projection = ImageHead(config.image_head, pooled, embed)
        self.summary = SummaryTokens(config) if config.summary_tokens else None
        self.text = None if "text" in config.absent else TextEncoder(config)
        self.text_projection = None if "contrastive" in config.absent else nn.Linear(width, embed)
        self.fusion = Fusion(config)
        # a dual encoder has nothing fused to match by
        matching = config.fusion != "none" and "matching" not in config.absent
        self.matching_head = nn.Linear(width, 2) if matching else None
        self.masked_head = None if "masked" in config.absent else LanguageHead(config)
        self.decoder = Decoder(config) if config.decoder_layers else None
        self.classifiers = nn.ModuleDict(
            {name: Classifier(c.images, width, len(c.labels)) for name, c in config.classifiers.items()}
        )
        # of shape (1,): DeepSpeed can't partition a scalar
        self.temperature = nn.Parameter(torch.tensor([config.temperature]))
        for name, part in self.named_children():
            if name != "visual":  # timm initialises its backbones itself
                part.apply(partial(initialise, std=0.02 * (768 / width) ** 0.5))

    def set_checkpointing(self, towers: Iterable[str]) -> None:
        """Recompute the activations of the named towers (visual, text, fusion, decoder) in the backward pass."""
        towers = set(towers)
        self.visual.set_checkpointing("visual" in towers)
        if self.text is not None:
            self.text.checkpointing = "text" in towers
        self.fusion.checkpointing = "fusion" in towers
        if self.decoder is not None:
            self.decoder.checkpointing = "decoder" in towers

    @property
    def layers(self) -> list[nn.Module]:
        """The transformer layers of all towers, each called as a whole."""
        towers = [self.text, self.fusion, self.decoder]
        return [*self.visual.layers, *(layer for tower in towers if tower is not None for layer in tower.layers)]

    @property
    def parts(self) -> dict[str, nn.Module | nn.Parameter]:
        """What can be frozen by its name: the towers, heads and projections, the temperature, and the visual encoder's
        ``stem``."""
        named = {**dict(self.named_children()), **dict(self.named_parameters(recurse=False))}
        return {**named, "stem": nn.ModuleList(self.visual.stem)}

    def freeze(self, names: Collection[str]) -> None:
        """Train all parts but those of these names, which compute as in evaluation, too: dropout in front of weights
        that stay as they are costs time and teaches nothing."""
        self.requires_grad_(True).train()
        for name, part in self.parts.items():
            if name in names:
                part.requires_grad_(False)
                if isinstance(part, nn.Module):
                    part.eval()

    def encode_image(self, pixels: Tensor) -> ImageEncoding:
        """``pixels`` [B, 3, H, W], normalised as the configuration says."""
        return self.encode_features(self.visual(pixels))

    def encode_features(self, features: Tensor, feature: Tensor | None = None) -> ImageEncoding:
        """From the backbone's tokens [B, N, C], which a frozen backbone computes once per image.

        ``feature`` [B, E] stands in for the contrastive feature where it is known.
        """
        if isinstance(self.visual_projection, GridProjection):
            tokens = self.visual_projection(*self.visual.split_levels(features))
        else:
            tokens = features if self.visual_projection is None else self.visual_projection(features)
        if self.grid_positions is not None:
            tokens = tokens + self.grid_positions
        if self.pooling > 1:
            tokens = self._pooled(tokens)
        if feature is None:
            feature = self.image_feature(features, tokens)
        if self.summary is not None:
            tokens = torch.cat([self.summary(feature), tokens], 1)
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        return ImageEncoding(tokens, feature, mask)

    def _pooled(self, tokens: Tensor) -> Tensor:
        """Tokens [B, N, W] of a convolutional grid averaged over squares of ``pooling`` by ``pooling``."""
        rows, columns = self.visual.token_grid
        grid = tokens.unflatten(1, (rows // self.pooling, self.pooling, columns // self.pooling, self.pooling))
        return grid.mean((2, 4)).flatten(1, 2)

    def image_feature(self, features: Tensor, tokens: Tensor) -> Tensor:
        """Contrastive feature [B, E]: of the class token, or of a convolutional grid's mean and maximum.

        [B, 0] of a model without a contrastive head.
        """
        if self.image_projection is None:
            return tokens.new_zeros(tokens.shape[0], 0)  # len() would fix the batch of an exported graph
        if self.visual.is_transformer:
            return F.normalize(self.image_projection(tokens[:, 0]), dim=-1)
        pooled = self.visual.pool(features)
        if self.config.image_head is None:
            return F.normalize(self.image_projection(pooled), dim=-1)
        probabilities = self.visual.class_probabilities(features) if self.config.image_head.classes else None
        return F.normalize(self.image_projection(pooled, probabilities), dim=-1)

    def imagine(self, feature: Tensor) -> ImageEncoding:
        """An image of which only its contrastive feature [B, E] is known: the summary tokens alone."""
        tokens = self.summary(feature)
        return ImageEncoding(tokens, feature, torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device))

    def encode_text(self, ids: Tensor, mask: Tensor) -> Tensor:
        """``ids`` and ``mask`` [B, T] to [B, T, W]; CheckpointError for a model without a text encoder."""
        if self.text is None:
            raise CheckpointError("this model has no text encoder", "choose a model that was trained for the task")
        pieces = self._pieces(mask)
        if pieces is None:
            return self.text(ids, mask)
        return in_pieces(pieces, ids.shape[1], lambda piece: self.text(piece.of(ids), piece.of(mask)))

    def text_feature(self, text: Tensor, mask: Tensor) -> Tensor:
        """Contrastive feature [B, E] of encoded text [B, T, W]: its [CLS], or its mean as ``text_pooling`` says.

        CheckpointError for a model without a contrastive head.
        """
        if self.text_projection is None:
            raise CheckpointError("this model has no contrastive head", "choose a model that was trained for the task")
        if self.config.text_pooling == "mean":
            weights = mask.to(text.dtype)[..., None]
            pooled = (text * weights).sum(1) / weights.sum(1).clamp(min=1)
        else:
            pooled = text[:, 0]
        return F.normalize(self.text_projection(pooled), dim=-1)

    def fuse(self, image: ImageEncoding, text: Tensor, text_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Fused image tokens [B, N, W] and text [B, T, W]."""
        pieces = self._pieces(text_mask) if len(image) == len(text) else None
        if pieces is None:
            return self.fusion(image.tokens, text, image.mask, text_mask)
        fused_images: list[Tensor] = []

        def fused(piece: Piece) -> Tensor:
            seen = image[piece.rows]
            fused_image, fused_text = self.fusion(seen.tokens, piece.of(text), seen.mask, piece.of(text_mask))
            fused_images.append(fused_image[: piece.real])
            return fused_text

        fused_text = in_pieces(pieces, text.shape[1], fused)
        return torch.cat(fused_images)[places(pieces)], fused_text

    def memory(
        self, image: ImageEncoding, text: Tensor | None = None, text_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """What the decoder looks at, and its mask: the fused [image ; text], or without a text the image alone.

        Texts on the same image may share it, lying next to each other (see :class:`Fusion`); each gets a row.
        """
        if text is None:
            return image.tokens, image.mask
        fused_image, fused_text = self.fuse(image, text, text_mask)
        image_mask = image.mask
        if len(image) != len(text):
            fused_image, image_mask = (
                t if len(t) == len(text) else t.repeat_interleave(len(text) // len(t), 0)
                for t in (fused_image, image_mask)
            )
        return torch.cat([fused_image, fused_text], 1), torch.cat([image_mask, text_mask.bool()], 1)

    def _pieces(self, mask: Tensor) -> list[Piece] | None:
        # without `by_length` every batch calls every layer once, which processes that share weights rely on
        if not self.by_length:
            return None
        some = next(self.parameters())
        return pieces_by_length(mask, made_for_shapes(some), self.config.max_positions)

    def hidden(self, ids: Tensor, mask: Tensor, memory: Tensor, memory_mask: Tensor | None) -> Tensor:
        """The decoder's hidden states [B, T - 1, W] of whole texts ``ids`` [B, T] (``mask``: 1 = real), a row of the
        memory each: what the losses of written texts need. The last token predicts nothing."""
        ids, mask = ids[:, :-1], mask[:, 1:]
        pieces = self._pieces(mask) if len(memory) == len(ids) else None
        if pieces is None:
            return self.decoder(ids, memory, memory_mask)

        def decoded(piece: Piece) -> Tensor:
            seen = None if memory_mask is None else memory_mask[piece.rows]
            return self.decoder(piece.of(ids), memory[piece.rows], seen)

        return in_pieces(pieces, ids.shape[1], decoded)

    def decode(
        self, ids: Tensor, memory: Tensor, memory_mask: Tensor | None = None, cache: DecoderCache | None = None
    ) -> Tensor:
        """Next-token logits [B, T, V]; see :class:`Decoder`."""
        return self.decoder.logits(self.decoder(ids, memory, memory_mask, cache))

    def matching_logits(self, fused_text: Tensor) -> Tensor:
        """[B, T, W] to [B, 2]: does the text belong to the image (index 1)?"""
        return self.matching_head(fused_text[:, 0])

    def masked_logits(self, hidden: Tensor, reduce: Reduce | None = None) -> Tensor:
        """Fused text [..., W] at masked positions to logits [..., V], or rows of it to what ``reduce`` makes of these
        (see :class:`LanguageHead`)."""
        return self.masked_head(hidden, self.text.embeddings.words, reduce)

    def classify(self, name: str, fused_texts: list[Tensor]) -> Tensor:
        """Logits of classifier ``name`` from the fused text of each image of the example."""
        return self.classifiers[name](torch.cat([text[:, 0] for text in fused_texts], -1))


def grid_sines(rows: int, columns: int, width: int) -> Tensor:
    """Where each cell of a grid lies, as sines and cosines of its row and its column: [rows * columns, W].

    Of about the size of the normalised features that they are added to, so that attention sees them from the start.
    """
    quarter = width // 4
    # from half a period over the grid up to one period in two cells
    rates = torch.pi * torch.logspace(0, math.log2(max(rows, columns, 2)), quarter, base=2.0) / max(rows, columns)
    down, across = (torch.arange(n)[:, None] * rates for n in (rows, columns))
    place = torch.zeros(rows, columns, width)
    waves = [wave for axis in (down[:, None], across[None]) for wave in (axis.sin(), axis.cos())]
    place[..., : 4 * quarter] = torch.cat([wave.expand(rows, columns, quarter) for wave in waves], -1)
    return place.flatten(0, 1)


def initialise(module: nn.Module, std: float = 0.02) -> None:
    """BERT's initialisation; ``std`` is of the linear layers, which keep BERT-base's gain at any width."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=std)
    if isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
    if isinstance(module, nn.Embedding) and module.padding_idx is not None:
        with torch.no_grad():
            module.weight[module.padding_idx].zero_()
