"""Prediction: base weights + condition -> response -> LoRA, layer batch by layer batch."""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .base_models import BaseWeights, TargetLayer
from .hypernetwork import Hypernetwork
from .lora import LoRA, LoRALayer

Progress = Callable[[int, int], None]  # (layers done, layers in all)


@dataclass
class Prediction:
    """A predicted LoRA; `responses` maps layer names to P(|dW| > 0.02 |W|), float32 [out, in] on the CPU."""

    lora: LoRA
    responses: dict[str, Tensor] = field(default_factory=dict)
    seconds: float = 0.0


def fitting_layers(hypernetwork: Hypernetwork, base: BaseWeights) -> list[TargetLayer]:
    """The base model's layers in the hypernetwork's order. ValueError, naming both, where they do not fit."""
    wanted, found = hypernetwork.base, {layer.name: layer for layer in base.model.layers}
    shapes = {layer.name: layer.shape for layer in base.model.layers}
    if any(shapes.get(layer.name) != tuple(layer.shape) for layer in wanted.layers) or len(found) != len(
        wanted.layers
    ):
        kinds = {tuple(layer.shape) for layer in wanted.layers}
        size = " and ".join(f"{out}x{into}" for out, into in sorted(kinds))
        raise ValueError(
            f"This hypernetwork predicts LoRAs for {wanted.name} ({len(wanted.layers)} layers of {size}); "
            f"the model given is {base.model.name} ({base.model.summary()}). "
            f"Load a hypernetwork trained for {base.model.name}."
        )
    return [found[layer.name] for layer in wanted.layers]


@torch.no_grad()
def predict(
    hypernetwork: Hypernetwork,
    base: BaseWeights,
    condition: Tensor,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    batch_size: int | None = None,
    want_response: bool = True,
    progress: Progress | None = None,
    check_cancelled: Callable[[], None] | None = None,
) -> Prediction:
    """Predict the LoRA for one condition [1, S, d] (LoFA eq. 2); rows of zeros after its end are padding.

    Runs on `device` in `dtype`, `batch_size` layers at a time (None: all), and reports after each batch.
    `check_cancelled` is called before each batch and may raise; nothing is kept then.
    """
    started = time.perf_counter()
    hypernetwork = _placed(hypernetwork, device, dtype)
    layers, responses = {}, {}
    for index, weights, condition_on_device in _batches(
        hypernetwork, base, condition, device, dtype, batch_size, progress, check_cancelled
    ):
        A, B, response = hypernetwork(weights, index, condition_on_device)
        maps = response.probability(weights)[0].cpu() if want_response else None
        for row, layer in enumerate(index.tolist()):
            name = hypernetwork.base.layers[layer].name
            layers[name] = LoRALayer(
                A[0, row].float().cpu(), B[0, row].float().cpu(), float(hypernetwork.config.rank)
            )
            if maps is not None:
                responses[name] = maps[row]
    metadata = {"lofa_condition": hypernetwork.condition.kind, "lofa_base": hypernetwork.base.name}
    if base.fingerprint() != hypernetwork.base.fingerprint:
        metadata["lofa_note"] = "predicted for other weights than the hypernetwork was trained with"
    lora = LoRA(layers, metadata)
    return Prediction(lora, responses, time.perf_counter() - started)


@torch.no_grad()
def predict_response(
    hypernetwork: Hypernetwork,
    base: BaseWeights,
    condition: Tensor,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    batch_size: int | None = None,
    progress: Progress | None = None,
    check_cancelled: Callable[[], None] | None = None,
) -> dict[str, Tensor]:
    """Stage I alone: layer name -> P(|dW| > 0.02 |W|), float32 [out, in] on the CPU. Arguments as of
    `predict`.
    """
    hypernetwork = _placed(hypernetwork, device, dtype)
    responses = {}
    for index, weights, condition_on_device in _batches(
        hypernetwork, base, condition, device, dtype, batch_size, progress, check_cancelled
    ):
        stage1 = hypernetwork.stage1
        maps = stage1(weights, index, stage1.trunk.project(condition_on_device)).probability(weights)[0].cpu()
        for row, layer in enumerate(index.tolist()):
            responses[hypernetwork.base.layers[layer].name] = maps[row]
    return responses


def _placed(hypernetwork: Hypernetwork, device: torch.device | str, dtype: torch.dtype) -> Hypernetwork:
    """The network on `device` in `dtype`; a copy where it would lose precision, so that the caller's stays
    exact.
    """
    held = next(hypernetwork.parameters()).dtype
    return (hypernetwork if held == dtype else copy.deepcopy(hypernetwork)).to(device=device, dtype=dtype)


def _batches(hypernetwork, base, condition, device, dtype, batch_size, progress, check_cancelled):
    """Yield (index [N], weights [N, out, in] float32, condition) on the device, of one batch of layers after
    another.
    """
    if condition.ndim != 3 or len(condition) != 1 or condition.shape[2] != hypernetwork.condition.width:
        raise ValueError(
            f"The condition is {list(condition.shape)}; this hypernetwork expects [1, tokens, "
            f"{hypernetwork.condition.width}] ({hypernetwork.condition.kind}). "
            "Encode it with the encoder it was trained with."
        )
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size = {batch_size}: expected at least 1 layer, or None for all at once.")
    layers = fitting_layers(hypernetwork, base)
    condition = condition.to(device=device, dtype=dtype)
    size = batch_size or len(layers)
    for start in range(0, len(layers), size):
        if check_cancelled is not None:
            check_cancelled()
        chosen = layers[start : start + size]
        weights = torch.stack([base.read(layer).float() for layer in chosen]).to(device)
        yield torch.arange(start, start + len(chosen), device=device), weights, condition
        if progress is not None:
            progress(start + len(chosen), len(layers))
