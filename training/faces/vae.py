"""The second miniature's VAE: SDXL's `AutoencoderKL` at toy size, 64x64 pixels to latents of 4 x 16 x 16.

SDXL's has one more level (a latent an eighth as wide as the picture); at 64 pixels eyes would be lost there.
"""

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from ..optimisers import MuonAdamW, set_learning_rate, warm_up_and_cosine
from . import checkpoints, world
from .portraits import Portraits, to_pixels

CHANNELS = 4
LATENT_SIZE = world.SIZE // 4


def build() -> AutoencoderKL:
    """A randomly initialised VAE with quiet latents: unit noise would drown untrained ones."""
    model = AutoencoderKL(
        block_out_channels=(8, 16, 32), down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3, layers_per_block=1, latent_channels=CHANNELS,
        norm_num_groups=4, sample_size=world.SIZE, force_upcast=False,
    )  # fmt: skip
    with torch.no_grad():
        model.quant_conv.weight[CHANNELS:] *= 0.1
        model.quant_conv.bias[CHANNELS:] = -6.0
    return model


def train(
    portraits: Portraits,
    steps: int,
    out: Path,
    *,
    batch: int = 16,
    seed: int = 0,
    learning_rate: float = 3e-3,
    kl_weight: float = 1e-5,
    report=lambda step, figures: None,
) -> AutoencoderKL:
    """Train; loss: 4 x squared error + L1 / 4 + kl_weight x mean KL. Goes on from `out`, which is written
    now and then.

    The scaling factor of the result is that of the portraits: latents times it have unit variance.
    """
    torch.manual_seed(seed)
    model = build()
    optimiser = MuonAdamW(model, learning_rate)
    first = checkpoints.resume(out, model, optimiser)["step"]
    for step in range(first, steps):
        draws = torch.Generator().manual_seed(seed * 1_000_003 + step)
        picks = torch.randint(len(portraits), (batch,), generator=draws)
        pixels = to_pixels(portraits.pixels[picks])
        posterior = model.encode(pixels).latent_dist
        rebuilt = model.decode(posterior.sample(generator=draws)).sample
        error = rebuilt - pixels
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        loss = (4.0 * error.pow(2) + 0.25 * error.abs()).mean() + kl_weight * kl
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        set_learning_rate(optimiser, learning_rate * warm_up_and_cosine(step, steps, 50))
        optimiser.step()
        optimiser.zero_grad()
        if checkpoints.due(step, steps):
            checkpoints.save(out, model, optimiser, step)
            report(step + 1, {"loss": loss.item(), "psnr": psnr(rebuilt.detach(), pixels), "kl": kl.item()})
    model.eval()
    model.register_to_config(scaling_factor=round(1.0 / float(encode(model, portraits, 512).std()), 4))
    return model


@torch.no_grad()
def encode(model: AutoencoderKL, portraits: Portraits, count: int | None = None) -> Tensor:
    """Posterior means, unscaled, of the first `count` (all) portraits, [N, 4, 16, 16]."""
    parts = portraits.pixels[:count].split(16)
    means = [model.encode(to_pixels(part)) for part in parts]
    return torch.cat([mean.latent_dist.mean for mean in means])


@torch.no_grad()
def decode(model: AutoencoderKL, latents: Tensor) -> Tensor:
    """Scaled latents [N, 4, 16, 16] -> pixels [N, 3, 64, 64], about -1..1."""
    parts = (latents.float() / model.config.scaling_factor).split(16)
    return torch.cat([model.decode(part).sample for part in parts])


def psnr(rebuilt: Tensor, pixels: Tensor) -> float:
    """Mean over pictures of 10 log10(peak^2 / MSE) in dB, pixels in -1..1."""
    error = (rebuilt.clamp(-1, 1) - pixels).pow(2).flatten(1).mean(1)
    return float((10.0 * torch.log10(4.0 / error)).mean())
