"""Flow matching as WAN2.1 uses it: x_t = (1 - t) x_0 + t eps, velocity v = eps - x_0 (LoFA eq. 7 in this
form).
"""

from collections.abc import Callable

import torch

Velocity = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (x_t, t in 0..1 [B]) -> v


def random_times(count: int, generator: torch.Generator | None = None) -> torch.Tensor:
    """Times in 0..1, [count]: logit-normal, denser where the clip's layout is decided (t above one half)."""
    return torch.sigmoid(0.5 + 1.2 * torch.randn(count, generator=generator))


def noised(clean: torch.Tensor, noise: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
    """x_t for clean latents and noise [B, C, T, H, W] and times [B]."""
    times = times.view(-1, *[1] * (clean.ndim - 1)).to(clean)
    return (1.0 - times) * clean + times * noise


def loss(
    velocity: Velocity,
    clean: torch.Tensor,
    noise: torch.Tensor,
    times: torch.Tensor,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean squared error of the predicted velocity, each entry of a latent times `weights` [C, T, H, W] if
    given.
    """
    wrong = (velocity(noised(clean, noise, times), times) - (noise - clean)).pow(2)
    return (wrong if weights is None else wrong * weights).mean()


def shifted_times(steps: int, shift: float) -> torch.Tensor:
    """`steps` + 1 times from 1 to 0, spaced as s t / (1 + (s - 1) t) (WAN2.1's flow shift)."""
    times = torch.linspace(1.0, 0.0, steps + 1)
    return shift * times / (1.0 + (shift - 1.0) * times)


@torch.no_grad()
def sample(velocity: Velocity, noise: torch.Tensor, steps: int = 20, shift: float = 3.0) -> torch.Tensor:
    """Integrate from noise [B, C, T, H, W] to a clean latent with Euler steps."""
    times = shifted_times(steps, shift)
    latent = noise
    for now, then in zip(times[:-1], times[1:], strict=True):
        latent = latent + (then - now) * velocity(latent, now.expand(len(latent)))
    return latent
