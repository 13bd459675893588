"""Baselines on a LoRA dataset: the mean LoRA, the nearest task's LoRA, ridge regression.

All three are told the true factors of a task, which the hypernetwork has to read from its condition. Each
returns the LoRAs of M wanted tasks.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ..factors import Factors


def mean_lora(known: Factors, wanted: int) -> Factors:
    """The same LoRA for every task: the mean of A and of B."""
    return known.map(lambda factor: factor.mean(0).expand(wanted, *factor.shape[1:]))


def nearest_lora(loras: Factors, known: Tensor, wanted: Tensor) -> Factors:
    """The LoRA of the task that agrees in most factors; known [K, F] and wanted [M, F] are factor indices."""
    agreement = (wanted.unsqueeze(1) == known.unsqueeze(0)).sum(-1)
    return loras[agreement.argmax(1)]


def ridge_lora(loras: Factors, known: Tensor, wanted: Tensor, strengths=(0.1, 1.0, 10.0, 100.0)) -> Factors:
    """Ridge regression from one-hot factors to entries of A and B."""
    return loras.unflat(ridge(loras.flat(), known, wanted, strengths))


def ridge(Y: Tensor, known: Tensor, wanted: Tensor, strengths=(0.1, 1.0, 10.0, 100.0)) -> Tensor:
    """Rows [M, n] for wanted tasks from those of known ones Y [K, n], by ridge regression on one-hot factors;
    the strength by leave-one-out error.
    """
    sizes = [int(max(known[:, i].max(), wanted[:, i].max())) + 1 for i in range(known.shape[1])]

    def one_hot(indices: Tensor) -> Tensor:
        return torch.cat([F.one_hot(indices[:, i].long(), size) for i, size in enumerate(sizes)], 1).float()

    X, X_wanted = one_hot(known), one_hot(wanted)
    centre = X.mean(0)
    X, X_wanted = X - centre, X_wanted - centre
    mean = Y.mean(0)
    best = None
    for strength in strengths:
        inverse = torch.linalg.inv(X.T @ X + strength * torch.eye(X.shape[1]))
        weights = inverse @ X.T @ (Y - mean)
        # Leave-one-out residuals of a linear smoother: the residual over one minus its leverage.
        leverage = (X @ inverse * X).sum(1, keepdim=True) + 1.0 / len(X)
        error = (((Y - mean) - X @ weights) / (1.0 - leverage)).pow(2).mean()
        if best is None or error < best[0]:
            best = (error, weights)
    return X_wanted @ best[1] + mean
