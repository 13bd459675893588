"""Pictures of the world's looks as the image encoder sees them, encoded once."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lofa_core.conditions.image import CLIPImageEncoder
from lofa_core.whole_files import cleared, whole_file

from . import image_encoder, world
from .world_tasks import all_looks

IMAGE_WIDTH = image_encoder.WIDTH
PICTURES = 8  # of each look
_SEED = 77


def style_states(base: Path, actions: list[world.Action], cache: Path) -> dict[world.Look, Tensor]:
    """States float16 [PICTURES, S, d] of pictures of every look; `cache` is a file to keep them in."""
    looks = all_looks()
    if not cache.exists():
        encoder, rng = CLIPImageEncoder.open(base), np.random.default_rng(_SEED)
        states = []
        for look in looks:
            pictures = [image_encoder.picture(look, actions, rng) for _ in range(PICTURES)]
            states.append(encoder.encode(pictures)[0].unflatten(0, (PICTURES, -1)).half())
        cache.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(cleared(cache)) as unfinished:
            torch.save(torch.stack(states), unfinished)
    return dict(zip(looks, torch.load(cache, weights_only=True), strict=True))
