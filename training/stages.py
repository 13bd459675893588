"""Stage I and Stage II (LoFA section 3.3): what each learns from a step's tasks. trainer.py runs them."""

import contextlib
import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lofa_core.hypernetwork import GaussianResponse, Hypernetwork, Response
from lofa_core.response_map import response_map

from . import flow
from .config import DiffusionConfig, Stage1Config, Stage2Config
from .data.folder_tasks import Tasks
from .injection import injected, target_modules
from .lora_dataset import LoRADataset
from .losses import RECONSTRUCTION
from .over_base import padded
from .trainer import draw, noise_from
from .validation import response_cosines, weight_cosines


def stage1_losses(response: Response, weights: Tensor, A: Tensor, B: Tensor) -> dict[str, Tensor]:
    """Binary cross-entropy of the response map (eq. 4) and the size of Stage I's factors (as the published
    training has it); where Stage I predicts dW as a Gaussian, its negative log-likelihood.

    weights [N, out, in]; targets A [K, N, r, in], B [K, N, out, r].
    """
    delta = B @ A
    wanted = response_map(weights.expand_as(delta), delta).float()
    probability = response.probability(weights).clamp(1e-6, 1.0 - 1e-6)
    losses = {
        "cross_entropy": F.binary_cross_entropy(probability, wanted),
        "size": response.A.square().mean() + response.B.square().mean(),
    }
    if isinstance(response, GaussianResponse):
        log_deviation = response.row_log_deviation.unsqueeze(-1) + response.column_log_deviation.unsqueeze(-2)
        error = (delta - response.B @ response.A) * (-log_deviation).exp()
        typical = log_deviation.detach().mean()  # so that the term does not depend on the unit of dW
        losses["likelihood"] = (0.5 * error.pow(2) + log_deviation - typical).mean()
    return losses


class Stage1:
    """Fits the hypernetwork's Stage I to the response maps of per-task LoRAs."""

    name = "stage1"

    def __init__(
        self,
        hypernetwork: Hypernetwork,
        data: Tasks,
        known: LoRADataset,
        held_out: LoRADataset | None,
        settings: Stage1Config,
        device: torch.device,
    ):
        self.hypernetwork, self.data, self.known, self.held_out = hypernetwork, data, known, held_out
        self.settings, self.device = settings, device
        self.module = _Stage1(hypernetwork.to(device))
        self.base = data.stacked_weights().to(device)
        self.patches = hypernetwork.patches(self.base)
        self.weights = {
            "cross_entropy": 1.0, "likelihood": settings.likelihood_weight, "size": settings.size_weight,
        }  # fmt: skip

    def tasks(self, step: int, items: Sequence[int]) -> list[str]:
        return [str(self.known.actions[pick]) for pick, _ in self._drawn(step, items)]

    def _drawn(self, step: int, items: Sequence[int]) -> list[tuple[int, np.random.Generator]]:
        draws = [draw(self.settings.seed, step, item) for item in items]
        return [(int(rng.integers(len(self.known.actions))), rng) for rng in draws]

    def losses(self, model: nn.Module, step: int, items: Sequence[int]) -> dict[str, Tensor]:
        drawn = self._drawn(step, items)
        sentences = [self.data.sentence(self.known.actions[pick], rng) for pick, rng in drawn]
        layers = draw(self.settings.seed, step).permutation(len(self.base))[: self.settings.layers]
        index = torch.from_numpy(layers).to(self.device)
        condition = padded(self.data.conditions(sentences), self.hypernetwork).to(self.device)
        response = model(self.patches[index], index, condition)
        picks = torch.tensor([pick for pick, _ in drawn])
        targets = (x[picks][:, index.cpu()].to(self.device) for x in (self.known.A, self.known.B))
        return stage1_losses(response, self.base[index], *targets)

    def after_step(self, step: int) -> None:
        pass

    def state(self) -> list[nn.Module]:
        return []

    def validate(self) -> dict[str, float]:
        if self.held_out is None:
            return {}
        return response_cosines(self.hypernetwork, self.data, self.known, self.held_out)


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


