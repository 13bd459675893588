"""What tasks know of the base model they live in."""

from functools import cached_property
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor
from torch.nn import functional as F

from lofa_core.base_models import BaseWeights
from lofa_core.descriptions import BaseDescription, LayerDescription
from lofa_core.hypernetwork import Hypernetwork

from .backbones import load_transformer, use_folded_padding


class OverBase:
    """The base model of the folder `base`."""

    def __init__(self, base: Path):
        self.base = base

    def load_model(self) -> WanTransformer3DModel:
        """The frozen base model, taking text from `fold_padding`."""
        model = load_transformer(self.base).requires_grad_(False)
        use_folded_padding(model)
        return model

    @cached_property
    def weights(self) -> BaseWeights:
        return BaseWeights.open(self.base)

    def stacked_weights(self) -> Tensor:
        """[L, out, in] float32 of all target layers."""
        return torch.stack([self.weights.read(layer).float() for layer in self.weights.model.layers])

    def base_description(self) -> BaseDescription:
        """The base model that a hypernetwork trained on these tasks is for."""
        model = self.weights.model
        layers = tuple(LayerDescription(x.name, x.depth, x.kind, x.shape) for x in model.layers)
        return BaseDescription(model.name, layers, self.weights.fingerprint())


def padded(condition: Tensor, hypernetwork: Hypernetwork) -> Tensor:
    """Condition tokens [B, S, d] with the rows of zeros that the hypernetwork is used with: some attend to
    them.
    """
    return F.pad(condition, (0, 0, 0, max(0, hypernetwork.condition.padded_to - condition.shape[1])))
