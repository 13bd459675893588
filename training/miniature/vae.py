"""The miniature's VAE: WAN2.1's architecture at base dim 8, trained on the world's clips.

After training, the per-channel mean and deviation of its latents are folded into the 1x1x1 convolutions at
its waist, so that they equal WAN2.1's published latent statistics: ComfyUI and diffusers then normalise our
latents as they do WAN's.
"""

import types
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, WanResample
from torch import nn
from torch.nn import functional as F

from ..optimisers import MuonAdamW, set_learning_rate, warm_up_and_cosine
from . import world

ARCHITECTURE = dict(base_dim=8, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2, attn_scales=[])


def build() -> AutoencoderKLWan:
    """A randomly initialised miniature VAE: quiet latents, temporal resampling a plain average and a plain
    repetition.
    """
    model = AutoencoderKLWan(temperal_downsample=[False, True, True], **ARCHITECTURE)
    for module in model.modules():
        if isinstance(module, WanResample) and hasattr(module, "time_conv"):
            _average_in_time(module)
    with torch.no_grad():  # unit noise on untrained latents would drown them for the first thousand steps
        model.quant_conv.weight[16:] *= 0.1
        model.quant_conv.bias[16:] = -6.0
    return model


@torch.no_grad()
def _average_in_time(module: WanResample) -> None:
    """Start temporal resampling where the image VAE can be continued: half the sum of two frames, or the
    frame twice.
    """
    weight, eye = module.time_conv.weight, torch.eye(module.dim)
    weight.mul_(0.1)
    if module.mode == "downsample3d":
        weight[:, :, 1:, 0, 0] += 0.5 * eye.unsqueeze(-1)
    else:
        weight[:, :, -1, 0, 0] += torch.cat([eye, eye])
    nn.init.zeros_(module.time_conv.bias)


def to_video(clips: np.ndarray) -> torch.Tensor:
    """uint8 [B, T, H, W, 3] -> float32 [B, 3, T, H, W] in -1..1."""
    return torch.from_numpy(clips).permute(0, 4, 1, 2, 3).float() / 127.5 - 1.0


def to_clips(video: torch.Tensor) -> np.ndarray:
    """float [B, 3, T, H, W] in -1..1 -> uint8 [B, T, H, W, 3]."""
    return ((video.clamp(-1, 1) + 1.0) * 127.5).round().byte().permute(0, 2, 3, 4, 1).cpu().numpy()


