"""Both stages at once, from clips alone: diffusion loss through the base model, no LoRA dataset.

After the HM-CFG paper (2511.03156), which trains a hypernetwork by the diffusion loss and an L2 penalty on
what it puts out.
"""

import torch
from torch import Tensor, nn

from lofa_core.conditions import Conditions
from lofa_core.hypernetwork import Hypernetwork
from lofa_core.trunk import Layers, shape_key

from .config import EndToEndConfig
from .data.folder_tasks import Tasks
from .factors import Factors
from .stages import Diffusion


class EndToEnd(Diffusion):
    """Trains the whole hypernetwork; Stage I learns to give features that Stage II can use."""

    name = "end_to_end"

    def __init__(
        self, hypernetwork: Hypernetwork, data: Tasks, settings: EndToEndConfig, device: torch.device
    ):
        hypernetwork = hypernetwork.to(device)
        super().__init__(hypernetwork, _Both(hypernetwork), hypernetwork, data, None, None, settings, device)
        self.weights["size"] = settings.size_weight

    def _on_factors(self, predicted: Factors, rows: Tensor) -> dict[str, Tensor]:
        """L2 on the network's output, in the units it is put out in."""
        statistics, total = self.hypernetwork.statistics, predicted.A[0].new_zeros(())
        layers = sum(map(len, self.groups))
        for look, (A, B) in zip(self.looks, predicted.pairs(), strict=True):
            if statistics is not None:
                A, B = statistics[shape_key(look.shape)].normalise(A, B, look.row)
            total = total + (A.square().mean() + B.square().mean()) * (len(look.row) / layers)
        return {"size": total}


class _Both(nn.Module):
    """One forward pass of both stages. Stage I's own heads learn nothing here and are left out."""

    def __init__(self, hypernetwork: Hypernetwork):
        super().__init__()
        self.trunk, self.stage2 = hypernetwork.stage1.trunk, hypernetwork.stage2

    def forward(self, looks: list[Layers], conditions: Conditions) -> Factors:
        given = self.trunk.project(conditions), self.stage2.trunk.project(conditions)
        found = (self.stage2(layers, given[1], self.trunk(layers, given[0], None)) for layers in looks)
        A, B = zip(*found, strict=True)
        return Factors(A, B)
