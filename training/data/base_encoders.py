"""A base folder's own encoders: clips to the latents that its diffusion model sees, texts to its states."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderKLWan
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import CLIPTokenizer

from lofa_core.base_models import WAN_IMAGE_KINDS, BaseModel
from lofa_core.conditions.pretrained import errors_of, open_pretrained
from lofa_core.conditions.text import TextEncoder

from ..backbones import (
    TEXT_LENGTH,
    fold_padding,
    from_unit,
    load_image_vae,
    load_vae,
    to_unit,
    variant_of,
)
from ..denoisers import Prompts

# One text as it is cached: `states` [S, d], and for SDXL `pooled` [p].
Text = dict[str, Tensor]


class BaseEncoders(ABC):
    """The encoders of a base folder, each loaded onto the device when it is first needed."""

    folders: ClassVar[tuple[str, ...]]  # that hold them

    def __init__(self, base: Path, device: torch.device):
        self.base, self.device = base, device

    @abstractmethod
    def load(self) -> None:
        """Read all of them now. Raises ValueError for files that are not whole."""

    @abstractmethod
    def latents(self, clip: np.ndarray) -> Tensor:
        """Frames uint8 [T, H, W, 3] -> unit latents float16 [1, C, ...], the posterior's mean."""

    @abstractmethod
    def pictures(self, latents: Tensor) -> np.ndarray:
        """Unit latents [N, C, ...] -> frames uint8 [N, T, H, W, 3]."""

    @abstractmethod
    def text(self, text: str) -> Text:
        """What the diffusion model reads of a text. Raises ValueError for one that is too long."""

    @staticmethod
    @abstractmethod
    def prompts(texts: Sequence[Text]) -> Prompts:
        """Cached texts as the diffusion model is given them, float32."""


class WanEncoders(BaseEncoders):
    """WAN2.1: a video VAE and UMT5, whose states are kept without padding."""

    folders = ("vae", "text_encoder", "tokenizer")

    @cached_property
    def _vae(self) -> AutoencoderKLWan:
        return load_vae(self.base).to(self.device)

    @cached_property
    def _text(self) -> TextEncoder:
        return TextEncoder.open(self.base, self.device)

    def load(self) -> None:
        _ = self._text, self._vae

    @torch.no_grad()
    def latents(self, clip: np.ndarray) -> Tensor:
        video = _pixels(clip, self.device).transpose(0, 1)[None]
        return to_unit(self._vae.encode(video).latent_dist.mean, self._vae).half().cpu()

    @torch.no_grad()
    def pictures(self, latents: Tensor) -> np.ndarray:
        video = self._vae.decode(from_unit(latents.to(self.device), self._vae)).sample
        return _frames(video.transpose(1, 2))

    def text(self, text: str) -> Text:
        states = self._text.encode(text)[0].cpu()
        if len(states) >= TEXT_LENGTH:
            raise ValueError(f"the text has {len(states)} tokens, {TEXT_LENGTH - 1} are read. Shorten it.")
        return {"states": states}

    @staticmethod
    def prompts(texts: Sequence[Text]) -> Prompts:
        rows = [text["states"].float() for text in texts]
        return Prompts(fold_padding(pad_sequence(rows, batch_first=True)))


class SDXLEncoders(BaseEncoders):
    """SDXL: an image VAE, and two CLIP text encoders whose penultimate states stand side by side.

    Texts are padded with tokens, as SDXL knows them: no row of the states is zero.
    """

    folders = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")

    @cached_property
    def _vae(self) -> AutoencoderKL:
        return load_image_vae(self.base).to(self.device)

    @cached_property
    def _texts(self) -> list[tuple[CLIPTokenizer, Any]]:
        return [
            (
                _clip_tokenizer(self.base / f"tokenizer{suffix}"),
                _clip_encoder(kind, self.base / f"text_encoder{suffix}").to(self.device),
            )
            for kind, suffix in (("CLIPTextModel", ""), ("CLIPTextModelWithProjection", "_2"))
        ]

    def load(self) -> None:
        _ = self._texts, self._vae

    @torch.no_grad()
    def latents(self, clip: np.ndarray) -> Tensor:
        if len(clip) != 1:
            raise ValueError(f"{len(clip)} frames: SDXL's clips are single pictures.")
        mean = self._vae.encode(_pixels(clip, self.device)).latent_dist.mean
        return (mean * self._vae.config.scaling_factor).half().cpu()

    @torch.no_grad()
    def pictures(self, latents: Tensor) -> np.ndarray:
        shown = self._vae.decode(latents.to(self.device) / self._vae.config.scaling_factor).sample
        return _frames(shown.unsqueeze(1))

    @torch.no_grad()
    def text(self, text: str) -> Text:
        states, pooled = [], torch.empty(0)
        for tokenizer, encoder in self._texts:
            read, there = tokenizer.model_max_length, len(tokenizer(text).input_ids)
            if there > read:
                raise ValueError(f"the text has {there} tokens, {read} are read. Shorten it.")
            tokens = tokenizer(text, padding="max_length", max_length=read, return_tensors="pt").input_ids
            said = encoder(tokens.to(self.device), output_hidden_states=True)
            states.append(said.hidden_states[-2][0])
            pooled = said[0][0]  # in the end the second encoder's projection; the first has none
        # Half of 77 x 2048 numbers is enough to keep for every text: SDXL is mostly run in float16.
        return {"states": torch.cat(states, -1).half().cpu(), "pooled": pooled.half().cpu()}

    @staticmethod
    def prompts(texts: Sequence[Text]) -> Prompts:
        states, pooled = (
            torch.stack([text[part].float() for text in texts]) for part in ("states", "pooled")
        )
        return Prompts(states, pooled)


def encoders_of(base: Path, model: BaseModel, frames: int) -> type[BaseEncoders]:
    """The sort of encoders that this base model goes with, for clips of so many frames.

    Raises ValueError naming `base` for one that cannot be trained on, and for a video of SDXL's.
    """
    if model.name.startswith("SDXL"):
        if frames != 1:
            raise ValueError(
                f"{base}: is {model.name}, which makes pictures; data.frames is {frames}, expected 1."
            )
        return SDXLEncoders
    if any(layer.kind in WAN_IMAGE_KINDS for layer in model.layers):
        raise ValueError(
            f"{base}: is {model.name}. A folder dataset can be trained for WAN2.1's text-to-video models and "
            "for SDXL."
        )
    return WanEncoders


def _pixels(clip: np.ndarray, device: torch.device) -> Tensor:
    """uint8 [T, H, W, 3] -> [T, 3, H, W] in -1..1."""
    return torch.from_numpy(clip).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def _frames(pixels: Tensor) -> np.ndarray:
    """[N, T, 3, H, W] in -1..1 -> uint8 [N, T, H, W, 3]."""
    return ((pixels.clamp(-1, 1) + 1.0) * 127.5).round().byte().permute(0, 1, 3, 4, 2).cpu().numpy()


def _clip_tokenizer(folder: Path) -> CLIPTokenizer:
    with errors_of(folder, "tokenizer"):
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True)


def _clip_encoder(kind: str, folder: Path) -> Any:
    """A CLIP text encoder in float32. Raises ValueError where it is not whole."""
    return open_pretrained(kind, folder, "CLIP text encoder", dtype=torch.float32, variant=variant_of(folder))
