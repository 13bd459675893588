"""Held-out evaluation: actions that base, LoRAs and hypernetwork never saw, in sentences worded as training
never did.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor

from lofa_core.hypernetwork import Hypernetwork
from lofa_core.response_map import centred_cosine, cosine, response_map

from . import flow
from .backbones import load_vae
from .baselines.simple import mean_lora, nearest_lora, ridge_lora
from .config import EvaluationConfig
from .injection import injected, target_modules
from .lora_dataset import LoRADataset
from .miniature import evaluator as evaluator_module
from .miniature.latents import decode_clips
from .miniature.tasks import MiniatureTasks
from .miniature.vae import WholeClipVAE
from .stages import by_name

BASELINES = ("base", "mean LoRA", "nearest LoRA", "ridge regression")
_TIMES = (0.2, 0.4, 0.6, 0.8, 0.95)


@dataclass(frozen=True)
class Method:
    """One row of the table: LoRA factors (or none), a prompt ("coarse", "fine" or "plain fine"), a guidance
    scale.
    """

    name: str
    factors: tuple[Tensor, Tensor] | None
    prompt: str = "coarse"
    guidance: float = 1.0


class Judge:
    """Draws, generates and reads clips of the held-out actions."""

    def __init__(
        self, data: MiniatureTasks, settings: EvaluationConfig, evaluator: evaluator_module.Evaluator
    ):
        self.data, self.settings, self.evaluator = data, settings, evaluator
        self.model = data.load_model()
        self.names = [layer.name for layer in data.weights.model.layers]
        self.modules = target_modules(self.model, self.names)
        self._decoder = WholeClipVAE(load_vae(data.base))
        rng = np.random.default_rng(settings.seed)
        self.sentences = [data.reserved_sentence(action, rng) for action in data.held_out]
        self.plain_sentences = [data.plain_sentence(action, rng) for action in data.held_out]
        self.real = data.held_out_clips(settings.clips_per_task)
        self.labels = self.real.actions.numpy()
        self.reference = self.read(
            data.held_out_clips(2 * settings.clips_per_task, offset=1).latents.float()
        )[1]

    def read(self, latents: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Factor indices and features of unit latents, through the VAE's decoder."""
        return self.evaluator.read(decode_clips(self._decoder, latents))

    def measure(self, method: Method) -> dict[str, float]:
        """Flow-matching loss, joint and mean factor accuracy, Frechet distance, diversity of a method."""
        torch.manual_seed(self.settings.seed)  # the same noise for every method
        loss = self._flow_matching(method)
        noise = torch.randn(len(self.labels), *self.real.latents.shape[1:])
        latents = [
            flow.sample(self._velocity(method, task), part, self.settings.sampling_steps, self.settings.shift)
            for task, part in self._by_tasks(noise)
        ]
        return self.score(torch.cat(latents)) | {"flow_matching": loss}

    def score(self, latents: Tensor) -> dict[str, float]:
        """Measures of latents in the order of `self.labels`."""
        read, features = self.read(latents)
        right = read == self.labels
        within = features.reshape(-1, self.settings.clips_per_task, features.shape[1]).std(1).mean()
        return {
            "joint": float(right.all(1).mean()),
            "mean_accuracy": float(right.mean()),
            "frechet": evaluator_module.frechet_distance(features, self.reference),
            "diversity": float(within),
        }

    def _flow_matching(self, method: Method) -> float:
        clean = self.real.latents.float()
        total = 0.0
        for time in _TIMES:
            noise = torch.randn_like(clean)
            for (task, part), (_, drawn) in zip(self._by_tasks(clean), self._by_tasks(noise), strict=True):
                with torch.no_grad():
                    times = torch.full((len(part),), time)
                    velocity = self._velocity(method, task, guided=False)
                    total += len(part) * flow.loss(velocity, part, drawn, times).item()
        return total / (len(_TIMES) * len(clean))

    def _by_tasks(self, values: Tensor, tasks_at_once: int = 4) -> list[tuple[slice, Tensor]]:
        each = self.settings.clips_per_task
        starts = range(0, len(values) // each, tasks_at_once)
        return [
            (slice(start, start + tasks_at_once), values[start * each : (start + tasks_at_once) * each])
            for start in starts
        ]

    def _velocity(self, method: Method, tasks: slice, guided: bool = True) -> flow.Velocity:
        each = self.settings.clips_per_task
        sentences = {"fine": self.sentences, "plain fine": self.plain_sentences}.get(method.prompt)
        count = len(self.data.held_out[tasks])
        prompts = sentences[tasks] if sentences else [self.data.coarse_prompt] * count
        states = self.data.prompts(prompts).repeat_interleave(each, 0)
        empty = self.data.prompts([""]).expand(count * each, -1, -1)

        def velocity(x: Tensor, times: Tensor) -> Tensor:
            if method.factors is None:
                return guide(x, times)
            A, B = (factors[tasks] for factors in method.factors)
            with injected(self.modules, *by_name(self.names, A, B)):
                return guide(x, times)

        def guide(x: Tensor, times: Tensor) -> Tensor:
            wanted = self.model(x, times * 1000.0, states, return_dict=False)[0]
            if method.guidance == 1.0 or not guided:
                return wanted
            unwanted = self.model(x, times * 1000.0, empty, return_dict=False)[0]
            return unwanted + method.guidance * (wanted - unwanted)

        return velocity


@torch.no_grad()
def predicted_factors(
    hypernetwork: Hypernetwork, data: MiniatureTasks, sentences: list[str]
) -> tuple[Tensor, Tensor]:
    """A [M, L, r, in], B [M, L, out, r] for M sentences."""
    weights = data.stacked_weights()
    index = torch.arange(len(weights))
    parts = [hypernetwork(weights, index, data.conditions([sentence]))[:2] for sentence in sentences]
    return torch.cat([A for A, _ in parts]), torch.cat([B for _, B in parts])


@torch.no_grad()
def response_figures(
    hypernetwork: Hypernetwork,
    data: MiniatureTasks,
    sentences: list[str],
    known: LoRADataset,
    wanted: LoRADataset,
) -> dict[str, float]:
    """Stage I against the held-out LoRAs' maps, beside the mean training map and |W| alone.

    Maps are compared as probabilities, over all layers of a task at once; centred means minus the mean
    training map.
    """
    weights = data.stacked_weights()
    patches = hypernetwork.patches(weights)
    index = torch.arange(len(weights))
    mean = sum(response_map(weights, b @ a).float() for a, b in zip(known.A, known.B, strict=True)) / len(
        known.actions
    )
    small_weights = (weights.abs() < weights.abs().median()).float()
    sums = {
        "stage1_cosine": 0.0,
        "mean_map_cosine": 0.0,
        "small_weight_cosine": 0.0,
        "stage1_centred_cosine": 0.0,
    }
    share = 0.0
    for sentence, a, b in zip(sentences, wanted.A, wanted.B, strict=True):
        real = response_map(weights, b @ a).float()
        stage1 = hypernetwork.stage1
        guess = stage1(patches, index, stage1.trunk.project(data.conditions([sentence]))).probability(
            weights
        )[0]
        sums["stage1_cosine"] += float(cosine(guess, real))
        sums["mean_map_cosine"] += float(cosine(mean, real))
        sums["small_weight_cosine"] += float(cosine(small_weights, real))
        sums["stage1_centred_cosine"] += float(centred_cosine(guess, real, mean))
        share += float(real.mean())
    return {name: total / len(sentences) for name, total in (sums | {"responding_share": share}).items()}


def evaluate(
    hypernetwork: Hypernetwork,
    data: MiniatureTasks,
    settings: EvaluationConfig,
    known: LoRADataset,
    wanted: LoRADataset,
    evaluator: evaluator_module.Evaluator,
    report: Callable[[str, dict[str, float]], None] = lambda name, figures: None,
    process: int = 0,
    processes: int = 1,
    more: bool = False,
) -> dict:
    """The whole table and its summary, the rows shared out among processes; `known` are the training LoRAs,
    `wanted` those of the held-out actions. `more` adds what a known wording, guidance and strength would do.
    """
    if wanted.actions != data.held_out:
        raise ValueError(
            f"the held-out LoRAs are of {len(wanted.actions)} actions that are not this configuration's "
            f"{len(data.held_out)} held-out ones. Train them with the same [data] table."
        )
    judge = Judge(data, settings, evaluator)
    own = (wanted.A, wanted.B)
    predicted = predicted_factors(hypernetwork, data, judge.sentences)
    methods = [
        Method("base", None),
        Method("base, fine prompt", None, "fine"),
        Method("mean LoRA", mean_lora(known.A, known.B, len(wanted.actions))),
        Method("nearest LoRA", nearest_lora(known.A, known.B, known.factors(), wanted.factors())),
        Method("ridge regression", ridge_lora(known.A, known.B, known.factors(), wanted.factors())),
        Method("LoFA", predicted),
        Method("LoFA, fine prompt", predicted, "fine"),
        Method("per-task LoRA", own),
        Method("per-task LoRA, fine prompt", own, "fine"),
    ]
    if more:
        methods += [
            Method("base, fine prompt in training's words", None, "plain fine"),
            Method("base, fine prompt, guidance 2.5", None, "fine", 2.5),
            Method("LoFA x 1.3", (predicted[0], 1.3 * predicted[1])),
        ]
    rows: dict[str, dict[str, float]] = {}
    for method in methods[process::processes]:
        rows[method.name] = judge.measure(method)
        report(method.name, rows[method.name])
    if processes > 1:
        every = {name: row for part in gather_object([rows]) for name, row in part.items()}
        rows = {method.name: every[method.name] for method in methods}
    rows["real clips"] = judge.score(judge.real.latents.float())
    report("real clips", rows["real clips"])
    summary = summarise(rows) | response_figures(hypernetwork, data, judge.sentences, known, wanted)
    return {"rows": rows, **summary}


def summarise(rows: dict[str, dict[str, float]]) -> dict:
    """Gaps closed from base to per-task LoRA, and the baselines beaten on all three measures."""

    def closed(measure: str) -> float | None:
        base, ours, own = (rows[name][measure] for name in ("base", "LoFA", "per-task LoRA"))
        return (base - ours) / (base - own) if base != own else None  # no gap to close

    ours = rows["LoFA"]
    beaten = [
        name
        for name in BASELINES
        if ours["frechet"] < rows[name]["frechet"]
        and ours["flow_matching"] < rows[name]["flow_matching"]
        and ours["joint"] > rows[name]["joint"]
    ]
    return {"frechet_gap_closed": closed("frechet"), "joint_gap_closed": closed("joint"), "beaten": beaten}