def random_clips(actions: list[world.Action], count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` clips of random actions in random looks, uint8 [count, T, H, W, 3]."""
    picks = rng.integers(len(actions), size=count)
    return np.stack([world.draw_clip(actions[i], world.random_look(rng), rng) for i in picks])


def train(
    actions: list[world.Action],
    steps: int,
    out: Path,
    *,
    frames: int,
    batch: int,
    start_from: Path | None = None,
    decoder_only: bool = False,
    seed: int = 0,
    learning_rate: float = 2e-3,
    kl_weight: float = 1e-4,
    report=lambda step, figures: None,
) -> AutoencoderKLWan:
    """Train on random cuts of `frames` frames (1 + a multiple of 4); writes `out` every 100 steps.

    WAN's own order: first single frames (`frames` 1: `batch` frames, four of each clip), then clips.
    Loss: `reconstruction_loss` + kl_weight x mean KL to a unit Gaussian. With `decoder_only` the latents stay
    as they are.
    """
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    torch.manual_seed(seed + accelerator.process_index)
    rng = np.random.default_rng([seed, accelerator.process_index])
    model = build()
    if start_from is not None:
        model.load_state_dict(torch.load(start_from, weights_only=True))
    if decoder_only:
        model.encoder.requires_grad_(False)
        model.quant_conv.requires_grad_(False)
    if frames == 1:  # never touched by single frames
        for module in model.modules():
            if isinstance(module, WanResample) and hasattr(module, "time_conv"):
                module.time_conv.requires_grad_(False)
    warm_up = max(1, min(50, steps // 10))
    wrapped = accelerator.prepare(WholeClipVAE(model))
    optimiser = MuonAdamW(model, learning_rate)
    for step in range(steps):
        video = to_video(_random_cuts(actions, batch, frames, rng)).to(accelerator.device)
        rebuilt, kl = wrapped(video)
        loss = reconstruction_loss(rebuilt, video) + kl_weight * kl
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(wrapped.parameters(), 1.0)
        set_learning_rate(optimiser, learning_rate * warm_up_and_cosine(step, steps, warm_up))
        optimiser.step()
        optimiser.zero_grad()
        if accelerator.is_main_process and (step % 100 == 99 or step == steps - 1):
            torch.save(model.state_dict(), out)
            report(step + 1, {"loss": loss.item(), "psnr": psnr(rebuilt.detach(), video), "kl": kl.item()})
    return model


def reconstruction_loss(rebuilt: torch.Tensor, video: torch.Tensor) -> torch.Tensor:
    """4 x squared error + L1 / 4 over [B, 3, T, H, W]; pixels that change within the cut count four times.

    L1 alone, or equal weights, let swinging limbs vanish: they are few pixels, and the action is in them.
    """
    moving = ((video - video.mean(2, keepdim=True)).abs().amax(1, keepdim=True) > 0.1).to(video)
    error = rebuilt - video
    return ((4.0 * error.pow(2) + 0.25 * error.abs()) * (1.0 + 3.0 * moving)).mean()


def _random_cuts(actions, batch: int, frames: int, rng: np.random.Generator) -> np.ndarray:
    """uint8 [batch, frames, H, W, 3]; single frames come four to a clip: drawing costs more than they do."""
    if frames > 1:
        start = int(rng.integers(0, world.FRAMES - frames + 1))
        return random_clips(actions, batch, rng)[:, start : start + frames]
    picks = rng.choice(world.FRAMES, size=4, replace=False)
    return random_clips(actions, batch // 4, rng)[:, picks].reshape(-1, 1, world.SIZE, world.SIZE, 3)


class WholeClipVAE(nn.Module):
    """A VAE that takes whole clips in one pass, unclamped (a clamped pixel has no gradient).

    diffusers runs the same arithmetic in groups of four frames with caches; the model given here no longer
    can.
    """

    def __init__(self, model: AutoencoderKLWan):
        super().__init__()
        self.model = model
        for module in model.modules():
            if isinstance(module, WanResample) and hasattr(module, "time_conv"):
                module.forward = types.MethodType(_resample_whole_clip, module)
            elif isinstance(module, WanCausalConv3d):
                module.forward = types.MethodType(_causal_conv, module)

    def encode(self, video: torch.Tensor) -> torch.Tensor:
        """Posterior means [B, 16, 1 + (T - 1) / 4, H / 8, W / 8]."""
        return self._posterior(video)[0]

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        """Video [B, 3, T, H, W], about -1..1."""
        return self.model.decoder(self.model.post_quant_conv(latent))

    def forward(self, video):
        """(Reconstruction from a sampled latent, mean KL to a unit Gaussian)."""
        mean, log_variance = self._posterior(video)
        latent = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
        kl = 0.5 * (mean.pow(2) + log_variance.exp() - 1.0 - log_variance).mean()
        return self.decode(latent), kl

    def _posterior(self, video):
        mean, log_variance = self.model.quant_conv(self.model.encoder(video)).chunk(2, dim=1)
        return mean, log_variance.clamp(-30.0, 20.0)


def _causal_conv(module: WanCausalConv3d, x: torch.Tensor, cache_x=None) -> torch.Tensor:
    """Of a single frame with nothing before it, only the last temporal tap counts: a 2D convolution."""
    if cache_x is not None:
        raise ValueError(
            "whole clips are trained without caches; use a freshly built VAE to encode in groups"
        )
    if x.shape[2] == 1 and module.stride[0] == 1:
        left, _, top, *_ = module._padding
        y = F.conv2d(x[:, :, 0], module.weight[:, :, -1], module.bias, padding=(top, left))
        return y.unsqueeze(2)
    return nn.Conv3d.forward(module, F.pad(x, module._padding))


def _resample_whole_clip(
    module: WanResample, x: torch.Tensor, feat_cache=None, feat_idx=None
) -> torch.Tensor:
    """Resample [B, C, T, H, W] in space and time; the first frame is its own group in time."""
    if module.mode == "upsample3d" and x.shape[2] > 1:
        batch, channels, count, height, width = x.shape
        later = module.time_conv(x[:, :, 1:]).view(batch, 2, channels, count - 1, height, width)
        later = later.permute(0, 2, 3, 1, 4, 5).reshape(batch, channels, 2 * (count - 1), height, width)
        x = torch.cat([x[:, :, :1], later], 2)
    count = x.shape[2]
    y = module.resample(x.transpose(1, 2).flatten(0, 1))
    y = y.unflatten(0, (-1, count)).transpose(1, 2)
    if module.mode == "downsample3d" and count > 1:
        y = torch.cat([y[:, :, :1], module.time_conv(y)], 2)
    return y


def psnr(rebuilt: torch.Tensor, video: torch.Tensor) -> float:
    """Mean over clips of 10 log10(peak^2 / MSE) in dB, pixels in -1..1."""
    error = (rebuilt.clamp(-1, 1) - video).pow(2).flatten(1).mean(1)
    return float((10.0 * torch.log10(4.0 / error)).mean())


@torch.no_grad()
def fold_statistics(model: AutoencoderKLWan, video: torch.Tensor) -> None:
    """Rescale the waist in place so that latents of `video` have WAN2.1's per-channel mean and deviation."""
    latent = model.encode(video).latent_dist.mean
    mean, deviation = latent.mean(dim=(0, 2, 3, 4)), latent.std(dim=(0, 2, 3, 4))
    scale = torch.tensor(model.config.latents_std) / deviation
    shift = torch.tensor(model.config.latents_mean) - mean * scale
    into, out = model.quant_conv, model.post_quant_conv
    into.weight[:16] *= scale.view(-1, 1, 1, 1, 1)
    into.bias[:16] = into.bias[:16] * scale + shift
    into.bias[16:] += 2.0 * scale.log()
    out.bias -= (out.weight.flatten(1) * (shift / scale)).sum(1)
    out.weight /= scale.view(1, -1, 1, 1, 1)
