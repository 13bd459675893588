"""Muon for the weight matrices and AdamW for the rest, behind one object."""

import math
from collections import defaultdict

import torch
from torch import Tensor, nn

# Coefficients of the quintic Newton-Schulz iteration (Jordan et al., Muon, 2024).
_QUINTIC = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5


def orthogonalised(matrices: Tensor) -> Tensor:
    """Matrices [N, rows, columns] with their singular values brought near 1 (0.7 to 1.2), the singular
    vectors kept.

    In the matrices' own precision: torch.optim.Muon always takes bfloat16, which a processor without it
    computes some thirty times slower than float32.
    """
    a, b, c = _QUINTIC
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(_ITERATIONS):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if tall else x


class MuonAdamW:
    """Muon (Nesterov momentum, step size matched to AdamW's) on every weight of two or more axes
    (convolutions as [out, in * taps]), AdamW on what is left.

    Muon's orthogonalised steps take small models to a given loss in well under half of AdamW's steps.
    Embeddings and first and last layers named in `adamw_names` (substrings) stay with AdamW, as is usual.
    """

    def __init__(
        self,
        model: nn.Module,
        learning_rate: float,
        *,
        muon_rate: float,
        adamw_names: tuple[str, ...] = (),
        momentum: float = 0.95,
    ):
        self.muon_rate, self.momentum = muon_rate, momentum
        by_shape: dict[tuple[int, int], list[nn.Parameter]] = defaultdict(list)
        rest = []
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            shape = (len(parameter), parameter[0].numel()) if parameter.ndim >= 2 else (1, 1)
            if min(shape) > 1 and not any(part in name for part in adamw_names):
                by_shape[shape].append(parameter)
            else:
                rest.append(parameter)
        self._groups = [  # parameters of one shape together: one batched product instead of many small ones
            (parameters, torch.zeros(len(parameters), *shape, device=parameters[0].device))
            for shape, parameters in by_shape.items()
        ]
        self._adamw = torch.optim.AdamW(rest, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
        self._adamw_rate = learning_rate

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """One step at `factor` times the learning rates; gradients are cleared. A matrix without a gradient
        counts as one whose gradient is zero.
        """
        for parameters, average in self._groups:
            gradients = torch.stack(
                [
                    (torch.zeros_like(p) if p.grad is None else p.grad).view(average.shape[1:])
                    for p in parameters
                ]
            )
            average.lerp_(gradients, 1.0 - self.momentum)
            steps = orthogonalised(gradients.lerp(average, self.momentum))
            rate = factor * self.muon_rate * 0.2 * math.sqrt(max(average.shape[1:]))
            for parameter, step in zip(parameters, steps, strict=True):
                parameter.sub_(step.view_as(parameter), alpha=rate)
                parameter.grad = None
        for group in self._adamw.param_groups:
            group["lr"] = self._adamw_rate * factor
        self._adamw.step()
        self._adamw.zero_grad()
