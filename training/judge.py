"""Measures of held-out tasks: clips generated under a method and read by the evaluators, maps compared."""

import contextlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lofa_core.hypernetwork import Hypernetwork
from lofa_core.metrics.distances import frechet_distance
from lofa_core.response_map import THRESHOLD, centred_cosine, cosine

from . import flow
from .backbones import load_vae
from .baselines.simple import ridge
from .config import EvaluationConfig
from .denoisers import Prompts
from .factors import Factors, by_name
from .injection import injected
from .looks import Predictor, looks_at
from .lora_dataset import LoRADataset
from .miniature import evaluator as evaluator_module
from .miniature import look_reader as look_reader_module
from .miniature import world
from .miniature.latents import decode_clips
from .miniature.tasks import MiniatureTasks
from .miniature.vae import WholeClipVAE
from .miniature.world_tasks import WorldTask
from .result_tables import FACTOR
from .validation import flat, mean_delta, mean_map, response_maps

_TIMES = (0.2, 0.4, 0.6, 0.8, 0.95)


@dataclass(frozen=True)
class Method:
    """One row of a table: the tasks' LoRAs (or none), a prompt ("coarse", "fine" or "plain fine"), a guidance
    scale.
    """

    name: str
    factors: Factors | None
    prompt: str = "coarse"
    guidance: float = 1.0


