"""The one attention of the package, its masks, and the key/value cache.

Masks are boolean, True where a query may look, until the moment of use; there they become an additive tensor with a
large *finite* negative number, so that a query with no allowed key gives a uniform average and never NaN.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mplug_core.model.dropout import drop


def additive_mask(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where ``allowed`` (bool), else a large finite negative number of ``dtype``."""
    blocked = -1e9 if dtype in (torch.float32, torch.float64, torch.bfloat16) else -1e4
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, blocked)


def key_mask(mask: Tensor | None) -> Tensor | None:
    """``[B, T]`` key mask (1 = real) to boolean ``[B, 1, 1, T]``, the same for all heads and queries."""
    return None if mask is None else mask.bool()[:, None, None, :]


def causal_mask(length: int, past: int = 0, device: torch.device | None = None) -> Tensor:
    """Boolean ``[1, 1, length, past + length]``: query i sees the past and positions up to its own."""
    ones = torch.ones(length, past + length, dtype=torch.bool, device=device)
    return ones.tril(past)[None, None]


def fused_is_faster(query: Tensor) -> bool:
    """Whether PyTorch's fused attention beats the three plain operations on such queries: everywhere but in
    reduced-precision training on a CPU, where its backward pass is 2-6 times slower."""
    return query.device.type != "cpu" or not torch.is_grad_enabled() or query.dtype in (torch.float32, torch.float64)


def attend(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None, dropout: float = 0.0) -> Tensor:
    """Scaled dot-product attention on ``[B, H, T, D]`` tensors; ``allowed`` broadcasts to ``[B, H, Tq, Tk]``."""
    mask = None if allowed is None else additive_mask(allowed, query.dtype)
    # on a CPU fused attention draws dropout's numbers one by one
    if fused_is_faster(query) and not (dropout and query.device.type == "cpu"):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    if mask is not None:
        scores = scores + mask
    # the CPU's softmax accumulates in fp32 whatever its input
    return drop(scores.softmax(-1), dropout) @ value


class LayerCache:
    """Keys and values of one decoder layer: the prefix of each sequence, and the memory once per *image*."""

    def __init__(self) -> None:
        self.memory: tuple[Tensor, Tensor] | None = None
        self._prefix: tuple[Tensor, Tensor] | None = None
        self._order: Tensor | None = None

    @property
    def prefix(self) -> tuple[Tensor, Tensor] | None:
        """Keys and values ``[B, H, T, D]`` of all tokens so far."""
        if self._prefix is not None and self._order is not None:
            self.prefix = tuple(t.index_select(0, self._order) for t in self._prefix)
        return self._prefix

    @prefix.setter
    def prefix(self, prefix: tuple[Tensor, Tensor]) -> None:
        self._prefix, self._order = prefix, None

    @property
    def length(self) -> int:
        """Number of tokens so far."""
        return 0 if self._prefix is None else self._prefix[0].shape[2]

    def reorder(self, rows: Tensor) -> None:
        """Row i becomes the old row ``rows[i]``: when the next tokens come, so that a step copies the prefix once."""
        if self._prefix is not None:
            self._order = rows if self._order is None else self._order[rows]

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append ``[B, H, t, D]`` keys and values and return all of them."""
        if self._prefix is not None:
            key, value = self._append(self._prefix[0], key), self._append(self._prefix[1], value)
        self.prefix = (key, value)
        return key, value

    def _append(self, old: Tensor, new: Tensor) -> Tensor:
        if self._order is None:
            return torch.cat([old, new], 2)
        rows, heads, length, size = new.shape
        past = old.shape[2]
        joined = new.new_empty(rows, heads, past + length, size)
        torch.index_select(old, 0, self._order, out=joined[:, :, :past])
        joined[:, :, past:] = new
        return joined


class DecoderCache:
    """The caches of all layers. Sequences of one image lie next to each other and share the image's memory."""

    def __init__(self, layers: int) -> None:
        self.layers = [LayerCache() for _ in range(layers)]

    @property
    def length(self) -> int:
        """Number of tokens that every sequence has seen."""
        return self.layers[0].length

    @property
    def memory_bytes(self) -> int:
        """Bytes of the memory's keys and values, whatever they are views of."""
        tensors = [tensor for layer in self.layers for tensor in layer.memory or ()]
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

    def reorder(self, sequences: Tensor, images: Tensor | None = None) -> None:
        """Row i becomes the old row ``sequences[i]``; with ``images`` also keep only those rows of the memory."""
        for layer in self.layers:
            layer.reorder(sequences)
            if images is not None and layer.memory is not None:
                layer.memory = tuple(t.index_select(0, images) for t in layer.memory)


class SelfAttention(nn.Module):
    """Multi-head self-attention with one fused projection to queries, keys and values."""

    def __init__(self, width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, allowed: Tensor | None = None, cache: LayerCache | None = None) -> Tensor:
        """``x`` [B, T, W]; ``allowed`` bool, broadcast to [B, H, T, T + past]. Returns [B, T, W]."""
        batch, length, width = x.shape
        query, key, value = self.qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        if cache is not None:
            key, value = cache.extend(key, value)
        mixed = attend(query, key, value, allowed, self.dropout if self.training else 0.0)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, width))


class CrossAttention(nn.Module):
    """Multi-head attention from one stream to another, whose keys and values may be cached and shared."""

    def __init__(self, width: int, heads: int, dropout: float = 0.0, memory_width: int | None = None) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query = nn.Linear(width, width)
        self.kv = nn.Linear(memory_width or width, 2 * width)
        self.out = nn.Linear(width, width)

    def keys_values(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """``memory`` [M, N, memory width] to keys and values [M, H, N, D]."""
        batch, length, _ = memory.shape
        key, value = self.kv(memory).view(batch, length, 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        return key, value

    def forward(
        self, x: Tensor, memory: Tensor, memory_mask: Tensor | None = None, cache: LayerCache | None = None
    ) -> Tensor:
        """``x`` [B, T, W] looks at ``memory`` [M, N, W] (mask [M, N]); returns [B, T, W].

        B is a multiple of M: the B/M sequences of one memory row lie next to each other and share its keys and
        values, as further queries of that row, so that nothing is copied.
        """
        if cache is not None and cache.memory is not None:
            key, value = cache.memory
        else:
            key, value = self.keys_values(memory)
            if cache is not None:
                cache.memory = (key, value)
        batch, length, width = x.shape
        rows = key.shape[0]
        query = self.query(x).view(rows, batch // rows * length, self.heads, -1).transpose(1, 2)
        mixed = attend(query, key, value, key_mask(memory_mask), self.dropout if self.training else 0.0)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, width))
