"""The second miniature's diffusion model: SDXL's UNet and objective, small, trained on the world's captions.

Noise prediction on SDXL's schedule. Parts of each caption are dropped at random, so the model knows every
trait by its words, yet the coarse prompt brings none of them out: a LoRA then selects a person.
"""

from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor

from ..optimisers import MuonAdamW, set_learning_rate, warm_up_and_cosine
from . import captions, checkpoints
from .model import SCHEDULE, Prompted, PromptEncoder, build_unet, noise_prediction
from .portraits import Portraits

_FIRST_AND_LAST = ("conv_in", "conv_out", "time_embedding", "add_embedding")
_LARGEST_SNR = 5.0


def random_prompt(portraits: Portraits, index: int, rng: np.random.Generator) -> str:
    """Half whole captions, the rest with parts dropped, some coarse, some empty (for guidance)."""
    kind = rng.random()
    if kind < 0.08:
        return ""
    if kind < 0.16:
        return captions.COARSE
    keep = 1.0 if kind < 0.6 else float(rng.random())
    attributes = portraits.attributes_of(index) if rng.random() < 0.8 else None
    return captions.fine_caption(portraits.identity(index), attributes, rng, keep=keep)


def noise_loss(
    unet: UNet2DConditionModel, clean: Tensor, prompted: Prompted, noise: Tensor, steps: Tensor
) -> Tensor:
    """Mean squared error of the predicted noise, scaled latents [B, 4, 16, 16] noised to `steps` [B].

    Every step of the schedule weighs min(SNR, 5) / SNR (Hang et al. 2023): nearly clean latents, where the
    noise is all there is to see, would otherwise take most of the gradient.
    """
    scheduler = DDPMScheduler(**SCHEDULE)
    wrong = (noise_prediction(unet, scheduler.add_noise(clean, noise, steps), steps, prompted) - noise).pow(2)
    kept = scheduler.alphas_cumprod[steps]
    snr = kept / (1.0 - kept)
    return (wrong.mean((1, 2, 3)) * snr.clamp(max=_LARGEST_SNR) / snr).mean()


def train(
    portraits: Portraits,
    latents: Tensor,
    prompts: PromptEncoder,
    steps: int,
    out: Path,
    *,
    batch: int = 32,
    seed: int = 0,
    learning_rate: float = 5e-3,
    ema_decay: float = 0.999,
    report=lambda step, figures: None,
) -> UNet2DConditionModel:
    """Train on scaled latents [N, 4, 16, 16] of the portraits; the averaged weights are returned.

    Goes on from `out`, which is written now and then.
    """
    torch.manual_seed(seed)
    unet = build_unet()
    optimiser = MuonAdamW(unet, learning_rate, adamw_names=_FIRST_AND_LAST)
    known = checkpoints.resume(out, unet, optimiser)
    start = {key: value.detach().clone() for key, value in unet.state_dict().items()}
    average, running = known.get("average", start), known.get("running")
    for step in range(known["step"], steps):
        rng = np.random.default_rng([seed, step])
        draws = torch.Generator().manual_seed(seed * 1_000_003 + step)
        picks = rng.integers(len(portraits), size=batch)
        prompted = prompts([random_prompt(portraits, int(i), rng) for i in picks])
        clean = latents[torch.from_numpy(picks)].float()
        noise = torch.randn(clean.shape, generator=draws)
        loss = noise_loss(unet, clean, prompted, noise, torch.randint(1000, (batch,), generator=draws))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        set_learning_rate(optimiser, learning_rate * warm_up_and_cosine(step, steps, 100))
        optimiser.step()
        optimiser.zero_grad()
        running = loss.item() if running is None else 0.99 * running + 0.01 * loss.item()
        decay = min(ema_decay, (1 + step) / (10 + step))
        with torch.no_grad():
            for key, value in unet.state_dict().items():
                average[key].lerp_(value, 1.0 - decay)
        if checkpoints.due(step, steps):
            checkpoints.save(out, unet, optimiser, step, average=average, running=running)
            report(step + 1, {"loss": running})
    unet.load_state_dict(average)
    return unet.eval()