class Judge:
    """Draws, generates and reads clips of held-out tasks that fix the same: an action, a look, or both."""

    def __init__(
        self,
        data: MiniatureTasks,
        tasks: list[WorldTask],
        settings: EvaluationConfig,
        evaluator: evaluator_module.Evaluator,
        look_reader: look_reader_module.LookReader | None = None,
    ):
        self.data, self.tasks, self.settings = data, tasks, settings
        self.readers: list[Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]] = []
        if tasks[0].action is not None:
            self.readers.append(evaluator.read)
        if tasks[0].look is not None:
            self.readers.append((look_reader or look_reader_module.load()).read)
        self.denoiser = data.load_denoiser()
        layers = data.base_description()
        self.groups = [[layers.layers[i].name for i in places] for places in layers.by_shape().values()]
        self.modules = self.denoiser.modules([name for names in self.groups for name in names])
        self._decoder = WholeClipVAE(load_vae(data.base))
        rng = np.random.default_rng(settings.seed)
        self.sentences = [data.reserved_sentence(task, rng) for task in tasks]
        self.plain_sentences = [data.plain_sentence(task, rng) for task in tasks]
        self.real = data.held_out_clips(settings.clips_per_task, tasks=tasks)
        self.labels = np.repeat([task.indices() for task in tasks], settings.clips_per_task, axis=0)
        self.reference = self.read(
            data.held_out_clips(2 * settings.clips_per_task, 1, tasks).latents.float()
        )[1]

    def read(self, latents: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Factor indices and features of unit latents, through the VAE's decoder."""
        return self._read(decode_clips(self._decoder, latents))

    def _read(self, clips: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        indices, features = zip(*(read(clips) for read in self.readers), strict=True)
        return np.concatenate(indices, 1), np.concatenate(features, 1)

    def measure(self, method: Method) -> dict[str, float]:
        """Flow-matching loss, accuracy of the factors (joint, mean and each), Frechet distance, diversity and
        motion of a method.
        """
        torch.manual_seed(self.settings.seed)  # the same noise for every method
        loss = self._flow_matching(method)
        noise = torch.randn(len(self.labels), *self.real.latents.shape[1:])
        latents = [self._sampled(method, part, *given) for part, *given in self._by_tasks(noise, method)]
        return self.score(torch.cat(latents)) | {"flow_matching": loss}

    def score(self, latents: Tensor) -> dict[str, float]:
        """Measures of latents in the order of `self.labels`."""
        clips = decode_clips(self._decoder, latents)
        read, features = self._read(clips)
        right = read == self.labels
        within = features.reshape(-1, self.settings.clips_per_task, features.shape[1]).std(1).mean()
        figures = {
            "joint": float(right.all(1).mean()),
            "mean_accuracy": float(right.mean()),
            "frechet": frechet_distance(features, self.reference),
            "diversity": float(within),
            "motion": motion(clips),
        }
        shares = zip(self.tasks[0].factors(), right.mean(0).tolist(), strict=True)
        figures |= {f"{FACTOR}{name}": share for name, share in shares}
        if len(self.readers) == 2:
            actions = len(world.FACTORS)
            figures |= {
                "joint_action": float(right[:, :actions].all(1).mean()),
                "joint_look": float(right[:, actions:].all(1).mean()),
                "accuracy_action": float(right[:, :actions].mean()),
                "accuracy_look": float(right[:, actions:].mean()),
            }
        return figures

    def _flow_matching(self, method: Method) -> float:
        clean = self.real.latents.float()
        total = 0.0
        for time in _TIMES:
            noise = torch.randn_like(clean)
            parts = zip(self._by_tasks(clean, method), self._by_tasks(noise, method), strict=True)
            for (part, prompts, loras), (drawn, *_) in parts:
                times = torch.full((len(part),), time)
                x = self.denoiser.noised(part, drawn, times)
                with torch.no_grad(), self._with(loras):
                    wrong = self.denoiser(x, times, prompts) - self.denoiser.target(part, drawn)
                total += len(part) * wrong.pow(2).mean().item()
        return total / (len(_TIMES) * len(clean))

    def _by_tasks(
        self, values: Tensor, method: Method, tasks_at_once: int = 4
    ) -> list[tuple[Tensor, Prompts, Factors | None]]:
        """(values, prompts, LoRAs) of a few tasks at a time."""
        each, found = self.settings.clips_per_task, []
        sentences = {"fine": self.sentences, "plain fine": self.plain_sentences}.get(method.prompt)
        for start in range(0, len(self.tasks), tasks_at_once):
            own = slice(start, start + tasks_at_once)
            count = len(self.tasks[own])
            prompts = self.data.prompts(sentences[own] if sentences else [self.data.coarse_prompt] * count)
            loras = None if method.factors is None else method.factors[own]
            found.append((values[start * each : (start + count) * each], prompts.repeated(each), loras))
        return found

    def _with(self, loras: Factors | None) -> contextlib.AbstractContextManager:
        if loras is None:
            return contextlib.nullcontext()
        return injected(self.modules, *by_name(self.groups, loras))

    def _sampled(self, method: Method, noise: Tensor, prompts: Prompts, loras: Factors | None) -> Tensor:
        steps, shift = self.settings.sampling_steps, self.settings.shift
        with self._with(loras):
            if method.guidance == 1.0:
                return self.denoiser.sample(noise, prompts, steps, shift)
            empty = self.data.prompts([""]).expanded(len(noise))

            def guided(x: Tensor, times: Tensor) -> Tensor:
                unwanted = self.denoiser(x, times, empty)
                return unwanted + method.guidance * (self.denoiser(x, times, prompts) - unwanted)

            return flow.sample(guided, noise, steps, shift)


def motion(clips: np.ndarray) -> float:
    """Mean absolute change of a pixel from one frame to the next, 0..1, of clips uint8 [N, T, H, W, 3]."""
    return float(np.abs(np.diff(clips.astype(np.float32), axis=1)).mean() / 255.0)


@torch.no_grad()
def predicted_factors(hypernetwork: Predictor, data: MiniatureTasks, told: list[dict[str, Any]]) -> Factors:
    """The LoRAs for M tasks, of each the condition that `data.conditions` takes."""
    weights, places = data.weights_by_shape(), hypernetwork.base.by_shape().values()
    found = []
    for one in told:
        conditions = data.conditions([one])
        pairs = [
            hypernetwork(W, torch.tensor(index), conditions)[:2]
            for W, index in zip(weights, places, strict=True)
        ]
        found.append(Factors(*map(tuple, zip(*pairs, strict=True))))
    return Factors.cat(found)


def agreement(
    data: MiniatureTasks, found: Factors, known: LoRADataset, wanted: LoRADataset
) -> dict[str, float]:
    """How far LoRAs of the same tasks agree with `wanted`: cosines of their response maps and of dW, plain
    and centred on the training LoRAs' mean. Two trainings of one task differ: a yardstick for predictions.
    """
    weights = data.weights_by_shape()
    mean, of_delta = mean_map(weights, known), mean_delta(known)
    sums: Counter[str] = Counter()
    for row in range(len(wanted.tasks)):
        pair = found[row : row + 1], wanted.loras[row : row + 1]
        maps, deltas = ([response_maps(weights, one) for one in pair], [flat(one.deltas()) for one in pair])
        sums["repeat_cosine"] += cosine(*maps)
        sums["repeat_centred_cosine"] += centred_cosine(*maps, mean)
        sums["repeat_delta_cosine"] += cosine(*deltas)
        sums["repeat_centred_delta_cosine"] += centred_cosine(*deltas, of_delta)
    return {name: total / len(wanted.tasks) for name, total in sums.items()}


@torch.no_grad()
def response_figures(
    hypernetwork: Hypernetwork,
    data: MiniatureTasks,
    told: list[dict[str, Any]],
    known: LoRADataset,
    wanted: LoRADataset,
    threshold: float = THRESHOLD,
) -> dict[str, float]:
    """Stage I's maps and those of Stage II's LoRAs against the held-out LoRAs' own and each other (section
    4.4), beside the mean training map, ridge regression of maps on true factors, and |W| alone.

    Stage I's maps are compared as probabilities, over all layers of a task at once; centred means minus the
    mean training map.
    """
    weights = data.weights_by_shape()
    looks = looks_at(hypernetwork, weights)
    magnitudes = flat(W.abs() for W in weights)
    small_weights = (magnitudes < magnitudes.median()).float()
    predicted = predicted_factors(hypernetwork, data, told)
    known_maps = [
        response_maps(weights, known.loras[row : row + 1], threshold) for row in range(len(known.tasks))
    ]
    mean = sum(known_maps) / len(known_maps)
    fitted = ridge(torch.stack(known_maps), known.indices(), wanted.indices())
    sums: Counter[str] = Counter()
    stage1 = hypernetwork.stage1
    for row, one in enumerate(told):
        real = response_maps(weights, wanted.loras[row : row + 1], threshold)
        condition = stage1.trunk.project(data.conditions([one]))
        guess = flat(
            stage1(look, condition).probability(W, threshold)[0]
            for look, W in zip(looks, weights, strict=True)
        )
        stage2 = response_maps(weights, predicted[row : row + 1], threshold)
        sums["stage1_cosine"] += cosine(guess, real)
        sums["stage2_cosine"] += cosine(stage2, real)
        sums["stage2_to_stage1_cosine"] += cosine(stage2, guess)
        sums["mean_map_cosine"] += cosine(mean, real)
        sums["small_weight_cosine"] += cosine(small_weights, real)
        sums["ridge_map_centred_cosine"] += centred_cosine(fitted[row], real, mean)
        sums["stage1_centred_cosine"] += centred_cosine(guess, real, mean)
        sums["stage2_centred_cosine"] += centred_cosine(stage2, real, mean)
        sums["stage2_to_stage1_centred_cosine"] += centred_cosine(stage2, guess, mean)
        sums["responding_share"] += float(real.mean())
    return {name: total / len(told) for name, total in sums.items()}
