"""Target statistics: the mean LoRA of a training set and its spread, so that networks predict numbers of
order one.
"""

import torch
from torch import Tensor, nn


class TargetStatistics(nn.Module):
    """Buffers over L target layers: A_mean [L, r, in], B_mean [L, out, r]; per layer, the deviation of A and
    of B from those means (A_scale, B_scale [L]) and the log deviation of dW's entries (delta_log_deviation
    [L])."""

    A_mean: Tensor
    B_mean: Tensor
    A_scale: Tensor
    B_scale: Tensor
    delta_log_deviation: Tensor

    def __init__(self, layers: int, rank: int, out_features: int, in_features: int):
        super().__init__()
        self.register_buffer("A_mean", torch.zeros(layers, rank, in_features))
        self.register_buffer("B_mean", torch.zeros(layers, out_features, rank))
        self.register_buffer("A_scale", torch.ones(layers))
        self.register_buffer("B_scale", torch.ones(layers))
        self.register_buffer("delta_log_deviation", torch.zeros(layers))

    @torch.no_grad()
    def fit(self, A: Tensor, B: Tensor) -> None:
        """Take the statistics of K LoRAs: A [K, L, r, in], B [K, L, out, r] (alpha already in B)."""
        if A.ndim != 4 or B.ndim != 4 or A.shape[:3] != (*B.shape[:2], B.shape[3]):
            raise ValueError(
                f"expected A [K, L, r, in] and B [K, L, out, r], got {list(A.shape)} and {list(B.shape)}"
            )
        self.A_mean.copy_(A.mean(0))
        self.B_mean.copy_(B.mean(0))
        self.A_scale.copy_((A - self.A_mean).pow(2).mean(dim=(0, 2, 3)).sqrt().clamp_min(1e-8))
        self.B_scale.copy_((B - self.B_mean).pow(2).mean(dim=(0, 2, 3)).sqrt().clamp_min(1e-8))
        mean = self.B_mean @ self.A_mean
        spread = sum(((b @ a) - mean).pow(2).mean(dim=(1, 2)) for a, b in zip(A, B, strict=True)) / len(A)
        self.delta_log_deviation.copy_(0.5 * spread.clamp_min(1e-16).log())

    @torch.no_grad()
    def start(self, A: Tensor, scale: float) -> None:
        """Without LoRAs to fit: A [L, r, in] for an output of zero, its entries' own size as A's unit, and
        `scale` as B's. B itself is zero then, and dW.
        """
        self.A_mean.copy_(A)
        self.A_scale.copy_(A.pow(2).mean(dim=(1, 2)).sqrt().clamp_min(1e-8))
        self.B_scale.fill_(scale)
        self.delta_log_deviation.copy_((A.shape[1] ** 0.5 * self.A_scale * scale).log())

    def denormalise(self, A: Tensor, B: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Offsets A [..., N, r, in], B [..., N, out, r] for the layers `index` [N] -> LoRA factors."""
        return (
            self.A_mean[index] + self.A_scale[index].view(-1, 1, 1) * A,
            self.B_mean[index] + self.B_scale[index].view(-1, 1, 1) * B,
        )

    def normalise(self, A: Tensor, B: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of `denormalise`."""
        return (
            (A - self.A_mean[index]) / self.A_scale[index].view(-1, 1, 1),
            (B - self.B_mean[index]) / self.B_scale[index].view(-1, 1, 1),
        )
