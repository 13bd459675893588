"""The miniature's tasks: an action, the sentences for it, its clips as latents, and the base model they live
in.
"""

from functools import cached_property
from pathlib import Path

import numpy as np
from torch import Tensor

from lofa_core import miniature
from lofa_core.descriptions import BaseDescription, ConditionDescription

from ..backbones import load_vae
from ..config import DataConfig
from ..over_base import OverBase
from . import captions, text_encoder, world
from .latents import LatentClips, encode_clips
from .transformer import PromptEncoder, load_prompt_encoder


class MiniatureTasks(OverBase):
    """Everything the training stages ask for. `folder` holds the run's cached latents."""

    def __init__(self, config: DataConfig, folder: Path, base: Path = miniature.FOLDER):
        super().__init__(base)
        self.config, self.folder = config, folder
        self.training, self.held_out = world.split_actions(config.held_out_tasks, config.seed)

    @cached_property
    def prompts(self) -> PromptEncoder:
        return load_prompt_encoder(self.base)

    @cached_property
    def clips(self) -> LatentClips:
        """Latents of the training actions, drawn and encoded once."""
        path = self.folder / "latents.pt"
        if not path.exists():
            encoded = encode_clips(
                load_vae(self.base), self.training, self.config.clips_per_task, self.config.seed
            )
            path.parent.mkdir(parents=True, exist_ok=True)
            encoded.save(path)
        return LatentClips.load(path)

    @cached_property
    def clips_by_action(self) -> dict[world.Action, Tensor]:
        """Indices into `clips`."""
        return {action: self.clips.of(action) for action in self.training}

    def held_out_clips(self, each: int, offset: int = 0) -> LatentClips:
        """Real latents of the held-out actions, from seeds that training never used; another set for each
        `offset`.
        """
        return encode_clips(load_vae(self.base), self.held_out, each, self.config.seed + 90_000 + offset)

    def descriptions(self) -> tuple[BaseDescription, ConditionDescription]:
        """What a hypernetwork trained on these tasks is for."""
        condition = ConditionDescription("text", text_encoder.WIDTH, captions.known_words(), captions.COARSE)
        return self.base_description(), condition

    def sentence(self, action: world.Action, rng: np.random.Generator) -> str:
        """A training sentence: mostly whole, some with parts left out or clothes and a place named."""
        keep = 1.0 if rng.random() < 0.8 else 0.8
        look = world.random_look(rng) if rng.random() < 0.3 else None
        return captions.fine_caption(action, look, rng, keep=keep)

    def plain_sentence(self, action: world.Action, rng: np.random.Generator) -> str:
        """A whole sentence in training's wordings, without clothes and place."""
        return captions.fine_caption(action, None, rng)

    def reserved_sentence(self, action: world.Action, rng: np.random.Generator) -> str:
        """A sentence in wordings and a plan that training never used."""
        return captions.fine_caption(action, None, rng, wordings="reserved", plans="reserved")

    @property
    def coarse_prompt(self) -> str:
        return captions.COARSE

    def conditions(self, sentences: list[str]) -> Tensor:
        """Condition tokens [B, S, d], zero rows after each sentence's end."""
        return self.prompts(sentences)[:, :-1]

    def coarse(self) -> Tensor:
        """The coarse prompt's folded states [1, S + 1, d]."""
        return self.prompts([self.coarse_prompt])
