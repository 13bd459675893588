"""A base model's target layers as a hypernetwork looks at them, those of each shape together."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lofa_core.conditions import Conditions
from lofa_core.hypernetwork import Hypernetwork
from lofa_core.trunk import Layers


def looks_at(hypernetwork: Hypernetwork, weights: Sequence[Tensor]) -> list[Layers]:
    """All target layers as the network looks at them, those of each shape together."""
    return [
        hypernetwork.look_at(own, torch.tensor(places, device=own.device))
        for own, places in zip(weights, hypernetwork.base.by_shape().values(), strict=True)
    ]


def names_by_shape(hypernetwork: Hypernetwork) -> list[list[str]]:
    """The names of each shape's target layers."""
    layers = hypernetwork.base.layers
    return [[layers[place].name for place in places] for places in hypernetwork.base.by_shape().values()]


def some_of(layers: Layers, rows: Tensor) -> Layers:
    """Some of them."""
    return Layers(layers.shape, layers.index[rows], layers.row[rows], layers.patches[rows])


def on(conditions: Conditions, device: torch.device) -> Conditions:
    """The conditions on a device."""
    return {kind: given.to(torch.empty(0, device=device)) for kind, given in conditions.items()}
