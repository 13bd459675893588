"""What identity tasks are made of: a person's latents with captions, and a reference picture of theirs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from . import captions, world
from .model import Prompted, PromptEncoder
from .portraits import Portraits, draw_portraits
from .vae import encode


@dataclass
class IdentityData:
    """One person: scaled latents [n, 4, 16, 16], a fine caption for each, and a reference picture uint8
    [64, 64, 3] that is none of the n."""

    identity: world.Identity
    latents: Tensor
    captions: list[str]
    reference: np.ndarray


def latents_of(vae: AutoencoderKL, portraits: Portraits) -> Tensor:
    """Scaled latents float16 [N, 4, 16, 16]: unit variance, as the UNet sees them."""
    return (encode(vae, portraits) * vae.config.scaling_factor).half()


def cached_latents(vae: AutoencoderKL, portraits: Portraits, path: Path) -> Tensor:
    """`latents_of`, kept in a file."""
    if not path.exists():
        partial = path.with_suffix(".partial")
        torch.save(latents_of(vae, portraits), partial)
        partial.replace(path)
    return torch.load(path, weights_only=True)


def identity_data(
    vae: AutoencoderKL, identities: Sequence[world.Identity], each: int, seed: int
) -> list[IdentityData]:
    """`each` latents of every person with whole captions, and a reference picture in other attributes."""
    drawn = draw_portraits(list(identities), each + 1, seed)
    latents = latents_of(vae, drawn)
    rng = np.random.default_rng([seed, 2])
    people = []
    for number, identity in enumerate(identities):
        start = number * (each + 1)
        rows = range(start + 1, start + 1 + each)
        said = [captions.fine_caption(identity, drawn.attributes_of(row), rng) for row in rows]
        people.append(
            IdentityData(identity, latents[rows.start : rows.stop], said, drawn.pixels[start].numpy())
        )
    return people


def coarse(prompts: PromptEncoder, count: int = 1) -> Prompted:
    """The coarse prompt, `count` times."""
    return prompts([captions.COARSE]).repeat(count)
