"""Stage I and Stage II training (LoFA section 3.3). Data parallel under torchrun through accelerate."""

import copy
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F

from lofa_core.hypernetwork import GaussianResponse, Hypernetwork, Response
from lofa_core.response_map import response_map

from . import flow
from .config import Stage1Config, Stage2Config
from .injection import injected, target_modules
from .miniature.tasks import MiniatureTasks
from .optimisers import MuonAdamW

Report = Callable[[int, dict[str, float]], None]
_EMBEDDINGS = ("embedding", "patch_embed", "position", "cls_token", "pooling_queries")


def stage1_loss(
    response: GaussianResponse, weights: Tensor, A: Tensor, B: Tensor, likelihood_weight: float
) -> Tensor:
    """Binary cross-entropy of the response map (eq. 4) + likelihood_weight x Gaussian negative log-likelihood
    of dW.

    weights [N, out, in]; targets A [K, N, r, in], B [K, N, out, r].
    """
    delta = B @ A
    wanted = response_map(weights.expand_as(delta), delta).float()
    probability = response.probability(weights).clamp(1e-6, 1.0 - 1e-6)
    cross_entropy = F.binary_cross_entropy(probability, wanted)
    log_deviation = response.row_log_deviation.unsqueeze(-1) + response.column_log_deviation.unsqueeze(-2)
    error = (delta - response.B @ response.A) * (-log_deviation).exp()
    typical = log_deviation.detach().mean()  # so that the term does not depend on the unit of dW
    likelihood = (0.5 * error.pow(2) + log_deviation - typical).mean()
    return cross_entropy + likelihood_weight * likelihood


def train_stage1(
    hypernetwork: Hypernetwork,
    data: MiniatureTasks,
    actions: list,
    A: Tensor,
    B: Tensor,
    settings: Stage1Config,
    report: Report,
) -> None:
    """Fit Stage I in place to per-task LoRAs A [K, L, r, in], B [K, L, out, r] of `actions`."""
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    rng, weights = _start(settings.seed, accelerator), data.stacked_weights().to(accelerator.device)
    patches = hypernetwork.patches(weights)
    wrapped = accelerator.prepare(_Stage1(hypernetwork))
    optimiser = MuonAdamW(
        hypernetwork.stage1, settings.learning_rate, muon_rate=settings.learning_rate, adamw_names=_EMBEDDINGS
    )
    for step in range(settings.steps):
        picks = torch.from_numpy(rng.integers(len(actions), size=settings.tasks))
        index = torch.from_numpy(rng.permutation(len(weights))[: settings.layers]).to(accelerator.device)
        condition = data.conditions([data.sentence(actions[i], rng) for i in picks.tolist()]).to(
            accelerator.device
        )
        response = wrapped(patches[index], index, condition)
        targets = (x[picks][:, index.cpu()].to(accelerator.device) for x in (A, B))
        loss = stage1_loss(response, weights[index], *targets, settings.likelihood_weight)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(wrapped.parameters(), 1.0)
        optimiser.step(_schedule(step, settings.steps))
        if accelerator.is_main_process and step % 50 == 49:
            report(step + 1, {"loss": loss.item()})


class _Stage1(nn.Module):
    """One forward pass of Stage I for data-parallel training."""

    def __init__(self, hypernetwork: Hypernetwork):
        super().__init__()
        self.stage1 = hypernetwork.stage1

    def forward(self, patches: Tensor, index: Tensor, condition: Tensor) -> Response:
        return self.stage1(patches, index, self.stage1.trunk.project(condition))


