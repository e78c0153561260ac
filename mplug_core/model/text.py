"""BERT embeddings and layers (post-LN, exact GELU), and the text encoder made of them (paper section 3.1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mplug_core.model.attention import CrossAttention, LayerCache, SelfAttention, key_mask
from mplug_core.model.config import MplugConfig
from mplug_core.model.dropout import Dropout


class Embeddings(nn.Module):
    """Word + position + segment embeddings, normalised. The segment is always the first, so it is one vector."""

    def __init__(self, config: MplugConfig) -> None:
        super().__init__()
        self.words = nn.Embedding(config.vocab_size, config.width, padding_idx=0)
        self.positions = nn.Embedding(config.max_positions, config.width)
        self.segment = nn.Parameter(torch.zeros(config.width))
        self.norm = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.dropout)

    def forward(self, ids: Tensor, start: int = 0) -> Tensor:
        """``ids`` [B, T] at positions ``start`` .. ``start + T - 1``; returns [B, T, W]."""
        positions = torch.arange(start, start + ids.shape[1], device=ids.device)
        return self.dropout(self.norm(self.words(ids) + self.positions(positions) + self.segment))


class FeedForward(nn.Module):
    """Two linear layers with an exact GELU between them."""

    def __init__(self, width: int, intermediate: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, intermediate)
        self.act = nn.GELU()
        self.down = nn.Linear(intermediate, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))


class BertLayer(nn.Module):
    """Self-attention, optional cross-attention, feed-forward: each with residual and LayerNorm after it."""

    def __init__(
        self,
        config: MplugConfig,
        cross: bool = False,
        intermediate: int | None = None,
        memory_width: int | None = None,
    ) -> None:
        super().__init__()
        width, eps = config.width, config.layer_norm_eps
        weights = config.dropout if config.attention_dropout is None else config.attention_dropout
        self.attention = SelfAttention(width, config.heads, weights)
        self.attention_norm = nn.LayerNorm(width, eps=eps)
        self.cross = CrossAttention(width, config.heads, weights, memory_width) if cross else None
        self.cross_norm = nn.LayerNorm(width, eps=eps) if cross else None
        self.feed_forward = FeedForward(width, intermediate or config.intermediate)
        self.feed_forward_norm = nn.LayerNorm(width, eps=eps)
        self.dropout = Dropout(config.dropout)

    def attend_self(self, x: Tensor, allowed: Tensor | None, cache: LayerCache | None = None) -> Tensor:
        return self.attention_norm(x + self.dropout(self.attention(x, allowed, cache)))

    def attend_other(
        self, x: Tensor, memory: Tensor, memory_mask: Tensor | None, cache: LayerCache | None = None
    ) -> Tensor:
        return self.cross_norm(x + self.dropout(self.cross(x, memory, memory_mask, cache)))

    def transform(self, x: Tensor) -> Tensor:
        return self.feed_forward_norm(x + self.dropout(self.feed_forward(x)))

    def forward(
        self,
        x: Tensor,
        allowed: Tensor | None = None,
        memory: Tensor | None = None,
        memory_mask: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """``x`` [B, T, W]; ``allowed`` bool for the self-attention; ``memory`` [M, N, W] with its key mask [M, N]."""
        x = self.attend_self(x, allowed, cache)
        if self.cross is not None:
            x = self.attend_other(x, memory, memory_mask, cache)
        return self.transform(x)


class TextEncoder(nn.Module):
    """The first layers of BERT."""

    def __init__(self, config: MplugConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(BertLayer(config) for _ in range(config.text_layers))
        self.checkpointing = False

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """``ids`` and ``mask`` (1 = real) [B, T]; returns [B, T, W]. Padding positions are computed too."""
        x, allowed = self.embeddings(ids), key_mask(mask)
        for layer in self.layers:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, allowed, use_reentrant=False)
            else:
                x = layer(x, allowed)
        return x
