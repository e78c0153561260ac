"""Stand-ins for the photos of captions that have none: their contrastive text feature, made to look like an image's.

Text and image features of a pair differ by a linear map and a residual. Both are estimated on real pairs by
:meth:`StandIn.fit`; a stand-in is a text feature through the map plus a residual of a random pair.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mplug_core.model.mplug import Mplug


class StandIn(nn.Module):
    """Buffers ``matrix`` [E, E], ``offset`` [E] and ``residuals`` [R, E]."""

    matrix: Tensor
    offset: Tensor
    residuals: Tensor

    def __init__(self, dim: int, residuals: int) -> None:
        super().__init__()
        self.register_buffer("matrix", torch.eye(dim))
        self.register_buffer("offset", torch.zeros(dim))
        self.register_buffer("residuals", torch.zeros(residuals, dim))

    @torch.no_grad()
    def fit(self, text: Tensor, image: Tensor, ridge: float = 1.0) -> None:
        """From features [R, E] of real pairs; the image's should be of a model that has not seen that pair."""
        text, image = text.float(), image.float()
        mean_text, mean_image = text.mean(0), image.mean(0)
        x, y = text - mean_text, image - mean_image
        gram = x.T @ x + ridge * torch.eye(x.shape[1])
        matrix = torch.linalg.solve(gram, x.T @ y)
        offset = mean_image - mean_text @ matrix
        self.matrix, self.offset = matrix, offset
        self.residuals = image - (text @ matrix + offset)

    def forward(self, model: Mplug, captions: dict[str, Tensor], generator: torch.Generator | None = None) -> Tensor:
        """[B, E] features for B captions: ids and mask [M, T], ``row`` [M] says whose each is; their mean is used."""
        with torch.no_grad():
            encoded = model.encode_text(captions["ids"], captions["mask"])
            features = model.text_feature(encoded, captions["mask"]).float()
            count = int(captions["row"].max()) + 1
            summed = features.new_zeros(count, features.shape[1]).index_add_(0, captions["row"], features)
            mean = F.normalize(summed, dim=-1)
            drawn = torch.randint(len(self.residuals), (count,), device="cpu", generator=generator)
            made = mean @ self.matrix.float() + self.offset.float() + self.residuals.float()[drawn.to(mean.device)]
            return F.normalize(made, dim=-1).to(encoded.dtype)
