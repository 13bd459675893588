"""Both stages at once, from clips alone: diffusion loss through the base model, no LoRA dataset.

After the HM-CFG paper (2511.03156), which trains a hypernetwork by the diffusion loss and an L2 penalty on
what it puts out.
"""

import torch
from torch import Tensor, nn

from lofa_core.hypernetwork import Hypernetwork

from .config import EndToEndConfig
from .data.folder_tasks import Tasks
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

    def _on_factors(self, predicted: tuple[Tensor, Tensor], rows: Tensor) -> dict[str, Tensor]:
        """L2 on the network's output, in the units it is put out in."""
        statistics = self.hypernetwork.statistics
        A, B = predicted if statistics is None else statistics.normalise(*predicted, self.index)
        return {"size": A.square().mean() + B.square().mean()}


class _Both(nn.Module):
    """One forward pass of both stages. Stage I's own heads learn nothing here and are left out."""

    def __init__(self, hypernetwork: Hypernetwork):
        super().__init__()
        self.trunk, self.stage2 = hypernetwork.stage1.trunk, hypernetwork.stage2

    def forward(self, patches: Tensor, index: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        features = self.trunk(patches, index, self.trunk.project(condition), None)
        return self.stage2(patches, index, self.stage2.trunk.project(condition), features)
