"""What tasks know of the base model they live in."""

import glob
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from lofa_core.base_models import BaseWeights
from lofa_core.conditions import Conditions, Given
from lofa_core.descriptions import BaseDescription, LayerDescription

from .backbones import (
    TEXT_LENGTH,
    load_noise_schedule,
    load_transformer,
    load_unet,
    pixels_of_a_latent,
    use_folded_padding,
)
from .denoisers import Denoiser, SDXLDenoiser, WanDenoiser
from .looks import Predictor


class OverBase:
    """The base model of the folder `base`; `more_bases`: folders of its relatives."""

    def __init__(self, base: Path, more_bases: Sequence[str] = ()):
        self.base, self.more_bases = base, more_bases

    def family(self) -> "list[OverBase]":
        """This base, and the relatives that training draws from. ValueError where one has other layers."""
        found = [self]
        for pattern in self.more_bases:
            folders = sorted(glob.glob(pattern))
            if not folders:
                raise ValueError(f"data.more_bases: there is no folder {pattern}.")
            found += [OverBase(Path(folder)) for folder in folders]
        for relative in found[1:]:
            if relative.base_description().layers != self.base_description().layers:
                raise ValueError(
                    f"{relative.base}: more_bases are to have the layers of {self.base} "
                    f"({self.weights.model.summary()}), not {relative.weights.model.summary()}."
                )
        return found

    def load_denoiser(self) -> Denoiser:
        """The frozen base model, in float32."""
        if self._is_sdxl:
            model = load_unet(self.base).requires_grad_(False)
            return SDXLDenoiser(model, load_noise_schedule(self.base), pixels_of_a_latent(self.base))
        model = load_transformer(self.base).requires_grad_(False)
        use_folded_padding(model)
        return WanDenoiser(model)

    @property
    def _is_sdxl(self) -> bool:
        return self.weights.model.name.startswith("SDXL")

    @property
    def text_rows(self) -> int:
        """To how many rows the base pads text states with zeros; 0: its padding is tokens like others."""
        return 0 if self._is_sdxl else TEXT_LENGTH

    @cached_property
    def weights(self) -> BaseWeights:
        return BaseWeights.open(self.base)

    def weights_by_shape(self) -> list[Tensor]:
        """[L, out, in] float32 of the target layers of each shape."""
        layers = self.weights.model.layers
        return [
            torch.stack([self.weights.read(layers[place]).float() for place in places])
            for places in self.base_description().by_shape().values()
        ]

    def base_description(self) -> BaseDescription:
        """The base model that a hypernetwork trained on these tasks is for."""
        model = self.weights.model
        layers = tuple(LayerDescription(x.name, x.depth, x.kind, x.shape) for x in model.layers)
        return BaseDescription(model.name, layers, self.weights.fingerprint())


def padded(conditions: Conditions, hypernetwork: Predictor) -> Conditions:
    """The conditions with the rows of zeros that the hypernetwork is used with: some attend to them."""
    return {
        kind: _padded(given, hypernetwork.conditions[kind].padded_to) for kind, given in conditions.items()
    }


def _padded(given: Given, rows: int) -> Given:
    missing = rows - given.values.shape[1]
    return given if missing <= 0 else replace(given, values=F.pad(given.values, (0, 0, 0, missing)))