class _Stage2(nn.Module):
    """One forward pass of Stage II over a frozen Stage I."""

    def __init__(self, hypernetwork: Hypernetwork):
        super().__init__()
        self.stage2 = hypernetwork.stage2
        self._stage1 = [hypernetwork.stage1]  # in a list: not this module's to train or to synchronise

    def forward(self, patches: Tensor, index: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        (stage1,) = self._stage1
        with torch.no_grad():
            features = stage1(patches, index, stage1.trunk.project(condition)).features
        return self.stage2(patches, index, self.stage2.trunk.project(condition), features)


def train_stage2(
    hypernetwork: Hypernetwork,
    data: MiniatureTasks,
    lora_actions: list,
    A: Tensor,
    B: Tensor,
    settings: Stage2Config,
    out: Path,
    report: Report,
) -> None:
    """Fit Stage II (from Stage I) with reconstruction, diffusion and distillation; averaged weights go to
    `out`.

    Reconstruction (eq. 6) needs a task's own LoRA: A [K, L, r, in], B [K, L, out, r] of `lora_actions`. The
    diffusion loss (eq. 7) and the distillation run on every training task: the base model under the coarse
    prompt with the predicted LoRA must match the clip's velocity, and a teacher's: the base with the task's
    own LoRA, or under the fine prompt without.
    """
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    device = accelerator.device
    hypernetwork.stage2.start_from(hypernetwork.stage1)
    hypernetwork.to(device).stage1.requires_grad_(False)
    rng, patches = _start(settings.seed, accelerator), hypernetwork.patches(data.stacked_weights().to(device))
    wrapped = accelerator.prepare(_Stage2(hypernetwork))
    optimiser = MuonAdamW(
        hypernetwork.stage2, settings.learning_rate, muon_rate=settings.learning_rate, adamw_names=_EMBEDDINGS
    )
    average = copy.deepcopy(hypernetwork.stage2).requires_grad_(False)
    model = data.load_model().to(device)
    names = [layer.name for layer in hypernetwork.base.layers]
    modules = target_modules(model, names)
    index, coarse = torch.arange(len(names), device=device), data.coarse().to(device)
    shown = data.clips.action_weights().to(device)
    own = {action: row for row, action in enumerate(lora_actions)}
    running: dict[str, float] = {}
    for step in range(settings.steps):
        tasks = _some_tasks(data.training, lora_actions, settings.tasks, rng)
        condition = data.conditions([data.sentence(action, rng) for action in tasks]).to(device)
        predicted_A, predicted_B = wrapped(patches, index, condition)

        picks = torch.cat([_some(data.clips_by_action[action], settings.clips, rng) for action in tasks])
        clean = data.clips.latents[picks].float().to(device)
        noise, times = torch.randn_like(clean), flow.random_times(len(clean)).to(device)
        x = flow.noised(clean, noise, times)
        # The action alone: clothes that the clip does not show would be noise in the teacher's answer.
        fine = data.prompts([data.plain_sentence(action, rng) for action in tasks]).to(device)
        fine = fine.repeat_interleave(settings.clips, 0)
        text = fine if rng.random() < settings.fine_prompts else coarse.expand(len(clean), -1, -1)

        with injected(modules, *by_name(names, predicted_A, predicted_B)):
            velocity = model(x, times * 1000.0, text, return_dict=False)[0]
        losses = {"diffusion": (shown * (velocity - (noise - clean)).pow(2)).mean()}
        rows = torch.tensor([own.get(action, -1) for action in tasks])
        if settings.distillation_weight:
            teacher = _teacher(
                model, modules, names, x, times, fine, coarse, rows, A, B, settings.clips,
                settings.teacher_guidance,
            )  # fmt: skip
            losses["distillation"] = (shown * (velocity - teacher).pow(2)).mean()
        known = rows >= 0
        if settings.reconstruction_weight and known.any():
            statistics, targets = (
                hypernetwork.statistics,
                (A[rows[known]].to(device), B[rows[known]].to(device)),
            )
            wanted = statistics.normalise(*targets, index)
            found = statistics.normalise(predicted_A[known], predicted_B[known], index)
            losses["reconstruction"] = sum(F.l1_loss(f, w) for f, w in zip(found, wanted, strict=True))
        loss = sum(getattr(settings, f"{name}_weight") * value for name, value in losses.items())
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(wrapped.parameters(), 1.0)
        optimiser.step(_schedule(step, settings.steps))

        decay = min(settings.ema_decay, (1 + step) / (10 + step))
        with torch.no_grad():
            for kept, new in zip(average.parameters(), hypernetwork.stage2.parameters(), strict=True):
                kept.lerp_(new, 1.0 - decay)
        for name, value in losses.items():
            running[name] = 0.98 * running.get(name, value.item()) + 0.02 * value.item()
        if accelerator.is_main_process and (step % 100 == 99 or step == settings.steps - 1):
            report(step + 1, running)
            torch.save(average.state_dict(), out)
    hypernetwork.stage2.load_state_dict(average.state_dict())


def _teacher(model, modules, names, x, times, fine, coarse, rows, A, B, clips, guidance) -> Tensor:
    """Velocities to match: base + own LoRA under the coarse prompt where there is one, else the base under
    the fine prompt, guided away from the coarse one: a student of many tasks answers too faintly, and this
    makes up for it.
    """
    has_lora = (rows >= 0).repeat_interleave(clips).to(x.device)
    target = torch.empty_like(x)
    with torch.no_grad():
        plain = ~has_lora
        if plain.any():
            inputs = x[plain], times[plain] * 1000.0
            said = model(*inputs, fine[plain], return_dict=False)[0]
            if guidance != 1.0:
                unsaid = model(*inputs, coarse.expand(len(said), -1, -1), return_dict=False)[0]
                said = unsaid + guidance * (said - unsaid)
            target[plain] = said
        if has_lora.any():
            chosen = rows[rows >= 0]
            with injected(modules, *by_name(names, A[chosen].to(x.device), B[chosen].to(x.device))):
                text = coarse.expand(int(has_lora.sum()), -1, -1)
                target[has_lora] = model(x[has_lora], times[has_lora] * 1000.0, text, return_dict=False)[0]
    return target


def by_name(names: list[str], A: Tensor, B: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A [K, L, r, in], B [K, L, out, r] -> per layer [K, r, in] and [K, out, r]."""
    return dict(zip(names, A.unbind(1), strict=True)), dict(zip(names, B.unbind(1), strict=True))


def _some_tasks(training: list, with_lora: list, count: int, rng: np.random.Generator) -> list:
    """A quarter of the tasks from those with a LoRA of their own, the rest from all."""
    few = count // 4 if with_lora else 0
    return [with_lora[i] for i in rng.integers(len(with_lora), size=few)] + [
        training[i] for i in rng.integers(len(training), size=count - few)
    ]


def _some(indices: Tensor, count: int, rng: np.random.Generator) -> Tensor:
    return indices[torch.from_numpy(rng.integers(len(indices), size=count))]


def _schedule(step: int, steps: int) -> float:
    """Warm-up over a twentieth of the steps, then a cosine to a fiftieth."""
    return min(1.0, (step + 1) / max(1, steps // 20)) * (0.02 + 0.49 * (1 + math.cos(math.pi * step / steps)))


def _start(seed: int, accelerator: Accelerator) -> np.random.Generator:
    torch.manual_seed(seed * 1000 + accelerator.process_index)
    return np.random.default_rng([seed, accelerator.process_index])
