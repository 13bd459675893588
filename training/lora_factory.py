"""Per-task LoRAs, the training targets: many tasks in one batch over one frozen base model.

All tasks start from one A and see one sequence of noise and times (common random numbers), so that a LoRA
says how its task differs and not how its start did. Measured on 24 tasks of the miniature
(`LoRAConfig(steps=60)`; each task left out in turn, its A and B predicted from its factors by
`baselines.simple.ridge_lora`): the centred cosine of predicted and true dW, dW less its mean over the other
tasks, is .46 +- .02 with one A for all and .13 +- .02 with an A for each task, at the same flow-matching loss
(.266). The canonical form does not stand in for a common start: .10 on the LoRAs of one A, .13 on the others.
"""

import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lofa_core.base_models import TargetLayer
from lofa_core.lora import LoRALayer

from .config import LoRAConfig
from .denoisers import Denoiser, Prompts
from .injection import injected


@dataclass(frozen=True)
class TrainedLoRA:
    """One task's LoRA (alpha = r, so dW = B A), or what became of it."""

    A: list[Tensor]  # [r, in] of each layer, float32, on the CPU
    B: list[Tensor]  # [out, r]
    loss: float  # diffusion loss, mean over the last tenth of the steps
    divergence: str | None  # what is wrong with it; None if nothing is


def initial_A(layers: tuple[TargetLayer, ...], rank: int, seed: int) -> dict[str, Tensor]:
    """A [r, in] of every layer, uniform as PEFT draws it; B starts at zero."""
    generator = torch.Generator().manual_seed(seed)
    return {
        layer.name: (2.0 * torch.rand(rank, layer.shape[1], generator=generator) - 1.0)
        / math.sqrt(layer.shape[1])
        for layer in layers
    }


