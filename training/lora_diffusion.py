"""LoRA Diffusion (arXiv 2412.02352): what its two parts learn from LoRAs, and how far its draws are apart."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lofa_core.conditions import Conditions
from lofa_core.descriptions import BaseDescription, ConditionDescription
from lofa_core.lora import LoRA, LoRALayer
from lofa_core.lora_diffusion import LoRADiffusion, noised, starting_noise, velocity
from lofa_core.lora_diffusion import LoRADiffusionConfig as NetworkConfig
from lofa_core.lora_latent import drawn, kl_divergence
from lofa_core.response_map import centred_cosine, cosine

from .config import LoRADiffusionConfig, LoRAVAEConfig, StageConfig, TrainingConfig
from .data.folder_tasks import Tasks
from .factors import Factors
from .looks import on
from .lora_dataset import LoRADataset
from .trainer import Stage, draw, follow, noise_from
from .validation import flat, mean_delta

FILE = "lora_diffusion.safetensors"  # in the run's folder
_TASKS = 16  # held-out tasks of a look
_SEED = 4321  # of what they are told


def new_network(
    config: TrainingConfig, base: BaseDescription, conditions: tuple[ConditionDescription, ...]
) -> LoRADiffusion:
    """An untrained one of the configured sizes."""
    vae, diffusion = config.lora_vae, config.lora_diffusion
    sizes = NetworkConfig(
        rank=config.lora.rank, form=vae.form, latent=vae.latent, layer_width=vae.layer_width,
        vae_width=vae.width, vae_blocks=vae.blocks, width=diffusion.width, blocks=diffusion.blocks,
        pooling_queries=diffusion.pooling_queries, target=diffusion.target,
        steps=diffusion.sampling_steps, guidance=diffusion.guidance,
    )  # fmt: skip
    torch.manual_seed(vae.seed)
    return LoRADiffusion(sizes, base, conditions)


def learned(
    config: TrainingConfig,
    data: Tasks,
    known: LoRADataset,
    held_out: LoRADataset | None,
    device: torch.device,
    train: Callable[[Stage], None],
) -> LoRADiffusion:
    """A new one after both stages, each run by `train`."""
    network = new_network(config, *data.descriptions())
    vae = LoRAVAEStage(network, known, held_out, config.lora_vae, device)
    train(vae)
    vae.finish()
    diffusion = LoRADiffusionStage(network, data, known, held_out, config.lora_diffusion, device)
    train(diffusion)
    diffusion.finish()
    return network


def loras_of(factors: Factors, base: BaseDescription) -> list[LoRA]:
    """Each task's LoRA by itself."""
    layers: list[dict[str, LoRALayer]] = [{} for _ in range(len(factors))]
    for places, (A, B) in zip(base.by_shape().values(), factors.pairs(), strict=True):
        for row, place in enumerate(places):
            for task, own in enumerate(layers):
                a, b = A[task, row], B[task, row]
                own[base.layers[place].name] = LoRALayer(a, b, float(len(a)))
    return [LoRA(own) for own in layers]


def factors_of(loras: Sequence[LoRA], base: BaseDescription) -> Factors:
    """The way back, for LoRAs with alpha = r."""
    names = [[base.layers[place].name for place in places] for places in base.by_shape().values()]
    A = (torch.stack([torch.stack([lora[n].A for n in own]) for lora in loras]) for own in names)
    B = (torch.stack([torch.stack([lora[n].B for n in own]) for lora in loras]) for own in names)
    return Factors(tuple(A), tuple(B))


class _OfKnown:
    """What both stages share: every item of a step is one of the tasks with a LoRA."""

    known: LoRADataset
    settings: StageConfig

    def tasks(self, step: int, items: Sequence[int]) -> list[str]:
        return [self.known.tasks[pick].id for pick, _ in self._drawn(step, items)]

    def _drawn(self, step: int, items: Sequence[int]) -> list[tuple[int, np.random.Generator]]:
        draws = [draw(self.settings.seed, step, item) for item in items]
        return [(int(rng.integers(len(self.known.tasks))), rng) for rng in draws]


