"""The world's clips as VAE latents in memory: what the base model, the LoRAs and the hypernetwork are trained
on.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from diffusers import AutoencoderKLWan

from lofa_core.whole_files import cleared, whole_file

from ..backbones import from_unit, to_unit
from . import vae as vae_module
from . import world
from .world_tasks import LOOK_FACTORS, WorldTask, look_indices

T = TypeVar("T")


@dataclass
class LatentClips:
    """Unit latents float16 [N, 16, 5, 8, 8]; factor indices uint8 [N, 6]; indices of shirt, trousers,
    backdrop [N, 3].
    """

    latents: torch.Tensor
    actions: torch.Tensor
    looks: torch.Tensor

    def __len__(self) -> int:
        return len(self.latents)

    def action(self, index: int) -> world.Action:
        values = zip(world.FACTORS.values(), self.actions[index].tolist(), strict=True)
        return world.Action(*(options[i] for options, i in values))

    def look(self, index: int) -> world.Look:
        values = zip(LOOK_FACTORS.values(), self.looks[index].tolist(), strict=True)
        return world.Look(*(options[i] for options, i in values))

    def of(self, task: WorldTask) -> torch.Tensor:
        """Indices of the clips that show a task's action and look."""
        shown = torch.ones(len(self), dtype=torch.bool)
        if task.action is not None:
            shown &= (self.actions == torch.tensor(task.action.indices(), dtype=torch.uint8)).all(1)
        if task.look is not None:
            shown &= (self.looks == torch.tensor(look_indices(task.look), dtype=torch.uint8)).all(1)
        return shown.nonzero().flatten()

    def action_weights(self) -> torch.Tensor:
        """Weights [16, 5, 8, 8] of mean 1 for a loss on these latents, larger where the action shows.

        Most of a clip's variance is clothes and backdrop; a swinging arm is two hundredths of it. Fixed
        weights leave a mean squared error's minimiser where it is and let training see the action sooner.
        """
        labels = torch.unique(self.actions, dim=0, return_inverse=True)[1]
        counts = torch.bincount(labels).clamp(min=1).view(-1, 1, 1, 1, 1)
        clips = self.latents.float()
        means = torch.zeros(len(counts), *clips.shape[1:]).index_add_(0, labels, clips) / counts
        shown = means.var(0)
        return (1.0 + 4.0 * shown / shown.mean()) / 5.0

    def save(self, path: Path) -> None:
        """Write whole or not at all."""
        with whole_file(cleared(path)) as unfinished:
            torch.save({"latents": self.latents, "actions": self.actions, "looks": self.looks}, unfinished)

    @classmethod
    def load(cls, *paths: Path) -> "LatentClips":
        parts = [torch.load(path, weights_only=True) for path in paths]
        return cls(*(torch.cat([part[key] for part in parts]) for key in ("latents", "actions", "looks")))


def _on_all_cores(function: Callable[[Any], T], parts: Iterable[Any]) -> list[T]:
    """`function` of each part, in order, without gradients; a part is computed by one thread.

    The VAE takes few clips at a time (more leave the processor's caches), which are too small to share out.
    """

    def one(part: Any) -> T:
        with torch.no_grad():  # which PyTorch remembers for each thread
            return function(part)

    with ThreadPoolExecutor(
        torch.get_num_threads(), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        return list(pool.map(one, parts))


def decode_clips(decoder: vae_module.WholeClipVAE, latents: torch.Tensor) -> np.ndarray:
    """Unit latents [N, 16, 5, 8, 8] -> uint8 clips [N, T, H, W, 3]."""

    def decode(part: torch.Tensor) -> np.ndarray:
        return vae_module.to_clips(decoder.decode(from_unit(part, decoder.model)))

    return np.concatenate(_on_all_cores(decode, latents.float().split(2)))


def encode_clips(vae: AutoencoderKLWan, tasks: list[WorldTask], each: int, seed: int) -> LatentClips:
    """Draw `each` clips of every task and encode them (posterior means); what a task leaves open is drawn."""
    actions = world.all_actions()
    rng = np.random.default_rng(seed)
    encoder = vae_module.WholeClipVAE(vae)
    latents: list[torch.Tensor] = []
    labels, looks = [], []

    def encode(clips: np.ndarray) -> torch.Tensor:
        # The layout decides how noise is drawn "like" a tensor, and convolutions choose it by processor.
        return to_unit(encoder.encode(vae_module.to_video(clips)), vae).half().contiguous()

    for task in tasks:
        shown = [task.look or world.random_look(rng) for _ in range(each)]
        done = [task.action or actions[rng.integers(len(actions))] for _ in range(each)]
        clips = np.stack(
            [world.draw_clip(action, look, rng) for action, look in zip(done, shown, strict=True)]
        )
        latents += _on_all_cores(encode, [clips[start : start + 2] for start in range(0, each, 2)])
        labels += [action.indices() for action in done]
        looks += [look_indices(look) for look in shown]
    return LatentClips(
        torch.cat(latents), torch.tensor(labels, dtype=torch.uint8), torch.tensor(looks, dtype=torch.uint8)
    )
