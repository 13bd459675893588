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


class MuonAdamW(torch.optim.AdamW):
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
        adamw_names: tuple[str, ...] = (),
        momentum: float = 0.95,
    ):
        self.momentum = momentum
        matrices, rest = [], []
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            shape = _as_matrix(parameter)
            large = min(shape) > 1 and not any(part in name for part in adamw_names)
            (matrices if large else rest).append(parameter)
        groups = [{"params": matrices, "muon": True}, {"params": rest, "muon": False}]
        super().__init__(
            [group for group in groups if group["params"]],
            lr=learning_rate,
            betas=(0.9, 0.98),
            weight_decay=0.0,
        )

    @torch.no_grad()
    def step(self, closure=None):
        """One step; a matrix without a gradient counts as one whose gradient is zero."""
        for group in self.param_groups:
            if group["muon"]:
                self._muon_step(group["params"], group["lr"])
        return super().step(closure)  # AdamW passes over the matrices, which have no gradient now

    def _muon_step(self, matrices: list[nn.Parameter], learning_rate: float) -> None:
        by_shape: dict[tuple[int, int], list[nn.Parameter]] = defaultdict(list)
        for parameter in matrices:
            by_shape[_as_matrix(parameter)].append(parameter)
        for shape, parameters in by_shape.items():  # one batched product instead of many small ones
            gradients = torch.stack(
                [(torch.zeros_like(p) if p.grad is None else p.grad).view(shape) for p in parameters]
            )
            averages = []
            for parameter, gradient in zip(parameters, gradients, strict=True):
                state = self.state[parameter]
                if "average" not in state:
                    state["average"] = torch.zeros_like(gradient)
                    state["step"] = torch.zeros(())  # AdamW looks for one when a state is loaded
                averages.append(state["average"].lerp_(gradient, 1.0 - self.momentum))
            steps = orthogonalised(gradients.lerp(torch.stack(averages), self.momentum))
            rate = learning_rate * 0.2 * math.sqrt(max(shape))
            for parameter, step in zip(parameters, steps, strict=True):
                parameter.sub_(step.view_as(parameter), alpha=rate)
                parameter.grad = None


def warm_up_and_cosine(step: int, steps: int, warm_up: int, end: float = 0.02) -> float:
    """Factor of the learning rate at a step: a line up to 1, times a cosine from 1 down to `end`."""
    cosine = end + 0.5 * (1.0 - end) * (1.0 + math.cos(math.pi * step / steps))
    return min(1.0, (step + 1) / max(1, warm_up)) * cosine


def set_learning_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    """The rate of every group from the next step on."""
    for group in optimiser.param_groups:
        group["lr"] = rate


def _as_matrix(parameter: Tensor) -> tuple[int, int]:
    return (len(parameter), parameter[0].numel()) if parameter.ndim >= 2 else (1, 1)