class LoRAVAEStage(_OfKnown):
    """Fits the VAE to the training LoRAs: their numbers out of noisy ones, and a latent near Normal(0, 1)."""

    name = "lora_vae"

    def __init__(
        self,
        network: LoRADiffusion,
        known: LoRADataset,
        held_out: LoRADataset | None,
        settings: LoRAVAEConfig,
        device: torch.device,
    ):
        self.network, self.known, self.held_out, self.settings = network, known, held_out, settings
        loras = loras_of(known.loras, network.base)
        network.to(device).codec.fit(loras)
        self.numbers, self.module = network.codec.numbers(loras), network.vae
        network.vae.start(self.numbers)
        self.weights = {"reconstruction": 1.0, "kl": settings.kl_weight}

    def losses(self, model: nn.Module, step: int, items: Sequence[int]) -> dict[str, Tensor]:
        drawn_items = self._drawn(step, items)
        generators = [noise_from(rng) for _, rng in drawn_items]
        clean = [own[[pick for pick, _ in drawn_items]] for own in self.numbers]
        noisy = [own + self.settings.noise * _noise(own, generators) for own in clean]
        latent = torch.empty(len(generators), self.network.config.latent, device=clean[0].device)
        found, mean, log_variance = model(noisy, _noise(latent, generators))
        wrong = sum((f - own).square().sum() for f, own in zip(found, clean, strict=True))
        return {
            "reconstruction": wrong / sum(own.numel() for own in clean),
            "kl": kl_divergence(mean, log_variance).mean(),
        }

    def after_step(self, step: int) -> None:
        pass

    def state(self) -> list[nn.Module]:
        return []

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Cosine of dW with what comes back of it, centred on the mean training dW: of training and of
        held-out tasks.
        """
        mean = mean_delta(self.known)
        found = {"known_cosine": self._rebuilt(self.known, mean)}
        return (
            found
            if self.held_out is None
            else found | {"held_out_cosine": self._rebuilt(self.held_out, mean)}
        )

    def _rebuilt(self, dataset: LoRADataset, mean: Tensor) -> float:
        network, rows = self.network, _some_rows(dataset)
        real = dataset.loras[torch.tensor(rows)]
        latent, _ = network.vae.encode(network.codec.numbers(loras_of(real, network.base)))
        back = factors_of(network.codec.loras(network.vae.decode(latent)), network.base)
        deltas = [(flat(back[i : i + 1].deltas()), flat(real[i : i + 1].deltas())) for i in range(len(rows))]
        return float(np.mean([centred_cosine(one, other, mean) for one, other in deltas]))

    @torch.no_grad()
    def finish(self) -> None:
        """Take the unit of the latents for the diffusion."""
        self.network.fit_latents(*self.network.vae.encode(self.numbers))


class LoRADiffusionStage(_OfKnown):
    """Fits the denoiser to the latents of the training LoRAs under their tasks' conditions."""

    name = "lora_diffusion"
    weights = {"denoising": 1.0}

    def __init__(
        self,
        network: LoRADiffusion,
        data: Tasks,
        known: LoRADataset,
        held_out: LoRADataset | None,
        settings: LoRADiffusionConfig,
        device: torch.device,
    ):
        self.network, self.data, self.known, self.held_out = network, data, known, held_out
        self.settings, self.device = settings, device
        with torch.no_grad():
            numbers = network.to(device).codec.numbers(loras_of(known.loras, network.base))
            self.mean, self.log_variance = network.vae.encode(numbers)
        self.module = network.denoiser
        self.average = copy.deepcopy(self.module).requires_grad_(False)

    def losses(self, model: nn.Module, step: int, items: Sequence[int]) -> dict[str, Tensor]:
        drawn_items = self._drawn(step, items)
        picks = [pick for pick, _ in drawn_items]
        told = [self.data.condition(self.known.tasks[pick], rng) for pick, rng in drawn_items]
        kept = torch.tensor([float(rng.random() >= self.settings.untold) for _, rng in drawn_items])
        t = torch.tensor([rng.random() for _, rng in drawn_items], dtype=torch.float32, device=self.device)
        generators = [noise_from(rng) for _, rng in drawn_items]
        mean, log_variance = self.mean[picks], self.log_variance[picks]
        x0 = self.network.normalised(drawn(mean, log_variance, _noise(mean, generators)))
        epsilon = _noise(mean, generators)
        wanted = x0 if self.settings.target == "x0" else velocity(x0, epsilon, t)
        conditions = on(some_untold(self.data.conditions(told), kept), self.device)
        return {"denoising": F.mse_loss(model(noised(x0, epsilon, t), t, conditions), wanted)}

    def after_step(self, step: int) -> None:
        follow(self.average, self.module, step, self.settings.ema_decay)

    def state(self) -> list[nn.Module]:
        return [self.average]

    def finish(self) -> None:
        """Put the averaged weights in the trained ones' place."""
        self.module.load_state_dict(self.average.state_dict())

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Cosine of one draw's dW with the real one of held-out tasks, plain and centred on the mean training
        dW, and the mean's own plain cosine; under the averaged weights.
        """
        if self.held_out is None:
            return {}
        rng, mean, found = np.random.default_rng(_SEED), mean_delta(self.known), []
        rows = _some_rows(self.held_out)
        told = [self.data.plain_condition(self.held_out.tasks[row], rng) for row in rows]
        network = copy.deepcopy(self.network)
        network.denoiser = self.average
        drawn_loras = drawn_factors(network, self.data, told)
        for i, row in enumerate(rows):
            guess = flat(drawn_loras[i : i + 1].deltas())
            real = flat(self.held_out.loras[row : row + 1].deltas())
            found.append((cosine(guess, real), centred_cosine(guess, real, mean), cosine(mean, real)))
        names = ("delta_cosine", "centred_delta_cosine", "mean_delta_cosine")
        return dict(zip(names, np.mean(found, axis=0).tolist(), strict=True))


def some_untold(conditions: Conditions, kept: Tensor) -> Conditions:
    """The conditions of B tasks with nothing told of those where `kept` [B] is 0."""
    return {
        kind: replace(given, strength=kept if given.strength is None else kept * given.strength)
        for kind, given in conditions.items()
    }


def drawn_factors(network: LoRADiffusion, data: Tasks, told: list[dict[str, Any]], seed: int = 0) -> Factors:
    """The LoRAs for M tasks, of each the condition that `data.conditions` takes, each drawn from `seed`."""
    start = starting_noise(seed, network.config.latent)
    device = network.latent_mean.device
    loras = [network.draw(on(data.conditions([one]), device), start)[0] for one in told]
    return factors_of(loras, network.base)


def spread(
    network: LoRADiffusion, data: Tasks, told: list[dict[str, Any]], own: Factors, seeds: int = 4
) -> dict[str, float]:
    """How far LoRAs are apart (`relative_distance` of dW, the mean over pairs): those of several seeds for
    one condition, those of one seed for different conditions, and the tasks' own LoRAs.
    """
    drawn_loras = [drawn_factors(network, data, told, seed) for seed in range(seeds)]
    of_task = [Factors.cat([loras[task : task + 1] for loras in drawn_loras]) for task in range(len(told))]
    return {
        "between_seeds": float(np.mean([mean_distance(loras) for loras in of_task])),
        "between_conditions": mean_distance(drawn_loras[0]),
        "between_tasks": mean_distance(own),
    }


def mean_distance(loras: Factors) -> float:
    """The mean `relative_distance` over all pairs of K LoRAs."""
    deltas = [flat(loras[row : row + 1].deltas()) for row in range(len(loras))]
    return float(np.mean([relative_distance(one, other) for one, other in combinations(deltas, 2)]))


def relative_distance(one: Tensor, other: Tensor) -> float:
    """||one - other|| over the root mean square of both norms: 0 for the same, sqrt(2) for orthogonal."""
    size = (0.5 * (one.square().sum() + other.square().sum())).sqrt().clamp_min(1e-12)
    return float((one - other).norm() / size)


def _noise(like: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Standard normal numbers in the shape of `like` [K, ...], each row from its own generator."""
    return torch.stack([torch.randn(like.shape[1:], generator=own) for own in generators]).to(like)


def _some_rows(dataset: LoRADataset) -> list[int]:
    return np.linspace(0, len(dataset.tasks) - 1, min(_TASKS, len(dataset.tasks))).astype(int).tolist()
