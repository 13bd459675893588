"""Stage II (LoFA section 3.3), and what all stages share that learn through the base model. trainer.py runs
them.
"""

import contextlib
import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lofa_core.conditions import Conditions
from lofa_core.hypernetwork import Hypernetwork
from lofa_core.trunk import Layers, shape_key

from .config import DiffusionConfig, ReconstructionConfig, Stage2Config
from .data.folder_tasks import Tasks
from .denoisers import Denoiser, Prompts
from .factors import Factors, by_name
from .injection import injected
from .looks import Predictor, looks_at, names_by_shape, on
from .lora_dataset import LoRADataset
from .losses import RECONSTRUCTION
from .over_base import OverBase, padded
from .trainer import draw, follow, noise_from
from .validation import weight_cosines


class _Stage2(nn.Module):
    """One forward pass of Stage II over a frozen Stage I."""

    def __init__(self, hypernetwork: Hypernetwork):
        super().__init__()
        self.stage2 = hypernetwork.stage2
        self._stage1 = [hypernetwork.stage1]  # in a list: not this module's to train or to synchronise

    def forward(self, looks: list[Layers], conditions: Conditions) -> Factors:
        (stage1,) = self._stage1
        features: Sequence[Tensor | None] = [None] * len(looks)
        if self.stage2.trunk.config.feature_blocks:
            with torch.no_grad():
                condition = stage1.trunk.project(conditions)
                features = [stage1(layers, condition).features for layers in looks]
        condition = self.stage2.trunk.project(conditions)
        found = (self.stage2(layers, condition, own) for layers, own in zip(looks, features, strict=True))
        A, B = zip(*found, strict=True)
        return Factors(A, B)


@dataclass(frozen=True)
class _Base:
    """A base model to train through, its target layers by name, and what a predictor sees of them."""

    denoiser: Denoiser
    modules: dict[str, nn.Linear]
    looks: list[Layers]


class Diffusion(ABC):
    """What every stage shares that is taught through the base model: the diffusion loss (eq. 7) of each
    task's clips under the predicted LoRA, and distillation.

    The base model under the coarse prompt with the predicted LoRA must match what training wants of it (WAN:
    the clip's velocity, SDXL: the noise), and what a teacher says: the base with the task's own LoRA, or
    under the fine prompt without. `average` is what is kept of `trained` in the end.
    """

    name = ""

    def __init__(
        self,
        hypernetwork: Predictor,
        module: nn.Module,
        trained: nn.Module,
        data: Tasks,
        known: LoRADataset | None,
        held_out: LoRADataset | None,
        settings: DiffusionConfig,
        device: torch.device,
    ):
        self.hypernetwork, self.module, self.trained = hypernetwork, module, trained
        self.data, self.known, self.held_out = data, known, held_out
        self.settings, self.device = settings, device
        self.average = copy.deepcopy(trained).requires_grad_(False)
        self.groups = names_by_shape(hypernetwork)
        self.bases = [self._opened(base) for base in data.family()]
        if len(self.bases) > 1 and known is not None and settings.with_lora:
            raise ValueError(
                f"[{self.name}] with_lora = {settings.with_lora}: the LoRAs are of {data.base} alone. Set "
                "with_lora = 0 where data.more_bases names others."
            )
        self._use(self.bases[0])
        self.coarse = data.coarse().to(device)
        self.own = {task: row for row, task in enumerate(known.tasks)} if known else {}
        self.weights = {name: getattr(settings, f"{name}_weight") for name in ("diffusion", "distillation")}
        self._injection = contextlib.ExitStack()

    def _opened(self, base: OverBase) -> "_Base":
        denoiser = base.load_denoiser()
        denoiser.model.to(self.device)
        if self.settings.checkpoint_activations:
            denoiser.model.enable_gradient_checkpointing()
        weights = [weights.to(self.device) for weights in base.weights_by_shape()]
        modules = denoiser.modules([name for names in self.groups for name in names])
        return _Base(denoiser, modules, looks_at(self.hypernetwork, weights))

    def _use(self, base: "_Base") -> None:
        self.denoiser, self.modules, self.looks = base.denoiser, base.modules, base.looks

    def tasks(self, step: int, items: Sequence[int]) -> list[str]:
        return [task.id for task, _ in self._drawn(step, items)]

    def _drawn(self, step: int, items: Sequence[int]) -> list[tuple[Any, np.random.Generator]]:
        """The first items of a step are tasks with a LoRA of their own, the others any."""
        few = round(self.settings.with_lora * self.settings.tasks) if self.own else 0
        drawn = []
        for item in items:
            rng = draw(self.settings.seed, step, item)
            known = self.known.tasks if self.known and item < few else None
            drawn.append((known[rng.integers(len(known))] if known else self.data.draw_task(rng), rng))
        return drawn

    def losses(self, model: nn.Module, step: int, items: Sequence[int]) -> dict[str, Tensor]:
        settings, device = self.settings, self.device
        common = draw(settings.seed, step)
        use_fine = common.random() < settings.fine_prompts
        self._use(self.bases[common.integers(len(self.bases))])
        tasks, draws = zip(*self._drawn(step, items), strict=True)
        told = [self.data.condition(task, rng) for task, rng in zip(tasks, draws, strict=True)]
        conditions = on(padded(self.data.conditions(told), self.hypernetwork), device)
        predicted = model(self.looks, conditions)

        x, target, times, fine = self._noised(tasks, draws)
        rows = torch.tensor([self.own.get(task, -1) for task in tasks])
        teacher = self._teacher(x, times, fine, rows) if settings.distillation_weight else None
        text = fine if use_fine else self.coarse.expanded(len(x))
        # Not taken out before the backward pass, which may compute the base model's blocks again.
        self._injection.close()
        self._injection.enter_context(injected(self.modules, *by_name(self.groups, predicted)))
        said = self.denoiser(x, times, text)
        shown = torch.stack([self.data.loss_weights(task) for task in tasks]).to(device)
        shown = shown.repeat_interleave(settings.clips, 0)
        losses = {"diffusion": (shown * (said - target).pow(2)).mean()}
        if teacher is not None:
            losses["distillation"] = (shown * (said - teacher).pow(2)).mean()
        return losses | self._on_factors(predicted, rows)

    @abstractmethod
    def _on_factors(self, predicted: Factors, rows: Tensor) -> dict[str, Tensor]:
        """Losses on the predicted factors. rows [K]: the tasks' own LoRAs in `known`, -1 for none."""

    def _noised(
        self, tasks: Sequence, draws: Sequence[np.random.Generator]
    ) -> tuple[Tensor, Tensor, Tensor, Prompts]:
        """(x_t, what training wants of it, times, fine prompts) of `clips` clips of each task."""
        clean, noise, times, sentences = [], [], [], []
        for task, rng in zip(tasks, draws, strict=True):
            clean.append(self.data.some_latents(task, self.settings.clips, rng).float())
            generator = noise_from(rng)
            noise.append(torch.randn(clean[-1].shape, generator=generator))
            times.append(self.denoiser.random_times(len(clean[-1]), generator))
        for task, rng in zip(tasks, draws, strict=True):
            # What the task is about alone: all else would be noise in the teacher's answer.
            sentences.append(self.data.plain_sentence(task, rng))
        fine = self.data.prompts(sentences).to(self.device).repeated(self.settings.clips)
        x0, epsilon, t = (torch.cat(parts).to(self.device) for parts in (clean, noise, times))
        return self.denoiser.noised(x0, epsilon, t), self.denoiser.target(x0, epsilon), t, fine

    def _teacher(self, x: Tensor, times: Tensor, fine: Prompts, rows: Tensor) -> Tensor:
        """What to match: base + own LoRA under the coarse prompt where there is one, else the base under the
        fine prompt, guided away from the coarse one: a student of many tasks answers too faintly, and this
        makes up for it.
        """
        has_lora = (rows >= 0).repeat_interleave(self.settings.clips).to(x.device)
        guidance, target = self.settings.teacher_guidance, torch.empty_like(x)
        with torch.no_grad():
            plain = ~has_lora
            if plain.any():
                said = self.denoiser(x[plain], times[plain], fine[plain])
                if guidance != 1.0:
                    unsaid = self.denoiser(x[plain], times[plain], self.coarse.expanded(len(said)))
                    said = unsaid + guidance * (said - unsaid)
                target[plain] = said
            if self.known is not None and has_lora.any():
                own = self.known.loras[rows[rows >= 0]].to(x.device)
                coarse = self.coarse.expanded(int(has_lora.sum()))
                with injected(self.modules, *by_name(self.groups, own)):
                    target[has_lora] = self.denoiser(x[has_lora], times[has_lora], coarse)
        return target

    def after_step(self, step: int) -> None:
        self._injection.close()
        follow(self.average, self.trained, step, self.settings.ema_decay)

    def state(self) -> list[nn.Module]:
        return [self.average]

    def finish(self) -> None:
        """Put the averaged weights in the trained ones' place."""
        self.trained.load_state_dict(self.average.state_dict())

    def validate(self) -> dict[str, float]:
        if self.known is None or self.held_out is None:
            return {}
        return weight_cosines(self.hypernetwork, self.data, self.known, self.held_out)


