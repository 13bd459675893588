"""LoRA Diffusion (arXiv 2412.02352): a LoRA drawn from noise under a condition, in lora_latent.py's latent.

A regressor gives one LoRA for a condition; this gives one for each seed. A second generator behind the
hypernetwork's interface: it knows a base model and conditions, and predicts LoRAs of the same target layers.
It does not look at the base weights, and has no response maps.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor, nn

from .blocks import MLP
from .conditions import Conditions
from .conditions.encoders import make_encoder
from .descriptions import BaseDescription, ConditionDescription, Form, Target, coarse_prompt_of
from .lora import LoRA
from .lora_latent import LoRACodec, LoRAVAE

Denoise = Callable[[Tensor, Tensor], Tensor]  # (x_t [K, latent], t [K]) -> x0 [K, latent]


@dataclass(frozen=True)
class LoRADiffusionConfig:
    """Sizes and design of the VAE and of the diffusion model, and how it is sampled."""

    rank: int
    form: Form = "canonical"
    latent: int = 512
    layer_width: int = 32  # numbers that a layer comes to before all layers meet
    vae_width: int = 512
    vae_blocks: int = 1
    width: int = 512
    blocks: int = 4
    pooling_queries: int = 8
    target: Target = "v"  # what the network puts out
    steps: int = 50
    guidance: float = 1.0  # of the condition over none; 1: the condition alone

    def __post_init__(self):
        for name, kind in (("form", Form), ("target", Target)):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name} = {getattr(self, name)!r}: expected one of {get_args(kind)}")
        for name in ("rank", "latent", "layer_width", "vae_width", "width", "pooling_queries", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: expected 1 or more")


# ------------------------------------------------------------
# The process: x_t = signal(t) x0 + noise(t) epsilon, t from 0 (clean) to 1 (noise)


def signal(t: Tensor) -> Tensor:
    """cos(pi t / 2): the cosine schedule (arXiv 2102.09672, eq. 17, without its offset)."""
    return (0.5 * math.pi * t).cos()


def noise(t: Tensor) -> Tensor:
    """sin(pi t / 2), so that signal^2 + noise^2 = 1."""
    return (0.5 * math.pi * t).sin()


def noised(x0: Tensor, epsilon: Tensor, t: Tensor) -> Tensor:
    """x_t of x0 and epsilon [K, n] at times t [K]."""
    return signal(t)[:, None] * x0 + noise(t)[:, None] * epsilon


def velocity(x0: Tensor, epsilon: Tensor, t: Tensor) -> Tensor:
    """v = signal epsilon - noise x0 (arXiv 2202.00512, appendix D)."""
    return signal(t)[:, None] * epsilon - noise(t)[:, None] * x0


def x0_from_velocity(x: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """x0 = signal x_t - noise v (arXiv 2202.00512, appendix D)."""
    return signal(t)[:, None] * x - noise(t)[:, None] * v


def ddim_step(x: Tensor, x0: Tensor, t: Tensor, to: Tensor) -> Tensor:
    """x at time `to` from x at time t > 0 and the x0 seen there, no new noise (arXiv 2010.02502, eq. 12)."""
    epsilon = (x - signal(t)[:, None] * x0) / noise(t)[:, None]
    return noised(x0, epsilon, to)


def guided(told: Tensor, untold: Tensor, guidance: float) -> Tensor:
    """untold + guidance (told - untold): classifier-free guidance (arXiv 2207.12598, eq. 6)."""
    return untold + guidance * (told - untold)


def sample(denoise: Denoise, x: Tensor, steps: int) -> Tensor:
    """x0 from noise x [K, n] in `steps` equal steps of DDIM."""
    times = torch.linspace(1.0, 0.0, steps + 1, device=x.device)
    for t, to in zip(times[:-1], times[1:], strict=True):
        here, there = t.expand(len(x)), to.expand(len(x))
        x = ddim_step(x, denoise(x, here), here, there)
    return x


# ------------------------------------------------------------
# The networks


class Told(nn.Module):
    """Conditions -> one vector [B, width]: each kind's tokens pooled by learned queries, times strength."""

    def __init__(self, conditions: tuple[ConditionDescription, ...], width: int, queries: int):
        super().__init__()
        self.encoders = nn.ModuleDict({known.kind: make_encoder(known, width) for known in conditions})
        self.queries = nn.Parameter(torch.randn(queries, width) / width**0.5)
        self.summary = nn.ModuleDict({known.kind: nn.Linear(queries * width, width) for known in conditions})

    def forward(self, conditions: Conditions) -> Tensor:
        """Raises ValueError for a kind that is not known here, and for one that is nothing but padding."""
        unknown = [kind for kind in conditions if kind not in self.encoders]
        if unknown or not conditions:
            raise ValueError(
                f"given {', '.join(conditions) or 'no condition'}: this network knows "
                f"{', '.join(self.encoders)}."
            )
        parts = []
        for kind, given in conditions.items():
            padding = None if kind == "pose" else (given.values == 0).all(-1)
            if padding is not None:
                nothing = padding.all(1)
                if (nothing if given.strength is None else nothing & (given.strength > 0)).any():
                    raise ValueError("the condition has no tokens: every row of it is zero")
                padding = padding & ~nothing[:, None]  # its strength is zero: any weights will do
            tokens = self.encoders[kind](given.values)
            scores = self.queries @ tokens.transpose(-1, -2)
            if padding is not None:
                scores = scores.masked_fill(padding[:, None], float("-inf"))
            summary = self.summary[kind]((scores.softmax(-1) @ tokens).flatten(1))
            parts.append(summary if given.strength is None else given.strength[:, None] * summary)
        return torch.stack(parts).sum(0)


