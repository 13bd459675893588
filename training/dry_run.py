"""Two optimiser steps of each stage at full size with random weights: does it fit, and how long is a step?

`python -m training.dry_run` builds WAN2.1-T2V-1.3B and a hypernetwork of LoFA_v0's size and runs the real
training loop over random clips. What it learns is nothing; what it costs is real.
"""

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from accelerate import Accelerator, init_empty_weights
from diffusers import WanTransformer3DModel
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lofa_core.base_models import BaseWeights

from .backbones import fold_padding, use_folded_padding
from .config import Stage1Config, Stage2Config
from .full_size import LAYERS, RELEASED, WAN_1_3B, WORDS, random_parameters, released_hypernetwork
from .injection import target_modules
from .lora_dataset import LoRADataset
from .machine import device_name, peak_memory
from .stages import Diffusion, Stage1, Stage2
from .trainer import train

LATENT_CHANNELS, SPATIAL, TEMPORAL = 16, 8, 4  # of WAN2.1's VAE
STEPS = 2


class RandomTasks:
    """Two tasks of random clips and prompts over a random base model: what the stages ask of their data."""

    coarse_prompt = ""

    def __init__(self, size: tuple[int, int, int], layers: int, dtype: torch.dtype, seed: int = 0):
        """`size`: frames, height and width in pixels. The first `layers` target layers take part."""
        self._draw = torch.Generator().manual_seed(seed)
        frames, height, width = size
        latent = (1 + (frames - 1) // TEMPORAL, height // SPATIAL, width // SPATIAL)
        self.training = ["task 0", "task 1"]
        latents = torch.randn(2, LATENT_CHANNELS, *latent, generator=self._draw)
        self.clips = SimpleNamespace(latents=latents, action_weights=lambda: torch.ones(()))
        self.clips_by_action = {task: torch.tensor([row]) for row, task in enumerate(self.training)}
        with init_empty_weights(include_buffers=False):  # the rotary tables are computed, not loaded
            self._model = WanTransformer3DModel(**WAN_1_3B)
        self._model.load_state_dict(random_parameters(self._model, dtype, seed), assign=True)
        self._model.requires_grad_(False).eval()
        use_folded_padding(self._model)
        self._layers = BaseWeights.from_tensors(self._model.state_dict()).model.layers[:layers]

    def load_model(self) -> WanTransformer3DModel:
        return self._model

    def stacked_weights(self) -> Tensor:
        modules = target_modules(self._model, [layer.name for layer in self._layers])
        return torch.stack([module.weight.float() for module in modules.values()])

    def sentence(self, task: str, rng: object) -> str:
        return task

    plain_sentence = sentence

    def prompts(self, sentences: list[str]) -> Tensor:
        """Folded text states [B, 49, 4096] of prompts of 48 tokens."""
        shape = (len(sentences), WORDS, RELEASED.condition_width)
        return fold_padding(torch.randn(shape, generator=self._draw))

    def conditions(self, sentences: list[str]) -> Tensor:
        return self.prompts(sentences)

    def coarse(self) -> Tensor:
        return self.prompts([self.coarse_prompt])


def random_loras(layers: int, count: int = 2) -> LoRADataset:
    """Per-task LoRAs to learn from, of the size trained ones have."""
    A = torch.randn(count, layers, RELEASED.rank, RELEASED.in_features) * RELEASED.in_features**-0.5
    B = 0.01 * torch.randn(count, layers, RELEASED.out_features, RELEASED.rank)
    return LoRADataset(A, B, [f"task {row}" for row in range(count)])


class _Done(Exception):
    """Two steps are enough."""


def measure(
    make: Callable[[], Stage1 | Diffusion], device: torch.device, console: Console
) -> dict[str, float | str]:
    """Build a stage and take two steps; seconds of the second, and the process's peak memory so far."""
    stage, times = make(), []

    def after(step: int) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter())
        if step == STEPS:
            raise _Done

    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(_Done):
        train(stage, stage.settings, Path(folder), Accelerator(cpu=device.type == "cpu"), console, after)
    return {
        "stage": stage.name,
        "seconds_per_step": round(times[1] - times[0], 2),
        "peak_memory_bytes": peak_memory(device),
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m training.dry_run", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--frames", type=int, default=5, help="of a clip (the paper: 81)")
    parser.add_argument("--height", type=int, default=64, help="in pixels (the paper: 480)")
    parser.add_argument("--width", type=int, default=64, help="in pixels (the paper: 832)")
    parser.add_argument("--layers", type=int, default=LAYERS, help=f"the first N of {LAYERS} target layers")
    parser.add_argument("--tasks", type=int, default=1, help="tasks a step")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--json", action="store_true", help="one object on standard output, nothing else")
    chosen = parser.parse_args()
    if chosen.frames % TEMPORAL != 1 or chosen.height % 16 or chosen.width % 16:
        parser.error("--frames is 1 more than a multiple of 4, --height and --width are multiples of 16")
    device, console = torch.device(chosen.device), Console(stderr=True, highlight=False)
    common = {
        "steps": STEPS + 1, "tasks": chosen.tasks, "optimiser": "adamw", "learning_rate": 1e-4,
        "schedule": "constant", "precision": chosen.precision, "checkpoint_activations": True,
        "checkpoint_every": STEPS + 2, "validate_every": 0,
    }  # fmt: skip
    size = (chosen.frames, chosen.height, chosen.width)
    data = RandomTasks(size, chosen.layers, getattr(torch, chosen.precision))
    network = released_hypernetwork(layers=chosen.layers).requires_grad_(True)
    for stage in (network.stage1, network.stage2):
        stage.trunk.checkpoint_activations = True
    known = random_loras(chosen.layers)
    stage1 = Stage1Config(**common, layers=min(10, chosen.layers), likelihood_weight=0.0)
    stage2 = Stage2Config(**common, clips=1, with_lora=1.0, distillation_weight=0.0, fine_prompts=0.0)
    found = [
        measure(lambda: Stage1(network, data, known, None, stage1, device), device, console),
        measure(lambda: Stage2(network, data, known, None, stage2, device), device, console),
    ]
    report = {
        "device": device_name(device), "precision": chosen.precision, "frames": chosen.frames,
        "height": chosen.height, "width": chosen.width, "layers": chosen.layers, "tasks": chosen.tasks,
        "stages": found,
    }  # fmt: skip
    if chosen.json:
        sys.stdout.write(json.dumps(report) + "\n")
        return 0
    clip = f"{chosen.frames} frames of {chosen.width}x{chosen.height}"
    table = Table(
        "stage", "seconds a step", "peak memory", title=f"{report['device']}, {clip}, {chosen.tasks} task(s)"
    )
    for row in found:
        table.add_row(row["stage"], f"{row['seconds_per_step']}", f"{row['peak_memory_bytes'] / 1e9:.1f} GB")
    Console(highlight=False).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
