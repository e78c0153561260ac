"""Stand-ins for the photos of captions that have none: their contrastive text feature, made to look like an image's.

Text and image features of a pair differ by a linear map and a residual. Both are estimated on real pairs by
:meth:`StandIn.fit`; a stand-in is a text feature through the map plus a random residual.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class StandIn(nn.Module):
    """Buffers ``matrix`` [E, E], ``offset`` [E] and ``noise`` [E, E], a factor of the residuals' covariance."""

    matrix: Tensor
    offset: Tensor
    noise: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("matrix", torch.eye(dim))
        self.register_buffer("offset", torch.zeros(dim))
        self.register_buffer("noise", torch.zeros(dim, dim))

    @torch.no_grad()
    def fit(self, text: Tensor, image: Tensor, ridge: float = 1.0, folds: int = 5) -> float:
        """From features [R, E] of real pairs, the image's by a model that has not seen the pair.

        ``ridge`` is in units of the texts' mean variance. Residuals are those of pairs left out of the map's fit, or
        the noise would be too small. Returns the share of the images' variance that the map explains on left-out pairs.
        """
        text, image = text.double(), image.double()
        residual = torch.empty_like(image)
        fold = torch.randperm(len(text), generator=torch.Generator().manual_seed(0)) % folds
        for k in range(folds):
            matrix, offset = ridge_map(text[fold != k], image[fold != k], ridge)
            residual[fold == k] = image[fold == k] - text[fold == k] @ matrix - offset
        covariance = residual.T @ residual / len(residual)
        # a thousand pairs don't determine all correlations of hundreds of dimensions
        covariance = 0.9 * covariance + 0.1 * torch.diag(covariance.diagonal())
        matrix, offset = ridge_map(text, image, ridge)
        self.matrix.copy_(matrix)
        self.offset.copy_(offset)
        self.noise.copy_(torch.linalg.cholesky(covariance + 1e-10 * torch.eye(len(covariance), dtype=torch.double)))
        return float(1 - residual.square().sum() / (image - image.mean(0)).square().sum())

    @torch.no_grad()
    def forward(self, features: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Text features [B, E] to stand-ins for image features [B, E], of unit length."""
        drawn = torch.randn(features.shape, generator=generator).to(features.device)
        made = features.float() @ self.matrix.float() + self.offset.float() + drawn @ self.noise.float().T
        return F.normalize(made, dim=-1).to(features.dtype)


def ridge_map(x: Tensor, y: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Ridge regression of y on x: matrix and offset with ``y ~ x @ matrix + offset``."""
    mean_x, mean_y = x.mean(0), y.mean(0)
    centred = x - mean_x
    gram = centred.T @ centred
    damped = gram + ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    matrix = torch.linalg.solve(damped, centred.T @ (y - mean_y))
    return matrix, mean_y - mean_x @ matrix
