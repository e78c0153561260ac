"""Causal decoder with cross-attention to the memory, and a language-model head tied to its word embeddings."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mplug_core.model.attention import DecoderCache, causal_mask, key_mask
from mplug_core.model.config import MplugConfig
from mplug_core.model.kernels import TOKENS, made_for_shapes, rounded
from mplug_core.model.text import BertLayer, Embeddings

CHUNK_BYTES = 1 << 26
"""Bytes that the fp32 logits of a chunk of rows take at most."""

Reduce = Callable[[Tensor, slice], Tensor]
"""Logits [m, V] of some rows, and which rows, to a number for each [m]."""


class LanguageHead(nn.Module):
    """BERT's prediction head: dense, GELU, LayerNorm, then the word embeddings as output weights, and a bias."""

    def __init__(self, config: MplugConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.width, config.width)
        self.norm = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.chunk = max(1, CHUNK_BYTES // (4 * config.vocab_size))

    def forward(self, hidden: Tensor, words: nn.Embedding, reduce: Reduce | None = None) -> Tensor:
        """``hidden`` [..., W] to logits [..., V]; with ``reduce``, ``hidden`` [M, W] to what it makes of them [M].

        More rows than a chunk are reduced chunk by chunk, and each chunk's logits are computed again in the backward
        pass, so that those of all rows are never there together. All chunks are one call of this module: processes
        that share its weights may have different numbers of them.
        """
        hidden = self.norm(F.gelu(self.dense(hidden)))
        if reduce is None:
            return F.linear(hidden, words.weight, self.bias)

        def reduced(part: Tensor, rows: slice) -> Tensor:
            more = rounded(len(part), TOKENS) - len(part) if made_for_shapes(words.weight) else 0
            return reduce(F.linear(F.pad(part, (0, 0, 0, more)), words.weight, self.bias)[: len(part)], rows)

        if len(hidden) <= self.chunk:
            return reduced(hidden, slice(0, len(hidden)))
        parts = []
        for start in range(0, len(hidden), self.chunk):
            rows = slice(start, min(start + self.chunk, len(hidden)))
            if torch.is_grad_enabled():
                parts.append(checkpoint(reduced, hidden[rows], rows, use_reentrant=False, preserve_rng_state=False))
            else:
                parts.append(reduced(hidden[rows], rows))
        return torch.cat(parts)


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

    def logits(self, hidden: Tensor, reduce: Reduce | None = None) -> Tensor:
        """``hidden`` [..., W] to next-token logits [..., V], or rows of it to what ``reduce`` makes of these (see
        :class:`LanguageHead`)."""
        return self.head(hidden, self.embeddings.words, reduce)
