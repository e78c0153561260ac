"""Causal decoder with cross-attention to the memory, and a language-model head tied to its word embeddings."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mplug_core.model.attention import DecoderCache, causal_mask, key_mask
from mplug_core.model.config import MplugConfig
from mplug_core.model.text import BertLayer, Embeddings


class LanguageHead(nn.Module):
    """BERT's prediction head: dense, GELU, LayerNorm, then the word embeddings as output weights, and a bias."""

    def __init__(self, config: MplugConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.width, config.width)
        self.norm = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden: Tensor, words: nn.Embedding) -> Tensor:
        """``hidden`` [..., W] to logits [..., V]."""
        return F.linear(self.norm(F.gelu(self.dense(hidden))), words.weight, self.bias)


class Decoder(nn.Module):
    """Predicts each next token from the tokens before it and from the memory."""

    def __init__(self, config: MplugConfig) -> None:
        super().__init__()
        memory_width, intermediate = config.width, config.decoder_intermediate or config.intermediate
        if config.decoder_width:
            heads = config.decoder_width * config.heads // config.width
            config = config.model_copy(update={"width": config.decoder_width, "heads": heads})
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(
            BertLayer(config, True, intermediate, memory_width) for _ in range(config.decoder_layers)
        )
        self.head = LanguageHead(config)
        self.checkpointing = False

    def forward(
        self,
        ids: Tensor,
        memory: Tensor,
        memory_mask: Tensor | None = None,
        cache: DecoderCache | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Hidden states [B, T, W] of ``ids`` [B, T] given ``memory`` [M, N, W], B a multiple of M.

        With a ``cache``, ``ids`` are the tokens after those already seen, and ``memory`` is read on the first call
        only. ``mask`` [B, T] (1 = real) hides padding within ``ids``; right padding needs none.
        """
        past = cache.length if cache is not None else 0
        # a single token sees all that were before it
        alone = ids.shape[1] == 1 and mask is None
        allowed = None if alone else causal_mask(ids.shape[1], past, ids.device)
        if mask is not None:
            allowed = allowed & key_mask(mask)
        x = self.embeddings(ids, past)
        for number, layer in enumerate(self.layers):
            layer_cache = cache.layers[number] if cache is not None else None
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, allowed, memory, memory_mask, layer_cache, use_reentrant=False)
            else:
                x = layer(x, allowed, memory, memory_mask, layer_cache)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """``hidden`` [..., W] to next-token logits [..., V]."""
        return self.head(hidden, self.embeddings.words)
