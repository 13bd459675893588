"""Conditions: what personalises a LoRA (text, pose, style, identity), and how a network is given them."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Given:
    """One kind of condition for B predictions.

    values: tokens [B, S, d] with zero rows as padding (text, style, identity), or skeletons [B, 3, T, H, W]
    in 0..1 (pose). strength [B]: 0 is as if it were not given, 1 as in training; None: 1 for all.
    """

    values: Tensor
    strength: Tensor | None = None

    def to(self, like: Tensor) -> "Given":
        """On the device and in the dtype of `like`."""
        return Given(self.values.to(like), None if self.strength is None else self.strength.to(like))


Conditions = Mapping[str, Given]  # by kind


def weakened(given: Given, strength: float) -> Given:
    """The same at another strength (above 1: strengthened). At 1 nothing is said of it: a network of a single
    kind of condition knows no other.
    """
    if strength == 1.0:
        return given
    before = given.strength if given.strength is not None else torch.ones(len(given.values))
    return Given(given.values, before * strength)
