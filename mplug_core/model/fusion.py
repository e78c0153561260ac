"""The fusion networks that the paper compares (section 3.2): skip-connected, connected, co-attention, asymmetric.

All take and return an image stream and a text stream. Adding one means adding one layer class and its name in
:func:`fusion_layers`. Only layers that run are built.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mplug_core.model.attention import key_mask
from mplug_core.model.config import MplugConfig
from mplug_core.model.text import BertLayer


class AsymmetricLayer(nn.Module):
    """Text attends to itself, then to the image, then feed-forward; the image stream passes untouched."""

    def __init__(self, config: MplugConfig) -> None:
        super().__init__()
        self.text = BertLayer(config, cross=True, intermediate=config.fusion_intermediate)

    def forward(self, image: Tensor, text: Tensor, image_mask: Tensor, text_mask: Tensor) -> tuple[Tensor, Tensor]:
        return image, self.text(text, key_mask(text_mask), image, image_mask)


class ConnectedLayer(nn.Module):
    """One BERT layer over [image ; text]. The image is added to its input, the text is replaced."""

    def __init__(self, config: MplugConfig) -> None:
        super().__init__()
        self.joint = BertLayer(config, intermediate=config.fusion_intermediate)

    def forward(self, image: Tensor, text: Tensor, image_mask: Tensor, text_mask: Tensor) -> tuple[Tensor, Tensor]:
        both = self.joint(torch.cat([image, text], 1), key_mask(torch.cat([image_mask, text_mask], 1)))
        return image + both[:, : image.shape[1]], both[:, image.shape[1] :]


class CoAttentionLayer(nn.Module):
    """Each stream attends to itself, then to the other stream, then feed-forward (LXMERT, ViLBERT)."""

    def __init__(self, config: MplugConfig) -> None:
        super().__init__()
        self.image = BertLayer(config, cross=True, intermediate=config.fusion_intermediate)
        self.text = BertLayer(config, cross=True, intermediate=config.fusion_intermediate)

    def forward(self, image: Tensor, text: Tensor, image_mask: Tensor, text_mask: Tensor) -> tuple[Tensor, Tensor]:
        image = self.image.attend_self(image, key_mask(image_mask))
        text = self.text.attend_self(text, key_mask(text_mask))
        image_next = self.image.transform(self.image.attend_other(image, text, text_mask))
        text_next = self.text.transform(self.text.attend_other(text, image, image_mask))
        return image_next, text_next


def fusion_layers(config: MplugConfig) -> list[nn.Module]:
    """The layers that ``config.fusion`` names; none for the dual encoder."""
    if config.fusion == "none":
        return []
    if config.fusion == "co":
        return [CoAttentionLayer(config) for _ in range(config.fusion_layers)]
    connected = set(config.connected_layers)
    return [ConnectedLayer(config) if k in connected else AsymmetricLayer(config) for k in range(config.fusion_layers)]


class Fusion(nn.Module):
    """A stack of fusion layers."""

    def __init__(self, config: MplugConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(fusion_layers(config))
        self.checkpointing = False

    def forward(
        self, image: Tensor, text: Tensor, image_mask: Tensor | None = None, text_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """``image`` [B, N, W], ``text`` [B, T, W], masks [B, N] and [B, T] (1 = real); returns both streams.

        Texts on the same image may share it: of M images, B a multiple of M, the B/M texts of each lie next to each
        other. Its keys and values are then computed once. The image stream comes back with M rows if no layer changes
        it, else with B.
        """
        if image_mask is None:
            image_mask = torch.ones(image.shape[:2], dtype=torch.bool, device=image.device)
        if text_mask is None:
            text_mask = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
        image_mask, text_mask = image_mask.bool(), text_mask.bool()
        for layer in self.layers:
            if image.shape[0] < text.shape[0] and not isinstance(layer, AsymmetricLayer):
                # from here on the image stream knows the text, and each text has one of its own
                image, image_mask = (t.repeat_interleave(len(text) // len(t), 0) for t in (image, image_mask))
            if self.checkpointing and torch.is_grad_enabled():
                image, text = checkpoint(layer, image, text, image_mask, text_mask, use_reentrant=False)
            else:
                image, text = layer(image, text, image_mask, text_mask)
        return image, text