def train_loras(
    denoiser: Denoiser,
    layers: tuple[TargetLayer, ...],
    clips: Mapping[str, Tensor],
    prompt: Prompts,
    settings: LoRAConfig,
    *,
    report: Callable[[int, Tensor], None] = lambda step, losses: None,
) -> dict[str, TrainedLoRA]:
    """LoRAs of K tasks at once, by the diffusion loss (LoFA eq. 7) through W + B A (eq. 1) with AdamW.

    `clips`: task id -> unit latents [n, C, ...]. `prompt`: what all tasks train under, one row. Computed
    where the model lies and in its dtype; factors and AdamW's moments are float32. `report` gets the step and
    every task's loss [K]; reading them waits for the device.

    No operation mixes tasks: what diverges in one of them is seen by no other.
    """
    names = [layer.name for layer in layers]
    modules, model = denoiser.modules(names), denoiser.model
    device, dtype = model.device, model.dtype  # asked once: diffusers walks the whole model for each answer
    A, B = _start(layers, list(clips), settings, device)
    optimiser = torch.optim.AdamW(
        [*A.values(), *B.values()], settings.learning_rate, (0.9, 0.99), weight_decay=0.0, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser,
        lambda step: (
            min(1.0, (step + 1) / 10) * (0.05 + 0.475 * (1 + math.cos(math.pi * step / settings.steps)))
        ),
    )
    generator = torch.Generator().manual_seed(settings.seed + 1_000_003 * settings.repeat)
    latents = [task.to(device) for task in clips.values()]
    text = prompt.to(device, dtype).expanded(len(latents) * settings.batch)
    last = max(1, settings.steps // 10)
    total = torch.zeros(len(latents), device=device)
    broken = torch.zeros(len(latents), dtype=torch.long, device=device)  # first step without a loss
    for step in range(1, settings.steps + 1):
        cast = ({name: x.to(dtype) for name, x in factors.items()} for factors in (A, B))
        with injected(modules, *cast):
            losses = _losses(denoiser, latents, text, settings.batch, generator)
        optimiser.zero_grad()
        # The sum over tasks of each task's own mean: a task's gradient does not depend on who shares its
        # batch.
        losses.sum().backward()
        optimiser.step()
        schedule.step()
        losses = losses.detach()
        broken = torch.where(losses.isfinite() | (broken > 0), broken, step)
        if step > settings.steps - last:
            total += losses / last
        report(step, losses)
    W_norms = torch.stack([modules[name].weight.detach().float().norm() for name in names])
    found = [[factors[name].detach() for name in names] for factors in (A, B)]
    relative = (torch.stack([_norms(a, b) for a, b in zip(*found, strict=True)], 1) / W_norms).cpu()  # [K, L]
    own = ([[factor[row].cpu() for factor in factors] for factors in found] for row in range(len(clips)))
    return {
        task: _finished(a, b, *row, names, settings)
        for task, (a, b), *row in zip(clips, own, total.tolist(), broken.tolist(), relative, strict=True)
    }


def _start(layers, tasks: list[str], settings: LoRAConfig, device) -> tuple[dict, dict]:
    """Trainable A [K, r, in] and B [K, out, r] by layer; a task's own A depends on its id alone."""
    seeds = [settings.seed + (0 if settings.shared_A else zlib.crc32(task.encode())) for task in tasks]
    starts = [initial_A(layers, settings.rank, seed) for seed in seeds]
    A = {
        layer.name: torch.stack([start[layer.name] for start in starts]).to(device).requires_grad_()
        for layer in layers
    }
    B = {
        layer.name: torch.zeros(len(tasks), layer.shape[0], settings.rank, device=device, requires_grad=True)
        for layer in layers
    }
    return A, B


def _losses(
    denoiser: Denoiser, latents: list[Tensor], text: Prompts, batch: int, generator: torch.Generator
) -> Tensor:
    """Each task's diffusion loss [K] on `batch` of its clips, under the same noise and times."""
    count, device, dtype = len(latents), text.states.device, text.states.dtype
    picks = torch.randint(2**31, (batch,), generator=generator)
    clean = torch.cat([clips[(picks % len(clips)).to(device)] for clips in latents]).float()
    noise = torch.randn(batch, *clean.shape[1:], generator=generator).to(device)
    noise = noise.repeat(count, *[1] * (noise.ndim - 1))
    times = denoiser.random_times(batch, generator).to(device).repeat(count)
    said = denoiser(denoiser.noised(clean, noise, times).to(dtype), times, text).float()
    return (said - denoiser.target(clean, noise)).pow(2).reshape(count, -1).mean(1)


def _norms(A: Tensor, B: Tensor) -> Tensor:
    """||B A|| (Frobenius) [K] of a layer: its square is the trace of (B^T B)(A A^T), r x r matrices."""
    squares = ((B.mT @ B) * (A @ A.mT)).sum((-1, -2))
    return squares.clamp(min=0.0).sqrt()


def _finished(
    A: list[Tensor],
    B: list[Tensor],
    loss: float,
    broken: int,
    relative: Tensor,
    names: list[str],
    settings: LoRAConfig,
) -> TrainedLoRA:
    """One task's factors and its verdict; `broken`: first step without a loss, `relative`: ||dW|| / ||W||."""
    worst = int(relative.nan_to_num(math.inf).argmax())
    if broken:
        divergence = f"the loss was not finite in step {broken}"
    elif not relative[worst] <= settings.max_relative_norm:
        divergence = (
            f"||dW|| is {relative[worst]:.3g} times ||W|| in {names[worst]}, "
            f"above max_relative_norm = {settings.max_relative_norm:g}"
        )
    else:
        divergence = None
    if settings.canonical and divergence is None:
        forms = [LoRALayer(a, b, settings.rank).truncated(settings.rank) for a, b in zip(A, B, strict=True)]
        A, B = [form.A for form in forms], [form.B for form in forms]
    return TrainedLoRA(A, B, loss, divergence)
