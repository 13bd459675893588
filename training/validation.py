"""Looks during training: how near predictions come on held-out tasks, beside what the mean LoRA gets."""

import numpy as np
import torch
from torch import Tensor

from lofa_core.hypernetwork import Hypernetwork
from lofa_core.response_map import centred_cosine, cosine, response_map

from .data.folder_tasks import Tasks
from .lora_dataset import LoRADataset
from .over_base import padded

_TASKS = 16  # held-out tasks of a look
_SEED = 4321  # of their sentences


@torch.no_grad()
def response_cosines(
    hypernetwork: Hypernetwork, data: Tasks, known: LoRADataset, held_out: LoRADataset
) -> dict[str, float]:
    """Cosine of Stage I's maps with the real ones, plain and centred on the mean training map, and that
    map's own plain cosine: what a prediction has to beat.
    """
    weights = data.stacked_weights()
    mean = sum(response_map(weights, b @ a).float() for a, b in zip(known.A, known.B, strict=True)) / len(
        known.actions
    )
    stage1, device = hypernetwork.stage1, next(hypernetwork.parameters()).device
    patches, index = hypernetwork.patches(weights.to(device)), torch.arange(len(weights), device=device)
    found = []
    for condition, a, b in _held_out(data, held_out):
        real = response_map(weights, b @ a).float()
        condition = padded(condition, hypernetwork).to(device)
        response = stage1(patches, index, stage1.trunk.project(condition))
        guess = response.probability(weights.to(device))[0].cpu()
        found.append((cosine(guess, real), centred_cosine(guess, real, mean), cosine(mean, real)))
    names = ("response_cosine", "centred_response_cosine", "mean_map_cosine")
    return dict(zip(names, np.mean(found, axis=0).tolist(), strict=True))


@torch.no_grad()
def weight_cosines(
    hypernetwork: Hypernetwork, data: Tasks, known: LoRADataset, held_out: LoRADataset
) -> dict[str, float]:
    """Cosine of predicted and real dW over all layers, plain and centred on the mean training dW, and the
    mean's own plain cosine.
    """
    weights, device = data.stacked_weights(), next(hypernetwork.parameters()).device
    mean = sum(b @ a for a, b in zip(known.A, known.B, strict=True)) / len(known.actions)
    index = torch.arange(len(weights), device=device)
    found = []
    for condition, a, b in _held_out(data, held_out):
        A, B, _ = hypernetwork(weights.to(device), index, padded(condition, hypernetwork).to(device))
        guess, real = (B[0] @ A[0]).cpu(), b @ a
        found.append((cosine(guess, real), centred_cosine(guess, real, mean), cosine(mean, real)))
    names = ("delta_cosine", "centred_delta_cosine", "mean_delta_cosine")
    return dict(zip(names, np.mean(found, axis=0).tolist(), strict=True))


def _held_out(data: Tasks, held_out: LoRADataset) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(condition, A, B) of the first held-out tasks, each in one sentence as training words it."""
    rng = np.random.default_rng(_SEED)
    return [
        (data.conditions([data.plain_sentence(action, rng)]), a, b)
        for action, a, b in zip(held_out.actions[:_TASKS], held_out.A, held_out.B, strict=False)
    ]