class Reconstruction(Diffusion):
    """Also learns from tasks' own LoRAs (eq. 6); the other losses run on every task."""

    def __init__(
        self,
        hypernetwork: Predictor,
        module: nn.Module,
        trained: nn.Module,
        data: Tasks,
        known: LoRADataset,
        held_out: LoRADataset | None,
        settings: ReconstructionConfig,
        device: torch.device,
    ):
        super().__init__(hypernetwork, module, trained, data, known, held_out, settings, device)
        self.weights["reconstruction"] = settings.reconstruction_weight
        self.compare = RECONSTRUCTION[settings.reconstruction]

    def _on_factors(self, predicted: Factors, rows: Tensor) -> dict[str, Tensor]:
        """Reconstruction: the mean over all tasks; one without a LoRA of its own counts nothing."""
        known = rows >= 0
        if not self.weights["reconstruction"]:
            return {}
        if self.known is None or not known.any():
            return {"reconstruction": predicted.A[0].new_zeros(())}
        wanted = self.known.loras[rows[known]].to(self.device)
        statistics = self.hypernetwork.statistics
        layers = sum(map(len, self.groups))
        each = sum(
            self.compare(found, own, None if statistics is None else statistics[shape_key(look.shape)])
            * (len(look.index) / layers)
            for look, found, own in zip(
                self.looks, predicted[known.to(self.device)].pairs(), wanted.pairs(), strict=True
            )
        )
        return {"reconstruction": each.sum() / len(rows)}


class Stage2(Reconstruction):
    """Fits Stage II, started from Stage I or afresh, with reconstruction (eq. 6), diffusion (eq. 7) and
    distillation.
    """

    name = "stage2"

    def __init__(
        self,
        hypernetwork: Hypernetwork,
        data: Tasks,
        known: LoRADataset,
        held_out: LoRADataset | None,
        settings: Stage2Config,
        device: torch.device,
    ):
        if settings.from_stage1:
            hypernetwork.stage2.start_from(hypernetwork.stage1)
        hypernetwork.to(device).stage1.requires_grad_(False)
        super().__init__(
            hypernetwork, _Stage2(hypernetwork), hypernetwork.stage2, data, known, held_out, settings, device
        )
