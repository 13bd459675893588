"""Measures of held-out tasks: clips generated under a method and read by the evaluators, maps compared."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lofa_core.hypernetwork import Hypernetwork
from lofa_core.metrics.distances import frechet_distance
from lofa_core.response_map import THRESHOLD, between_tasks_cosine, centred_cosine, cosine

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
    """How far LoRAs of the same tasks agree with `wanted`: cosines of their response maps and of dW, plain,
    centred on the training LoRAs' mean, and between tasks. Two trainings of one task differ: a yardstick for
    predictions.
    """
    weights, both = data.weights_by_shape(), (found, wanted.loras)
    figures = {}
    for name, rows, mean in (
        ("", lambda one: response_maps(weights, one), mean_map(weights, known)),
        ("delta_", lambda one: flat(one.deltas()), mean_delta(known)),
    ):
        a, b = (_rows(rows, loras) for loras in both)
        figures |= _cosines("repeat", a, b, mean, name)
    return figures


def _rows(of_one: Callable[[Factors], Tensor], loras: Factors) -> Tensor:
    """What a function gives of each task's LoRA, [M, n]."""
    return torch.stack([of_one(loras[row : row + 1]) for row in range(len(loras))])


def _cosines(name: str, a: Tensor, b: Tensor, mean: Tensor, of: str = "") -> dict[str, float]:
    """Cosines of rows [M, n] of the same tasks: plain, less `mean`, and less each set's own mean."""
    pairs = list(zip(a, b, strict=True))
    return {
        f"{name}_{of}cosine": sum(cosine(*pair) for pair in pairs) / len(pairs),
        f"{name}_centred_{of}cosine": sum(centred_cosine(*pair, mean) for pair in pairs) / len(pairs),
        f"{name}_task_{of}cosine": between_tasks_cosine(a, b),
    }


@torch.no_grad()
def response_figures(
    hypernetwork: Hypernetwork,
    data: MiniatureTasks,
    told: list[dict[str, Any]],
    known: LoRADataset,
    wanted: LoRADataset,
    threshold: float = THRESHOLD,
    again: Sequence[Factors] = (),
) -> dict[str, float]:
    """Stage I's maps and those of Stage II's LoRAs against the held-out LoRAs' own and each other (section
    4.4), beside the mean training map, ridge regression of maps on true factors, and |W| alone.

    Stage I's maps are compared as probabilities, over all layers of a task at once. "centred" figures are of
    maps minus the mean training map; "task" figures of maps minus their own mean over the held-out tasks
    (`between_tasks_cosine`). `again`: LoRAs of the same tasks from other trainings; Stage I, which says how
    probable a response is, is then compared with how often each entry responds, too.
    """
    weights = data.weights_by_shape()
    looks = looks_at(hypernetwork, weights)
    magnitudes = flat(W.abs() for W in weights)
    small_weights = (magnitudes < magnitudes.median()).float()

    def maps_of(loras: Factors) -> Tensor:
        return _rows(lambda one: response_maps(weights, one, threshold), loras)

    known_maps, real = maps_of(known.loras), maps_of(wanted.loras)
    mean = known_maps.mean(0)
    fitted = ridge(known_maps, known.indices(), wanted.indices())
    stage1 = hypernetwork.stage1
    conditions = [stage1.trunk.project(data.conditions([one])) for one in told]
    guess = torch.stack(
        [
            flat(
                stage1(look, condition).probability(W, threshold)[0]
                for look, W in zip(looks, weights, strict=True)
            )
            for condition in conditions
        ]
    )
    stage2 = maps_of(predicted_factors(hypernetwork, data, told))
    figures = _cosines("stage1", guess, real, mean)
    figures |= _cosines("stage2", stage2, real, mean)
    figures |= _cosines("stage2_to_stage1", stage2, guess, mean)
    of_ridge = _cosines("ridge_map", fitted, real, mean)
    figures |= {name: of_ridge[name] for name in ("ridge_map_centred_cosine", "ridge_map_task_cosine")}
    figures["mean_map_cosine"] = sum(cosine(mean, row) for row in real) / len(real)
    figures["small_weight_cosine"] = sum(cosine(small_weights, row) for row in real) / len(real)
    figures["responding_share"] = float(real.mean())
    if again:
        often = (real + sum(map(maps_of, again))) / (1 + len(again))
        figures |= {
            "trainings": 1.0 + len(again),
            "stage1_often_task_cosine": between_tasks_cosine(guess, often),
        }
    return figures
