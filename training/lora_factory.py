"""Per-task LoRAs, the training targets: several tasks at once, from one shared initialisation.

The shared A and common random numbers matter: with an A drawn anew for each task, nothing about A or B can be
learned across tasks (miniature.md, finding 1).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from lofa_core.base_models import TargetLayer

from . import flow
from .injection import injected, target_modules


@dataclass(frozen=True)
class LoRATraining:
    """How one task's LoRA is trained."""

    rank: int = 4
    steps: int = 200
    batch: int = 8  # clips a step and task
    learning_rate: float = 3e-3
    seed: int = 0


def shared_initialisation(layers: tuple[TargetLayer, ...], rank: int, seed: int) -> dict[str, Tensor]:
    """A [r, in] of every layer, uniform as PEFT draws it; B starts at zero."""
    generator = torch.Generator().manual_seed(seed)
    return {
        layer.name: (2.0 * torch.rand(rank, layer.shape[1], generator=generator) - 1.0)
        / math.sqrt(layer.shape[1])
        for layer in layers
    }


def train_loras(
    model: WanTransformer3DModel,
    layers: tuple[TargetLayer, ...],
    tasks: list[Tensor],
    states: Tensor,
    settings: LoRATraining,
    *,
    report: Callable[[int, float], None] = lambda step, loss: None,
) -> tuple[Tensor, Tensor]:
    """LoRAs for K tasks of unit latents [n_k, C, T, H, W], under the coarse prompt's folded text states [1, S
    + 1, d].

    Every task sees the same noise and times (common random numbers). Returns A [K, L, r, in] and B [K, L,
    out, r].
    """
    count, names = len(tasks), [layer.name for layer in layers]
    modules = target_modules(model, names)
    start = shared_initialisation(layers, settings.rank, settings.seed)
    A = {name: start[name].expand(count, -1, -1).clone().requires_grad_() for name in names}
    B = {
        layer.name: torch.zeros(count, layer.shape[0], settings.rank, requires_grad=True) for layer in layers
    }
    optimiser = torch.optim.AdamW(
        [*A.values(), *B.values()], lr=settings.learning_rate, betas=(0.9, 0.99), weight_decay=0.0
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser,
        lambda step: (
            min(1.0, (step + 1) / 10) * (0.05 + 0.475 * (1 + math.cos(math.pi * step / settings.steps)))
        ),
    )
    generator = torch.Generator().manual_seed(settings.seed)
    text = states.expand(count * settings.batch, -1, -1)
    for step in range(settings.steps):
        picks = torch.randint(2**31, (settings.batch,), generator=generator)
        clean = torch.cat([clips[picks % len(clips)] for clips in tasks]).float()
        noise = torch.randn(settings.batch, *clean.shape[1:], generator=generator).repeat(count, 1, 1, 1, 1)
        times = flow.random_times(settings.batch, generator).repeat(count)
        with injected(modules, A, B):
            x = flow.noised(clean, noise, times)
            wrong = model(x, times * 1000.0, text, return_dict=False)[0] - (noise - clean)
        # The sum over tasks of each task's own mean: a task's gradient does not depend on who shares its
        # batch.
        loss = wrong.pow(2).view(count, -1).mean(1).sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        report(step + 1, loss.item() / count)
    return (
        torch.stack([A[name].detach() for name in names], 1),
        torch.stack([B[name].detach() for name in names], 1),
    )
