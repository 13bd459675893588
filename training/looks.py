"""A base model's target layers as a hypernetwork looks at them, those of each shape together."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lofa_core.conditions import Conditions
from lofa_core.descriptions import BaseDescription, ConditionDescription
from lofa_core.hypernetwork import Response
from lofa_core.trunk import Layers


class Predictor(Protocol):
    """What predicts the LoRAs of layers from a condition: LoFA's Hypernetwork, or a baseline in its place."""

    base: BaseDescription
    conditions: Mapping[str, ConditionDescription]
    statistics: nn.ModuleDict | None

    def look_at(self, weights: Tensor, index: Tensor) -> Layers:
        """The layers `index` [N] with weights [N, out, in]."""
        ...

    def __call__(
        self, weights: Tensor, index: Tensor, conditions: Conditions
    ) -> tuple[Tensor, Tensor, Response | None]:
        """(A [B, N, r, in], B [B, N, out, r], Stage I's response where there is one)."""
        ...

    def parameters(self) -> Any: ...


def looks_at(hypernetwork: Predictor, weights: Sequence[Tensor]) -> list[Layers]:
    """All target layers as the network looks at them, those of each shape together."""
    return [
        hypernetwork.look_at(own, torch.tensor(places, device=own.device))
        for own, places in zip(weights, hypernetwork.base.by_shape().values(), strict=True)
    ]


def names_by_shape(hypernetwork: Predictor) -> list[list[str]]:
    """The names of each shape's target layers."""
    layers = hypernetwork.base.layers
    return [[layers[place].name for place in places] for places in hypernetwork.base.by_shape().values()]


def some_of(layers: Layers, rows: Tensor) -> Layers:
    """Some of them."""
    return Layers(layers.shape, layers.index[rows], layers.row[rows], layers.patches[rows])


def on(conditions: Conditions, device: torch.device) -> Conditions:
    """The conditions on a device."""
    return {kind: given.to(torch.empty(0, device=device)) for kind, given in conditions.items()}
