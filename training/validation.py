"""Looks during training: how near predictions come on held-out tasks, beside what the mean LoRA gets."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from lofa_core.conditions import Conditions
from lofa_core.hypernetwork import Hypernetwork
from lofa_core.response_map import THRESHOLD, centred_cosine, cosine, response_map

from .data.folder_tasks import Tasks
from .factors import Factors
from .looks import Predictor, looks_at, on
from .lora_dataset import LoRADataset
from .over_base import padded

_TASKS = 16  # held-out tasks of a look
_SEED = 4321  # of their sentences


@torch.no_grad()
def response_cosines(
    hypernetwork: Hypernetwork,
    data: Tasks,
    known: LoRADataset,
    held_out: LoRADataset,
    threshold: float = THRESHOLD,
) -> dict[str, float]:
    """Cosine of Stage I's maps with the real ones, plain and centred on the mean training map, and that
    map's own plain cosine: what a prediction has to beat.
    """
    device = next(hypernetwork.parameters()).device
    weights = [own.to(device) for own in data.weights_by_shape()]
    mean = mean_map(weights, known, threshold)
    stage1, looks = hypernetwork.stage1, looks_at(hypernetwork, weights)
    found = []
    for conditions, own in _held_out(data, held_out, hypernetwork):
        real = response_maps(weights, own, threshold)
        condition = stage1.trunk.project(conditions)
        guess = flat(
            stage1(look, condition).probability(W, threshold)[0]
            for look, W in zip(looks, weights, strict=True)
        )
        found.append((cosine(guess, real), centred_cosine(guess, real, mean), cosine(mean, real)))
    names = ("response_cosine", "centred_response_cosine", "mean_map_cosine")
    return dict(zip(names, np.mean(found, axis=0).tolist(), strict=True))


@torch.no_grad()
def weight_cosines(
    hypernetwork: Predictor, data: Tasks, known: LoRADataset, held_out: LoRADataset
) -> dict[str, float]:
    """Cosine of predicted and real dW over all layers, plain and centred on the mean training dW, and the
    mean's own plain cosine.
    """
    device = next(hypernetwork.parameters()).device
    weights = [own.to(device) for own in data.weights_by_shape()]
    places = hypernetwork.base.by_shape().values()
    mean = mean_delta(known)
    found = []
    for conditions, own in _held_out(data, held_out, hypernetwork):
        parts = [
            hypernetwork(W, torch.tensor(index, device=device), conditions)
            for W, index in zip(weights, places, strict=True)
        ]
        guess, real = flat(B[0] @ A[0] for A, B, _ in parts), flat(own.deltas())
        found.append((cosine(guess, real), centred_cosine(guess, real, mean), cosine(mean, real)))
    names = ("delta_cosine", "centred_delta_cosine", "mean_delta_cosine")
    return dict(zip(names, np.mean(found, axis=0).tolist(), strict=True))


def mean_delta(known: LoRADataset) -> Tensor:
    """The mean dW of the training tasks, all entries in a row; one task's at a time is in memory."""
    count = len(known.tasks)
    return sum(flat(known.loras[row : row + 1].deltas()) for row in range(count)) / count


def flat(parts: Iterable[Tensor]) -> Tensor:
    """All entries in a row, on the CPU."""
    return torch.cat([part.flatten().cpu() for part in parts])


def response_maps(weights: Sequence[Tensor], own: Factors, threshold: float = THRESHOLD) -> Tensor:
    """The response maps of one task's LoRA, all entries in a row, 0 or 1."""
    maps = (
        response_map(W.cpu(), delta[0], threshold) for W, delta in zip(weights, own.deltas(), strict=True)
    )
    return flat(maps).float()


def mean_map(weights: Sequence[Tensor], known: LoRADataset, threshold: float = THRESHOLD) -> Tensor:
    """Their mean over the training tasks."""
    rows = range(len(known.tasks))
    maps = (response_maps(weights, known.loras[row : row + 1], threshold) for row in rows)
    return sum(maps) / len(known.tasks)


def _held_out(
    data: Tasks, held_out: LoRADataset, hypernetwork: Predictor
) -> Iterator[tuple[Conditions, Factors]]:
    """(conditions, own LoRA) of held-out tasks, each told as training tells them."""
    rng, device = np.random.default_rng(_SEED), next(hypernetwork.parameters()).device
    rows = np.linspace(0, len(held_out.tasks) - 1, min(_TASKS, len(held_out.tasks))).astype(int)
    for row in rows:
        told = data.conditions([data.plain_condition(held_out.tasks[row], rng)])
        yield on(padded(told, hypernetwork), device), held_out.loras[row : row + 1]