class Diffusion(ABC):
    """What every stage shares that is taught through the base model: the diffusion loss (eq. 7) of each
    task's clips under the predicted LoRA, and distillation.

    The base model under the coarse prompt with the predicted LoRA must match the clip's velocity, and a
    teacher's: the base with the task's own LoRA, or under the fine prompt without. `average` is what is kept
    of `trained` in the end.
    """

    name = ""

    def __init__(
        self,
        hypernetwork: Hypernetwork,
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
        self.patches = hypernetwork.patches(data.stacked_weights().to(device))
        self.model = data.load_model().to(device)
        if settings.checkpoint_activations:
            self.model.enable_gradient_checkpointing()
        self.names = [layer.name for layer in hypernetwork.base.layers]
        self.modules = target_modules(self.model, self.names)
        self.index = torch.arange(len(self.names), device=device)
        self.coarse = data.coarse().to(device)
        self.shown = data.clips.action_weights().to(device)
        self.own = {action: row for row, action in enumerate(known.actions)} if known else {}
        self.weights = {name: getattr(settings, f"{name}_weight") for name in ("diffusion", "distillation")}
        self._injection = contextlib.ExitStack()

    def tasks(self, step: int, items: Sequence[int]) -> list[str]:
        return [str(action) for action, _ in self._drawn(step, items)]

    def _drawn(self, step: int, items: Sequence[int]) -> list[tuple[object, np.random.Generator]]:
        """The first items of a step are tasks with a LoRA of their own, the others any."""
        few = round(self.settings.with_lora * self.settings.tasks) if self.own else 0
        drawn = []
        for item in items:
            rng = draw(self.settings.seed, step, item)
            choices = self.known.actions if self.known and item < few else self.data.training
            drawn.append((choices[rng.integers(len(choices))], rng))
        return drawn

    def losses(self, model: nn.Module, step: int, items: Sequence[int]) -> dict[str, Tensor]:
        settings, device = self.settings, self.device
        actions, draws = zip(*self._drawn(step, items), strict=True)
        sentences = [self.data.sentence(action, rng) for action, rng in zip(actions, draws, strict=True)]
        condition = padded(self.data.conditions(sentences), self.hypernetwork).to(device)
        predicted = model(self.patches, self.index, condition)

        x, velocity_of_data, times, fine = self._noised(actions, draws)
        rows = torch.tensor([self.own.get(action, -1) for action in actions])
        teacher = self._teacher(x, times, fine, rows) if settings.distillation_weight else None
        use_fine = draw(settings.seed, step).random() < settings.fine_prompts
        text = fine if use_fine else self.coarse.expand(len(x), -1, -1)
        # Not taken out before the backward pass, which may compute the base model's blocks again.
        self._injection.close()
        self._injection.enter_context(injected(self.modules, *by_name(self.names, *predicted)))
        velocity = self.model(x, times * 1000.0, text, return_dict=False)[0]
        losses = {"diffusion": (self.shown * (velocity - velocity_of_data).pow(2)).mean()}
        if teacher is not None:
            losses["distillation"] = (self.shown * (velocity - teacher).pow(2)).mean()
        return losses | self._on_factors(predicted, rows)

    @abstractmethod
    def _on_factors(self, predicted: tuple[Tensor, Tensor], rows: Tensor) -> dict[str, Tensor]:
        """Losses on the predicted factors. rows [K]: the tasks' own LoRAs in `known`, -1 for none."""

    def _noised(self, actions: Sequence, draws: Sequence[np.random.Generator]) -> tuple[Tensor, ...]:
        """(x_t, the velocity of the clips, times, fine prompts) of `clips` clips of each task."""
        clean, noise, times = [], [], []
        for action, rng in zip(actions, draws, strict=True):
            clips = self.data.clips_by_action[action]
            picks = clips[torch.from_numpy(rng.integers(len(clips), size=self.settings.clips))]
            clean.append(self.data.clips.latents[picks].float())
            generator = noise_from(rng)
            noise.append(torch.randn(clean[-1].shape, generator=generator))
            times.append(flow.random_times(len(picks), generator))
        # The action alone: clothes that the clip does not show would be noise in the teacher's answer.
        sentences = [
            self.data.plain_sentence(action, rng) for action, rng in zip(actions, draws, strict=True)
        ]
        fine = self.data.prompts(sentences).to(self.device).repeat_interleave(self.settings.clips, 0)
        x0, epsilon, t = (torch.cat(parts).to(self.device) for parts in (clean, noise, times))
        return flow.noised(x0, epsilon, t), epsilon - x0, t, fine

    def _teacher(self, x: Tensor, times: Tensor, fine: Tensor, rows: Tensor) -> Tensor:
        """Velocities to match: base + own LoRA under the coarse prompt where there is one, else the base
        under the fine prompt, guided away from the coarse one: a student of many tasks answers too faintly,
        and this makes up for it.
        """
        has_lora = (rows >= 0).repeat_interleave(self.settings.clips).to(x.device)
        guidance, target = self.settings.teacher_guidance, torch.empty_like(x)
        with torch.no_grad():
            plain = ~has_lora
            if plain.any():
                inputs = x[plain], times[plain] * 1000.0
                said = self.model(*inputs, fine[plain], return_dict=False)[0]
                if guidance != 1.0:
                    coarse = self.coarse.expand(len(said), -1, -1)
                    unsaid = self.model(*inputs, coarse, return_dict=False)[0]
                    said = unsaid + guidance * (said - unsaid)
                target[plain] = said
            if has_lora.any():
                own = (factor[rows[rows >= 0]].to(x.device) for factor in (self.known.A, self.known.B))
                coarse = self.coarse.expand(int(has_lora.sum()), -1, -1)
                with injected(self.modules, *by_name(self.names, *own)):
                    target[has_lora] = self.model(
                        x[has_lora], times[has_lora] * 1000.0, coarse, return_dict=False
                    )[0]
        return target

    def after_step(self, step: int) -> None:
        self._injection.close()
        decay = min(self.settings.ema_decay, (1 + step) / (10 + step))
        with torch.no_grad():
            for kept, new in zip(self.average.parameters(), self.trained.parameters(), strict=True):
                kept.lerp_(new, 1.0 - decay)

    def state(self) -> list[nn.Module]:
        return [self.average]

    def finish(self) -> None:
        """Put the averaged weights in the trained ones' place."""
        self.trained.load_state_dict(self.average.state_dict())

    def validate(self) -> dict[str, float]:
        if self.known is None or self.held_out is None:
            return {}
        return weight_cosines(self.hypernetwork, self.data, self.known, self.held_out)


class Stage2(Diffusion):
    """Fits Stage II, started from Stage I, with reconstruction (eq. 6), diffusion (eq. 7) and distillation.

    Reconstruction needs a task's own LoRA; the other two run on every task.
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
        hypernetwork.stage2.start_from(hypernetwork.stage1)
        hypernetwork.to(device).stage1.requires_grad_(False)
        super().__init__(
            hypernetwork, _Stage2(hypernetwork), hypernetwork.stage2, data, known, held_out, settings, device
        )
        self.weights["reconstruction"] = settings.reconstruction_weight
        self.compare = RECONSTRUCTION[settings.reconstruction]

    def _on_factors(self, predicted: tuple[Tensor, Tensor], rows: Tensor) -> dict[str, Tensor]:
        """Reconstruction: the mean over all tasks; one without a LoRA of its own counts nothing."""
        known = rows >= 0
        if not self.weights["reconstruction"]:
            return {}
        if self.known is None or not known.any():
            return {"reconstruction": predicted[0].new_zeros(())}
        wanted = (self.known.A[rows[known]].to(self.device), self.known.B[rows[known]].to(self.device))
        found = (predicted[0][known], predicted[1][known])
        each = self.compare(found, wanted, self.hypernetwork.statistics)
        return {"reconstruction": each.sum() / len(rows)}


def by_name(names: list[str], A: Tensor, B: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A [K, L, r, in], B [K, L, out, r] -> per layer [K, r, in] and [K, out, r]."""
    return dict(zip(names, A.unbind(1), strict=True)), dict(zip(names, B.unbind(1), strict=True))
