"""Prediction with either generator, a hypernetwork or LoRA Diffusion, in the same words."""

import copy
import time
from dataclasses import replace

import torch

from . import prediction
from .base_models import BaseWeights
from .checkpoint import Generator
from .conditions import Conditions
from .lora_diffusion import LoRADiffusion, starting_noise
from .memory import memory_for
from .prediction import Prediction, ResponseMaps
from .steps import UNWATCHED, Watch


@torch.no_grad()
def predict(
    generator: Generator,
    base: BaseWeights,
    conditions: Conditions,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    watch: Watch = UNWATCHED,
) -> Prediction:
    """The LoRA for the conditions of one task; other arguments as of `prediction.predict`.

    LoRA Diffusion draws it from `seed`, always in float32, and gives no response maps; a hypernetwork takes
    no notice of the seed. Raises ValueError where base or conditions are not what it was trained for.
    """
    if not isinstance(generator, LoRADiffusion):
        return prediction.predict(
            generator, base, conditions,
            device=device, dtype=dtype, watch=watch,
        )  # fmt: skip
    started = time.perf_counter()
    prediction.check_conditions(generator, conditions)
    layers = len(prediction.fitting_layers(generator, base))
    watch.before()
    with memory_for("to draw a LoRA", device):
        network = _in_float32(generator, torch.device(device))
        given = {kind: one.to(network.latent_mean) for kind, one in conditions.items()}
        with prediction.asked_often(network, watch):
            (lora,) = network.draw(given, starting_noise(seed, network.config.latent))
    for name, layer in lora.items():
        if not layer.is_finite():
            raise prediction.not_finite("LoRA", name, network.latent_mean)
    watch.after(layers, layers)
    metadata = prediction.metadata_of(generator, base, conditions) | {"lofa_seed": str(seed)}
    return Prediction(replace(lora, metadata=metadata), ResponseMaps(base), time.perf_counter() - started)


def predict_response(
    generator: Generator,
    base: BaseWeights,
    conditions: Conditions,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    watch: Watch = UNWATCHED,
) -> ResponseMaps:
    """Stage I alone, as `prediction.predict_response`. ValueError for LoRA Diffusion, which has none."""
    if isinstance(generator, LoRADiffusion):
        raise ValueError(
            "This is a LoRA Diffusion: it predicts no response maps, only LoRAs. Load a hypernetwork, or "
            "draw a LoRA with Predict LoRA and see its own maps with Response from LoRA."
        )
    return prediction.predict_response(
        generator, base, conditions,
        device=device, dtype=dtype, watch=watch,
    )  # fmt: skip


def _in_float32(network: LoRADiffusion, device: torch.device) -> LoRADiffusion:
    """The network itself where it is so already, else a copy: the caller's stays as it is."""
    held = network.latent_mean
    if held.dtype == torch.float32 and held.device == device:
        return network
    return copy.deepcopy(network).to(device, torch.float32)
