"""Muon for the weight matrices and AdamW for the rest, behind one object."""

import torch
from torch import nn


class MuonAdamW:
    """torch.optim.Muon on every weight of two or more axes (convolutions as [out, in * taps]), AdamW on what
    is left.

    Muon's orthogonalised steps take small models to a given loss in well under half of AdamW's steps.
    Embeddings and first and last layers named in `adamw_names` (substrings) stay with AdamW, as is usual.
    Make it after the model has reached its device: it holds views of the parameters.
    """

    def __init__(
        self, model: nn.Module, learning_rate: float, *, muon_rate: float, adamw_names: tuple[str, ...] = ()
    ):
        self._matrices: list[tuple[nn.Parameter, torch.Tensor]] = []
        rest = []
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            if (
                parameter.ndim >= 2
                and min(parameter.shape[0], parameter[0].numel()) > 1
                and not any(part in name for part in adamw_names)
            ):
                self._matrices.append((parameter, parameter.data.view(parameter.shape[0], -1)))
            else:
                rest.append(parameter)
        self.optimisers: list[torch.optim.Optimizer] = [
            torch.optim.Muon([flat for _, flat in self._matrices], lr=muon_rate, weight_decay=0.0,
                             momentum=0.95, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0),
        ]  # fmt: skip
        self._rates = [group["lr"] for optimiser in self.optimisers for group in optimiser.param_groups]

    def step(self, factor: float) -> None:
        """One step at `factor` times the learning rates; gradients are cleared."""
        groups = [group for optimiser in self.optimisers for group in optimiser.param_groups]
        for group, rate in zip(groups, self._rates, strict=True):
            group["lr"] = rate * factor
        for parameter, flat in self._matrices:
            if flat.data_ptr() != parameter.data_ptr():
                raise RuntimeError(
                    "the model's parameters moved after MuonAdamW was made; make it afterwards"
                )
            flat.grad = None if parameter.grad is None else parameter.grad.view_as(flat)
        for optimiser in self.optimisers:
            optimiser.step()
        for parameter, flat in self._matrices:
            parameter.grad, flat.grad = None, None
        self.optimisers[1].zero_grad()
