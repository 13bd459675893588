"""Text-to-LoRA's hypernetwork (2506.06105) on our tasks: an MLP from a pooled condition, a layer's depth and
its kind to all of that layer's A and B. It never looks at the base weights.
"""

import torch
from torch import Tensor, nn

from lofa_core.conditions import Conditions
from lofa_core.conditions.encoders import make_encoder
from lofa_core.descriptions import BaseDescription, ConditionDescription
from lofa_core.hypernetwork import Response
from lofa_core.normalisation import TargetStatistics
from lofa_core.trunk import Layers, shape_key

from ..config import TextToLoRAConfig
from ..data.folder_tasks import Tasks
from ..factors import Factors
from ..lora_dataset import LoRADataset
from ..stages import Reconstruction


class TextToLoRA(nn.Module):
    """The variant with a head for all of A and B (their "L"), as offsets from the mean LoRA like LoFA's."""

    row_of: Tensor  # int64 [L]: a layer's place among those of its shape

    def __init__(
        self,
        base: BaseDescription,
        conditions: tuple[ConditionDescription, ...],
        rank: int,
        width: int,
        blocks: int,
    ):
        super().__init__()
        self.base, self.rank = base, rank
        self.conditions: dict[str, ConditionDescription] = {known.kind: known for known in conditions}
        layers, groups = base.layers, base.by_shape()
        kinds = list(dict.fromkeys(layer.kind for layer in layers))
        self.register_buffer("depth_of", torch.tensor([layer.depth for layer in layers]), persistent=False)
        self.register_buffer(
            "kind_of", torch.tensor([kinds.index(layer.kind) for layer in layers]), persistent=False
        )
        row_of = torch.zeros(len(layers), dtype=torch.long)
        for places in groups.values():
            row_of[places] = torch.arange(len(places))
        self.register_buffer("row_of", row_of, persistent=False)
        self.encoders = nn.ModuleDict({given.kind: make_encoder(given, width) for given in conditions})
        self.depth_embedding = nn.Embedding(1 + max(layer.depth for layer in layers), width)
        self.kind_embedding = nn.Embedding(len(kinds), width)
        self.joined = nn.Linear(3 * width, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
            )
            for _ in range(blocks)
        )
        self.norm = nn.LayerNorm(width)
        self.statistics = nn.ModuleDict(
            {shape_key(shape): TargetStatistics(len(own), rank, *shape) for shape, own in groups.items()}
        )
        self.to_A = nn.ModuleDict({shape_key(shape): nn.Linear(width, rank * shape[1]) for shape in groups})
        self.to_B = nn.ModuleDict({shape_key(shape): nn.Linear(width, shape[0] * rank) for shape in groups})
        for head in (*self.to_A.values(), *self.to_B.values()):
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)

    def look_at(self, weights: Tensor, index: Tensor) -> Layers:
        """The layers `index` [N]; of `weights` [N, out, in] only the shape counts."""
        shape = (weights.shape[1], weights.shape[2])
        return Layers(shape, index, self.row_of[index], weights.new_empty(len(index), 0, 0))

    def layers(self, looked_at: Layers, conditions: Conditions) -> tuple[Tensor, Tensor]:
        """(A [B, N, r, in], B [B, N, out, r]) of N layers of one shape under B conditions."""
        key, index = shape_key(looked_at.shape), looked_at.index
        task = sum(self._pooled(kind, conditions) for kind in conditions)
        place = torch.cat(
            [self.depth_embedding(self.depth_of[index]), self.kind_embedding(self.kind_of[index])], -1
        )
        x = self.joined(
            torch.cat([task.unsqueeze(1).expand(-1, len(index), -1), place.expand(len(task), -1, -1)], -1)
        )
        for block in self.blocks:
            x = x + block(x)
        x = self.norm(x)
        A = self.to_A[key](x).unflatten(-1, (self.rank, looked_at.shape[1]))
        B = self.to_B[key](x).unflatten(-1, (looked_at.shape[0], self.rank))
        return self.statistics[key].denormalise(A, B, looked_at.row)

    def _pooled(self, kind: str, conditions: Conditions) -> Tensor:
        """[B, width]: the mean of a condition's tokens without padding, times its strength."""
        values, strength = conditions[kind].values, conditions[kind].strength
        tokens = self.encoders[kind](values)
        if kind == "pose":
            pooled = tokens.mean(1)
        else:
            there = (values != 0).any(-1, keepdim=True).to(tokens.dtype)
            pooled = (tokens * there).sum(1) / there.sum(1).clamp_min(1.0)
        return pooled if strength is None else strength.unsqueeze(1) * pooled

    def forward(
        self, weights: Tensor, index: Tensor, conditions: Conditions
    ) -> tuple[Tensor, Tensor, Response | None]:
        """As Hypernetwork.forward, without a response."""
        return *self.layers(self.look_at(weights, index), conditions), None


class TextToLoRAStage(Reconstruction):
    """Trains the MLP by the same losses on the same tasks as Stage II."""

    name = "text_to_lora"

    def __init__(
        self,
        network: TextToLoRA,
        data: Tasks,
        known: LoRADataset,
        held_out: LoRADataset | None,
        settings: TextToLoRAConfig,
        device: torch.device,
    ):
        network = network.to(device)
        super().__init__(network, _AllLayers(network), network, data, known, held_out, settings, device)


class _AllLayers(nn.Module):
    """One forward pass for data-parallel training."""

    def __init__(self, network: TextToLoRA):
        super().__init__()
        self.network = network

    def forward(self, looks: list[Layers], conditions: Conditions) -> Factors:
        A, B = zip(*(self.network.layers(layers, conditions) for layers in looks), strict=True)
        return Factors(A, B)