class AdaptiveBlock(nn.Module):
    """x + gate * MLP(norm(x)): the code gives the norm's scale and shift, and the gate (arXiv 2212.09748,
    adaLN-Zero). Starts as the identity.
    """

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.mlp, self.modulation = MLP(width, 2), nn.Linear(width, 3 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, code: Tensor) -> Tensor:
        scale, shift, gate = self.modulation(code).chunk(3, dim=-1)
        return x + gate * self.mlp(self.norm(x) * (1.0 + scale) + shift)


class Denoiser(nn.Module):
    """x_t, t and what is told -> x0 or v, [K, latent]."""

    frequencies: Tensor  # [width / 2]

    def __init__(self, config: LoRADiffusionConfig, conditions: tuple[ConditionDescription, ...]):
        super().__init__()
        half = -(-config.width // 2)
        with torch.device("cpu"):  # also where the network is built without memory, to be filled
            frequencies = torch.exp(-math.log(1e4) * torch.arange(half) / half)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.time = nn.Sequential(
            nn.Linear(2 * half, config.width), nn.SiLU(), nn.Linear(config.width, config.width)
        )
        self.told = Told(conditions, config.width, config.pooling_queries)
        self.into = nn.Linear(config.latent, config.width)
        self.blocks = nn.ModuleList(AdaptiveBlock(config.width) for _ in range(config.blocks))
        self.norm, self.out = nn.LayerNorm(config.width), nn.Linear(config.width, config.latent)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        return self.denoised(x, t, self.told(conditions))

    def denoised(self, x: Tensor, t: Tensor, told: Tensor) -> Tensor:
        """The same for conditions that `told` [K, width] stands for; zeros: nothing is told."""
        angles = 1e3 * t[:, None] * self.frequencies
        code = self.time(torch.cat([angles.sin(), angles.cos()], -1)) + told
        code, h = nn.functional.silu(code), self.into(x)
        for block in self.blocks:
            h = block(h, code)
        return self.out(self.norm(h))


class LoRADiffusion(nn.Module):
    """The codec, the VAE and the diffusion model, with what they were trained for."""

    latent_mean: Tensor  # [latent]
    latent_scale: Tensor  # []

    def __init__(
        self,
        config: LoRADiffusionConfig,
        base: BaseDescription,
        conditions: tuple[ConditionDescription, ...],
    ):
        super().__init__()
        self.config, self.base = config, base
        self.conditions: dict[str, ConditionDescription] = {known.kind: known for known in conditions}
        self.codec = LoRACodec(base, config.rank, config.form)
        sizes = (config.layer_width, config.vae_width, config.vae_blocks, config.latent)
        self.vae = LoRAVAE(base, config.rank, *sizes)
        self.denoiser = Denoiser(config, conditions)
        self.register_buffer("latent_mean", torch.zeros(config.latent))
        self.register_buffer("latent_scale", torch.ones(()))

    @property
    def coarse_prompt(self) -> str:
        return coarse_prompt_of(self.conditions.values())

    @torch.no_grad()
    def fit_latents(self, mean: Tensor, log_variance: Tensor) -> None:
        """Take the unit of the diffusion's latents from those of K LoRAs, [K, latent]: one for all entries,
        so that those the VAE does not use stay small.
        """
        self.latent_mean.copy_(mean.mean(0))
        variance = (mean - self.latent_mean).square().mean() + log_variance.exp().mean()
        self.latent_scale.copy_(variance.sqrt().clamp_min(1e-8))

    def normalised(self, latent: Tensor) -> Tensor:
        """A VAE's latent [K, latent] in the diffusion's unit."""
        return (latent - self.latent_mean) / self.latent_scale

    @torch.no_grad()
    def draw(self, conditions: Conditions, start: Tensor) -> list[LoRA]:
        """The LoRA of each of K conditions from its noise [K, latent]; on the device of the weights.

        Raises ValueError where what is drawn is not finite.
        """
        told, guidance = self.denoiser.told(conditions), self.config.guidance

        def denoise(x: Tensor, t: Tensor) -> Tensor:
            found = self.denoiser.denoised(x, t, told)
            if guidance != 1.0:
                found = guided(found, self.denoiser.denoised(x, t, torch.zeros_like(told)), guidance)
            return found if self.config.target == "x0" else x0_from_velocity(x, found, t)

        x0 = sample(denoise, start.to(self.latent_mean), self.config.steps)
        numbers = self.vae.decode(self.latent_mean + self.latent_scale * x0)
        if not all(bool(own.isfinite().all()) for own in numbers):
            raise ValueError(
                "What this LoRA Diffusion draws is not finite. Its file is damaged: get or train it again."
            )
        return self.codec.loras(numbers)


def starting_noise(seed: int, latent: int) -> Tensor:
    """[1, latent], the same for a seed on every device."""
    return torch.randn(1, latent, generator=torch.Generator().manual_seed(seed))
