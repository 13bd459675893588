"""The frozen base model as training sees it: how its samples are noised, and what it has to say of them."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel, WanTransformer3DModel
from torch import Tensor, nn

from lofa_core.key_names import wan_to_diffusers

from . import flow


@dataclass(frozen=True)
class Prompts:
    """Encoded prompts of B samples: states [B, S, d] (WAN: with the folded padding row), and for SDXL the
    pooled embedding [B, p].
    """

    states: Tensor
    pooled: Tensor | None = None

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, rows: Tensor | slice) -> "Prompts":
        return Prompts(self.states[rows], None if self.pooled is None else self.pooled[rows])

    def repeated(self, times: int) -> "Prompts":
        """Each row so many times, one after the other."""
        pooled = None if self.pooled is None else self.pooled.repeat_interleave(times, 0)
        return Prompts(self.states.repeat_interleave(times, 0), pooled)

    def expanded(self, count: int) -> "Prompts":
        """The one row as `count` rows."""
        pooled = None if self.pooled is None else self.pooled.expand(count, -1)
        return Prompts(self.states.expand(count, -1, -1), pooled)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "Prompts":
        pooled = None if self.pooled is None else self.pooled.to(device, dtype)
        return Prompts(self.states.to(device, dtype), pooled)


class Denoiser(ABC):
    """A diffusion model and its training objective. Times run from 0, the clean sample, to 1, noise."""

    model: WanTransformer3DModel | UNet2DConditionModel

    @abstractmethod
    def random_times(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Times [count] as training draws them."""

    @abstractmethod
    def noised(self, clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """x_t for clean latents and noise [B, C, ...] and times [B]."""

    @abstractmethod
    def target(self, clean: Tensor, noise: Tensor) -> Tensor:
        """What the model should say of x_t."""

    @abstractmethod
    def __call__(self, x: Tensor, times: Tensor, prompts: Prompts) -> Tensor:
        """What it says of x_t [B, C, ...] at times [B]."""

    @abstractmethod
    def sample(self, noise: Tensor, prompts: Prompts, steps: int, shift: float) -> Tensor:
        """From noise to clean latents."""

    def modules(self, names: Sequence[str]) -> dict[str, nn.Linear]:
        """Canonical layer names -> the modules that hold those weights."""
        return {name: self.model.get_submodule(self._own_name(name)) for name in names}

    @staticmethod
    @abstractmethod
    def _own_name(name: str) -> str:
        """diffusers' name of a target layer."""


class WanDenoiser(Denoiser):
    """WAN2.1: flow matching (LoFA eq. 7 in this form), times times 1000, text from `fold_padding`."""

    def __init__(self, model: WanTransformer3DModel):
        self.model = model

    def random_times(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        return flow.random_times(count, generator)

    def noised(self, clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        return flow.noised(clean, noise, times)

    def target(self, clean: Tensor, noise: Tensor) -> Tensor:
        return noise - clean

    def __call__(self, x: Tensor, times: Tensor, prompts: Prompts) -> Tensor:
        return self.model(x, times * 1000.0, prompts.states, return_dict=False)[0]

    def sample(self, noise: Tensor, prompts: Prompts, steps: int, shift: float) -> Tensor:
        return flow.sample(lambda x, times: self(x, times, prompts), noise, steps, shift)

    @staticmethod
    def _own_name(name: str) -> str:
        return wan_to_diffusers(f"{name}.weight").removesuffix(".weight")


class SDXLDenoiser(Denoiser):
    """SDXL: the noise is predicted (epsilon) at the 1,000 steps of its DDPM schedule, uniformly drawn; the
    picture's size goes in as six numbers.
    """

    def __init__(self, model: UNet2DConditionModel, schedule: DDPMScheduler, pixels: int):
        """`pixels`: a latent's side in pixels is this many times as long."""
        self.model, self.pixels = model, pixels
        self.alphas = schedule.alphas_cumprod.float()

    def random_times(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        steps = torch.randint(len(self.alphas), (count,), generator=generator)
        return (steps + 0.5) / len(self.alphas)

    def _steps(self, times: Tensor) -> Tensor:
        return (times * len(self.alphas)).long().clamp(max=len(self.alphas) - 1)

    def noised(self, clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        alpha = self.alphas.to(clean.device)[self._steps(times)].view(-1, *[1] * (clean.ndim - 1))
        return alpha.sqrt() * clean + (1.0 - alpha).sqrt() * noise

    def target(self, clean: Tensor, noise: Tensor) -> Tensor:
        return noise

    def __call__(self, x: Tensor, times: Tensor, prompts: Prompts) -> Tensor:
        height, width = (self.pixels * side for side in x.shape[2:])
        sizes = torch.tensor([height, width, 0, 0, height, width], device=x.device, dtype=x.dtype)
        added = {"text_embeds": prompts.pooled, "time_ids": sizes.expand(len(x), -1)}
        steps = self._steps(times)
        return self.model(x, steps, prompts.states, added_cond_kwargs=added, return_dict=False)[0]

    @torch.no_grad()
    def sample(self, noise: Tensor, prompts: Prompts, steps: int, shift: float = 1.0) -> Tensor:
        """DDIM without added noise; the schedule has no shift."""
        times = torch.linspace(1.0, 0.0, steps + 1)[:-1] - 0.5 / len(self.alphas)
        latent = noise
        alphas = [*(self.alphas[self._steps(time)] for time in times), torch.ones(())]
        for time, now, then in zip(times, alphas[:-1], alphas[1:], strict=True):
            said = self(latent, time.expand(len(latent)).to(latent), prompts)
            clean = (latent - (1.0 - now).sqrt() * said) / now.sqrt()
            latent = then.sqrt() * clean + (1.0 - then).sqrt() * said
        return latent

    @staticmethod
    def _own_name(name: str) -> str:
        return name
