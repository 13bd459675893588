"""The world's portraits in memory: pixels and what they show."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from . import world


@dataclass
class Portraits:
    """Pixels uint8 [N, 64, 64, 3] and what they show: indices of factors [N, 8] and of attributes [N, 5],
    proportions float32 [N, 3]."""

    pixels: Tensor
    factors: Tensor
    proportions: Tensor
    attributes: Tensor

    def __len__(self) -> int:
        return len(self.factors)

    def identity(self, index: int) -> world.Identity:
        values = zip(world.FACTORS.values(), self.factors[index].tolist(), strict=True)
        return world.Identity(*(v[i] for v, i in values), tuple(self.proportions[index].tolist()))

    def attributes_of(self, index: int) -> world.Attributes:
        values = zip(world.ATTRIBUTES.values(), self.attributes[index].tolist(), strict=True)
        return world.Attributes(*(v[i] for v, i in values))

    def save(self, path: Path) -> None:
        """Write whole or not at all."""
        partial = path.with_suffix(".partial")
        torch.save(vars(self), partial)
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> "Portraits":
        return cls(**torch.load(path, weights_only=True))


def draw_portraits(identities: list[world.Identity], each: int, seed: int) -> Portraits:
    """Draw every identity `each` times, one after the other, with random attributes."""
    rng = np.random.default_rng(seed)
    people = [identity for identity in identities for _ in range(each)]
    shown = [world.random_attributes(rng) for _ in people]
    pixels = np.stack([world.draw(*pair, rng) for pair in zip(people, shown, strict=True)])
    return Portraits(
        torch.from_numpy(pixels),
        torch.tensor([person.indices() for person in people]),
        torch.tensor([person.proportions for person in people]),
        torch.tensor([attributes.indices() for attributes in shown]),
    )


def random_portraits(identities: list[world.Identity], count: int, each: int, seed: int) -> Portraits:
    """Portraits of `count` different identities, `each` of everyone."""
    picks = np.random.default_rng([seed, 1]).permutation(len(identities))[:count]
    return draw_portraits([identities[i] for i in picks], each, seed)


def to_pixels(pictures: np.ndarray | Tensor) -> Tensor:
    """uint8 [B, H, W, 3] -> float32 [B, 3, H, W] in -1..1."""
    return torch.as_tensor(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def to_pictures(pixels: Tensor) -> np.ndarray:
    """float [B, 3, H, W] in -1..1 -> uint8 [B, H, W, 3]."""
    return ((pixels.clamp(-1, 1) + 1.0) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
